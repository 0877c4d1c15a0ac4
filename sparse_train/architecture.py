"""The parts of a model, found from its modules alone: linear layers, decoder blocks, routers, fused experts.

Shape suffixes: E experts, O out_features, I in_features.
"""

import functools
import inspect
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

CONV1D = "transformers.pytorch_utils.Conv1D"


# --- linear layers ---------------------------------------------------------------------------------------------------


def class_path(cls: type) -> str:
    """Module and name, which together identify classes of libraries that are not imported here."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored (I, O)."""
    return any(class_path(cls) == CONV1D for cls in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear``, also a subclass, or transformers' ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def shape_OI(module: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear layer or a ``Conv1D``, also if its weight is sharded."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return int(module.nf), int(module.nx)  # type: ignore[arg-type]


def numel(parameter: nn.Parameter) -> int:
    """Number of elements of the whole parameter: ZeRO-3 leaves an empty tensor in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def dimensions(parameter: nn.Parameter) -> int:
    """Number of dimensions of the whole parameter: ZeRO-3 leaves an empty tensor of one dimension in its place."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def transformers_models(root: nn.Module, layers: Iterable[Any]) -> list[nn.Module]:
    """The transformers models in ``root`` that hold all of ``layers``, the outermost first."""
    wanted = set(layers)
    pretrained = (each for each in root.modules() if any(c.__name__ == "PreTrainedModel" for c in type(each).__mro__))
    return [module for module in pretrained if wanted <= set(module.modules())]


# --- decoder blocks --------------------------------------------------------------------------------------------------


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost ``nn.ModuleList``s of composite modules, by name, largest first; for any architecture."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(_is_block, module)):
            lists[name] = module
    return dict(sorted(lists.items(), key=lambda item: -_size(item[1])))


def all_blocks(model: nn.Module) -> list[nn.Module]:
    return [block for blocks in block_lists(model).values() for block in blocks]


def _is_block(module: nn.Module) -> bool:
    composite = next(module.children(), None) is not None
    return composite and any(dimensions(parameter) >= 2 for parameter in module.parameters())


def _size(module: nn.Module) -> int:
    return sum(map(numel, module.parameters()))


def unambiguous_blocks(model: nn.Module) -> str | None:
    """The name of the list of blocks; None if there is none. Raises ValueError if several are about equally large.

    Frozen blocks beside layers in training are those of a teacher or a reference, and do not count.
    """
    lists, adapted = block_lists(model), _with_adapters(model)
    trained = {name: blocks for name, blocks in lists.items() if _trains(blocks) or name.startswith(adapted)}
    if not trained and any(is_linear(module) and _trains(module) for module in model.modules()):
        return None
    lists = trained or lists
    if not lists:
        return None
    first, *others = lists
    rivals = [name for name in others if 10 * _size(lists[name]) > _size(lists[first])]
    if rivals:
        raise ValueError(
            f"The model has several lists of blocks ({', '.join([first, *rivals])}), and it is not clear which are "
            f"to be pruned. Name them: targets=[{first!r}], or all of them."
        )
    return first


def frozen_linears(model: nn.Module) -> set[str]:
    """Linear layers that are frozen beside others in training, such as those of a teacher; none if all are frozen.

    A list of blocks is frozen or in training as a whole, and so is a model of peft, in which adapters are trained.
    """
    adapted, frozen, others = _with_adapters(model), set(), False
    lists = {f"{name}.": _trains(blocks) for name, blocks in block_lists(model).items()}
    for name, module in model.named_modules():
        if is_linear(module):
            outer = next((each for each in lists if name.startswith(each)), None)
            if name.startswith(adapted) or (lists[outer] if outer else _trains(module)):
                others = True
            else:
                frozen.add(name)
    return frozen if others else set()


def _with_adapters(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names in models of peft that are in training."""
    wrapped = ((name, module) for name, module in model.named_modules() if hasattr(module, "peft_config"))
    return tuple(f"{name}." if name else "" for name, module in wrapped if _trains(module))


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def decoder_blocks(model: nn.Module, layers: Iterable[Any]) -> list[nn.Module]:
    """The list of blocks that holds most of ``layers``, modules or parameters of the model; empty if none holds any."""
    wanted, most = set(map(id, layers)), 0
    chosen: list[nn.Module] = []
    for blocks in block_lists(model).values():
        held = sum(id(part) in wanted for block in blocks for part in (*block.modules(), *block.parameters()))
        if held > most:
            chosen, most = list(blocks), held
    return chosen


# --- experts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FusedExperts:
    """The weights of all experts of a Mixture-of-Experts block in one parameter."""

    parameter: nn.Parameter
    """(E, O, I), or (E, I, O) if ``transposed``."""
    transposed: bool

    @property
    def shape_OI(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of one expert's matrix."""
        _, rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)


def fused_experts(model: nn.Module) -> dict[str, FusedExperts]:
    """Three-dimensional parameters, as transformers stores experts; their modules say whether they are transposed."""
    experts = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            # experts' modules in transformers say how weights are stored; in others, three dimensions mean nothing
            if dimensions(parameter) == 3 and "bias" not in own and hasattr(module, "is_transposed"):
                experts[f"{name}.{own}"] = FusedExperts(parameter, bool(module.is_transposed))
    return experts


def is_router(module: nn.Module) -> bool:
    """Whether its class is one that chooses experts."""
    # its few weights decide which experts run; every method leaves it dense, at almost no loss of sparsity
    return re.search("Router|Gate$|Gating$", type(module).__name__) is not None


def router_names(model: nn.Module, blocks: str) -> set[str]:
    """Linear layers of blocks that decide which experts run, or (with a single output) how much one counts."""
    inside = set(model.get_submodule(blocks).modules())
    of_routers = {part for module in inside if is_router(module) for part in module.modules()}
    routers = set()
    for name, module in model.named_modules():
        if module in inside and is_linear(module):
            outputs, inputs = shape_OI(module)
            # a router has fewer outputs than inputs; the gate of a SwiGLU has as many outputs as the layer it gates
            parent, _, own = name.rpartition(".")
            beside_experts = own == "gate" and hasattr(model.get_submodule(parent), "experts")
            routes = (module in of_routers or beside_experts) and outputs < inputs
            if routes or "router" in own or outputs == 1:
                routers.add(name)
    return routers


def read_directly(model: nn.Module) -> set[str]:
    """Linear layers whose weight the module around them reads, so that a mask has no effect: in attention, Mamba."""
    in_attention = {
        inner
        for name, outer in model.named_modules()
        if isinstance(outer, nn.MultiheadAttention)
        for inner, module in outer.named_modules(prefix=name)
        if is_linear(module)
    }
    # mixers of Mamba and its kin give weights to kernels, some of them in training alone; others call all their layers
    mixers = {name: module for name, module in model.named_modules() if "A_log" in module._parameters}
    sources = {name: _own_source(mixer.__class__) for name, mixer in mixers.items()}
    inside = [(name, own) for name, mixer in mixers.items() for own, part in mixer.named_children() if is_linear(part)]
    # without any source, each of them may be read
    return in_attention | {f"{n}.{own}" for n, own in inside if not sources[n] or f"self.{own}.weight" in sources[n]}


@functools.cache
def _own_source(cls: Any) -> str:
    """The code of a module's classes, as far as it is known: some are made at run time, as by FSDP2."""
    sources = []
    for each in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        with suppress(OSError, TypeError):
            sources.append(inspect.getsource(each))
    return "".join(sources)
