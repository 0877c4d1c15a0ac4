"""The command line, ``sparse-train``."""
