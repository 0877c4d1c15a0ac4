"""Re-pruning: its settings, one update of all masks, and the run of a training loop."""
