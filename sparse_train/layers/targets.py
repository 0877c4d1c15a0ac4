"""Which layers are pruned: the linear layers of the decoder blocks unless told otherwise; and which can be masked."""

import difflib
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from sparse_train.arguments import did_you_mean, leave_out
from sparse_train.blocks import (
    FusedExperts,
    dimensions,
    frozen_linears,
    fused_experts,
    is_linear,
    is_router,
    numel,
    read_directly,
    router_names,
    shape_OI,
    unambiguous_blocks,
)
from sparse_train.distributed.engines import layout_of
from sparse_train.layers.adapters import check_reads
from sparse_train.layers.masked_layer import is_plain_linear
from sparse_train.patterns import Pattern

_log = logging.getLogger(__name__)
_ROUTERS = 0.01  # warn if routers have a larger share of the parameters: those of known models have less


@dataclass(frozen=True)
class Selection:
    """What was chosen."""

    layers: dict[str, nn.Module]
    """Targets by name, in the model's order: ``nn.Linear`` or transformers' ``Conv1D``."""
    experts: dict[str, FusedExperts] = field(default_factory=dict)
    """Fused experts of Mixture-of-Experts blocks by parameter name. One-shot pruning can prune them;
    masks in training cannot."""


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
        pattern: must fit the layers.
        targets: names of modules, class names such as "Linear", or "re:" and a regular expression matched from the
            start of the name (as in llm-compressor). Default: the linear layers of the decoder blocks except routers
            and gates of experts; in a model without blocks, all linear layers except the last one and those with tied
            weights. Where something is trained, frozen blocks and layers beside it are left out: those of a teacher.
        ignore: layers to leave out, in the same three forms.
        experts: choose fused experts too (one-shot pruning); otherwise they count as weights that cannot be pruned.

    Raises:
        ValueError: nothing chosen, a name that matches nothing, or a chosen layer that cannot be masked (see
            ``check_maskable``) or does not fit the pattern.
    """
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    frozen: set[str] = set()
    adapters = adapter_names(model)
    tied = tied_names(model)
    blocks = unambiguous_blocks(model) if targets is None else None
    fused = fused_experts(model) if experts else {}
    ignored = set(_match(model, ignore, "ignore", fused))
    lenient = False
    if targets is not None:
        matched = _match(model, targets, "targets", fused)
        # a pattern may match adapters by accident; only a full name of one is an error
        chosen = [name for name in matched if name not in ignored and (name not in adapters or name in targets)]
    elif blocks is not None:
        inside = set(model.get_submodule(blocks).modules())  # a block may also have another name, which comes first
        everything = [name for name in linears if model.get_submodule(name) in inside]
        everything += [name for name in fused if name.startswith(f"{blocks}.")]
        routers = router_names(model, blocks)
        own_use = read_directly(model, blocks) - ignored
        dense = ignored | adapters | routers | own_use
        chosen = [name for name in everything if name not in dense]
        _warn_of_routers(model, routers - ignored)
        if own_use:
            _log.info("%d layers stay dense, whose weight the block reads itself: %s, ...", len(own_use), min(own_use))
    else:
        frozen = frozen_linears(model)
        candidates = [name for name in linears if name not in adapters | tied | frozen]
        # if mask_lora has been added already, it has frozen the last layer
        last = {name for name in candidates[-1:] if not getattr(model.get_submodule(name), "adapted", False)}
        chosen = [name for name in candidates if name not in last | ignored]
        lenient = True
        if frozen and chosen:
            _log.info("%d linear layers stay dense, which are frozen beside others: %s, ...", len(frozen), min(frozen))

    layers: dict[str, nn.Module] = {}
    misfits: dict[str, ValueError] = {}
    for name in chosen:
        if name in fused:
            continue
        module = model.get_submodule(name)
        check_maskable(model, name, module, adapters, tied)
        try:
            pattern.check_layer(name, shape_OI(module)[1])
        except ValueError as error:
            if not lenient:
                misfits[name] = error
            else:
                _log.warning("%s stays dense: %s", name, error)
            continue
        layers[name] = module
    if len(misfits) > 1 and not layers:  # leaving them out would leave nothing to prune
        raise ValueError(f"{next(iter(misfits.values()))} None of the {len(misfits)} targets fits.")
    if misfits:
        raise _misfit(misfits)
    chosen_experts = {name: fused[name] for name in chosen if name in fused}
    for name, expert in chosen_experts.items():
        pattern.check_layer(name, expert.shape_OI[1])
    if not layers and not chosen_experts:
        free = [name for name in linears if name not in ignored | adapters | tied]
        free.sort(key=lambda name: name in frozen)  # those in training first
        of_these = f", {len(frozen)} of them frozen beside others in training" if frozen else ""
        raise ValueError(
            "Nothing to prune: no linear layer was targeted "
            f"(targets={list(targets) if targets is not None else None}, ignore={list(ignore)}, "
            f"{len(linears)} nn.Linear in {type(model).__name__}{of_these}). "
            + (
                "A model that is built in configure_model does not exist before it has run."
                if not linears
                else f"Name layers with targets, such as targets=[{free[0]!r}]."
                if free
                else "All of them are ignored, adapters, or tied."
            )
        )
    _log.info("Pruning %s.", named([*layers, *chosen_experts]))
    untargetable = _untargetable(model, blocks, fused) if blocks else {}
    if untargetable:
        _warn_of_dense(model, untargetable)
    return Selection(layers, chosen_experts)


def named(layers: Iterable[str]) -> str:
    """Which layers these are: "21 layers in model.layers", or "3 layers: fc1, ..., fc3" where no module holds them."""
    names = list(layers)
    common = posixpath.commonpath([name.rpartition(".")[0].replace(".", "/") for name in names]).replace("/", ".")
    shown = names if len(names) < 3 else [names[0], "...", names[-1]]
    number = "1 layer" if len(names) == 1 else f"{len(names)} layers"
    return f"{number} in {common}" if common and len(names) > 1 else f"{number}: {', '.join(shown)}"


def _match(model: nn.Module, patterns: Sequence[str], argument: str, fused: Mapping[str, FusedExperts]) -> list[str]:
    if patterns is None:
        raise ValueError(f"{argument} is a list of names, got null; leave it out, or write [].")
    if isinstance(patterns, str):
        raise ValueError(f"{argument} is a list of names, got the text {patterns!r}; write [{patterns!r}].")
    modules = dict(model.named_modules())
    layers = [*(name for name, module in modules.items() if is_linear(module)), *fused]
    matched: set[str] = set()
    for text in patterns:
        if text.startswith("re:"):
            try:
                # expressions from other tools may match embeddings; one that matches nothing at all is a mistake
                names = {name for name in layers if re.match(text[3:], name)} or {
                    name for name in modules if argument == "ignore" and re.match(text[3:], name)
                }
            except re.error as error:
                raise ValueError(f"{argument}: {text!r} is not a regular expression: {error}.") from error
        else:
            hits = {n for n, m in modules.items() if n == text or text in {cls.__name__ for cls in type(m).__mro__}}
            hits |= set(fused) if text == "Linear" else {text} & set(fused)  # an expert is also a linear map
            names = {n for n in layers if any(n == hit or n.startswith(f"{hit}.") for hit in hits)} or hits
        if not names:
            raise ValueError(
                f"{argument}: {text!r} matches no layer of {type(model).__name__}." + _in_full(text, layers)
            )
        matched |= names
    return [name for name in [*modules, *fused] if name in matched]


def _in_full(text: str, layers: Sequence[str]) -> str:
    """A suggestion for a text that is only the end, or another part, of names."""
    part = text.removeprefix("re:").lstrip("^")
    try:
        found = [name for name in layers if re.search(rf"(^|\.)({part})(\.|$)", name)]
    except re.error:
        found = []
    if not found:
        kinds = sorted({name.rpartition(".")[2] for name in layers})
        close = difflib.get_close_matches(part.strip("*.$"), kinds, n=1, cutoff=0.6)
        return did_you_mean(text, layers) or (f" Did you mean 're:.*{close[0]}$'?" if close else "")
    end = "$" if any(re.search(rf"({part})$", name) for name in found) else r"\."
    return rf" Names are matched from their start, such as {found[0]}: write 're:(.*\.)?({part}){end}'."


def _misfit(errors: dict[str, ValueError]) -> ValueError:
    """The first of these errors; if there are several, with their number and a shorter fix."""
    first, *others = errors
    if not others:
        return errors[first]
    return ValueError(
        f"{errors[first]} The same is true of {len(others)} more, such as {others[0]}. {leave_out(errors)}"
    )


def _untargetable(model: nn.Module, prefix: str, fused: Mapping[str, FusedExperts]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, module in model.get_submodule(prefix).named_modules():
        if is_linear(module) or isinstance(module, nn.Embedding):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}.{parameter_name}"
            if dimensions(parameter) >= 2 and full not in fused and not is_router(module):
                found[full] = numel(parameter)
    return found


def _warn_of_dense(model: nn.Module, untargetable: dict[str, int]) -> None:
    total = sum(map(numel, model.parameters()))
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
            "%s has zeros, as left by one-shot pruning, but no mask that would keep them: training fills them. "
            "Freeze it (requires_grad=False) to keep its zeros.",
            sparse[0],
        )


def _warn_of_routers(model: nn.Module, routers: set[str]) -> None:
    weights = sum(numel(parameter) for name in routers for parameter in model.get_submodule(name).parameters())
    share = weights / max(1, sum(map(numel, model.parameters())))
    if share > _ROUTERS:
        name = min(routers)
        _log.warning(
            "%d linear layers, such as %s, are taken for routers or gates of experts and stay dense (%.1f %% of the "
            "model's parameters). Where they are none, name what is to be pruned: targets=['Linear'] is all linear "
            "layers.",
            len(routers),
            name,
            100 * share,
        )


def _share_of_zeros(parameter: nn.Parameter) -> float:
    if parameter.is_meta or not parameter.numel() or not parameter.requires_grad:
        return 0.0
    part = parameter.detach()[:1]
    return 1 - int(part.count_nonzero()) / part.numel()


# --- what a mask can reach -------------------------------------------------------------------------------------------


def check_maskable(model: nn.Module, name: str, module: nn.Module, adapters: set[str], tied: set[str]) -> None:
    """Refuse modules whose forward would ignore the mask, or whose mask would also affect other modules."""
    way_out = f"Leave it dense with ignore=[{name!r}]"
    if not is_linear(module):
        raise ValueError(f"{name} is a {type(module).__name__}; only nn.Linear layers can be masked. {way_out}.")
    for outer in _ancestors(model, name):
        if isinstance(outer, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(
                f"{name} is inside a {type(outer).__name__}, whose fast path reads the weight directly and would "
                f"bypass the mask. Leave all of these dense with ignore=[{type(outer).__name__!r}], or build the block "
                "from nn.Linear layers."
            )
    if not is_plain_linear(type(module)):
        raise ValueError(
            f"{name} is a {type(module).__name__}, a subclass of nn.Linear with its own computation, which a mask "
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
    if name.endswith(".base_layer"):
        check_reads(model.get_submodule(name.removesuffix(".base_layer")))
    dtype = module._parameters["weight"].dtype  # type: ignore[union-attr]
    if dtype.itemsize < 2:
        raise ValueError(f"The weight of {name} is {dtype}: masks are for 16 bits or more. {way_out}.")
    layout_of(module._parameters["weight"]).check(name)
    if name in adapters:
        raise ValueError(f"{name} belongs to a peft adapter; adapters are never pruned. {way_out}.")
    if name in tied:
        raise ValueError(f"{name} shares its weight with another module; its mask would prune that too. {way_out}.")


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def adapter_names(model: nn.Module) -> set[str]:
    """All modules inside the adapter layers of peft's tuner layers (lora_A, lora_B, ...)."""
    prefixes = [
        f"{name}.{part}" if name else part
        for name, module in model.named_modules()
        for part in getattr(module, "adapter_layer_names", ())
        if isinstance(part, str)
    ]
    return {n for n, _ in model.named_modules() if any(n == p or n.startswith(f"{p}.") for p in prefixes)}


def tied_names(model: nn.Module) -> set[str]:
    """Modules that share a parameter with another module; one module under two names does not count."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {
        name
        for name, module in model.named_modules()
        if any(owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False))
    }
