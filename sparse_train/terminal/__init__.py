"""Output of commands in the terminal: bars, lines, tables."""
