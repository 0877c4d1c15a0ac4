"""``SparseConv1D``: the masked form of transformers' ``Conv1D``, the linear layer of GPT-2. Imports transformers."""

from transformers.pytorch_utils import Conv1D

from sparse_train.layers.masked_layer import MaskedLayer


class SparseConv1D(MaskedLayer, Conv1D):  # type: ignore[misc]
    """A ``Conv1D`` whose forward uses only kept weights; the parameter stays (I, O), masks and scores are (O, I)."""

    is_transposed = True
    dense = Conv1D
    nf: int
    nx: int

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.nx

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.nf
