"""Which linear layers a mask can reach, and the names of those that are never pruned."""

from collections import Counter

from torch import nn

from sparse_train.layers.adapters import check_reads
from sparse_train.layers.mask_lora import MaskLoRALinear
from sparse_train.layers.matrices import CONV1D, FALCON_LINEAR, class_path, is_linear
from sparse_train.layers.sparse_linear import SPARSE_CONV1D, SparseLinear


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
    if not _is_plain_linear(type(module)):
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
    if name in adapters:
        raise ValueError(f"{name} belongs to a peft adapter; adapters are never pruned. {way_out}.")
    if name in tied:
        raise ValueError(f"{name} shares its weight with another module; its mask would prune that too. {way_out}.")


def _is_plain_linear(cls: type) -> bool:
    if cls in (nn.Linear, SparseLinear, MaskLoRALinear):
        return True
    if class_path(cls) in (CONV1D, SPARSE_CONV1D, FALCON_LINEAR):
        return True
    # fully_shard generates a class: FSDPLinear(FSDPModule, Linear)
    first, *others = cls.__bases__
    fsdp = first.__name__ == "FSDPModule" and first.__module__.startswith("torch.distributed.")
    return fsdp and others in ([nn.Linear], [SparseLinear])


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
