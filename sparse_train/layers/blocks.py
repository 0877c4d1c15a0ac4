"""The parts of a model: blocks, routers, fused experts. Found from its modules, independent of the architecture."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparse_train.layers.matrices import is_linear, shape_OI


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost ``nn.ModuleList``s of composite modules, by name, largest first; for any architecture."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(_is_block, module)):
            found[name] = module
    return dict(sorted(found.items(), key=lambda item: -_size(item[1])))


def unambiguous_blocks(model: nn.Module) -> str | None:
    """The name of the list of blocks; None if there is none. Raises ValueError if several are about equally large."""
    found = block_lists(model)
    trainable = {name: blocks for name, blocks in found.items() if any(p.requires_grad for p in blocks.parameters())}
    found = trainable or found  # a frozen model next to one in training is its teacher or reference
    if not found:
        return None
    first, *others = found
    rivals = [name for name in others if 10 * _size(found[name]) > _size(found[first])]
    if rivals:
        raise ValueError(
            f"The model has several lists of blocks ({', '.join([first, *rivals])}), and it is not clear which are "
            f"to be pruned. Name them: targets=[{first!r}], or all of them."
        )
    return first


def reads_two_texts(model: nn.Module, layers: Iterable[Any]) -> bool:
    """Whether any of ``layers`` is part of an encoder-decoder model, whose batches have a mask for one of two texts."""
    wanted = set(layers)
    found = (m for m in model.modules() if getattr(getattr(m, "config", None), "is_encoder_decoder", False) is True)
    return any(wanted & set(module.modules()) for module in found)


ONE_OF_TWO_TEXTS = "(tokens of the other text, I)"
"""Which inputs the attention mask of such a batch does not fit."""


def vocabulary_of(model: nn.Module) -> int | None:
    """How many token ids a transformers model has embeddings for; None if that is not known."""
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        return None
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    except NotImplementedError:  # a model whose code is not that of transformers
        return None


def _is_block(module: nn.Module) -> bool:
    composite = next(module.children(), None) is not None
    return composite and any(dimensions(parameter) >= 2 for parameter in module.parameters())


@dataclass(frozen=True)
class FusedExperts:
    """The weights of all experts of a Mixture-of-Experts block in one parameter."""

    parameter: nn.Parameter
    """(E, O, I), or (E, I, O) if ``transposed``."""
    transposed: bool


def fused_experts(model: nn.Module) -> dict[str, FusedExperts]:
    """Three-dimensional parameters, as transformers stores experts; their modules say whether they are transposed."""
    found = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            # experts' modules in transformers say how weights are stored; in others, three dimensions mean nothing
            if dimensions(parameter) == 3 and "bias" not in own and hasattr(module, "is_transposed"):
                found[f"{name}.{own}"] = FusedExperts(parameter, bool(module.is_transposed))
    return found


def expert_shape_OI(experts: FusedExperts) -> tuple[int, int]:
    """``(out_features, in_features)`` of one expert's matrix."""
    _, rows, columns = experts.parameter.shape
    return (columns, rows) if experts.transposed else (rows, columns)


def is_router(module: nn.Module) -> bool:
    """Whether its class is one that chooses experts."""
    # its few weights decide which experts run; every method leaves it dense, at almost no loss of sparsity
    return re.search("Router|Gate$|Gating$", type(module).__name__) is not None


def router_names(model: nn.Module, blocks: str) -> set[str]:
    """Linear layers of blocks that decide which experts run, or (with a single output) how much one counts."""
    of_routers = {
        part for module in model.get_submodule(blocks).modules() if is_router(module) for part in module.modules()
    }
    found = set()
    for name, module in model.named_modules():
        if is_linear(module):
            outputs, inputs = shape_OI(module)
            # a router has fewer outputs than inputs; the gate of a SwiGLU has as many outputs as the layer it gates
            routes = module in of_routers and outputs < inputs
            if routes or "router" in name.rpartition(".")[2] or outputs == 1:
                found.add(name)
    return found


def read_directly(model: nn.Module, blocks: str) -> set[str]:
    """Linear layers of Mamba blocks whose weight the block multiplies with itself, so that a mask has no effect."""
    return {
        name
        for name, module in model.named_modules()
        if name.startswith(f"{blocks}.") and name.endswith(".dt_proj") and is_linear(module)
    }


def _size(module: nn.Module) -> int:
    return sum(map(numel, module.parameters()))


def numel(parameter: nn.Parameter) -> int:
    """Number of elements of the whole parameter: ZeRO-3 leaves an empty tensor in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def dimensions(parameter: nn.Parameter) -> int:
    """Number of dimensions of the whole parameter: ZeRO-3 leaves an empty tensor of one dimension in its place."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
