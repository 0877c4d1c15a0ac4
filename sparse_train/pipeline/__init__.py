"""Schedule -> scores -> masks -> policy: one pass over a model, and the same over a training run."""
