"""Perplexity of one-shot, static and dynamically re-pruned models at equal tokens, one row per command.

    python benchmarks/quality.py --arm dynamic --seed 0 --lr 2e-4 --steps 50 --tuning true
    python benchmarks/quality.py --arm dynamic --seed 1 --lr 2e-4 --wikitext WIKITEXT2_RAW_TEST.txt --c4 C4_SAMPLE.jsonl

Every arm starts from the same model and, for a given seed, uses the same batches in the same order. Arms with the same
pattern start from the same first mask, except those that prune gradually. With --tuning, a run is evaluated only on
validation articles; such rows, with seeds that are not reported, decide learning rates and variants. Other runs are
evaluated once at their end, on held-out articles and the given files. Rows are appended to benchmarks/quality.csv as
runs finish. A row that already exists is not run again, so a list of commands resumes after an interruption. With
--checkpoints, an interrupted run of hours goes on as well.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows
import torch
from arms import ARMS, ONESHOT
from jsonargparse import auto_cli

from sparse_train.cli import lightning_cli
from sparse_train.data.text_blocks import TextBlocks
from sparse_train.data.texts import PackagedWikipedia, TextFiles, TextSource
from sparse_train.evaluation import evaluate_perplexity, token_ids
from sparse_train.models.sources import FromScratch, PackagedSmolLM2
from sparse_train.oneshot.batches import random_batches
from sparse_train.oneshot.permutation import permute
from sparse_train.oneshot.prune import prune

BLOCK_SIZE = 512
"""Tokens of a sequence, in all recipes."""


@dataclass(frozen=True)
class Row:
    """One line of the table; perplexities are on at most the first ``eval_tokens`` tokens of a text."""

    arm: str
    seed: int
    steps: int
    lr: float
    tuning: bool
    validation: float
    heldout: float | None
    wikitext2: float | None
    c4: float | None
    sparsity: float
    first_flip_rate: float | None = None
    last_flip_rate: float | None = None
    initial_flip_rate: float | None = None
    first_flip_agreement: float | None = None  # of these two, there are only old rows
    last_flip_agreement: float | None = None
    teacher: str | None = None
    tokens_a_step: int = 2048
    eval_tokens: int = 32768
    model: str = PackagedSmolLM2.name
    protocol: str = "windows of 512, no overlap, bfloat16 autocast, loss in float32"


def main(
    arm: str,
    seed: int = 0,
    steps: int = 100,
    lr: float = 2e-4,
    tokens_a_step: int = 2048,
    tuning: bool = False,
    wikitext: str | None = None,
    c4: str | None = None,
    teacher: str | None = None,
    export: str | None = None,
    checkpoints: str | None = None,
    out: str = "benchmarks/quality.csv",
) -> None:
    """Run one arm and append its row.

    Args:
        arm: of ``benchmarks/arms.py``: trained, or one-shot; or none (the untrained dense model).
        seed: of data order. First masks come from the same batches for all seeds.
        steps: optimizer steps.
        lr: peak learning rate.
        tokens_a_step: a multiple of 512, the length of a sequence. At other sizes of a step, the same sequences come in
            the same order, and the first mask is calibrated on the same ones; intervals between updates stay in steps.
        tuning: evaluate only on validation articles.
        wikitext: path of the WikiText-2 raw test text.
        c4: path of C4 documents, one JSON object with "text" per line.
        teacher: folder of the model from which the arms named "tuned" learn: dense_seedN_STEPS, as written by --arm
            dense --seed N --steps STEPS --export, with the same seed and number of steps.
        export: folder for the trained model.
        checkpoints: folder where the run saves itself every 50 steps. The same command goes on from there. Not for arms
            of ``variants.py``, whose state is in no checkpoint.
        out: CSV file.
    """
    known = ["none", *ONESHOT, *ARMS]
    if arm not in known:
        raise SystemExit(f"--arm is one of {', '.join(known)}, got {arm!r}.")
    if tokens_a_step < BLOCK_SIZE or tokens_a_step % BLOCK_SIZE:
        raise SystemExit(f"--tokens_a_step is a multiple of {BLOCK_SIZE}, got {tokens_a_step}.")
    if arm not in ARMS:
        steps, lr, tokens_a_step = 0, 0.0, Row.tokens_a_step
    elif ARMS[arm].teacher != (teacher is not None):
        raise SystemExit(f"--teacher is for the arms {', '.join(name for name, each in ARMS.items() if each.teacher)}.")
    alike = f"dense_seed{seed}_{steps * tokens_a_step // Row.tokens_a_step}"
    if teacher is not None and Path(teacher).name != alike:
        raise SystemExit(f"The teacher must have seen the same tokens: --teacher must name {alike}.")
    if checkpoints is not None and arm in ARMS and any("variants." in option for option in ARMS[arm].options()):
        raise SystemExit(f"{arm} has a state that no checkpoint holds: leave --checkpoints out.")
    path = Path(out)
    given = {"heldout": "", "wikitext2": wikitext, "c4": c4}
    wanted = [] if tuning else [name for name, text in given.items() if text is not None]
    key = {"arm": arm, "seed": str(seed), "steps": str(steps), "lr": str(lr), "tuning": str(tuning)}
    key |= {"teacher": Path(teacher).name if teacher else "", "tokens_a_step": str(tokens_a_step)}
    done = any(key.items() <= row.items() and all(row[name] for name in wanted) for row in rows.read(path))
    if done and (export is None or Path(export).exists()):
        print(f"{arm}, seed {seed}, {steps} steps, lr {lr}: already in {path}")
        return
    began = time.perf_counter()
    if arm in ARMS:
        file = f"{arm}_seed{seed}_{steps}x{tokens_a_step}_lr{lr}.ckpt"
        checkpoint = None if checkpoints is None else Path(checkpoints).absolute() / file
        model, flips, name = _train(arm, seed, steps, lr, tokens_a_step, teacher, export, checkpoint)
    else:
        model, flips, name = _oneshot(arm), {}, None
    if done:
        return
    weights = [p for n, p in model.named_parameters() if "proj" in n and "lora" not in n]
    sparsity = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    domain: TextSource = ARMS[arm].text if arm in ARMS else PackagedWikipedia()
    found = {"validation": _perplexity(model, domain, "validation")}
    if not tuning:
        texts: dict[str, TextSource] = {"heldout": domain}
        texts |= {} if wikitext is None else {"wikitext2": TextFiles(test=[wikitext])}
        texts |= {} if c4 is None else {"c4": TextFiles(test=[c4])}
        found |= {name: _perplexity(model, text, "test") for name, text in texts.items()}
    numbers: dict[str, Any] = {text: found.get(text) for text in given} | flips
    row = Row(
        arm,
        seed,
        steps,
        lr,
        tuning,
        found["validation"],
        sparsity=sparsity,
        teacher=key["teacher"] or None,
        tokens_a_step=tokens_a_step,
        model=name or PackagedSmolLM2.name,
        **numbers,
    )
    rows.append(path, row)
    print(f"{row} {time.perf_counter() - began:.0f} s")


def _train(
    name: str,
    seed: int,
    steps: int,
    lr: float,
    tokens_a_step: int,
    teacher: str | None,
    export: str | None,
    checkpoint: Path | None,
) -> tuple[Any, dict[str, float], str]:
    """The trained model, its flip rates, and a description of the model."""
    arm, batch_size = ARMS[name], tokens_a_step // BLOCK_SIZE
    saving = ["--trainer.enable_checkpointing=false"]
    if checkpoint is not None:
        saving = [
            "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
            f"--trainer.callbacks.dirpath={checkpoint.parent}",
            f"--trainer.callbacks.filename={checkpoint.stem}",
            "--trainer.callbacks.every_n_train_steps=50",
            "--trainer.callbacks.enable_version_counter=false",
            *([f"--ckpt_path={checkpoint}"] if checkpoint.exists() else []),
        ]
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder, "start")
        if arm.start is not None:
            _oneshot(arm.start).save_pretrained(start)
            PackagedSmolLM2().tokenizer().save_pretrained(start)
        cli = lightning_cli.run(
            [
                "fit",
                *arm.options(),
                *([] if arm.start is None else [f"--model.model={start}"]),
                *([] if teacher is None else [f"--model.distillation.teacher={teacher}"]),
                *([] if export is None else [f"--export={export}"]),
                f"--seed_everything={seed}",
                f"--data.seed={seed}",
                f"--data.batch_size={batch_size}",
                f"--model.lr={lr}",
                "--model.compile_blocks=true",
                f"--trainer.max_steps={steps}",
                f"--trainer.default_root_dir={folder}",
                "--trainer.gradient_clip_val=1.0",
                *saving,
                "--trainer.limit_val_batches=0",
                "--trainer.num_sanity_val_steps=0",
            ]
        )
        logged = [row for file in Path(folder).rglob("metrics.csv") for row in rows.read(file)]
    source = cli.model.source
    return cli.model.model, flips(logged), source.name if isinstance(source, FromScratch) else PackagedSmolLM2.name


def flips(logged: list[dict[str, str]]) -> dict[str, float]:
    """Flip rates of the first and last update, from the rows that a run has logged."""
    found: dict[str, float] = {}
    updates = [row for row in logged if row["step"] != "0"]  # step 0 reports the first mask, which flips nothing
    values = [float(row["sparsity/flip_rate"]) for row in updates if row.get("sparsity/flip_rate")]
    if any(values):  # static masks are only confirmed
        found |= {"first_flip_rate": values[0], "last_flip_rate": values[-1]}
    differing = [float(row["sparsity/initial_flip_rate"]) for row in logged if row.get("sparsity/initial_flip_rate")]
    found |= {"initial_flip_rate": differing[-1]} if differing else {}
    return found


def _oneshot(name: str) -> Any:
    """The model pruned or permuted, on the random batches of trained arms' first masks, under the same autocast."""
    source = PackagedSmolLM2()
    model = source.load()
    if name not in ONESHOT:
        return model
    arm, data = ONESHOT[name], TextBlocks(source, PackagedWikipedia(), block_size=512, batch_size=4)
    data.setup("fit")
    batches = random_batches(data.train_dataloader().dataset, 4, None, 32)
    with torch.autocast("cpu", torch.bfloat16):
        if arm.permuted:
            permute(model, batches, autocast=torch.bfloat16)
        if arm.method is not None:
            prune(
                model,
                batches,
                arm.mask_structure,
                sparsity=arm.sparsity,
                criterion=arm.method,
                distribution=arm.distribution,
                progress=True,
            )
    return model


def _perplexity(model: Any, text: TextSource, split: Any) -> float:
    ids = token_ids(text.documents(split), PackagedSmolLM2().tokenizer())
    return evaluate_perplexity(
        model, ids, max_tokens=Row.eval_tokens, autocast=torch.bfloat16, progress=True
    ).perplexity


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
