"""``sparse-train inspect``: sparsity by layer."""

from typing import Any

from sparse_train.cli.tables import show_inspection
from sparse_train.export.verify import verify as verify_folder
from sparse_train.inspection import layer_sparsities
from sparse_train.models.sources import ModelSource, Pretrained, as_model_source
from sparse_train.pruning.counts import sparsity_of


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
