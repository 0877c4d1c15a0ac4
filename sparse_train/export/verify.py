"""The zeros of a folder, counted on its files, against the pruning that the folder records.

Shape suffixes: O out_features, I in_features.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_train.blocks import fused_experts, is_conv1d
from sparse_train.files import reading
from sparse_train.oneshot.disk import Checkpoint, model_without_weights
from sparse_train.patterns import Pattern, Unstructured, group_label, parse_word

RECORD = "pruning.json"
"""How a model was pruned. Of the last of its ``stages``, ``mask_structure`` as ``group_label`` writes it,
``wanted_sparsity`` and ``distribution`` are compared with the zeros; and ``layers``, the sparsity of each by name."""


def verify(folder: str | Path) -> dict[str, Any]:
    """``compare`` a folder with its own record; ValueError if it has none. Holds one weight at a time."""
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise ValueError(
            f"{folder} has no {RECORD}, which says what its zeros should be: sparse-train prune, fit --export and "
            "export write it, and SparseTrainerCallback to its checkpoints."
        )
    with reading(folder / RECORD):
        record = json.loads((folder / RECORD).read_text())
        _recipe(record)
    checkpoint = Checkpoint(folder)
    return compare(record, checkpoint, model_without_weights(folder, checkpoint))


def _recipe(record: Mapping[str, Any]) -> tuple[Pattern | None, float | None, dict[str, float]]:
    """The pattern if it and the sparsity are the same in every layer, the sparsity, and that of each layer."""
    stage, layers = record["stages"][-1], {name: float(share) for name, share in record["layers"].items()}
    label, wanted = stage["mask_structure"], stage["wanted_sparsity"]
    known = re.fullmatch(r"\d+:\d+|unstructured|unstructured \(layer\)", label)  # not over the model, or a user's own
    alike = known and stage["distribution"] == "Uniform()"
    return parse_word(label.split()[0], "layer" if "(" in label else "row") if alike else None, wanted, layers


def compare(record: Mapping[str, Any], checkpoint: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """Compare the zeros of files with how they were made. A group may be sparser than that, and never denser.

    If all layers have one pattern and sparsity, every group is compared; otherwise each layer with its own sparsity,
    and all of them with that of the model. Of ``model``, only the modules are looked at, not their weights.

    Returns:
        How many ``layers``, their ``sparsity``, and ``zeros_kept``: zeros that no pattern asks for.

    Raises:
        ValueError: names each layer that is denser, what was expected and what was found.
    """
    shared, wanted, layers = _recipe(record)
    pattern = shared or Unstructured("layer")
    wrong, size, zeros, pruned, columns = [], 0, 0, 0, 1 << 62
    for name, weight_OI in _weights(checkpoint, model, layers):
        nonzero_OI = weight_OI != 0
        # half a weight more, so that rounding loses none
        sparsity = wanted if shared and wanted is not None else layers[name] + 0.5 / nonzero_OI.numel()
        # with itself as the scores, as in check_masks: a pattern drops a weight only if a group has too few zeros
        keep_OI = pattern.mask(nonzero_OI.float(), sparsity)
        expected, found = (int((~each).sum()) for each in (keep_OI, nonzero_OI))
        if dense := int((nonzero_OI & ~keep_OI).sum()):
            where = f"{name}: {group_label(pattern)} at a sparsity of {sparsity:.6g}"
            wrong.append(f"{where} has {expected} zeros; found {found}, and {dense} of the expected are missing")
        size, zeros, pruned = size + nonzero_OI.numel(), zeros + found, pruned + expected
        columns = min(columns, nonzero_OI.shape[1])
    if wanted is not None and zeros < (wanted - 1 / columns) * size:  # rows prune whole counts
        wrong.append(f"all {len(layers)} layers: expected a sparsity of {wanted:g}, found {zeros / size:.6g}")
    if wrong or not layers:
        some = "\n".join(wrong[:10]) + (f"\nand {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise ValueError(f"{checkpoint.folder} has not the zeros that {RECORD} says:\n{some or 'no layer is named'}")
    return {"layers": len(layers), "sparsity": zeros / size, "zeros_kept": zeros - pruned}


def _weights(checkpoint: Checkpoint, model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """These layers by name, one after the other, (O, I)."""
    experts = fused_experts(model)
    for name in names:
        own, _, index = name.partition("[")
        key = own if own in experts else f"{own}.weight"
        if key not in checkpoint.files:
            raise ValueError(
                f"{checkpoint.folder} has no tensor {key}, which {RECORD} names, or holds it under another name, as "
                "some models do with experts. Then load the model and look at sparse_train.summary(model)."
            )
        weight = checkpoint.read([key])[key]
        if own in experts:
            weight, transposed = weight[int(index.rstrip("]"))], experts[own].transposed
        else:
            transposed = is_conv1d(model.get_submodule(own))
        yield name, weight.t() if transposed else weight
