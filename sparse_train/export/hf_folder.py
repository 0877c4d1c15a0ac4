"""Export: a Hugging Face folder with true zeros, readable by plain ``AutoModelForCausalLM.from_pretrained``."""

import logging
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from sparse_train.distributed import rank
from sparse_train.export.card import ModelCard, training_rows, write_card
from sparse_train.files import written_whole
from sparse_train.inspection import layer_sparsities
from sparse_train.layers.sharding import is_dtensor, is_zero3, whole_state_dict
from sparse_train.layers.sparsify import sparsify_like, squash
from sparse_train.models import lora
from sparse_train.models.checkpoints import PRUNING_STATE, read_checkpoint

_log = logging.getLogger(__name__)


def export_model(model: Any, tokenizer: Any | None, out: str | Path, card: ModelCard | None = None) -> Path:
    """Write a transformers model with its masks folded in, its tokenizer and its model card to a folder.

    For a peft model, the base is written with its original names, and the adapter to ``adapter/`` inside the folder,
    because their sum would be dense.

    The folder is first written under another name and then renamed, so ``out`` is complete or absent. ``model`` itself
    is not changed. With several processes, rank 0 writes; a model that is sharded over them (FSDP2, ZeRO-3) is
    gathered, and all of them must call. ``card`` has what cannot be counted on the weights.

    Raises:
        ValueError: ``out`` exists and is not an empty folder.
    """
    out = Path(out)
    sharded = any(is_dtensor(parameter) or is_zero3(parameter) for parameter in model.parameters())
    state = whole_state_dict(model) if sharded else None
    if rank() != 0:
        return out
    card = card or ModelCard()
    with written_whole(out) as beside:
        # layers first: save_pretrained takes tied names out of the state dict
        if lora.is_peft(model):
            base_state, layers = lora.base_of(model, state)
            card = replace(card, made={**card.made, "adapter": lora.card_row(model)})
            model.get_base_model().save_pretrained(beside, state_dict=base_state)
            _save_adapter(model, beside / lora.FOLDER, state, out)
        else:
            layers = layer_sparsities(model, state)
            model.save_pretrained(beside, state_dict=state)  # for a sparsified model, pruned weights become zeros
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        write_card(beside, card, layers)
    return out


def _save_adapter(model: Any, folder: Path, state: Any, base: Path) -> None:
    config = lora.active_config(model)
    before, config.base_model_name_or_path = config.base_model_name_or_path, str(base)  # not what the base was made of
    try:
        # embeddings belong to the base; otherwise peft would ask the hub
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = before


def export_checkpoint(checkpoint: str | Path, out: str | Path, tokenizer: Any | None = None) -> Path:
    """Export the model of a Lightning checkpoint that ``CausalLM`` wrote, masks folded in.

    Args:
        checkpoint: a file, or a folder that FSDP2 or DeepSpeed wrote, see ``sparse_train.models.checkpoints``.
        out: folder to write.
        tokenizer: saved with the model.

    Raises:
        ValueError: no such checkpoint, or one of another LightningModule.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    content = read_checkpoint(checkpoint)
    if "model_config" not in content:
        raise ValueError(
            f"{checkpoint} was not written by sparse_train's CausalLM, so its architecture is not known. Load it into "
            "your module, call sparse_train.squash(module), and save it like a dense model."
        )
    settings = dict(content["model_config"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    state = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    model = AutoModelForCausalLM.from_config(config)
    if content.get("generation_config"):
        model.generation_config = GenerationConfig.from_dict(content["generation_config"])
    if content.get("adapter_config"):
        model = lora.wrap(model, content["adapter_config"])
    sparsify_like(model, state)
    model.load_state_dict(state)
    squash(model)  # before weights are converted to their dtype: factors of adapters may have a higher precision
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    return export_model(model, tokenizer, out, _card_of(content))


def _card_of(content: dict[str, Any]) -> ModelCard:
    state = content.get("callbacks", {}).get(PRUNING_STATE)
    rises = state and not state["settings"]["schedule"].startswith("Constant")
    if rises and state["steps"] < state["timing"]["end_step"]:
        _log.warning(
            "The checkpoint was written after %d steps, at a sparsity of %g: its schedule is %s and ends at step %d.",
            state["steps"],
            state["target"] or 0.0,
            state["settings"]["schedule"],
            state["timing"]["end_step"],
        )
    made = training_rows(state["settings"], state["timing"], state["steps"]) if state else {}
    source = content.get("model_source", {})
    return ModelCard(source.get("name"), source.get("hub_id"), source.get("license"), made=made)
