"""Sparse weights on disk as mask bits and kept values: tensors, and whole Hugging Face folders."""

from sparse_train.packed.tensors import load_packed, save_packed

__all__ = ["load_packed", "save_packed"]
