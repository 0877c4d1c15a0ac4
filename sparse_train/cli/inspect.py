"""``sparse-train inspect``: sparsity by layer."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich import get_console

from sparse_train.export.verify import verify as verify_folder
from sparse_train.inspection import LayerSparsity, layer_sparsities, pruned_layers
from sparse_train.models.sources import ModelSource, Pretrained, as_model_source
from sparse_train.patterns import PRUNED
from sparse_train.pruning.counts import sparsity_of
from sparse_train.terminal import print_table


def inspect(model: ModelSource | str, verify: bool = False) -> dict[str, Any]:
    """Sparsity and pattern of the linear layers, their size on disk, and whether 2:4 hardware could run it.

    All numbers are counted on the weights, in the dtype that they have on disk.

    Args:
        model: Hugging Face id, local folder, or a model source (whose dtype is then used).
        verify: instead, compare the zeros of the files, group by group, with how the folder says that it was pruned
            (pruning.json); a difference is an error. Holds one weight at a time.
    """
    source = as_model_source(model, dtype="auto")
    if verify:
        if not isinstance(source, Pretrained):
            raise ValueError(f"verify reads a folder or a hub model with safetensors, not {source.name}.")
        counted = verify_folder(source.folder())
        print(f"{source.name}: every group of its {counted['layers']} pruned layers has the zeros that it should have.")
        print(f"sparsity {counted['sparsity']:.6f}; {counted['zeros_kept']} zeros more than asked for")
        return {"model": source.name, **counted}
    loaded = source.load()
    layers = layer_sparsities(loaded)
    model_bytes = sum(parameter.numel() * parameter.dtype.itemsize for parameter in loaded.parameters())
    show_inspection(source.name, layers, model_bytes)
    return {
        "model": source.name,
        "sparsity": sparsity_of(layers),
        "dense_bytes": sum(layer.dense_bytes for layer in layers),
        "model_bytes": model_bytes,
        "layers": [layer.as_dict() for layer in layers],
    }


def show_inspection(name: str, layers: Sequence[LayerSparsity], model_bytes: int) -> None:
    """Sparsity and size of layers, and whether their zeros and shape fit 2:4 hardware; then why pruned ones do not.

    Layers of different blocks that are alike share a row. ``model_bytes`` are those of all parameters, each counted
    once.
    """

    def row(label: str, shape: str, own: Sequence[LayerSparsity], pattern: str, able: str) -> list[str]:
        size = sum(layer.dense_bytes for layer in own)
        return [label, shape, str(len(own)), f"{sparsity_of(own):.4f}", pattern, f"{size / 1e6:.2f}", able]

    def total(label: str, own: Sequence[LayerSparsity]) -> list[str]:
        return row(label, "", own, "", f"{sum(layer.misfit_2of4 is None for layer in own)}/{len(own)}")

    sparse = pruned_layers(layers)
    alike, reasons = defaultdict[Any, list[LayerSparsity]](list), defaultdict[str, list[str]](list)
    for layer in layers:
        able = "no" if layer.misfit_2of4 else "yes"
        alike[re.sub(r"\.\d+\.", ".*.", layer.name), layer.shape, layer.pattern, able].append(layer)
        if (why_not := layer.why_not_2of4) and layer.sparsity > PRUNED:
            reasons[f"does not fit 2:4, {why_not}" if layer.misfit_2of4 else f"fits 2:4; {why_not}"].append(layer.name)
    rows = [
        row(name if len(own) > 1 else own[0].name, " x ".join(map(str, shape)), own, pattern, able)
        for (name, shape, pattern, able), own in alike.items()
    ]
    if 0 < len(sparse) < len(layers):
        rows.append(total("pruned layers", sparse))
    rows += [total("all linear layers", layers), ["the whole model", "", "", "", "", f"{model_bytes / 1e6:.2f}", ""]]
    print_table([name, "shape", "layers", "sparsity", "pattern", "MB", "fits 2:4"], rows, words=(0, 1, 4))
    for reason, names in reasons.items():
        some = ", ".join([*names[:3], f"and {len(names) - 3} more"] if len(names) > 4 else names)
        get_console().print(f"{reason}: {some}", soft_wrap=True, highlight=False, markup=False)
