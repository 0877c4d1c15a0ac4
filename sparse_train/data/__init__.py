"""Where text and conversations come from, and how they become batches."""
