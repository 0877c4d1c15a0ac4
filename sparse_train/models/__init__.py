"""Models: where they come from, what recipes train, and what that learns from."""
