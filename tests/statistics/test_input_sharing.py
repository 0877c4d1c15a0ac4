import torch
from torch import nn

from sparse_train.layers.matrices import Recorder
from sparse_train.layers.sparse_linear import sparse_layers, sparsify
from sparse_train.pipeline.recording import attach
from sparse_train.statistics.activations import ActivationNorm
from sparse_train.statistics.input_sharing import InputSharing
from tests.conftest import VOCABULARY, tiny_llama


def test_layers_that_share_an_input_are_found_by_identity():
    llama = tiny_llama()
    linears = {n: m for n, m in llama.named_modules() if n.endswith("proj")}
    sparsify(llama, linears.values())
    recorder = Recorder("always", sharing=InputSharing())
    attach(linears.values(), recorder, ActivationNorm)
    llama(input_ids=torch.randint(0, VOCABULARY, (1, 8)))
    name = {m: n for n, m in sparse_layers(llama).items()}
    leaders = {
        name[m].split("layers.0.")[-1]: name[leader]
        for m, leader in recorder.sharing.leaders().items()
        if "layers.0." in name[m]
    }
    prefix = "model.layers.0."
    assert leaders == {
        "self_attn.q_proj": prefix + "self_attn.q_proj",
        "self_attn.k_proj": prefix + "self_attn.q_proj",
        "self_attn.v_proj": prefix + "self_attn.q_proj",
        "self_attn.o_proj": prefix + "self_attn.o_proj",
        "mlp.gate_proj": prefix + "mlp.gate_proj",
        "mlp.up_proj": prefix + "mlp.gate_proj",
        "mlp.down_proj": prefix + "mlp.down_proj",
    }


def test_equal_values_or_reused_addresses_are_no_shared_input():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    sharing = InputSharing()
    for layer in (a, b):
        x = torch.ones(2, 4)  # the second may well sit where the first was
        sharing.watch(layer, x)
        del x
    assert sharing.leaders() == {a: a, b: b}
    x = torch.ones(2, 4)
    sharing.watch(a, x)
    sharing.watch(b, x)
    assert sharing.leaders()[b] is b  # shared once, but not always
