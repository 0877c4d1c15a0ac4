"""Where models come from, checkpoints of runs among them, and the module that recipes train."""
