"""Which layers are pruned: the linear layers of the decoder blocks unless told otherwise."""

import difflib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from sparse_train.matrices import is_conv1d, shape_OI
from sparse_train.patterns import Pattern

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FusedExperts:
    """The weights of all experts of a Mixture-of-Experts block in one parameter."""

    parameter: nn.Parameter
    """(E, O, I), or (E, I, O) where ``transposed``."""
    transposed: bool


@dataclass(frozen=True)
class Selection:
    """What was chosen, and what of the decoder blocks could not be."""

    layers: dict[str, nn.Module]
    """Targets by name, in the model's order: ``nn.Linear`` or transformers' ``Conv1D``."""
    experts: dict[str, FusedExperts] = field(default_factory=dict)
    """Fused experts of Mixture-of-Experts blocks by parameter name. One-shot pruning reaches them;
    a mask in training does not."""
    untargetable: dict[str, int] = field(default_factory=dict)
    """Other weights of blocks that no mask can reach: parameter name -> count. They stay dense."""


def select(
    model: nn.Module,
    pattern: Pattern,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    *,
    experts: bool = False,
) -> Selection:
    """Choose the layers to prune.

    Args:
        model: any module; nothing is changed.
        pattern: layers must fit it.
        targets: names of modules, class names such as "Linear", or "re:" and a regular expression matched from the
            start of the name (as in llm-compressor). Default: the linear layers of the decoder blocks but for routers
            and gates of experts; in a model without blocks, all linear layers but the last one and those with tied
            weights.
        ignore: the same three forms; takes layers out again.
        experts: choose fused experts too (one-shot pruning); otherwise they count as untargetable.

    Raises:
        ValueError: nothing chosen, a name that matches nothing, or a chosen layer that cannot be masked (see
            ``_check_maskable``) or does not fit the pattern.
    """
    linears = [name for name, module in model.named_modules() if _is_linear(module)]
    adapters = adapter_names(model)
    tied = _tied_names(model)
    blocks = _unambiguous_blocks(model) if targets is None else None
    fused = fused_experts(model) if experts else {}
    ignored = set(_match(model, ignore, "ignore", fused))
    lenient = False
    if targets is not None:
        matched = _match(model, targets, "targets", fused)
        # a pattern may reach adapters by accident; only one named in full is a mistake worth an error
        chosen = [name for name in matched if name not in ignored and (name not in adapters or name in targets)]
    elif blocks is not None:
        everything = [*linears, *fused]
        routers = _router_names(model, blocks)
        dense = ignored | adapters | routers
        chosen = [name for name in everything if name.startswith(f"{blocks}.") and name not in dense]
        _log.info("Pruning the linear layers of the decoder blocks %s.", blocks)
    else:
        candidates = [name for name in linears if name not in adapters | tied]
        chosen = [name for name in candidates[:-1] if name not in ignored]
        lenient = True

    layers: dict[str, nn.Module] = {}
    misfits: dict[str, ValueError] = {}
    for name in chosen:
        if name in fused:
            continue
        module = model.get_submodule(name)
        _check_maskable(model, name, module, adapters, tied)
        try:
            pattern.check_layer(name, shape_OI(module)[1])
        except ValueError as error:
            if not lenient:
                misfits[name] = error
            else:
                _log.warning("%s stays dense: %s", name, error)
            continue
        layers[name] = module
    if misfits:
        raise _misfit(misfits)
    chosen_experts = {name: fused[name] for name in chosen if name in fused}
    for name, expert in chosen_experts.items():
        pattern.check_layer(name, expert_shape_OI(expert)[1])
    if not layers and not chosen_experts:
        raise ValueError(
            "Nothing to prune: no linear layer was targeted "
            f"(targets={list(targets) if targets is not None else None}, ignore={list(ignore)}, "
            f"{len(linears)} nn.Linear in {type(model).__name__}). "
            + (
                "A model that is built in configure_model does not exist before it has run."
                if not linears
                else f"Name layers with targets, such as targets=[{linears[0]!r}]."
            )
        )
    untargetable = _untargetable(model, blocks, fused) if blocks else {}
    if untargetable:
        _warn_of_dense(model, untargetable)
    return Selection(layers, chosen_experts, untargetable)


def _misfit(errors: dict[str, ValueError]) -> ValueError:
    """The first of these errors; where there are more, with their number and a shorter way out."""
    first, *others = errors
    if not others:
        return errors[first]
    return ValueError(f"{errors[first]} So it is with {len(others)} more, such as {others[0]}. {leave_out(errors)}")


