"""Tests, in processes that import much."""

import gc

gc.set_threshold(20_000, 10, 10)  # each look at a million objects of libraries takes a quarter of a second
