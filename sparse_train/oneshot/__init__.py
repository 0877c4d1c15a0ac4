"""One-shot pruning: one walk over decoder blocks, of a model in memory or of a checkpoint on disk."""
