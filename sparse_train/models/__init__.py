"""Where models come from, including checkpoints of runs, and the module that recipes train."""
