"""Scenarios of one process: functions that train or prune a tiny model and return what it ends with."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

from tests.golden import api
from tests.golden.models import Tokens, batches, loader, model
from tests.golden.outcome import Outcome

Scenario = Callable[[], Outcome]

STEPS = 12  # with an update every 3, the last of them at step 9
MIDDLE = 5  # within the window of the update at step 6, and in the middle of an epoch

# --- training in Lightning --------------------------------------------------------------------------------------------


class Module(L.LightningModule):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


class KeepMasks(L.Callback):
    """Keeps the masks that a run ends with; the weights are squashed later, in ``on_fit_end``."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.masks = api.masks_of(pl_module)


class Stop(L.Callback):
    """Writes a checkpoint in the middle of a run and ends it there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == MIDDLE:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(
    mask_structure: Any = "2:4",
    sparsity: float | None = None,
    *,
    start: Callable[[], nn.Module] = model,
    resumed: bool = False,
    accumulate: int = 1,
    padded: bool = False,
    precision: Any = "32-true",
    **arguments: Any,
) -> Outcome:
    """A run with ``DynamicPruning``, in one go or ``resumed`` from a checkpoint in its middle."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "middle.ckpt"

        def run(*callbacks: L.Callback, ckpt_path: Path | None = None) -> Outcome:
            module, keep = Module(start()), KeepMasks()
            torch.manual_seed(0)  # adapters of mask_lora begin at random
            pruning = api.DynamicPruning(mask_structure, sparsity, **({"update_freq": 3} | api.one_shot() | arguments))
            trainer = L.Trainer(
                max_steps=STEPS,
                accumulate_grad_batches=accumulate,
                precision=precision,
                callbacks=[pruning, *callbacks, keep],
                default_root_dir=folder,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, loader(padded), ckpt_path=ckpt_path, weights_only=False)
            return Outcome(keep.masks, module.state_dict())

        if not resumed:
            return run()
        run(Stop(path))
        return run(ckpt_path=path)


# --- training in other loops ------------------------------------------------------------------------------------------


def loop(
    mask_structure: Any = "2:4",
    sparsity: float | None = None,
    *,
    start: Callable[[], nn.Module] = model,
    resumed: bool = False,
    **arguments: Any,
) -> Outcome:
    """A plain loop with ``MaskUpdater``, in one go or with a second updater and optimizer from the middle on."""
    arguments = {"update_freq": 3, "total_steps": STEPS} | arguments
    trained = start()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3, weight_decay=0.1)
    updater = api.MaskUpdater(trained, mask_structure, sparsity, optimizers=[optimizer], **arguments)
    data = Tokens(padded=True)
    for step in range(STEPS):
        if resumed and step == MIDDLE:
            states = trained.state_dict(), optimizer.state_dict(), updater.state_dict()
            trained = start()
            optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3, weight_decay=0.1)
            given = {"optimizers": [optimizer], "state": states[2]}
            updater = api.MaskUpdater(trained, mask_structure, sparsity, **given, **arguments)
            trained.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        batch = torch.utils.data.default_collate([data[2 * step], data[2 * step + 1]])
        updater.token_mask = batch["attention_mask"]
        trained(**batch).loss.backward()
        updater.before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
    updater.finish()
    return squashed(trained)


def squashed(trained: nn.Module) -> Outcome:
    masks = api.masks_of(trained)
    api.squash(trained)
    return Outcome(masks, trained.state_dict())


def transformers_trainer() -> Outcome:
    trained = model()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        pruning = api.SparseTrainerCallback("2:4", update_freq=3, squash=False, **api.one_shot())
        run = Trainer(model=trained, args=settings, train_dataset=Tokens(padded=True), callbacks=[pruning])
        run.remove_callback(PrinterCallback)
        run.train()
    return squashed(trained)


# --- models that were pruned before -----------------------------------------------------------------------------------


def with_zeros(mask_structure: Any = "2:4", sparsity: float | None = None) -> nn.Module:
    pruned = model()
    api.prune(pruned, batches(), mask_structure, sparsity)
    return pruned


def with_masks(family: str = "llama") -> nn.Module:
    pruned = model(family)
    api.prune(pruned, batches(), "2:4", squash=False)
    return pruned


def solved() -> nn.Module:
    """Pruned by a solver on the batches that a run would calibrate its first mask on."""
    pruned, data = model(), api.random_batches(Tokens(padded=False), 2, None, 16)
    api.prune(pruned, data, "2:4", criterion=api.SparseGPT(), squash=False)
    return pruned


# --- one-shot pruning -------------------------------------------------------------------------------------------------


