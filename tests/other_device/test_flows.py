"""The same on a device that is not the CPU: tensors are moved where they are wanted, branches for GPUs do what CPUs do.

No GPU is needed, see ``device.py``. Where there is one, ``pytest -m gpu`` runs the same on it.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from sparse_train import (
    OWL,
    RIA,
    FirstWindow,
    Magnitude,
    Regrow,
    SparseGPT,
    StraightThrough,
    Unstructured,
    Wanda,
)
from tests.other_device import device, flows
from tests.ranks.launch import TIMEOUT, run

NO_BACKENDS = pytest.mark.skipif(not device.SUPPORTED, reason="this torch has no backends in Python")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TRAINING = {
    "2:4": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "moved late": {"late": True},
    "Conv1D": {"kind": "gpt2"},
    "adapters": {"lora": True},
    "decay": {"policy": StraightThrough(srste_decay=0.01)},
    "regrow": {"policy": Regrow()},
    "owl": {"mask_structure": "unstructured", "sparsity": 0.6, "distribution": OWL(owl_m=2)},
    "checkpointing": {"checkpointing": True},
    "model-wide": {"mask_structure": Unstructured("model"), "sparsity": 0.5},
}


@pytest.fixture(scope="module", params=[pytest.param(device.NAME, marks=NO_BACKENDS), pytest.param("cuda", marks=GPU)])
def there(request):
    """What a flow returns on another device, in whose process all flows run."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, context, flows.begin, (request.param,)) as process:
        yield lambda flow, **arguments: process.submit(flows.on, request.param, flow, **arguments).result(TIMEOUT)


@pytest.fixture
def both(there):
    """What a flow returns on the CPU, and on another device."""
    return lambda flow, **arguments: (flows.on("cpu", flow, **arguments), there(flow, **arguments))


def differing(ours, theirs):
    assert ours.keys() == theirs.keys()
    counts = [int((ours[name] != theirs[name]).sum()) for name in ours if ours[name].dtype in (torch.uint8, torch.bool)]
    return sum(counts)


@pytest.mark.parametrize("settings", TRAINING.values(), ids=TRAINING)
def test_training(both, settings):
    cpu, other = both("train", **settings)
    assert cpu.pop("zeros") == other.pop("zeros")
    torch.testing.assert_close(cpu["flips"], other["flips"], atol=0.01, rtol=0.05)
    size = sum(mask.numel() for mask in cpu.values())
    share = 0.1 if settings.get("dtype") == torch.bfloat16 else 0.002
    assert differing(cpu, other) < share * size  # near-ties: sums are rounded in another order


@pytest.mark.parametrize(
    ("method", "structure"),
    [
        (Wanda(), "2:4"),
        (Magnitude(), "unstructured"),
        (RIA(), "2:4"),
        (SparseGPT(block_size=16), "2:4"),
        (SparseGPT(block_size=16), "unstructured"),
    ],
    ids=repr,
)
def test_oneshot(both, method, structure):
    cpu, other = both("oneshot", criterion=method, mask_structure=structure, sparsity=0.5)
    assert differing(cpu, other) == 0
    torch.testing.assert_close(cpu["perplexity"], other["perplexity"])


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(block_size=16)], ids=["wanda", "sparsegpt"])
def test_oneshot_of_conv1d(both, method):
    assert differing(*both("oneshot", kind="gpt2", criterion=method)) == 0


@pytest.mark.parametrize("settings", [{}, {"first_mask": FirstWindow()}], ids=["calibrated", "first window"])
def test_the_callback(both, settings):
    cpu, other = both("lightning", **settings)
    assert differing(cpu, other) < 0.002 * sum(mask.numel() for mask in cpu.values())


@pytest.mark.parametrize("there", ["cpu", pytest.param("cuda", marks=GPU)], indirect=True)
@pytest.mark.parametrize(
    ("flow", "settings", "share"),
    [
        ("train", {"compiled": True}, 0.002),
        ("lightning", {"precision": "bf16-mixed"}, 0.1),
        ("lightning", {"precision": "16-mixed"}, 0.1),
    ],
    ids=["compiled", "bf16-mixed", "16-mixed"],
)
def test_what_the_stand_in_does_not_have(there, flow, settings, share):
    """Against the plain run on the CPU; on the CPU, too, so that what runs on a GPU is known to work."""
    plain, other = flows.on("cpu", flow), there(flow, **settings)
    for found in (plain, other):
        found.pop("zeros", None)
    assert differing(plain, other) < share * sum(mask.numel() for mask in plain.values())


def test_streaming(both):
    assert differing(*both("stream", criterion=Wanda())) == 0


def test_losses(both):
    for ours, theirs in zip(*(found.values() for found in both("losses")), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_selection_is_that_of_the_cpu_bit_by_bit(both):
    cpu, other = both("select")
    assert differing(cpu, other) == 0


def test_masks_of_any_width_are_those_of_the_cpu(both):
    cpu, other = both("pack")
    assert cpu.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in cpu.items())


@NO_BACKENDS
def test_the_device_refuses_tensors_of_the_cpu():
    refused = "Expected all tensors to be on the same device"
    assert [refused in told for told in run(_mixing, ranks=1)[0]] == [True, True, True, False, False]


def _mixing():
    device.install()
    cpu, other, picked = torch.ones(2), torch.ones(2, device=device.NAME), torch.tensor([0, 1])

    def told(mix):
        try:
            return str(mix())
        except RuntimeError as error:
            return str(error)

    mixes = [
        lambda: other + cpu,
        lambda: cpu[other > 0],
        lambda: other.index_put((picked,), cpu),
        lambda: other[picked],
        lambda: other + torch.tensor(1.0),
    ]
    return list(map(told, mixes))
