"""Flags of the Wanda reference (github.com/locuslab/wanda, main.py) as aliases for those of ``sparse-train prune``."""

import json

from sparse_train.commands.llm_compressor import nm_of_pruned
from sparse_train.suggestions import did_you_mean

_STANDS_FOR = {
    "--prune_method": "--criterion",
    "--use_variant": "--criterion",
    "--sparsity_ratio": "--sparsity",
    "--sparsity_type": "--mask_structure",
    "--nsamples": "--num_calibration_samples",
    "--save_model": "--out",
}
_CRITERIA = {  # the last two are methods of its forks
    "wanda": "Wanda",
    "magnitude": "Magnitude",
    "sparsegpt": "SparseGPT",
    "ria": "RIA",
    "random": "Random",
}
_ELSEWHERE = {
    "--save": "The results are printed, and written to pruning.json in the --out folder: leave --save out.",
    "--cache_dir": "Set the environment variable HF_HOME.",
    "--eval_zero_shot": "Run sparse-train evaluate --tasks wanda7 on the pruned model.",
}


def translate(options: list[str]) -> list[str]:
    """Translate a command line with flags of the reference to options of ``sparse-train prune``.

    Other options stay unchanged, in their place. N:M counts N **pruned** in the reference.

    Raises:
        ValueError: an alias is given together with the flag that it stands for, without a value, or with a value that
            has no counterpart; or a flag of the reference has no counterpart.
    """
    found = _split(options)
    values = {name: value for name, value, _ in found}
    for name in values:
        if name in _ELSEWHERE:
            raise ValueError(f"{name} of the Wanda reference is not a flag of sparse-train prune. {_ELSEWHERE[name]}")
        if _STANDS_FOR.get(name) in values:
            raise ValueError(f"{name} stands for {_STANDS_FOR[name]}, and both are given. Give one of them.")
    method, variant = values.get("--prune_method"), "--use_variant" in values
    if variant and method != "wanda":
        raise ValueError("--use_variant is a variant of Wanda: give --prune_method wanda with it.")
    translated = []
    for name, value, written in found:
        if name == "--prune_method":
            translated.append(f"--criterion={'WandaCumulative' if variant else _criterion(value)}")
        elif name == "--sparsity_type":
            translated.append(f"--mask_structure={_mask_structure(value, method)}")
        elif name not in _STANDS_FOR:
            translated.append(written)
        elif name != "--use_variant":
            translated.append(f"{_STANDS_FOR[name]}={value}")
    return translated


def _split(options: list[str]) -> list[tuple[str, str, str]]:
    """Name, value and text of each option; only for an alias is the next argument taken as its value."""
    found = []
    rest = iter(options)
    for option in rest:
        name, equals, value = option.partition("=")
        if name == "--use_variant" and equals:
            raise ValueError(f"--use_variant takes no value, got {value!r}.")
        if name in _STANDS_FOR and name != "--use_variant":
            value = value if equals else next(rest, "")
            if not value or value.startswith("--"):
                raise ValueError(f"{name} needs a value.")
        found.append((name, value, option))
    return found


def _criterion(method: str) -> str:
    if method not in _CRITERIA:
        raise ValueError(
            f"--prune_method {method} has no counterpart; there are {', '.join(_CRITERIA)}."
            + did_you_mean(method, _CRITERIA)
        )
    return _CRITERIA[method]


def _mask_structure(word: str, method: str | None) -> str:
    if word == "unstructured":
        # the scripts' magnitude and RIA compare within a layer; other methods use the group of the criterion
        layer = {"class_path": "Unstructured", "init_args": {"group": "layer"}}
        return json.dumps(layer) if method in ("magnitude", "ria") else word
    try:
        pattern = nm_of_pruned(word)
    except ValueError as error:
        raise ValueError(f"--sparsity_type {error}.{did_you_mean(word, ['unstructured'])}") from error
    return f"{pattern.n}:{pattern.m}"
