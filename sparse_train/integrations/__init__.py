"""Re-pruning in the trainers of other libraries; each module imports its library."""
