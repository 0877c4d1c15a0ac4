"""What is shown while something runs: bars, lines, tables."""
