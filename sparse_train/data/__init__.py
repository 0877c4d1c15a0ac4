"""Where text and conversations come from, and their way into batches."""