def leave_out(names: Iterable[str]) -> str:
    """How to leave out layers, and all that are named alike."""
    kinds = "|".join(re.escape(kind) for kind in dict.fromkeys(name.rpartition(".")[2] for name in names))
    return rf"One expression leaves out all that are named alike: ignore=['re:(.*\.)?({kinds})$']."


def _warn_of_dense(model: nn.Module, untargetable: dict[str, int]) -> None:
    total = sum(map(_numel, model.parameters()))
    _log.warning(
        "%d block weights cannot be masked and stay dense (%.1f %% of the model's parameters): %s",
        len(untargetable),
        100 * sum(untargetable.values()) / total,
        ", ".join(list(untargetable)[:3]) + (", ..." if len(untargetable) > 3 else ""),
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sparse = [name for name in untargetable if _share_of_zeros(parameters[name]) > 0.01]
    if sparse:
        _log.warning(
            "%s has zeros, as one-shot pruning leaves them, and no mask that would keep them: training fills them. "
            "Freeze it (requires_grad=False) to keep its zeros.",
            sparse[0],
        )


def _share_of_zeros(parameter: nn.Parameter) -> float:
    if parameter.is_meta or not parameter.numel() or not parameter.requires_grad:
        return 0.0
    part = parameter.detach()[:1]
    return 1 - int(part.count_nonzero()) / part.numel()


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost ``nn.ModuleList``s of composite modules, by name, largest first; no architecture is known."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(_is_block, module)):
            found[name] = module
    return dict(sorted(found.items(), key=lambda item: -_size(item[1])))


def _unambiguous_blocks(model: nn.Module) -> str | None:
    found = block_lists(model)
    trainable = {name: blocks for name, blocks in found.items() if any(p.requires_grad for p in blocks.parameters())}
    found = trainable or found  # beside a model in training, a frozen one is its teacher or reference
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


def did_you_mean(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """ " Did you mean ...?" or nothing, to put behind an error; ``prefix`` stands before each candidate."""
    close = difflib.get_close_matches(word, list(candidates), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(prefix + name) for name in close)}?" if close else ""


def _match(model: nn.Module, patterns: Sequence[str], argument: str, fused: Mapping[str, FusedExperts]) -> list[str]:
    if isinstance(patterns, str):
        raise ValueError(f"{argument} is a list of names, got the text {patterns!r}; write [{patterns!r}].")
    modules = dict(model.named_modules())
    layers = [*(name for name, module in modules.items() if _is_linear(module)), *fused]
    matched: set[str] = set()
    for text in patterns:
        if text.startswith("re:"):
            try:
                # an expression of another tool may be about embeddings; what matches nothing at all is a mistake
                names = {name for name in layers if re.match(text[3:], name)} or {
                    name for name in modules if argument == "ignore" and re.match(text[3:], name)
                }
            except re.error as error:
                raise ValueError(f"{argument}: {text!r} is not a regular expression: {error}.") from error
        else:
            hits = {n for n, m in modules.items() if n == text or text in {cls.__name__ for cls in type(m).__mro__}}
            hits |= set(fused) if text == "Linear" else {text} & set(fused)  # an expert is a linear map, too
            names = {n for n in layers if any(n == hit or n.startswith(f"{hit}.") for hit in hits)} or hits
        if not names:
            raise ValueError(
                f"{argument}: {text!r} matches no layer of {type(model).__name__}." + did_you_mean(text, layers)
            )
        matched |= names
    return [name for name in [*modules, *fused] if name in matched]


def _check_maskable(model: nn.Module, name: str, module: nn.Module, adapters: set[str], tied: set[str]) -> None:
    """Refuse every module whose forward would not see its mask, or whose mask would reach further than it."""
    way_out = f"Leave it dense with ignore=[{name!r}]"
    if not _is_linear(module):
        raise ValueError(f"{name} is a {type(module).__name__}; only nn.Linear layers can be masked. {way_out}.")
    for outer in _ancestors(model, name):
        if isinstance(outer, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(
                f"{name} is inside a {type(outer).__name__}, whose fast path reads the weight directly and would "
                f"bypass the mask. {way_out}, or build the block from nn.Linear layers."
            )
    if not _is_plain_linear(type(module)):
        raise ValueError(
            f"{name} is a {type(module).__name__}, a subclass of nn.Linear with a computation of its own, which a mask "
            f"would replace. {way_out}, or load the model without it (for example not in 4 bits)."
        )
    if "weight" not in module._parameters:
        raise ValueError(
            f"The weight of {name} is computed (weight_norm, a parametrization), so zeros in it would not last. Remove "
            f"the parametrization first. {way_out}."
        )
    if "forward" in module.__dict__:
        raise ValueError(
            f"{name} has its forward overridden on the instance (accelerate does this with device_map), so the mask "
            "would have no effect. Load the model without device_map, or remove the hooks with "
            f"accelerate.hooks.remove_hook_from_submodules. {way_out}."
        )
    if name in adapters:
        raise ValueError(f"{name} belongs to a peft adapter; adapters are never pruned. {way_out}.")
    if name in tied:
        raise ValueError(f"{name} shares its weight with another module; its mask would prune that too. {way_out}.")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _is_plain_linear(cls: type) -> bool:
    from sparse_train.layers import SparseLinear
    from sparse_train.mask_lora import MaskLoRALinear

    if cls in (nn.Linear, SparseLinear, MaskLoRALinear) or cls.__name__ in ("Conv1D", "SparseConv1D", "FalconLinear"):
        return True  # Falcon's computes what nn.Linear does
    # after fully_shard the class is generated: FSDPLinear(FSDPModule, Linear)
    return cls.__name__.startswith("FSDP") and len(cls.__bases__) == 2 and cls.__bases__[1] in (nn.Linear, SparseLinear)


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def adapter_names(model: nn.Module) -> set[str]:
    """Everything inside what a peft tuner layer calls its adapter layers (lora_A, lora_B, ...)."""
    prefixes = [
        f"{name}.{part}" if name else part
        for name, module in model.named_modules()
        for part in getattr(module, "adapter_layer_names", ())
        if isinstance(part, str)
    ]
    return {n for n, _ in model.named_modules() if any(n == p or n.startswith(f"{p}.") for p in prefixes)}


def _tied_names(model: nn.Module) -> set[str]:
    parameters = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in parameters)
    return {name.rpartition(".")[0] for name, parameter in parameters if uses[id(parameter)] > 1}


def expert_shape_OI(experts: FusedExperts) -> tuple[int, int]:
    """``(out_features, in_features)`` of one expert's matrix."""
    _, rows, columns = experts.parameter.shape
    return (columns, rows) if experts.transposed else (rows, columns)


def fused_experts(model: nn.Module) -> dict[str, FusedExperts]:
    """Three-dimensional parameters, as transformers keeps experts; their modules say where they are transposed."""
    found = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            # transformers says of its experts' modules how their weights lie; elsewhere three dimensions mean nothing
            if dimensions(parameter) == 3 and "bias" not in own and hasattr(module, "is_transposed"):
                found[f"{name}.{own}"] = FusedExperts(parameter, bool(module.is_transposed))
    return found


def _untargetable(model: nn.Module, prefix: str, fused: Mapping[str, FusedExperts]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, module in model.get_submodule(prefix).named_modules():
        if _is_linear(module) or isinstance(module, nn.Embedding):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}.{parameter_name}"
            if dimensions(parameter) >= 2 and full not in fused and not _is_router(module):
                found[full] = _numel(parameter)
    return found


def _is_router(module: nn.Module) -> bool:
    # its few weights decide which experts run; every method leaves it dense, and it is no loss of sparsity
    return re.search("Router|Gate$|Gating$", type(module).__name__) is not None


def _router_names(model: nn.Module, blocks: str) -> set[str]:
    """Linear layers of blocks that decide which experts run, or how much one counts: a single output."""
    routers = [name for name, module in model.get_submodule(blocks).named_modules(prefix=blocks) if _is_router(module)]
    found = set()
    for name, module in model.named_modules():
        inside = any(name == router or name.startswith(f"{router}.") for router in routers)
        if _is_linear(module) and (inside or "router" in name.rpartition(".")[2] or shape_OI(module)[0] == 1):
            found.add(name)
    return found


def _size(module: nn.Module) -> int:
    return sum(map(_numel, module.parameters()))


def _is_block(module: nn.Module) -> bool:
    composite = next(module.children(), None) is not None
    return composite and any(dimensions(parameter) >= 2 for parameter in module.parameters())


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor in its place


def dimensions(parameter: nn.Parameter) -> int:
    """Of the whole parameter: ZeRO-3 leaves an empty tensor of one dimension in its place."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
