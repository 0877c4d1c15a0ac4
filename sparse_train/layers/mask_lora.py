"""``mask_lora``: a low-rank adapter inside the mask of a layer, so that merging it keeps every zero.

Shape suffixes: O out_features, I in_features, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_train.arguments import named
from sparse_train.distributed.engines import layout_of
from sparse_train.layers.functional import low_rank_sum
from sparse_train.layers.masked_layer import MaskedLayer, SparseLinear, sparse_layers
from sparse_train.layers.masks import FACTOR_NAMES


@dataclass(frozen=True)
class MaskLoRA:
    """Low-rank fine-tuning of a sparse model that stays sparse: ``where(mask, W + s B A, 0)``, W frozen, s = alpha / r.

    A plain LoRA (Hu et al., arXiv 2106.09685) adds ``B A`` outside the mask, so merging it fills every zero. Here the
    adapter is inside the mask, as in MaskLoRA (Zimmer et al., arXiv 2312.15230): after merging, the layer is as sparse
    as its mask and computes the same as before. When masks change, ``W + s B A`` is scored. There is no dropout,
    because dropout on the input of an adapter cannot be written as one matrix inside a mask.

    The policy also applies to A and B. Under ``Fixed`` they get the gradient of the loss; under ``StraightThrough``,
    that of the unpruned sum, to which pruned entries also contribute. Policies that would write into W (``Regrow``,
    ``srste_decay``) are refused.

    Args:
        r: rank.
        lora_alpha: the product is multiplied by ``lora_alpha / r``.
        target_modules: parts of the names of masked layers, as in peft, and ``targets``; "all-linear" = all masked
            layers. Masked layers that have no adapter stay frozen.
    """

    r: int = 8
    lora_alpha: int = 16
    target_modules: Sequence[str] | str = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        if self.r < 1 or self.lora_alpha < 1 or self.lora_alpha != int(self.lora_alpha):  # state dicts hold an integer
            raise ValueError(f"r and lora_alpha are whole numbers from 1 on, got {self.r} and {self.lora_alpha}.")


class MaskLoRALinear(SparseLinear):
    """A masked linear layer with a low-rank adapter inside its mask; converted in place, both ways.

    ``mask_lora_A`` (r, I) and ``mask_lora_B`` (O, r) are parameters next to the frozen ``weight``.
    """

    has_factors = True
    mask_lora_A: nn.Parameter
    mask_lora_B: nn.Parameter
    lora_alpha: int

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.lora_alpha / self.mask_lora_A.shape[0]

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:  # type: ignore[override]
        return self.mask_lora_A, self.mask_lora_B

    def unmasked_weight(self) -> Tensor:
        return self.summed(self.weight.detach(), self.mask_lora_A.detach(), self.mask_lora_B.detach())

    def summed(self, weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        return low_rank_sum(weight_OI, a_RI, b_OR, self.scale)

    @torch.no_grad()
    def merge(self) -> None:
        self.weight.copy_(self.unmasked_weight())
        for name in (*FACTOR_NAMES, "lora_alpha"):
            delattr(self, name)
        self.__class__ = SparseLinear  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.kaiming_uniform_(self.mask_lora_A, a=math.sqrt(5))  # as in peft
        nn.init.zeros_(self.mask_lora_B)

    def get_extra_state(self) -> Tensor:  # accelerate and safetensors save tensors alone
        return torch.tensor(self.lora_alpha)

    def set_extra_state(self, state: Tensor) -> None:
        self.lora_alpha = int(state)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {described(self)}"


def described(layer: MaskLoRALinear) -> str:
    return f"r={layer.mask_lora_A.shape[0]}, lora_alpha={layer.lora_alpha}"


def describe_factors(layers: Mapping[str, MaskedLayer]) -> str | None:
    """The adapters of masked layers in words, for checkpoints and model cards; None if there are none."""
    adapted = [described(layer) for layer in layers.values() if isinstance(layer, MaskLoRALinear)]
    return f"{', '.join(sorted(set(adapted)))} on {len(adapted)} of {len(layers)} layers" if adapted else None


def add_mask_lora(model: nn.Module, lora: MaskLoRA | None = None) -> list[nn.Parameter]:
    """Put low-rank adapters inside the masks of a model, and freeze everything else in it; idempotent.

    ::

        updater = MaskUpdater(model, "2:4", total_steps=1000)  # or prune(..., squash=False)
        optimizer = torch.optim.AdamW(add_mask_lora(model, MaskLoRA(r=8)), lr=1e-4)
        ...
        squash(model)

    A is initialised as in peft and B is zero, so at first the model computes the same as before.

    Args:
        model: with masked layers, see ``sparse_train.sparsify``.
        lora: which adapters; default ``MaskLoRA()``.

    Returns:
        The parameters to train: A and B of each adapted layer.

    Raises:
        ValueError: there is no masked layer of a requested name, or a layer is sharded, is not an ``nn.Linear``, or
            already has another adapter.
    """
    lora = lora or MaskLoRA()
    check_mask_lora(model, lora)
    model.requires_grad_(False)
    for layer in _wanted(model, lora).values():
        if not layer.has_factors:
            attach_factors(layer, lora.r, lora.lora_alpha)
    factors = [factor for layer in sparse_layers(model).values() for factor in layer.factors or ()]
    for factor in factors:
        factor.requires_grad_(True)
    return factors


def check_mask_lora(model: nn.Module, lora: MaskLoRA) -> None:
    """Raise the ValueErrors of ``add_mask_lora``, without changing anything."""
    for name, layer in _wanted(model, lora).items():
        if not isinstance(layer, MaskLoRALinear):
            check_not_divided(name, layer)
            if type(layer) is not SparseLinear:
                raise ValueError(f"{name} is a {type(layer).__name__}; mask_lora adapts nn.Linear. Leave it out.")
        elif (layer.mask_lora_A.shape[0], layer.lora_alpha) != (lora.r, lora.lora_alpha):
            raise ValueError(
                f"{name} has an adapter already ({described(layer)}), and {lora} asks for another. Use the same, such "
                "as that of the checkpoint, or call merge_mask_lora(model) first."
            )


def merge_mask_lora(model: nn.Module) -> None:
    """Replace each adapted weight by ``W + s B A``; layers stay masked, and compute the same as before.

    ``squash`` does this too, and also folds the masks in. Weights stay frozen.
    """
    for layer in sparse_layers(model).values():
        layer.merge()


def check_not_divided(name: str, layer: MaskedLayer) -> None:
    """Raise ValueError if an engine divides the weight of a layer, or the factors of its adapter."""
    weight, *factors = (layout_of(each) for each in (layer.weight, *(layer.factors or ())))
    if weight.is_sharded or any(each.is_sharded or each.has_masters for each in factors):
        raise ValueError(
            f"{name} has a mask_lora adapter, and its parameters are divided among processes (FSDP2, DeepSpeed), where "
            "the sum of the two cannot be masked. Train in one process or with DDP, or without mask_lora."
        )


def attach_factors(layer: MaskedLayer, rank: int, lora_alpha: int) -> None:
    """Give a ``SparseLinear`` an adapter, and freeze its weight."""
    assert isinstance(layer, SparseLinear)
    weight = layer.weight
    # in half precision, small optimizer steps would be lost, so the factors are then float32, as in peft
    dtype = torch.promote_types(weight.dtype, torch.float32)
    shapes = ((rank, layer.in_features), (layer.out_features, rank))
    layer.requires_grad_(False)
    for name, shape in zip(FACTOR_NAMES, shapes, strict=True):
        layer.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device)))
    layer.__class__ = MaskLoRALinear
    assert isinstance(layer, MaskLoRALinear)
    nn.init.kaiming_uniform_(layer.mask_lora_A, a=math.sqrt(5))
    layer.lora_alpha = lora_alpha


def _wanted(model: nn.Module, lora: MaskLoRA) -> dict[str, MaskedLayer]:
    layers, wanted = sparse_layers(model), lora.target_modules
    parts = [wanted] if isinstance(wanted, str) else wanted
    found = [list(layers)] if wanted == "all-linear" else [named(part, layers) for part in parts]
    if not found or not all(found):
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise ValueError(
            f"mask_lora puts adapters inside masks, and no masked layer is named like one of {lora.target_modules}: "
            f"they are {known}. In a loop of your own, build the MaskUpdater first, or prune with squash=False."
        )
    return {name: layers[name] for names in found for name in names}
