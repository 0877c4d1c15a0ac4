"""Whole runs as YAML; data, not code. ``sparse-train --config recipes/NAME.yaml`` finds them from any folder."""
