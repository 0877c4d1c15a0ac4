"""What the library does, on a device of choice; each flow returns tensors on CPU and numbers, by name.

Models and data are the same for each device; batches stay on CPU where users leave them there.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers import AutoModelForCausalLM

from sparse_train import NM, MaskUpdater, Unstructured, prune, sparse_layers, squash
from sparse_train.callbacks import DynamicPruning
from sparse_train.evaluation import evaluate_perplexity
from sparse_train.inspection import layer_sparsities
from sparse_train.layers import masks
from sparse_train.layers.mask_lora import MaskLoRA, add_mask_lora
from sparse_train.layers.state_dicts import folded_state_dict
from sparse_train.models.losses import distillation_loss, next_token_loss
from sparse_train.oneshot.prune import prune_checkpoint
from tests.callbacks.runs import InInit, loader, trainer
from tests.conftest import VOCABULARY, shallow_llama
from tests.oneshot.test_prune import tiny
from tests.other_device import device as other

KINDS = {
    "block": lambda: shallow_llama(num_hidden_layers=1),
    "llama": shallow_llama,
    "gpt2": lambda: tiny("gpt2"),
}


def begin(device: str) -> None:
    """To be called once in a process of the device's own, before its flows."""
    torch.set_num_threads(1)
    if device == other.NAME:
        other.install()


def on(device: str, flow: str, **arguments: Any) -> dict[str, Any]:
    """A flow of this module."""
    torch.manual_seed(0)
    found: dict[str, Any] = globals()[flow](device, **arguments)
    return found


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (2, 16), generator=generator) for _ in range(count)]


def masks_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: layer.weight_mask.cpu() for name, layer in sparse_layers(model).items()}


