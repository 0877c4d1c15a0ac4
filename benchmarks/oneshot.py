"""WikiText-2 perplexity of one-shot pruned models, one row per command: the paper's tables on a small model.

    python benchmarks/oneshot.py --method wanda --structure 2:4 --seed 0
    python benchmarks/oneshot.py --method sparsegpt --structure unstructured --data WIKITEXT2_RAW_TEST.txt \\
        --calibration C4_SAMPLE.jsonl
    python benchmarks/oneshot.py --method wanda --weights float32 --autocast bfloat16 --samples 16 --length 512

Rows are appended to benchmarks/oneshot.csv as runs finish. A row that already exists is not run again, so a list of
commands resumes after an interruption. Text comes from the hub unless files are given: the raw WikiText-2 test split
joined by blank lines, as in Wanda, SparseGPT and GPTQ, and C4. Weights are bfloat16 by default; in the papers they are
float16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import rows
import torch
from jsonargparse import auto_cli

from sparse_train import IHT, RIA, Magnitude, SparseGPT, Unstructured, Wanda, WandaCumulative
from sparse_train.data.packing import calibration_batches
from sparse_train.data.texts import HubText, TextFiles, TextSource
from sparse_train.evaluation import evaluate_perplexity, token_ids
from sparse_train.models.sources import PackagedSmolLM2
from sparse_train.oneshot.prune import prune

METHODS: dict[str, tuple[Callable[[], Any], str]] = {
    "magnitude": (Magnitude, "row"),
    "magnitude_layer": (Magnitude, "layer"),
    "magnitude_model": (Magnitude, "model"),
    "wanda": (Wanda, "row"),
    "wanda_layer": (Wanda, "layer"),
    "wanda_variant": (WandaCumulative, "layer"),
    "ria": (RIA, "row"),
    "ria_layer": (RIA, "layer"),
    "sparsegpt": (SparseGPT, "layer"),
    "iht": (IHT, "row"),
    "iht_asymmetric": (partial(IHT, dampening_frac=0.1, asymmetric=True), "row"),
}
"""By name: the method, and the group in which unstructured weights are compared."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    structure: str
    sparsity: float
    seed: int
    samples: int
    length: int
    perplexity: float
    tokens: int
    window: int
    forward_seconds: float
    pruning_seconds: float
    data: str
    calibration: str
    threads: int
    model: str
    autocast: str
    """Of the forwards that calibrate."""


def main(
    method: str,
    structure: str = "unstructured",
    sparsity: float | None = None,
    seed: int = 0,
    samples: int = 64,
    length: int = 1024,
    window: int = 2048,
    max_tokens: int | None = None,
    data: str | None = None,
    calibration: str | None = None,
    weights: Literal["bfloat16", "float32"] = "bfloat16",
    autocast: Literal["bfloat16"] | None = None,
    out: str = "benchmarks/oneshot.csv",
) -> None:
    """Prune, measure, and append a row.

    Args:
        method: "dense", or one of METHODS.
        structure: "unstructured" or "N:M".
        sparsity: for unstructured; default 0.5.
        seed: of the choice of calibration samples.
        samples: number of calibration samples.
        length: tokens per sample.
        window: tokens per window in evaluation, without overlap.
        max_tokens: use only the first tokens of the test text.
        data: file with the test text; default: the hub's WikiText-2 raw.
        calibration: file with calibration text; default: the hub's C4.
        weights: their dtype. Float32 weights are evaluated under bfloat16 autocast.
        autocast: dtype of the forwards that calibrate float32 weights.
        out: CSV file.
    """
    if method not in ("dense", *METHODS):
        raise SystemExit(f"--method is dense or one of {', '.join(METHODS)}, got {method!r}.")
    if method == "dense" or method.startswith("magnitude"):
        seed, samples, length = 0, 0, 0  # nothing is random
    sparsity = 0.5 if sparsity is None and structure == "unstructured" else sparsity
    path = Path(out)
    name = f"{PackagedSmolLM2.name}, {weights} weights"
    wanted = {"method": method, "structure": structure, "seed": seed, "samples": samples, "length": length}
    wanted |= {"window": window, "model": name, "autocast": autocast or ""}
    for row in rows.read(path):
        same = all(row[key] == str(value) for key, value in wanted.items())
        if same and sparsity in (None, round(float(row["sparsity"]), 3)):
            print(f"{wanted}: already in {path}")
            return
    source = PackagedSmolLM2()
    model, tokenizer = source.load().to(getattr(torch, weights)), source.tokenizer()
    texts: tuple[TextSource, TextSource] = (
        TextFiles(test=[data]) if data else HubText("Salesforce/wikitext", "wikitext-2-raw-v1"),
        TextFiles(train=[calibration]) if calibration else HubText("allenai/c4", "en", max_documents=20_000),
    )
    reached, seconds = 0.0, (0.0, 0.0)
    if method != "dense":
        make, group = METHODS[method]
        pattern = Unstructured(group) if structure == "unstructured" else structure  # type: ignore[arg-type]
        batches = None
        if samples:
            batches = calibration_batches(
                texts[1],
                tokenizer,
                num_calibration_samples=samples,
                max_seq_length=length,
                batch_size=min(samples, 4),
                seed=seed,
            )
        casts = None if autocast is None else getattr(torch, autocast)
        report = prune(model, batches, pattern, sparsity=sparsity, criterion=make(), autocast=casts, progress=True)
        reached, seconds = report.sparsity, (report.forward_seconds, report.pruning_seconds)
    ids = token_ids(texts[0].documents("test"), tokenizer)
    options: Any = {"window": window, "batch_size": 1, "max_tokens": max_tokens, "progress": True}
    found = evaluate_perplexity(model, ids, autocast=torch.bfloat16 if weights == "float32" else None, **options)
    row = Row(
        method,
        structure,
        reached,
        seed,
        samples,
        length,
        found.perplexity,
        found.tokens,
        window,
        *seconds,
        texts[0].name,
        texts[1].name if samples else "",
        torch.get_num_threads(),
        name,
        autocast or "",
    )
    rows.append(path, row)
    print(row)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
