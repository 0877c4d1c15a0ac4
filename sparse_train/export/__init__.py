"""Export: a Hugging Face folder with true zeros, and its model card."""

from sparse_train.export.card import ModelCard
from sparse_train.export.hf_folder import export_checkpoint, export_model

__all__ = ["ModelCard", "export_checkpoint", "export_model"]
