"""``pruning.json``: what a run pruned; and the zeros of a folder, counted on its files, against it.

Shape suffixes: O out_features, I in_features.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_train.architecture import fused_experts, is_conv1d
from sparse_train.arguments import as_call
from sparse_train.files import reading
from sparse_train.layers.masked_layer import MaskedLayer
from sparse_train.model_folders import PRUNING_FILE, WeightFiles, model_without_weights, names_in_model
from sparse_train.patterns import Pattern, Unstructured, group_label, parse_word
from sparse_train.pruning.counts import mask_sparsities


def verify(folder: str | Path) -> dict[str, Any]:
    """``compare`` a folder with its own ``pruning.json``; ValueError if it has none. Holds one weight at a time.

    Compared are ``mask_structure`` (as ``group_label`` writes it), ``wanted_sparsity`` and ``distribution`` of the last
    of its ``stages``; and ``layers``, by name the share that the mask of a layer prunes.
    """
    folder = Path(folder)
    hint = " It says what zeros should be: prune, fit --export and export write it. Plain inspect needs none."
    with reading(folder / PRUNING_FILE, lambda: hint):
        pruning = json.loads((folder / PRUNING_FILE).read_text())
        _expected(pruning)
    checkpoint = WeightFiles(folder)
    return compare(pruning, checkpoint, model_without_weights(folder, checkpoint))


def pruning_json(
    settings: Mapping[str, Any], sparsity: float | None, layers: Mapping[str, MaskedLayer]
) -> dict[str, Any]:
    """What a run with these settings (``as_data``) prunes now, as ``pruning.json`` says it."""
    label, distribution = settings["mask_structure"], as_call(settings["distribution"])
    stage = {"mask_structure": label, "wanted_sparsity": sparsity or 0.0, "distribution": distribution}
    stage |= {name: as_call(settings[name]) for name in ("criterion", "policy", "first_mask")}
    # as verify reads them: of each row, or else of the whole layer
    return {
        "stages": [stage],
        "layers": mask_sparsities(layers, Unstructured("row" if label == "unstructured" else "layer")),
    }


def _expected(pruning: Mapping[str, Any]) -> tuple[Pattern, dict[str, float], float | None]:
    """The pattern within each layer, what it has in each, and the sparsity of the model where that says more."""
    # a little more, so that rounding loses no weight
    stage, layers = pruning["stages"][-1], {name: float(share) + 1e-10 for name, share in pruning["layers"].items()}
    label, wanted = stage["mask_structure"], stage["wanted_sparsity"]
    known = re.fullmatch(r"\d+:\d+|unstructured|unstructured \(layer\)", label)  # not over the model, or a user's own
    pattern = parse_word(label.split()[0], "layer" if "(" in label else "row") if known else Unstructured("layer")
    if known and stage["distribution"] == "Uniform()":
        layers, wanted = dict.fromkeys(layers, wanted), None  # each is compared with it; N:M goes through whole counts
    return pattern, layers, wanted


def compare(pruning: Mapping[str, Any], checkpoint: WeightFiles, model: nn.Module) -> dict[str, Any]:
    """Compare the zeros of files with how they were made. A group may be sparser than that, and never denser.

    Every row, group of M or layer is compared with the sparsity of its layer, and all layers with that of the model.
    Of ``model``, only the modules are looked at, not their weights.

    Returns:
        How many ``layers``, their ``sparsity``, and ``zeros_kept``: zeros that no pattern asks for.

    Raises:
        ValueError: names each layer that is denser, what was expected and what was found.
    """
    pattern, shares, wanted = _expected(pruning)
    wrong, size, found, expected, rounding = [], 0, 0, 0, 0.0
    for name, weight_OI in _weights(checkpoint, model, shares):
        nonzero_OI = weight_OI != 0
        # with itself as the scores, as in misfitting_layer: a pattern drops a weight only if a group has too few zeros
        keep_OI = pattern.mask(nonzero_OI.float(), shares[name])
        own, zeros, missing = (int(each.sum()) for each in (~keep_OI, ~nonzero_OI, nonzero_OI & ~keep_OI))
        if missing:
            wrong.append(
                f"{name}: {group_label(pattern)} at a sparsity of {shares[name]:.6g} has {own} zeros; found {zeros}, "
                f"and {missing} of the expected are missing"
            )
        size, found, expected = size + weight_OI.numel(), found + zeros, expected + own
        rounding = max(rounding, 1 / weight_OI.shape[1])  # rows prune whole counts
    if wanted is not None and found < (wanted - rounding) * size:
        wrong.append(f"all {len(shares)} layers: expected a sparsity of {wanted:g}, found {found / size:.6g}")
    if wrong or not shares:
        some = "\n".join(wrong[:10]) + (f"\nand {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise ValueError(
            f"{checkpoint.folder} does not have the zeros that {PRUNING_FILE} describes:\n{some or 'no layer is named'}"
        )
    return {"layers": len(shares), "sparsity": found / size, "zeros_kept": found - expected}


def _weights(checkpoint: WeightFiles, model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """These layers by name, one after the other, (O, I)."""
    experts = fused_experts(model)
    keys = {name: key for key, name in names_in_model(model, checkpoint.files, converted=False).items()}
    for name in names:
        own, _, index = name.partition("[")
        stored = own if own in experts else f"{own}.weight"
        if stored not in keys:
            raise ValueError(
                f"{checkpoint.folder} has no tensor {stored}, which {PRUNING_FILE} names, or holds it in other parts, "
                "as some models do with experts. Then load the model and look at sparse_train.summary(model)."
            )
        weight = checkpoint.read([keys[stored]])[keys[stored]]
        if own in experts:
            weight, transposed = weight[int(index.rstrip("]"))], experts[own].transposed
        else:
            transposed = is_conv1d(model.get_submodule(own))
        yield name, weight.t() if transposed else weight
