"""Perplexity of one-shot, static and dynamically re-pruned models, one row a command, at equal tokens.

    python benchmarks/quality.py --arm dynamic --seed 1
    python benchmarks/quality.py --arm static --seed 1 --steps 100 --lr 2e-4 --wikitext WIKITEXT2_RAW_TEST.txt

Every arm starts from the same model and, where it is pruned, from the same first mask, and sees the same batches in
the same order for a seed. Rows are appended to benchmarks/quality.csv as runs finish; a row that is there already is
not run again, so a list of commands resumes after an interruption. --wikitext adds perplexity on that file
("\n\n".join of the raw test split); held-out articles of the packaged Wikipedia text are always measured.
"""

import csv
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from jsonargparse import auto_cli

from sparse_train import Magnitude, Wanda, lightning_cli, prune
from sparse_train.data import calibration_batches
from sparse_train.evaluation import evaluate_perplexity, token_ids
from sparse_train.packaged import MODEL_NAME
from sparse_train.sources import PackagedSmolLM2, PackagedWikipedia, TextFiles, TextSource

_PRUNING = "--trainer.callbacks.init_args"
_DECAY = [f"{_PRUNING}.policy=StraightThrough", f"{_PRUNING}.policy.srste_decay=0.01"]
ARMS: dict[str, tuple[str, list[str]]] = {
    "dense": ("recipes/smollm2_dense.yaml", []),
    "static": ("recipes/smollm2_2of4_static.yaml", []),
    "static_ste": ("recipes/smollm2_2of4.yaml", [f"{_PRUNING}.end_step=0"]),
    "dynamic": ("recipes/smollm2_2of4.yaml", []),
    "dynamic_k50": ("recipes/smollm2_2of4.yaml", [f"{_PRUNING}.update_freq=50"]),
    "dynamic_frozen_norms": ("recipes/smollm2_2of4.yaml", [f"{_PRUNING}.memory=frozen"]),
    "dynamic_memory50": ("recipes/smollm2_2of4.yaml", [f"{_PRUNING}.memory=0.5"]),
    "dynamic_memory90": ("recipes/smollm2_2of4.yaml", [f"{_PRUNING}.memory=0.9"]),
    "dynamic_cumulative": ("recipes/smollm2_2of4.yaml", [f"{_PRUNING}.memory=1"]),
    "dynamic_hysteresis5": ("recipes/smollm2_2of4.yaml", [f"{_PRUNING}.hysteresis=0.05"]),
    "dynamic_hysteresis20": ("recipes/smollm2_2of4.yaml", [f"{_PRUNING}.hysteresis=0.2"]),
    "dynamic_noise1": ("recipes/smollm2_2of4.yaml", [f"{_PRUNING}.noise_margin=1", f"{_PRUNING}.flip_agreement=true"]),
    "dynamic_noise2": ("recipes/smollm2_2of4.yaml", [f"{_PRUNING}.noise_margin=2", f"{_PRUNING}.flip_agreement=true"]),
    "dynamic_decay": ("recipes/smollm2_2of4.yaml", _DECAY),
    "dynamic_decay_annealed": ("recipes/smollm2_2of4.yaml", [*_DECAY, f"{_PRUNING}.policy.anneal=0.5"]),
    "regrow": ("recipes/smollm2_2of4.yaml", [f"{_PRUNING}.policy=Regrow"]),
    "regrow_times_norm": (
        "recipes/smollm2_2of4.yaml",
        [f"{_PRUNING}.policy=Regrow", f"{_PRUNING}.policy.times_norm=true"],
    ),
    "static_unstructured60": ("recipes/smollm2_unstructured60.yaml", [f"{_PRUNING}.policy=Fixed"]),
    "dynamic_unstructured60": ("recipes/smollm2_unstructured60.yaml", []),
    "regrow_unstructured60": ("recipes/smollm2_unstructured60.yaml", [f"{_PRUNING}.policy=Regrow"]),
    "dynamic_magnitude": ("recipes/smollm2_2of4.yaml", [f"{_PRUNING}.criterion=Magnitude"]),
}
"""Trained arms: the recipe, and what is changed in it."""
ONESHOT = {"oneshot_wanda": Wanda(), "oneshot_magnitude": Magnitude()}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    arm: str
    seed: int
    steps: int
    lr: float
    tokens: int
    heldout_perplexity: float
    wikitext2_perplexity: float | None
    sparsity: float
    model: str = MODEL_NAME
    protocol: str = "windows of 512, no overlap, bfloat16 autocast, loss in float32"


def main(
    arm: str,
    seed: int = 0,
    steps: int = 100,
    lr: float = 2e-4,
    wikitext: str | None = None,
    out: str = "benchmarks/quality.csv",
) -> None:
    """Run one arm and append its row.

    Args:
        arm: dense, static (no gradient to pruned weights), static_ste (straight-through, mask frozen), dynamic and
            its variants, regrow and its variants (see ``ARMS``), oneshot_wanda, oneshot_magnitude or none (the
            untrained dense model).
        seed: of data order and calibration.
        steps: optimizer steps of 2048 tokens.
        lr: peak learning rate.
        wikitext: path of the WikiText-2 raw test text.
        out: CSV file.
    """
    known = ["none", *ONESHOT, *ARMS]
    if arm not in known:
        raise SystemExit(f"--arm is one of {', '.join(known)}, got {arm!r}.")
    if arm not in ARMS:
        steps, lr = 0, 0.0
    path = Path(out)
    if any(
        row["arm"] == arm and row["seed"] == str(seed) and row["steps"] == str(steps) and float(row["lr"]) == lr
        for row in _read(path)
    ):
        print(f"{arm}, seed {seed}, {steps} steps, lr {lr}: already in {path}")
        return
    source = PackagedSmolLM2()
    tokenizer = source.tokenizer()
    if arm in ARMS:
        recipe, changes = ARMS[arm]
        with tempfile.TemporaryDirectory() as folder:
            cli = lightning_cli.run(
                [
                    "fit",
                    f"--config={recipe}",
                    *changes,
                    f"--seed_everything={seed}",
                    f"--data.seed={seed}",
                    f"--model.lr={lr}",
                    f"--trainer.max_steps={steps}",
                    f"--trainer.default_root_dir={folder}",
                    "--trainer.enable_checkpointing=false",
                    f"--trainer.val_check_interval={steps}",
                ]
            )
        model = cli.model.model
    else:
        model = source.load()
        if arm in ONESHOT:
            batches = calibration_batches(PackagedWikipedia(), tokenizer, seed=seed)
            prune(model, batches, "2:4", criterion=ONESHOT[arm], progress=True)
    weights = [p for n, p in model.named_parameters() if "proj" in n]
    sparsity = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    texts: dict[str, TextSource] = {"heldout": PackagedWikipedia()}
    if wikitext is not None:
        texts["wikitext2"] = TextFiles(test=[wikitext])
    found = {
        name: evaluate_perplexity(
            model, token_ids(text.documents("test"), tokenizer), window=512, autocast=torch.bfloat16, progress=True
        ).perplexity
        for name, text in texts.items()
    }
    row = Row(
        arm,
        seed,
        steps,
        lr,
        steps * 2048,
        found["heldout"],
        found.get("wikitext2"),
        sparsity,
    )
    _append(path, row)
    print(row)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def _append(path: Path, row: Row) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