def train(
    device: str,
    kind: str = "block",
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    lora: bool = False,
    late: bool = False,
    compiled: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Re-pruned for eight steps, the last four of them resumed; then squashed."""

    def begin(state: Any) -> tuple[Any, MaskUpdater, Any]:
        model = KINDS[kind]().to(dtype)
        model = model if late else model.to(device)
        updater = MaskUpdater(
            model, **({"mask_structure": "2:4"} | settings), update_freq=3, total_steps=8, state=state
        )
        model.to(device)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            model.compile(backend="inductor" if device == "cuda" else "aot_eager")  # a test compiles for seconds
        parameters = add_mask_lora(model, MaskLoRA(r=2)) if lora else model.parameters()
        return model.train(), updater, torch.optim.SGD(parameters, lr=0.03)

    model, updater, optimizer = begin(None)
    flips = []
    for step, batch in enumerate(batches(8)):
        if step == 4 and not lora:
            weights, state = model.state_dict(), copy.deepcopy(updater.state_dict())
            model, updater, optimizer = begin(state)
            model.load_state_dict(weights)
        updater.token_mask = torch.ones_like(batch)
        model(input_ids=batch.to(device), labels=batch.to(device)).loss.backward()
        updater.before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        report = updater.step()
        flips += [] if report is None else [report.flip_rate, report.initial_flip_rate, report.sparsity]
    updater.finish()
    own = masks_of(model)
    folded = {name: value.cpu() for name, value in folded_state_dict(model).items()}
    counted = {layer.name: layer.zeros for layer in layer_sparsities(model)}
    squash(model)
    assert all(torch.equal(folded[name], value.cpu()) for name, value in model.state_dict().items())
    return {"flips": torch.tensor(flips), "zeros": counted, **own}


class Accelerator(L.pytorch.accelerators.Accelerator):
    """The other device, as Lightning sees one."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(other.NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return other.NAME


def lightning(device: str, precision: Any = None, **settings: Any) -> dict[str, Any]:
    """A first mask from calibration, updates, validation, a checkpoint, and a run that resumes it."""
    where: dict[str, Any] = {"accelerator": "gpu"} if device == "cuda" else {}
    if precision is not None:  # the plugin itself, since the Trainer takes no float16 on a CPU
        where["plugins"] = MixedPrecision(precision, device)
    if device == other.NAME:
        where = {"accelerator": "auto", "strategy": SingleDeviceStrategy(torch.device(device, 0), Accelerator())}
    with tempfile.TemporaryDirectory() as folder:
        for path, steps in ((None, 4), (f"{folder}/four.ckpt", 8)):
            module, pruning = InInit(), DynamicPruning("2:4", update_freq=3, end_step=8, squash=False, **settings)
            run = trainer(Path(folder), pruning, max_steps=steps, devices=1, **where)
            run.fit(module, loader(), loader(), ckpt_path=path)
            run.save_checkpoint(f"{folder}/four.ckpt")
    assert run.strategy.root_device.type == device
    assert pruning.last_report is not None
    own = masks_of(module)
    squash(module)
    return {"flips": torch.tensor([pruning.last_report.flip_rate]), **own}


def oneshot(device: str, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> dict[str, Any]:
    model = KINDS[kind]().to(dtype).to(device)
    prune(model, batches(4), **settings)
    ids = torch.cat(batches(4)).flatten()
    perplexity = evaluate_perplexity(model, ids, window=16).perplexity
    return {"perplexity": torch.tensor(perplexity)} | {n: (p != 0).cpu() for n, p in model.named_parameters()}


def stream(device: str, **settings: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start, out = Path(folder, "start"), Path(folder, "out")
        shallow_llama(tie_word_embeddings=False).save_pretrained(start)
        prune_checkpoint(start, out, batches(4), device=device, **settings)
        return {n: p != 0 for n, p in AutoModelForCausalLM.from_pretrained(out).named_parameters()}


def select(device: str) -> dict[str, torch.Tensor]:
    """Masks of scores with many ties, infinities and both zeros."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (64, 96), generator=generator).float() - 2
    scores[scores == -2] = -torch.inf
    scores[scores == 3] = torch.inf
    scores[::2][scores[::2] == 0] = -0.0
    patterns = {
        "2:4": NM(2, 4),
        "4:8": NM(4, 8),
        "16:32": NM(16, 32),
        "rows": Unstructured(),
        "layer": Unstructured("layer"),
    }
    return {name: pattern.mask(scores.to(device), 0.5).cpu() for name, pattern in patterns.items()}


def pack(device: str) -> dict[str, torch.Tensor]:
    """Masks of any width, as parts of a longer one: packed, read back, applied, counted."""
    generator = torch.Generator().manual_seed(0)
    whole, weights = torch.rand(6, 60, generator=generator) < 0.5, torch.randn(6, 60, generator=generator)
    found = {}
    for rows, start, stop in ((6, 0, 60), (6, 0, 16), (6, 4, 20), (1, 8, 48), (1, 3, 19), (6, 7, 12), (6, 1, 2)):
        mask, weight = (each.to(device)[:rows, start:stop] for each in (whole, weights))
        packed = masks.pack(mask)
        assert packed.device.type == torch.device(device).type
        counts = torch.tensor([masks.count(packed), masks.count_differing(packed, packed.roll(1, 0))])
        each = {"packed": packed, "read": masks.unpack(packed, stop - start), "applied": masks.apply(weight, packed)}
        each |= {"counts": counts, "fingerprint": masks.fingerprint(packed)}
        found |= {f"{rows} {start} {stop} {name}": value.cpu() for name, value in each.items()}
    return found


def losses(device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 16, 40, generator=generator).to(device) for _ in range(2))
    labels = torch.randint(40, (2, 16), generator=generator)
    labels[0, :4] = -100
    student.requires_grad_()
    both, ce, kldiv = distillation_loss(student, teacher, labels.to(device), temperature=2.0)
    plain, _ = next_token_loss(student, labels.to(device))
    (both + plain).backward()
    assert student.grad is not None
    return {"losses": torch.stack([ce, kldiv, plain]).detach().cpu(), "gradient": student.grad.cpu()}
