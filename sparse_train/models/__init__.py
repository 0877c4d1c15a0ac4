"""Where models come from, what they consist of, and the module that recipes train."""
