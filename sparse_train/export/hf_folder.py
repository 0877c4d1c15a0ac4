"""Export: a Hugging Face folder with true zeros, readable by plain ``AutoModelForCausalLM.from_pretrained``."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from sparse_train.architecture import numel
from sparse_train.distributed.collectives import rank
from sparse_train.distributed.engines import layout_of, whole_state_dict
from sparse_train.export.card import ModelCard, training_rows, write_card
from sparse_train.export.verify import compare, pruning_json
from sparse_train.files import reading, write_json, written_whole
from sparse_train.inspection import LayerSparsity, layer_sparsities
from sparse_train.layers.masked_layer import sparse_layers
from sparse_train.layers.sparsify import sparsify_like, squash
from sparse_train.layers.state_dicts import folded_state_dict
from sparse_train.model_folders import PRUNING_FILE, WeightFiles, copy_others, names_in_model
from sparse_train.models import lora
from sparse_train.models.checkpoints import PRUNING_STATE, read_checkpoint
from sparse_train.models.sources import PackagedSmolLM2, Pretrained
from sparse_train.pruning.resuming import check_restored_masks

_log = logging.getLogger(__name__)


def export_model(
    model: Any,
    tokenizer: Any | None,
    out: str | Path,
    card: ModelCard | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a transformers model with its masks folded in, its tokenizer and its model card to a folder.

    Of a peft model, the adapter goes to ``adapter/`` inside the folder, because its sum with the base would be dense.
    ``out`` is complete or absent, and ``model`` is not changed. With several processes, rank 0 writes; a model that is
    sharded over them (FSDP2, ZeRO-3) is gathered, and all of them must call.

    Args:
        model: a model of transformers, masked or squashed, or a ``PeftModel`` around one.
        tokenizer: saved with the model; None = the folder has none.
        out: folder to write.
        card: what cannot be counted on the weights.
        dtype: of the weights that are written (adapters keep theirs). Default: that of the files that the model was
            loaded from, if it has 16 bits and the model more, as in training; otherwise weights stay as they are.

    Raises:
        ValueError: ``out`` exists and is not an empty folder, weights are not finite or too large for ``dtype``, or the
            files do not hold the zeros of the model, or of the run (``card.pruning``).
    """
    out = Path(out)
    sharded = any(layout_of(parameter).is_sharded for parameter in model.parameters())
    state = whole_state_dict(model) if sharded else model.state_dict()
    if rank() != 0:
        return out
    card, dtype = card or ModelCard(), dtype or _narrower_dtype_of_files(model)
    if any(layer.has_factors for layer in sparse_layers(model).values()):
        state = folded_state_dict(model, state)  # before the conversion: factors are summed in their own precision
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} has weights that are infinite or NaN. Did the loss diverge?")
    written = state if dtype is None else _in_dtype(state, dtype)
    with written_whole(out) as beside:
        # layers first: save_pretrained takes tied names out of the state dict
        if lora.is_peft(model):
            base = model.get_base_model()
            base_state, layers = lora.base_of(model, written)
            card = replace(card, made={**card.made, "adapter": lora.card_row(model)})
            base.save_pretrained(beside, state_dict=base_state)
            _save_adapter(model, beside / lora.FOLDER, state, out)
        else:
            base, layers = model, layer_sparsities(model, written)
            model.save_pretrained(beside, state_dict=written)  # for a sparsified model, pruned weights become zeros
        check_written(beside, layers, base)
        if dtype is not None:  # save_pretrained has written that of the model in memory
            config = copy.deepcopy(base.config)
            config.dtype = dtype
            config.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if base.name_or_path and Path(base.name_or_path).is_dir():
            copy_others(Path(base.name_or_path), beside)
        write_card(beside, card, layers)
        if card.pruning is not None:
            pruning = {**card.pruning, "stages": [*card.stages, *card.pruning["stages"]]}
            write_json(beside / PRUNING_FILE, pruning)
            compare(pruning, WeightFiles(beside), base)
    return out


def renamed(pruning: Mapping[str, Any]) -> dict[str, Any]:
    """The ``pruning_json`` of a run of ``CausalLM`` with the names that layers have in its exported model."""
    return {**pruning, "layers": {lora.bare(n.removeprefix("model.")): share for n, share in pruning["layers"].items()}}


def check_written(folder: Path, layers: Sequence[LayerSparsity], model: Any) -> None:
    """Count the zeros of the files again; ValueError if they are not those that the card states."""
    checkpoint, counted = WeightFiles(folder), {f"{layer.name}.weight": layer.zeros for layer in layers}
    names = names_in_model(model, checkpoint.files, converted=False)
    for key in (key for key, name in names.items() if name in counted):  # tied weights and fused experts are not
        weight, file = checkpoint.read([key])[key], checkpoint.files[key]
        if (zeros := weight.numel() - int(weight.count_nonzero())) != counted[names[key]]:
            raise ValueError(f"{key} has {zeros} zeros in {file.name}, and {counted[names[key]]} in the model.")


