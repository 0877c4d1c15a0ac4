"""Export: a Hugging Face folder with true zeros, readable by plain ``AutoModelForCausalLM.from_pretrained``."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from sparse_train.checkpoints import read_checkpoint
from sparse_train.distributed import rank
from sparse_train.layers import MASK_NAME, sparsify_like, squash
from sparse_train.sharding import is_dtensor, is_zero3, whole_state_dict


def export_model(model: Any, tokenizer: Any | None, out: str | Path) -> Path:
    """Write a transformers model, masks folded in, and its tokenizer to a folder.

    Written beside and renamed: ``out`` is complete or absent. ``model`` itself is not changed. Where several processes
    run, rank 0 writes; a model that is sharded over them (FSDP2, ZeRO-3) is gathered, and all of them must call.

    Raises:
        ValueError: ``out`` exists and is not an empty folder.
    """
    out = Path(out)
    sharded = any(is_dtensor(parameter) or is_zero3(parameter) for parameter in model.parameters())
    state = whole_state_dict(model) if sharded else None
    if rank() != 0:
        return out
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(beside, state_dict=state)  # of a sparsified model: pruned weights as zeros
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if out.exists():
            out.rmdir()
        beside.chmod(0o755)
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return out


def export_checkpoint(checkpoint: str | Path, out: str | Path, tokenizer: Any | None = None) -> Path:
    """Export the model of a Lightning checkpoint that ``CausalLM`` wrote, masks folded in.

    Args:
        checkpoint: a file, or a folder that FSDP2 or DeepSpeed wrote, see ``sparse_train.checkpoints``.
        out: folder to write.
        tokenizer: is put beside the model.

    Raises:
        ValueError: no such checkpoint, or that of another LightningModule.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    content = read_checkpoint(checkpoint)
    if "model_config" not in content:
        raise ValueError(
            f"{checkpoint} was not written by sparse_train's CausalLM, so its architecture is not known. Load it into "
            "your own module, call sparse_train.squash(module), and save it as you save a dense model."
        )
    settings = dict(content["model_config"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    state = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    model = AutoModelForCausalLM.from_config(config)
    sparsify_like(model, state)
    model.load_state_dict(state)
    model.to(next(v for k, v in state.items() if not k.endswith(MASK_NAME)).dtype)
    squash(model)
    return export_model(model, tokenizer, out)


def check_free(out: Path) -> None:
    """Raise ValueError where ``out`` would be overwritten; call it before the work, not after."""
    if out.is_symlink() or out.is_mount():
        raise ValueError(
            f"{out} is a link or a mount point, which no finished folder can be renamed to. Choose another."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not an empty folder. Choose another, or remove it first.")
