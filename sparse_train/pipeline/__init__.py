"""Schedule -> scores -> masks -> policy: one pass over a model, the same over a training run, and what is recorded."""