def one_shot(
    mask_structure: Any = "2:4",
    sparsity: float | None = None,
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> Outcome:
    """``prune`` of a model; its masks are read off its zeros, since fused experts have none of their own."""
    pruned = model(family).to(dtype)
    api.prune(pruned, batches(), mask_structure, sparsity, **arguments)
    return zeros_and_weights(pruned)


def streamed(
    mask_structure: Any = "2:4", sparsity: float | None = None, *, family: str = "llama", **arguments: Any
) -> Outcome:
    """``one_shot``, block by block from disk to disk."""
    with tempfile.TemporaryDirectory() as folder:
        dense, sparse = Path(folder) / "dense", Path(folder) / "sparse"
        model(family).save_pretrained(dense)
        api.prune_checkpoint(dense, sparse, batches(), mask_structure, sparsity=sparsity, **arguments)
        return zeros_and_weights(AutoModelForCausalLM.from_pretrained(sparse))


def zeros_and_weights(pruned: nn.Module) -> Outcome:
    weights = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    matrices = {name: weight for name, weight in weights.items() if weight.dim() > 1 and bool((weight == 0).any())}
    return Outcome({name: weight != 0 for name, weight in matrices.items()}, weights)


# --- all of them ------------------------------------------------------------------------------------------------------

ROWS, LAYER, MODEL = (api.Unstructured(group) for group in ("row", "layer", "model"))
OWL = api.distribution(api.OWL(owl_m=2.0))

SCENARIOS: dict[str, Scenario] = {
    # the defaults
    "2:4": lambda: fit(),
    "2:4, resumed": lambda: fit(resumed=True),
    "50 %": lambda: fit("unstructured", 0.5),
    "70 %": lambda: fit("unstructured", 0.7),
    "70 %, resumed": lambda: fit("unstructured", 0.7, resumed=True),
    # the first mask
    "2:4, first window": lambda: fit(**api.first_window()),
    "2:4, first window, resumed": lambda: fit(**api.first_window(), resumed=True),
    "50 %, first window": lambda: fit("unstructured", 0.5, **api.first_window()),
    "70 %, first window": lambda: fit("unstructured", 0.7, **api.first_window()),
    "2:4, one-shot of 6 samples": lambda: fit(**api.one_shot(samples=6)),
    "2:4, one-shot RIA": lambda: fit(**api.one_shot(api.RIA())),
    "2:4, one-shot SparseGPT": lambda: fit(start=solved, **api.existing_masks()),
    "2:4 from zeros": lambda: fit(start=with_zeros, **api.from_zeros()),
    "2:4 from masks": lambda: fit(start=with_masks, **api.existing_masks()),
    "2:4 from step 4": lambda: fit(start_step=4),
    # batches
    "2:4, accumulated, padded": lambda: fit(accumulate=2, padded=True),
    "2:4, accumulated, padded, resumed": lambda: fit(accumulate=2, padded=True, resumed=True),
    "50 %, first window, accumulated, padded": lambda: fit(
        "unstructured", 0.5, accumulate=2, padded=True, **api.first_window()
    ),
    "2:4 in bfloat16": lambda: fit(precision="bf16-mixed"),
    # schedules
    "cubic to 70 %": lambda: fit("unstructured", schedule=api.Cubic(0.7)),
    "cubic to 70 %, resumed": lambda: fit("unstructured", schedule=api.Cubic(0.7), resumed=True),
    "linear to 2:4": lambda: fit(schedule=api.Linear(0.5)),
    # policies
    "2:4 Fixed": lambda: fit(policy=api.Fixed()),
    "cubic to 70 % Fixed": lambda: fit("unstructured", schedule=api.Cubic(0.7), policy=api.Fixed()),
    "2:4 with srste_decay": lambda: fit(policy=api.srste(0.01)),
    "2:4 Dormant": lambda: fit(policy=api.Dormant()),
    "50 % Dormant": lambda: fit("unstructured", 0.5, policy=api.Dormant()),
    "50 % Regrow": lambda: fit("unstructured", 0.5, policy=api.Regrow()),
    "50 % Regrow, resumed": lambda: fit("unstructured", 0.5, policy=api.Regrow(), resumed=True),
    "2:4 Regrow": lambda: fit(policy=api.Regrow(0.5), accumulate=2),
    # criteria and groups
    "2:4 RIA": lambda: fit(criterion=api.RIA()),
    "50 % WandaCumulative": lambda: fit(LAYER, 0.5, criterion=api.WandaCumulative()),
    "50 % RIA in layers": lambda: fit(LAYER, 0.5, criterion=api.RIA()),
    "2:4 Magnitude": lambda: fit(criterion=api.Magnitude()),
    "50 % Magnitude in layers": lambda: fit(LAYER, 0.5, criterion=api.Magnitude()),
    "50 % in layers": lambda: fit(LAYER, 0.5),
    "50 % in the model": lambda: fit(MODEL, 0.5),
    # sparsity among layers
    "60 % OWL": lambda: fit("unstructured", 0.6, **OWL),
    "60 % OWL, first window": lambda: fit("unstructured", 0.6, **OWL, **api.first_window()),
    "cubic to 60 % OWL": lambda: fit("unstructured", schedule=api.Cubic(0.6), **OWL),
    "cubic to 60 % OWL, resumed": lambda: fit("unstructured", schedule=api.Cubic(0.6), **OWL, resumed=True),
    # memory of norms
    "2:4, last window": lambda: fit(**api.norm_decay(0.0)),
    "2:4, fading windows": lambda: fit(**api.norm_decay(0.5)),
    # adapters inside masks
    "2:4 mask_lora": lambda: fit(mask_lora=api.MaskLoRA(r=4)),
    "2:4 mask_lora, resumed": lambda: fit(mask_lora=api.MaskLoRA(r=4), resumed=True),
    "2:4 mask_lora on all": lambda: fit(mask_lora=api.MaskLoRA(4, target_modules="all-linear")),
    # other loops
    "loop 2:4": lambda: loop(**api.loop_first_window()),
    "loop 2:4, resumed": lambda: loop(**api.loop_first_window(), resumed=True),
    "loop 50 %": lambda: loop("unstructured", 0.5, **api.loop_first_window()),
    "loop 2:4 from zeros": lambda: loop(start=with_zeros, **api.loop_from_zeros()),
    "loop 50 % from zeros": lambda: loop(
        ROWS, 0.5, start=lambda: with_zeros(ROWS, 0.5), policy=api.Fixed(), **api.loop_from_zeros()
    ),
    "loop 2:4 from masks": lambda: loop(start=with_masks, **api.loop_existing_masks()),
    "loop 50 % Regrow": lambda: loop("unstructured", 0.5, policy=api.Regrow(), **api.loop_first_window()),
    "loop 2:4 GPT-2": lambda: loop(start=lambda: with_masks("gpt2"), **api.loop_existing_masks()),
    "transformers.Trainer 2:4": transformers_trainer,
    # one-shot
    "one-shot 2:4": lambda: one_shot(),
    "one-shot 2:4, from disk": lambda: streamed(),
    "one-shot 50 %": lambda: one_shot("unstructured", 0.5),
    "one-shot 50 %, from disk": lambda: streamed("unstructured", 0.5),
    "one-shot 50 % in the model": lambda: one_shot(MODEL, 0.5),
    "one-shot 2:4 of bfloat16": lambda: one_shot(dtype=torch.bfloat16),
    "one-shot 2:4 RIA": lambda: one_shot(criterion=api.RIA()),
    "one-shot 50 % WandaCumulative": lambda: one_shot(LAYER, 0.5, criterion=api.WandaCumulative()),
    "one-shot 50 % RIA in layers": lambda: one_shot(LAYER, 0.5, criterion=api.RIA()),
    "one-shot 2:4 SparseGPT": lambda: one_shot(criterion=api.SparseGPT(block_size=16)),
    "one-shot 50 % SparseGPT": lambda: one_shot("unstructured", 0.5, criterion=api.SparseGPT(block_size=16)),
    "one-shot 50 % SparseGPT, from disk": lambda: streamed("unstructured", 0.5, criterion=api.SparseGPT(block_size=16)),
    "one-shot 50 % Magnitude in layers": lambda: one_shot(LAYER, 0.5, criterion=api.Magnitude()),
    "one-shot 60 % OWL": lambda: one_shot("unstructured", 0.6, **OWL),
    "one-shot 60 % OWL, from disk": lambda: streamed("unstructured", 0.6, **OWL),
    "one-shot by name": lambda: one_shot("unstructured", 0.5, **api.distribution(api.Explicit({"down_proj": 0.25}))),
    "one-shot 2:4 GPT-2": lambda: one_shot(family="gpt2"),
    "one-shot 50 % SparseGPT GPT-2": lambda: one_shot("unstructured", 0.5, family="gpt2", criterion=api.SparseGPT()),
    "one-shot 2:4 Mixtral": lambda: one_shot(family="mixtral"),
    "one-shot 2:4 Mixtral, from disk": lambda: streamed(family="mixtral"),
    "one-shot 50 % SparseGPT Mixtral": lambda: one_shot(
        "unstructured", 0.5, family="mixtral", criterion=api.SparseGPT()
    ),
    "one-shot 2:4 Qwen3-MoE": lambda: one_shot(family="qwen3_moe"),
}
