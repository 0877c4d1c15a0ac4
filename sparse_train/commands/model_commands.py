"""The commands other than training: prune, evaluate, export, inspect, pack, unpack, report.

Each shows its result, unless ``json`` is set, and returns it: docs/terminal.md lists the names.
"""

from collections.abc import Callable
from typing import Any

import sparse_train.models.lora  # noqa: F401  (a source that --model can name)
from sparse_train.commands.evaluate_command import evaluate
from sparse_train.commands.parsers import ShortErrors, settings
from sparse_train.commands.prune_command import prune
from sparse_train.commands.reference_flags import translate
from sparse_train.commands.yaml_numbers import install
from sparse_train.models.sources import ModelSource, Pretrained, as_model_source
from sparse_train.terminal.streams import stdout_for_json, take_json
from sparse_train.terminal.tables import show_inspection


def export(checkpoint: str, out: str, tokenizer: ModelSource | str | None = None, json: bool = False) -> dict[str, Any]:
    """Write the model of a training checkpoint as a Hugging Face folder with true zeros.

    Args:
        checkpoint: file, or folder of FSDP2 or DeepSpeed, that ``sparse-train fit`` wrote.
        out: folder to write; must not exist.
        tokenizer: model source, Hugging Face id or folder whose tokenizer is saved with the model.
        json: print one JSON object instead of text.
    """
    from sparse_train.export import export_checkpoint

    loaded = None if tokenizer is None else as_model_source(tokenizer).tokenizer()
    folder = export_checkpoint(checkpoint, out, loaded)
    if not json:
        print(f"exported to {folder}")
    return {"out": str(folder), "checkpoint": checkpoint}


def inspect(model: ModelSource | str, json: bool = False) -> dict[str, Any]:
    """Sparsity and pattern of each linear layer, its size on disk, and whether 2:4 hardware could run it.

    All numbers are counted on the weights, in the dtype that they have on disk.

    Args:
        model: Hugging Face id, local folder, or a model source (whose dtype is then used).
        json: print one JSON object instead of a table.
    """
    from sparse_train.inspection import layer_sparsities, overall_sparsity, sizes

    source = Pretrained(model, dtype="auto") if isinstance(model, str) else model
    loaded = source.load()
    layers = layer_sparsities(loaded)
    model_bytes = sum(parameter.numel() * parameter.dtype.itemsize for parameter in loaded.parameters())
    if not json:
        show_inspection(source.name, layers, model_bytes)
    dense, packed = sizes(layers)
    return {
        "model": source.name,
        "sparsity": overall_sparsity(layers),
        "dense_bytes": dense,
        "packed_bytes": packed,
        "model_bytes": model_bytes,
        "layers": [layer.as_dict() for layer in layers],
    }


def pack(model: str, out: str, json: bool = False) -> dict[str, Any]:
    """Write a pruned model as a smaller folder: mask bits and kept values, without the zeros.

    Args:
        model: Hugging Face folder with safetensors, as written by prune, export and fit.
        out: folder to write; must not exist. Only "sparse-train unpack" can read it.
        json: print one JSON object instead of text.
    """
    from sparse_train.packed.folder import pack_folder

    report = pack_folder(model, out)
    if not json:
        print(f"packed to {out}: {report}")
    return {
        "out": out,
        "weights": len(report.packed),
        "dense_bytes": report.dense_bytes,
        "packed_bytes": report.packed_bytes,
    }


def unpack(packed: str, out: str, json: bool = False) -> dict[str, Any]:
    """Restore the Hugging Face folder from a packed folder, bit for bit.

    Args:
        packed: folder that "sparse-train pack" wrote.
        out: folder to write; must not exist.
        json: print one JSON object instead of text.
    """
    from sparse_train.packed.folder import unpack_folder

    folder = unpack_folder(packed, out)
    if not json:
        print(f"unpacked to {folder}")
    return {"out": str(folder)}


def report(runs: list[str], out: str | None = None, json: bool = False) -> dict[str, Any]:
    """Write one page about training runs, as report.html and report.md; several runs are compared.

    Args:
        runs: folders of runs, which contain a sparse_train_history.jsonl.
        out: folder to write to; default: that of the run; for several runs, "report" in the current folder.
        json: print one JSON object instead of text.
    """
    from sparse_train.report import collect, headline, write_run_report

    page = write_run_report(runs, out)
    if not json:
        print(f"report: {page}")
    return {"report": str(page), "runs": [headline(run) for run in collect(runs)]}


COMMANDS: dict[str, tuple[Callable[..., dict[str, Any] | None], list[str]]] = {
    "prune": (prune, []),
    "evaluate": (evaluate, ["model"]),
    "export": (export, ["checkpoint", "out"]),
    "inspect": (inspect, ["model"]),
    "pack": (pack, ["model", "out"]),
    "unpack": (unpack, ["packed", "out"]),
    "report": (report, ["runs+"]),
}
"""The function of each command, and its arguments that may also be positional; "+": the last one may be repeated."""


def parser_of(command: str) -> ShortErrors:
    """The parser of one command."""
    install()
    function, _ = COMMANDS[command]
    description = (function.__doc__ or "").split("\n\n")[0]
    parser = ShortErrors(
        prog=f"sparse-train {command}", description=description, allow_abbrev=False, **settings(command)
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments.")
    parser.add_function_arguments(function)
    return parser


def run_command(command: str, options: list[str]) -> None:
    """Parse and run one command."""
    function, positional = COMMANDS[command]
    json, options = take_json(options)
    taken: list[str] = []
    several = bool(positional) and positional[-1].endswith("+")
    while options and (len(taken) < len(positional) or several) and not options[0].startswith("-"):
        taken.append(f"--{positional[min(len(taken), len(positional) - 1)]}={options[0]}")
        options = options[1:]
    if command == "prune":
        options = translate(options)
    config: Any = parser_of(command).parse_args([*taken, *options, *(["--json=true"] if json else [])])
    with stdout_for_json(bool(config.get("json"))) as write:
        arguments = parser_of(command).instantiate(config)
        arguments.pop("config", None)
        found = function(**arguments)
        if found is not None:  # None in all processes except the first
            write(found)