def size_of(model: Any, dtype: torch.dtype | None) -> int:
    """Bytes that ``export_model`` will write, about."""
    dtype = dtype or _narrower_dtype_of_files(model)
    return sum(numel(weight) * (dtype or weight.dtype).itemsize for weight in model.parameters())


def _narrower_dtype_of_files(model: Any) -> torch.dtype | None:
    """The dtype of the files that a model was loaded from, if it has 16 bits and the model has more; otherwise None."""
    from transformers import AutoConfig

    if not model.name_or_path or model.dtype.itemsize <= 2:
        return None
    try:
        stored = AutoConfig.from_pretrained(model.name_or_path, local_files_only=True, trust_remote_code=False).dtype
    except (OSError, ValueError):  # they are no longer here, or never were
        return None
    return stored if stored in (torch.bfloat16, torch.float16) else None


def _in_dtype(state: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A state dict with its float tensors in ``dtype``; tied weights stay tied."""
    written, converted = dict(state), {}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != dtype:
            place = (tensor.data_ptr(), tensor.shape)  # save_pretrained recognises tied weights by their memory
            if place not in converted:
                converted[place] = tensor.to(dtype)
            written[name] = converted[place]
            if not written[name].isfinite().all():
                raise ValueError(f"{name} has weights that are too large for {dtype}. Export with dtype=torch.float32.")
    return written


def _save_adapter(model: Any, folder: Path, state: Any, base: Path) -> None:
    config = lora.active_config(model)
    before, config.base_model_name_or_path = config.base_model_name_or_path, str(base)  # not what the base was made of
    try:
        # embeddings belong to the base; otherwise peft would ask the hub
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = before


def export_checkpoint(
    checkpoint: str | Path, out: str | Path, tokenizer: Any | None = None, *, dtype: torch.dtype | None = None
) -> Path:
    """Export the model of a Lightning checkpoint that ``CausalLM`` wrote, masks folded in.

    Args:
        checkpoint: a file, or a folder that FSDP2 or DeepSpeed wrote.
        out: folder to write.
        tokenizer: saved with the model; default: that of the model that the run began with, if it can be read here.
        dtype: as for ``export_model``; the model's files are those that the run began with.

    Raises:
        ValueError: no such checkpoint, or one of another LightningModule.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    content = read_checkpoint(checkpoint)
    if "model_config" not in content:
        raise ValueError(
            f"{checkpoint} was not written by sparse_train's CausalLM, so its architecture is not known. In Python, "
            "load it with sparse_train.load_from_checkpoint(YourModule, checkpoint), call sparse_train.squash(module), "
            "and save it like a dense model."
        )
    with reading(checkpoint):
        settings, source, card = dict(content["model_config"]), content.get("model_source", {}), _card_of(content)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        state = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
        model = AutoModelForCausalLM.from_config(config)
        if content.get("generation_config"):
            model.generation_config = GenerationConfig.from_dict(content["generation_config"])
        if content.get("adapter_config"):
            model = lora.wrap(model, content["adapter_config"])
        sparsify_like(model, state)
        model.load_state_dict(state)
        if run := content.get("callbacks", {}).get(PRUNING_STATE):
            layers = {f"model.{name}": layer for name, layer in sparse_layers(model).items()}
            check_restored_masks(run["masks"], layers, run["sparsity"])
            card = replace(card, pruning=renamed(pruning_json(run["settings"], run["sparsity"], layers)))
    squash(model)  # before weights are converted to their dtype: factors of adapters may have a higher precision
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)
    model.name_or_path = source.get("name", "")
    return export_model(model, tokenizer or _tokenizer_of(source), out, card, dtype=dtype)


def _tokenizer_of(source: Mapping[str, Any]) -> Any | None:
    """The tokenizer of the model that a run began with; None, with a warning, if it cannot be read here."""
    name = source.get("name", "")
    try:
        if name == PackagedSmolLM2().name:
            return PackagedSmolLM2().tokenizer()
        if name.endswith(".gguf"):
            return Pretrained(str(Path(name).parent), gguf_file=Path(name).name).tokenizer()
        return Pretrained(name).tokenizer()
    except (OSError, ValueError) as error:
        _log.warning("The exported folder has no tokenizer, because that of %s cannot be read here: %s", name, error)
        return None


def _card_of(content: Mapping[str, Any]) -> ModelCard:
    """From what ``CausalLM`` and ``DynamicPruning`` have stored; warns if the sparsity was still rising."""
    source, state = content.get("model_source", {}), content.get("callbacks", {}).get(PRUNING_STATE)
    made = training_rows(state["settings"], state["timing"], state["steps"]) if state else {}
    if state and (state["sparsity"] or 0.0) < made["sparsity"]:
        _log.warning(
            "The checkpoint was written after %d steps, at a sparsity of %g: it rises to %g until step %d.",
            *(state["steps"], state["sparsity"] or 0.0, made["sparsity"], state["timing"]["end_step"]),
        )
    name, stages = source.get("name"), source.get("stages", ())
    return ModelCard(name, source.get("hub_id"), source.get("license"), made=made, stages=stages)
