"""Solvers compute in float32, whatever autocast and settings of TF32 say, and leave the settings alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparse_train import SparseGPT, prune

new_words = pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch sets TF32 only by its old interface"
)


@pytest.fixture
def tf32(request):
    """TF32 as it is set by each of torch's two interfaces, which must not be mixed; gives a look at how it is set."""
    if request.param in ("highest", "medium"):
        torch.set_float32_matmul_precision(request.param)
        yield torch.get_float32_matmul_precision
        torch.set_float32_matmul_precision("highest")
    else:
        matmul = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        torch.backends.fp32_precision = request.param
        yield lambda: matmul[0].fp32_precision
        torch.backends.fp32_precision = "ieee"
        assert [each.fp32_precision for each in matmul] == ["ieee", "ieee"]  # they follow the global setting again
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("tf32", ["highest", "medium", pytest.param("tf32", marks=new_words)], indirect=True)
def test_a_solver_computes_in_float32_under_autocast_too(tf32):
    """Autocast is of the forwards, of which here there is none in front of the target."""
    seen = set()

    class Looking(SparseGPT):
        def solve(self, weight_OI, gram_II, pattern, sparsity):
            seen.add(tf32())  # on a CPU TF32 changes no digit
            return super().solve(weight_OI, gram_II, pattern, sparsity)

    layer = nn.Sequential(nn.Linear(16, 8, bias=False))
    inputs = [torch.randn(64, 16, generator=torch.Generator().manual_seed(0))]
    plain, cast = copy.deepcopy(layer), copy.deepcopy(layer)
    prune(plain, inputs, "2:4", criterion=SparseGPT(block_size=8), targets=["0"])
    before = tf32()
    with torch.autocast("cpu", torch.bfloat16):
        prune(cast, inputs, "2:4", criterion=Looking(block_size=8), targets=["0"])
    assert tf32() == before
    assert seen <= {"highest", "ieee"} and len(seen) == 1
    assert torch.equal(plain[0].weight, cast[0].weight)


@new_words
def test_a_solver_leaves_what_tf32_is_set_by_as_it_was():
    for each in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        each.fp32_precision = "none"  # as they are in a new process
    prune(nn.Sequential(nn.Linear(16, 8)), [torch.randn(64, 16)], "2:4", criterion=SparseGPT(), targets=["0"])
    torch.backends.fp32_precision = "tf32"
    try:
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = "none"


def test_a_solver_runs_where_torch_has_only_the_old_words_for_tf32(monkeypatch):
    """torch 2.7 and 2.8 have no ``torch.backends.mkldnn.matmul``."""
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace())
    layer = nn.Sequential(nn.Linear(16, 8))
    prune(layer, [torch.randn(64, 16)], "2:4", criterion=SparseGPT(), targets=["0"])
    assert int((layer[0].weight == 0).sum()) == 64
