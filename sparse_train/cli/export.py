"""``sparse-train export``: the model of a training checkpoint as a Hugging Face folder."""

from pathlib import Path
from typing import Any

from sparse_train.export import export_checkpoint
from sparse_train.models.checkpoints import newest_checkpoint
from sparse_train.models.sources import Dtype, ModelSource, as_model_source, torch_dtype


def export(
    checkpoint: str,
    out: str,
    tokenizer: ModelSource | str | None = None,
    dtype: Dtype | None = None,
) -> dict[str, Any]:
    """Write the model of a training checkpoint as a Hugging Face folder with true zeros.

    Args:
        checkpoint: file, or folder of FSDP2 or DeepSpeed, that ``sparse-train fit`` wrote; or the folder of a run, of
            which the newest is taken.
        out: folder to write; must not exist.
        tokenizer: model source, Hugging Face id or folder whose tokenizer is saved with the model; default: that of
            the model that the run began with.
        dtype: of the written weights; default: that of the files that the run began with.
    """
    if any(Path(checkpoint).rglob("*.ckpt")):  # not inside a checkpoint
        checkpoint = str(newest_checkpoint(checkpoint))
    loaded = None if tokenizer is None else as_model_source(tokenizer).tokenizer()
    folder = export_checkpoint(checkpoint, out, loaded, dtype=torch_dtype(dtype))
    print(f"{checkpoint} exported to {folder}")
    return {"out": str(folder), "checkpoint": checkpoint}
