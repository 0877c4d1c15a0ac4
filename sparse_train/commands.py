"""The commands that are no training: prune, evaluate, export, inspect."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from sparse_train.criteria import Criterion, Wanda
from sparse_train.patterns import Pattern, group_label, parse_pattern
from sparse_train.sources import ModelSource, PackagedWikipedia, Split, TextSource, as_model_source, float_dtype
from sparse_train.tables import show_inspection, show_pruning
from sparse_train.yaml_numbers import install


def prune(
    model: ModelSource | str,
    out: str,
    text: TextSource | None = None,
    mask_structure: str | Pattern = "2:4",
    sparsity: float | None = None,
    criterion: Criterion = Wanda(),  # noqa: B008  (frozen; jsonargparse shows it as the default)
    targets: list[str] | None = None,
    ignore: list[str] = [],  # noqa: B006  (not changed)
    num_calibration_samples: int = 32,
    max_seq_length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
) -> None:
    """Prune a model in one shot and write it as a Hugging Face folder with true zeros.

    Args:
        model: Hugging Face id, local folder, or a model source.
        out: folder to write; must not exist.
        text: calibration text; default: the packaged Wikipedia text.
        mask_structure: "unstructured", "N:M" with N kept of every M consecutive inputs, or a pattern class.
        sparsity: share of weights that are zero; implied by N:M.
        criterion: scores weights.
        targets: layers by name, class name or "re:" expression; default: the decoder blocks' linear layers.
        ignore: layers to leave dense.
        num_calibration_samples: blocks of text.
        max_seq_length: tokens a block.
        batch_size: blocks a forward.
        seed: of the choice of blocks.
    """
    from sparse_train.data import calibration_batches
    from sparse_train.export import check_free, export_model
    from sparse_train.inspection import layer_sparsities
    from sparse_train.oneshot import prune as prune_model

    pattern, _ = parse_pattern(mask_structure, sparsity)  # mistakes in the pattern should not wait for the model
    check_free(Path(out))
    source = as_model_source(model)
    began = time.perf_counter()
    loaded, tokenizer = source.load(), source.tokenizer()
    text = text or PackagedWikipedia()
    batches = calibration = None
    if criterion.needs_activations:
        calibration = f"{num_calibration_samples} x {max_seq_length} tokens of {text.name}, seed {seed}"
        batches = calibration_batches(
            text,
            tokenizer,
            num_calibration_samples=num_calibration_samples,
            max_seq_length=max_seq_length,
            batch_size=batch_size,
            seed=seed,
        )
    report = prune_model(
        loaded,
        batches,
        mask_structure,
        sparsity=sparsity,
        criterion=criterion,
        targets=targets,
        ignore=ignore,
        progress=sys.stderr.isatty() or sys.stdout.isatty(),
    )
    folder = export_model(loaded, tokenizer, out)
    details = {
        "model": source.name,
        "criterion": repr(criterion),
        "mask_structure": group_label(pattern),
        "sparsity": report.sparsity,
        "calibration": calibration,
        "seconds": {
            "forwards": report.forward_seconds,
            "pruning": report.pruning_seconds,
            "all": time.perf_counter() - began,
        },
    }
    (folder / "pruning.json").write_text(json.dumps(details, indent=2) + "\n")
    show_pruning(details, layer_sparsities(loaded), folder)


def evaluate(
    model: ModelSource | str,
    text: TextSource | None = None,
    split: Split = "test",
    window: int = 512,
    stride: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    autocast: str | None = None,
    json: bool = False,
) -> None:
    """Perplexity of a model, printed with its protocol.

    Args:
        model: Hugging Face id, local folder, or a model source.
        text: default: the packaged Wikipedia text.
        split: train, validation or test.
        window: tokens a forward sees.
        stride: tokens between starts of windows; default: no overlap.
        batch_size: windows a forward.
        max_tokens: read only the first tokens of the split.
        autocast: compute in this dtype, such as "bfloat16"; the loss stays float32.
        json: print one JSON object instead of text.
    """
    from json import dumps

    from sparse_train.evaluation import evaluate_perplexity, token_ids

    dtype = None if autocast is None else float_dtype(autocast)
    source, text = as_model_source(model), text or PackagedWikipedia()
    loaded, tokenizer = source.load(), source.tokenizer()
    documents = text.documents(split)
    if not documents:
        raise ValueError(f"{text.name} has no text in its {split} split.")
    result = evaluate_perplexity(
        loaded,
        token_ids(documents, tokenizer),
        window=window,
        stride=stride,
        batch_size=batch_size,
        max_tokens=max_tokens,
        model_name=source.name,
        data_name=text.name,
        split=split,
        autocast=dtype,
        progress=not json,
    )
    print(dumps(result.as_dict()) if json else f"{result.perplexity:.2f}  {result.protocol}")


def export(checkpoint: str, out: str, tokenizer: ModelSource | str | None = None) -> None:
    """Write the model of a training checkpoint as a Hugging Face folder with true zeros.

    Args:
        checkpoint: file that ``sparse-train fit`` wrote.
        out: folder to write; must not exist.
        tokenizer: model source, Hugging Face id or folder whose tokenizer is put beside the model.
    """
    from sparse_train.export import export_checkpoint

    loaded = None if tokenizer is None else as_model_source(tokenizer).tokenizer()
    print(f"exported to {export_checkpoint(checkpoint, out, loaded)}")


def inspect(model: ModelSource | str, json: bool = False) -> None:
    """Sparsity and pattern of each linear layer, counted on the weights.

    Args:
        model: Hugging Face id, local folder, or a model source.
        json: print one JSON object instead of a table.
    """
    from sparse_train.inspection import layer_sparsities

    source = as_model_source(model)
    show_inspection(source.name, layer_sparsities(source.load()), json)


COMMANDS: dict[str, tuple[Callable[..., None], list[str]]] = {
    "prune": (prune, []),
    "evaluate": (evaluate, ["model"]),
    "export": (export, ["checkpoint", "out"]),
    "inspect": (inspect, ["model"]),
}
"""Each command's function, and which of its arguments may also be given by position."""


def parser_of(command: str) -> ArgumentParser:
    """The parser of one command."""
    install()
    function, _ = COMMANDS[command]
    parser = ArgumentParser(prog=f"sparse-train {command}", description=(function.__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments.")
    parser.add_function_arguments(function)
    return parser


def run_command(command: str, options: list[str]) -> None:
    """Parse and run one command."""
    function, positional = COMMANDS[command]
    taken: list[str] = []
    while options and len(taken) < len(positional) and not options[0].startswith("-"):
        taken.append(f"--{positional[len(taken)]}={options[0]}")
        options = options[1:]
    if "--json" in options and not {"true", "false"} & set(options):  # a switch by itself, too
        options = ["--json=true" if option == "--json" else option for option in options]
    config: Any = parser_of(command).parse_args([*taken, *options])
    arguments = parser_of(command).instantiate(config)
    arguments.pop("config", None)
    function(**arguments)
