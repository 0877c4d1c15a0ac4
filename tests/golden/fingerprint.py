"""What the last bits of a result depend on besides the code: the kind of CPU and the versions of libraries."""

import functools
import platform
from importlib.metadata import version

import torch

from tests.golden.models import batches, model
from tests.golden.outcome import Outcome, digests, one_thread

LIBRARIES = ("torch", "transformers", "lightning", "deepspeed")


@functools.cache
def fingerprint() -> dict[str, str]:
    """What must be the same for digests to be the same.

    "arithmetic" is the hash of a computation without any of sparse_train, because CPUs of one capability may still
    add in another order.
    """
    return {
        **{library: version(library) for library in LIBRARIES},
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": "1",
        "arithmetic": _arithmetic(),
    }


def difference(recorded: dict[str, str]) -> str | None:
    """Why digests that were recorded elsewhere cannot be compared with those of this process; None: they can."""
    found = fingerprint()
    differing = [
        f"{name} {recorded.get(name)}, here {found[name]}" for name in found if recorded.get(name) != found[name]
    ]
    if not differing:
        return None
    return f"Floating point differs from that of the recording: {'; '.join(differing)}."


@one_thread()
def _arithmetic() -> str:
    """Dense training in float32 and under bfloat16 autocast, a Cholesky factor, and a running sum."""
    results = {}
    for bfloat16 in (False, True):
        trained = model()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3, weight_decay=0.1)
        for batch in batches():
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = trained(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results |= {f"{name} {bfloat16}": tensor for name, tensor in trained.state_dict().items()}
    weight_OI = results["model.layers.0.mlp.down_proj.weight False"]
    gram_II = weight_OI.T @ weight_OI + torch.eye(weight_OI.shape[1])
    results["cholesky"] = torch.cholesky_inverse(torch.linalg.cholesky(gram_II))
    results["norm"] = weight_OI.square().sum(0).sqrt()
    results["running sum"] = weight_OI.double().cumsum(1)
    return digests(Outcome({}, results))["weights"]
