"""The jobs that are interrupted: what the README promises to go on with, on a tiny model."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sparse_train.cli.main import main
from sparse_train.integrations.trainer_checkpoints import STATE_FILE
from tests.conftest import tiny_llama, tiny_tokenizer, without_pictures
from tests.faults.harness import Job, Start
from tests.integrations.runs import pruning, trainer

STEPS = 24


def jobs(shared: Path, short: bool = False) -> dict[str, Job]:
    """All jobs by name; a model and a text for them are written to ``shared``.

    What "export" exports is the end of "fit" in the folder ``shared / "fit"``, where that has to run first. ``short``
    jobs have a report without pictures, which take longer than the rest of "fit", and few calibration samples: most
    signals then come before the first block of "prune" is done.
    """
    model, text = shared / "model", shared / "text.txt"
    tiny_llama(num_hidden_layers=6).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    text.write_text(_prose())
    files = json.dumps(
        {"class_path": "TextFiles", "init_args": {split: [str(text)] for split in ("train", "validation")}}
    )
    fit = [
        *("fit", "--config=recipes/smollm2_2of4.yaml", "--config=configs/precision/float32.yaml"),
        *(f"--model.model={model}", f"--data.text={files}", "--data.block_size=32", "--data.batch_size=2"),
        *("--data.max_validation_blocks=2", f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=12"),
        "--trainer.default_root_dir=run",
        *("--pruning.update_freq=4", "--trainer.callbacks+=ModelCheckpoint"),
        *("--trainer.callbacks.every_n_train_steps=2", "--export=out"),
    ]
    prune = [
        *("prune", str(model), "out", f"--text={files}", "--streaming=true", "--mask_structure=2:4"),
        *("--max_seq_length=32", f"--num_calibration_samples={8 if short else 64}"),
    ]
    fit_starts = partial(_fit_starts, _without_pictures if short else main, fit)
    found = [
        Job("fit", fit_starts, _fit_result, "Restored all states from the checkpoint"),
        Job("prune --streaming", partial(_same_starts, prune), model_result, "Continuing after"),
        Job("export", partial(_export_starts, shared / "fit"), model_result),
        Job("transformers.Trainer", _trainer_starts, _trainer_result, _Says.continues, is_command=False),
    ]
    return {job.name: job for job in found}


def _prose() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics)[:4]).encode("ascii", "ignore").decode()


def _ended(folder: Path) -> bool:
    return (folder / "out").exists()


def _same_starts(command: list[str], folder: Path) -> list[Start]:
    return [] if _ended(folder) else [Start(partial(main, command))]


def _export_starts(fitted: Path, folder: Path) -> list[Start]:
    return _same_starts(["export", str(checkpoints(fitted)[0]), "out"], folder)


def model_result(folder: Path) -> dict[str, str]:
    """Of every file of the model; the card and the record of a pruning name times and places."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (folder / "out").iterdir()
        if file.name.startswith(("model", "config", "generation_config", "tokenizer", "special_tokens"))
    }


# --- fit -------------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _without_pictures(command: list[str]) -> None:
    with without_pictures():
        main(command)


def _fit_starts(call: Callable[[list[str]], None], command: list[str], folder: Path) -> list[Start]:
    if _ended(folder):
        return []
    found = checkpoints(folder)
    names = ["last", *map(str, found[1:])]
    going_on = [Start(partial(call, [*command, f"--ckpt_path={n}"]), p) for n, p in zip(names, found, strict=False)]
    return [*going_on, Start(partial(call, command))]


def _fit_result(folder: Path) -> dict[str, str]:
    """Of the exported model, and of what a longer run would go on from."""
    last = next(path for path in checkpoints(folder) if path.name.endswith(f"step={STEPS}.ckpt"))
    content = torch.load(last, weights_only=True)
    return model_result(folder) | {
        "weights and masks": digest(content["state_dict"]),
        "optimizer": digest(content["optimizer_states"]),
        "pruning": digest(content["callbacks"]["DynamicPruning"]),
    }


# --- Trainer ---------------------------------------------------------------------------------------------------------


class _Says(TrainerCallback):
    continues = "It goes on after step"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            print(self.continues, state.global_step)


def _train(folder: Path, checkpoint: Path | None) -> None:
    run = trainer(folder, pruning(), _Says(), max_steps=STEPS, save_strategy="steps", save_steps=2)
    run.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _trainer_checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def _trainer_starts(folder: Path) -> list[Start]:
    found = _trainer_checkpoints(folder)
    return [Start(partial(_train, folder, path), path) for path in [*found, None]]


def _trainer_result(folder: Path) -> dict[str, str]:
    last = folder / f"checkpoint-{STEPS}"
    files = ("optimizer.pt", "scheduler.pt", STATE_FILE)
    states = {name: torch.load(last / name, weights_only=True) for name in files}
    states[STATE_FILE]["updater"]["metrics"].pop("sparsity/update_seconds", None)
    model = hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()
    return {name: digest(state) for name, state in states.items()} | {"model": model}


def digest(content: Any) -> str:
    """SHA-256 of tensors and plain values."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                found.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            found.update(f"{len(value)}".encode())
            for each in value:
                add(each)
        else:
            found.update(repr(value).encode())

    add(content)
    return found.hexdigest()
