"""Which layers are pruned: the linear layers of the decoder blocks unless told otherwise; and which can be masked."""

import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from sparse_train.architecture import (
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
from sparse_train.arguments import did_you_mean, named
from sparse_train.distributed.engines import layout_of
from sparse_train.layers.adapters import check_no_dora
from sparse_train.layers.masked_layer import MaskedLayer
from sparse_train.layers.sparsify import sparse_class
from sparse_train.patterns import PRUNED, Pattern

_log = logging.getLogger(__name__)
_ROUTERS = 0.01  # warn if routers have a larger share of the parameters: those of known models have less


@dataclass(frozen=True)
class Targets:
    layers: dict[str, nn.Module]
    """Targets by name, in the model's order: ``nn.Linear`` or transformers' ``Conv1D``."""
    experts: dict[str, FusedExperts]
    """Fused experts of Mixture-of-Experts blocks by parameter name. One-shot pruning can prune them;
    masks in training cannot."""


def find_targets(
    model: nn.Module,
    pattern: Pattern,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    *,
    experts: bool = False,
) -> Targets:
    """Choose the layers to prune.

    Args:
        model: any module; nothing is changed.
        pattern: must fit the layers.
        targets: names of layers or modules, parts of names between dots ("q_proj", "self_attn"), class names such as
            "Linear", or "re:" and a regular expression matched from the start of the name (as in llm-compressor).
            Default: the linear layers of the decoder blocks except routers and gates of experts; in a model without
            blocks, all linear layers except the last one and those with tied weights. The default leaves out layers
            whose weight another module reads (``read_directly``) and, where something is trained, frozen blocks and
            layers beside it: those of a teacher.
        ignore: layers to leave out, in the same forms.
        experts: choose fused experts too (one-shot pruning); otherwise they count as weights that cannot be pruned.

    Raises:
        ValueError: nothing chosen, a name that matches nothing, or a chosen layer that cannot be masked (see
            ``check_maskable``) or does not fit the pattern.
    """
    adapters, tied, own_use = adapter_names(model), tied_names(model), read_directly(model)
    frozen = frozen_linears(model)
    fused = fused_experts(model) if experts else {}
    ignored = set(_match(model, ignore, "ignore", fused))
    blocks = unambiguous_blocks(model) if targets is None else None
    if targets is not None:
        # an expression may match adapters by accident; only a full name of one is an error
        matched = _match(model, targets, "targets", fused)
        chosen = [name for name in matched if name not in adapters or name in targets]
    elif blocks is not None:
        chosen = [name for name in _in_blocks(model, blocks, fused, ignored) if name not in adapters | own_use]
    else:
        chosen = _without_blocks(model, pattern, adapters | tied | own_use | frozen, ignored)
    chosen = [name for name in chosen if name not in ignored]
    resting, trained = ([name for name in chosen if (name in frozen) == rests] for rests in (True, False))
    if targets is not None and resting and trained:
        outer = _outer(resting[0])
        _log.warning(
            "%d of the layers that targets names, such as %s, are frozen beside others in training, as those of a "
            "teacher are, and are pruned, too. ignore=[%r] leaves them out.",
            *(len(resting), resting[0], next(each for each in outer if not _around(each, trained))),
        )
    if not chosen:
        linears = [name for name, module in model.named_modules() if is_linear(module)]
        free = sorted(set(linears) - ignored - adapters - tied, key=lambda name: (name in frozen, linears.index(name)))
        free = [name for name in free if not _misfit(model, name, pattern)]
        raise ValueError(
            f"Nothing to prune: no linear layer was targeted (targets={targets}, ignore={ignore}, {len(linears)} "
            f"nn.Linear in {type(model).__name__}, {len(frozen)} of them frozen beside others in training). A model "
            "that is built in configure_model does not exist before it has run."
            + (f" Name layers with targets, such as targets=[{free[0]!r}]." if free else "")
        )

    layers = {name: model.get_submodule(name) for name in chosen if name not in fused}
    for name in chosen:
        if name in layers:
            check_maskable(model, name, layers[name], adapters, tied)
        pattern.check_layer(name, (shape_OI(layers[name]) if name in layers else fused[name].shape_OI)[1])
    if targets is None and (blocks is not None or own_use):
        _warn_of_dense(model, blocks or "", fused, own_use)
    return Targets(layers, {name: fused[name] for name in chosen if name in fused})


def _in_blocks(model: nn.Module, blocks: str, fused: Mapping[str, FusedExperts], ignored: set[str]) -> list[str]:
    """Linear layers and fused experts of the decoder blocks, but for those that decide which experts run."""
    inside = set(model.get_submodule(blocks).modules())  # a block may also have another name, which comes first
    routers = router_names(model, blocks)
    dense = routers - ignored
    weights = sum(numel(each) for name in dense for each in model.get_submodule(name).parameters())
    share = weights / max(1, sum(map(numel, model.parameters())))
    if share > _ROUTERS:
        _log.warning(
            "%d linear layers, such as %s, are taken for routers or gates of experts and stay dense (%.1f %% of the "
            "model's parameters). Where they are none, name what is to be pruned: targets=['Linear'] is all linear "
            "layers.",
            *(len(dense), min(dense), 100 * share),
        )
    linears = [name for name, module in model.named_modules() if is_linear(module) and module in inside]
    linears += [name for name in fused if name.startswith(f"{blocks}.")]
    return [name for name in linears if name not in routers]


def _without_blocks(model: nn.Module, pattern: Pattern, never: set[str], ignored: set[str]) -> list[str]:
    """All linear layers but the last one, those in ``never``, and those that the pattern misfits."""
    linears = [name for name, module in model.named_modules() if is_linear(module) and name not in never]
    # if mask_lora has been added already, it has frozen the last layer
    if linears and not getattr(model.get_submodule(linears[-1]), "has_factors", False):
        del linears[-1]
    fitting = []
    for name in (name for name in linears if name not in ignored):
        if why := _misfit(model, name, pattern):
            _log.warning("%s stays dense: %s", name, why)
        else:
            fitting.append(name)
    return fitting


def _misfit(model: nn.Module, name: str, pattern: Pattern) -> str:
    """Why the pattern does not fit a layer; empty if it does."""
    try:
        pattern.check_layer(name, shape_OI(model.get_submodule(name))[1])
    except ValueError as error:
        return str(error)
    return ""


def layers_in_words(layers: Iterable[str]) -> str:
    """Which layers these are: "21 layers in model.layers", or "3 layers: fc1, ..., fc3" where no module holds them."""
    names = list(layers)
    common = posixpath.commonpath([name.rpartition(".")[0].replace(".", "/") for name in names]).replace("/", ".")
    shown = names if len(names) < 3 else [names[0], "...", names[-1]]
    number = "1 layer" if len(names) == 1 else f"{len(names)} layers"
    return f"{number} in {common}" if common and len(names) > 1 else f"{number}: {', '.join(shown)}"


def _match(model: nn.Module, patterns: Sequence[str], argument: str, fused: Mapping[str, FusedExperts]) -> list[str]:
    if patterns is None or isinstance(patterns, str):
        raise ValueError(f"{argument} is a list of names, got {patterns!r}; write [{patterns or ''!r}].")
    modules = dict(model.named_modules())
    layers = [*(name for name, module in modules.items() if is_linear(module)), *fused]
    matched: set[str] = set()
    for text in patterns:
        of_class = {n for n, m in modules.items() if text in {cls.__name__ for cls in type(m).__mro__}}
        of_class |= {*fused} if text == "Linear" else set()  # an expert is also a linear map
        names = {*named(text, layers), *(name for name in layers if not of_class.isdisjoint(_outer(name)))}
        # what matches embeddings leaves out nothing; what matches nothing, or only modules around layers, is a mistake
        others = set() if names else {*named(text, modules), *of_class}
        if not (names or others) or any(_around(each, layers) for each in others):
            parts = {part for name in layers for part in (name, *name.split("."))}
            meant = did_you_mean(text.removeprefix("re:").strip(".*$"), sorted(parts))
            whole = " An expression is for the names of layers, not of modules around them." if others else ""
            raise ValueError(f"{argument}: {text!r} matches no layer of {type(model).__name__}.{whole}{meant}")
        matched |= names or others
    return [name for name in [*modules, *fused] if name in matched]


def _outer(name: str) -> Iterable[str]:
    """The modules around a layer, from the outermost, and itself."""
    return accumulate(name.split("."), "{}.{}".format)


def _around(name: str, layers: Iterable[str]) -> bool:
    """Whether a module is one of these layers, or around one."""
    return not name or any(f"{layer}.".startswith(f"{name}.") for layer in layers)  # "" is the model itself


def _warn_of_dense(model: nn.Module, blocks: str, fused: Mapping[str, FusedExperts], own_use: set[str]) -> None:
    """Warn of weights of the blocks that no mask can reach."""
    dense: dict[str, nn.Parameter] = {}
    for name, module in model.get_submodule(blocks).named_modules(prefix=blocks):
        if name in own_use or not (is_linear(module) or is_router(module) or isinstance(module, nn.Embedding)):
            own = dict(module.named_parameters(prefix=name, recurse=False))
            dense |= {full: each for full, each in own.items() if dimensions(each) >= 2 and full not in fused}
    if not dense:
        return
    _log.warning(
        "%d weights cannot be masked and stay dense (%.1f %% of the model's parameters): %s",
        len(dense),
        100 * sum(map(numel, dense.values())) / sum(map(numel, model.parameters())),
        ", ".join(list(dense)[:3]) + (", ..." if len(dense) > 3 else ""),
    )
    sparse = [name for name, parameter in dense.items() if not name.endswith(".A_log") and _has_zeros(parameter)]
    if sparse:
        _log.warning(
            "%s has zeros, as left by one-shot pruning, but no mask that would keep them: training fills them. "
            "Freeze it (requires_grad=False) to keep its zeros.",
            sparse[0],
        )


def _has_zeros(parameter: nn.Parameter) -> bool:
    if parameter.is_meta or not parameter.numel() or not parameter.requires_grad:
        return False
    part = parameter.detach()[:1]
    return int(part.count_nonzero()) < (1 - PRUNED) * part.numel()


# --- what a mask can reach -------------------------------------------------------------------------------------------


def check_maskable(model: nn.Module, name: str, module: nn.Module, adapters: set[str], tied: set[str]) -> None:
    """Refuse modules whose forward would ignore the mask, or whose mask would also affect other modules."""
    way_out = f"Leave it dense with ignore=[{name!r}]"
    if not is_linear(module):
        raise ValueError(
            f"{name} is a {type(module).__name__}; only nn.Linear layers can be masked. Take it out of targets."
        )
    parts = name.split(".")
    for outer in (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))):
        if isinstance(outer, nn.MultiheadAttention):
            raise ValueError(
                f"{name} is inside a {type(outer).__name__}, which reads the weight itself, so that a mask would have "
                f"no effect. Leave all of these dense with ignore=[{type(outer).__name__!r}], or build attention from "
                "nn.Linear layers."
            )
    if not isinstance(module, MaskedLayer) and sparse_class(type(module)) is None:  # type: ignore[arg-type]
        raise ValueError(
            f"{name} is a {type(module).__name__}, a subclass of nn.Linear with its own computation, which a mask "
            f"would replace. {way_out}, or load the model without it (for example not in 4 bits)."
        )
    weight = module._parameters.get("weight")
    if weight is None:
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
        check_no_dora(model.get_submodule(name.removesuffix(".base_layer")))
    if weight.dtype.itemsize < 2:
        raise ValueError(f"The weight of {name} is {weight.dtype}: masks are for 16 bits or more. {way_out}.")
    layout_of(weight).check(name)
    if name in adapters:
        raise ValueError(f"{name} belongs to a peft adapter; adapters are never pruned. {way_out}.")
    if name in tied:
        raise ValueError(f"{name} shares its weight with another module; its mask would prune that too. {way_out}.")


def adapter_names(model: nn.Module) -> set[str]:
    """All modules inside the adapter layers of peft's tuner layers (lora_A, lora_B, ...)."""
    modules = dict(model.named_modules(remove_duplicate=False))  # of tied layers, both have the same one
    prefixes = [
        f"{name}.{part}" if name else part
        for name, module in modules.items()
        for part in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
        if isinstance(part, str)
    ]
    return {n for n in modules if any(n == p or n.startswith(f"{p}.") for p in prefixes)}


def tied_names(model: nn.Module) -> set[str]:
    """Modules that share a parameter with another module; one module under two names does not count."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {
        name
        for name, module in model.named_modules()
        if any(owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False))
    }
