"""Overlays for a second ``--config``; data, not code."""
