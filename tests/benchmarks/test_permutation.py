"""``benchmarks/permutation.py``: the model computes the same, and 2:4 keeps more."""

import sys
from pathlib import Path

import torch

from tests.conftest import VOCABULARY, tiny_llama

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import permutation


def test_a_permuted_llama_computes_the_same():
    model = tiny_llama().eval()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    ids = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        permutation.permute(model, permutation.input_norms(model, [{"input_ids": ids}]))
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert {"self_attn.o_proj.weight", "mlp.down_proj.weight", "self_attn.v_proj.weight"} <= {
        name.removeprefix("model.layers.0.") for name in moved
    }


def test_large_neighbours_are_dealt_out():
    scores = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) * 0.01
    scores[:, :4] += 1
    assert permutation.kept(scores, torch.arange(16)) < 7
    order = permutation.better_order(scores)
    assert sorted(order.tolist()) == list(range(16))
    assert permutation.kept(scores, order) > 12
