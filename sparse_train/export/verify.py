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
"""How a model was pruned; ``stages`` and ``layers`` are compared with its zeros."""


def verify(folder: str | Path) -> dict[str, Any]:
    """``compare`` a folder with its own record; holds one weight at a time.

    Raises:
        ValueError: as ``compare`` does; or the folder has no record.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise ValueError(
            f"{folder} has no {RECORD}, which says what its zeros should be: sparse-train prune, fit --export and "
            "export write it, and SparseTrainerCallback to its checkpoints."
        )
    with reading(folder / RECORD):
        record = json.loads((folder / RECORD).read_text())
        stage, layers = record["stages"][-1], {name: float(share) for name, share in record["layers"].items()}
        _ = stage["mask_structure"], stage["wanted_sparsity"], stage["distribution"]
    checkpoint = Checkpoint(folder)
    return compare(stage, layers, checkpoint, model_without_weights(folder, checkpoint))


def compare(
    stage: Mapping[str, Any], layers: Mapping[str, float], checkpoint: Checkpoint, model: nn.Module
) -> dict[str, Any]:
    """Compare the zeros of files with how they were made. A group may be sparser than that, and never denser.

    Args:
        stage: ``mask_structure`` as ``group_label`` writes it, ``wanted_sparsity`` and ``distribution``. With Uniform,
            every group is compared with them.
        layers: the sparsity of each pruned layer. Where they differ, by the distribution or because groups are larger,
            each layer is compared with its own, and all together with ``wanted_sparsity``.
        checkpoint: the files.
        model: with the modules that the weights belong to, whose own weights are not looked at.

    Returns:
        ``layers``, ``sparsity`` of all of them, and ``zeros_kept``: zeros that no pattern asks for.

    Raises:
        ValueError: names each layer that is denser, what was expected and what was found.
    """
    label, wanted = stage["mask_structure"], stage["wanted_sparsity"]
    pattern: Pattern = Unstructured("layer")
    alike = stage["distribution"] == "Uniform()" and re.fullmatch(r"\d+:\d+|unstructured|unstructured \(layer\)", label)
    if alike:  # groups are not the whole model, nor those of a user's own pattern
        pattern = parse_word(label.partition(" ")[0], "layer" if "layer" in label else "row")
    wrong, size, zeros, pruned, columns = [], 0, 0, 0, 1 << 62
    for name, weight_OI in _weights(checkpoint, model, layers):
        nonzero_OI = weight_OI != 0
        sparsity = wanted if alike else layers[name] + 0.5 / nonzero_OI.numel()  # rounding must not lose a weight
        # with itself as the scores, as in check_masks: a pattern drops a weight only if a group has too few zeros
        keep_OI = pattern.mask(nonzero_OI.float(), sparsity)
        expected, found = (int((~each).sum()) for each in (keep_OI, nonzero_OI))
        if dense := int((nonzero_OI & ~keep_OI).sum()):
            where = f"{group_label(pattern)} at a sparsity of {sparsity:.6g}"
            wrong.append(
                f"{name}: {where} has {expected} zeros; found {found}, and {dense} of the expected are missing"
            )
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
            weight = weight[int(index.rstrip("]"))]
        transposed = experts[own].transposed if own in experts else is_conv1d(model.get_submodule(own))
        yield name, weight.t() if transposed else weight
