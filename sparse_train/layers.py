"""The masked layer: an ``nn.Linear`` that keeps its dense parameter and computes with ``where(mask, weight, 0)``.

Shape suffixes: T tokens, O out_features, I in_features, J packed mask bytes = ceil(I / 8).
"""

import functools
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse_train import masks
from sparse_train.activations import ActivationNorm, InputSharing, recomputing

MASK_NAME = "weight_mask"
"""Name of the packed mask buffer beside ``weight`` in a state dict."""


@dataclass
class Recorder:
    """What all masked layers of a model share while activations are recorded."""

    when: Literal["never", "training", "always"] = "never"
    """"training" skips evaluation: forwards in eval mode with autograd off. Calibration wants "always"."""
    token_mask: Tensor | None = None
    """Which tokens of the current batch count (B, L); None = all."""
    sharing: InputSharing | None = None
    """Set during the one forward in which shared inputs are looked for."""
    mask_misfit: str | None = None
    """Shape of the first input that the token mask did not fit, for one warning."""
    warned: bool = False

    def wants(self, training: bool) -> bool:
        return self.when == "always" or (self.when == "training" and (training or torch.is_grad_enabled()))


class SparseLinear(nn.Linear):
    """A linear layer whose forward sees only kept weights.

    Made from an ``nn.Linear`` in place by ``sparsify``: the parameter objects and their names stay, so optimizers,
    sharding engines and checkpoints need to know nothing. ``weight`` (O, I) holds kept and shadow values together;
    ``weight_mask`` (O, ceil(I / 8)) uint8 is the packed mask, see ``sparse_train.masks``.

    Attributes:
        straight_through: whether pruned weights get the gradient of their masked self, or none.
        statistics: norms of the input, shared between layers that share it; None where no criterion needs them.
        records: False where another layer records the shared input.
        recorder: the model's common switch and token mask.
        reached: whether a forward came by since the last mask update.
    """

    weight_mask: Tensor
    straight_through: bool
    statistics: ActivationNorm | None
    records: bool
    recorder: Recorder | None
    reached: bool

    def forward(self, x: Tensor) -> Tensor:
        self.reached = True
        recorder = self.recorder
        if recorder is not None and self.statistics is not None and recorder.wants(self.training):
            self._record(x, recorder, self.statistics)
        return masked_linear(x, self.weight, self.weight_mask, self.bias, straight_through=self.straight_through)

    def _record(self, x: Tensor, recorder: Recorder, statistics: ActivationNorm) -> None:
        if recorder.sharing is not None and not torch.compiler.is_compiling() and not recomputing():
            recorder.sharing.watch(self, x)
        mask = recorder.token_mask
        if mask is not None and mask.shape != x.shape[:-1] and recorder.mask_misfit is None:
            recorder.mask_misfit = f"{tuple(x.shape)}"
        if self.records:
            statistics.add(x, recorder.token_mask)

    def masked_weight(self) -> Tensor:
        """``where(mask, weight, 0)``, a new tensor (O, I)."""
        return masks.apply(self.weight.detach(), self.weight_mask)

    def unpacked_mask(self) -> Tensor:
        """The bool mask (O, I), True = kept."""
        return masks.unpack(self.weight_mask, self.in_features)

    def keeps_all(self) -> bool:
        """Whether the mask prunes nothing."""
        return masks.count(self.weight_mask) == self.weight.numel()

    def set_mask(self, mask_OI: Tensor) -> None:
        """Replace the mask in place."""
        self.weight_mask.copy_(masks.pack(mask_OI))

    def reset_parameters(self) -> None:
        # Also reached after ``to_empty`` of a layer made on the meta device, where the buffer's bytes are garbage.
        super().reset_parameters()
        if MASK_NAME in self._buffers:
            masks.fill_full(self.weight_mask, self.in_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {MASK_NAME}={self.weight_mask.numel()} bytes"


class _MaskedLinear(torch.autograd.Function):
    """``F.linear(x, where(mask, weight, 0), bias)`` that holds x, weight and packed mask, and no masked copy.

    The masked weight is made again in backward: keeping it would hold a second model between the two (and under
    FSDP2 or ZeRO-3 the whole gathered one).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, mask_OJ: Tensor, bias_O: Tensor | None, straight_through: bool
    ) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if not autocast and x.dtype != weight_OI.dtype:
            raise RuntimeError(f"input is {x.dtype} and weight is {weight_OI.dtype}; they must have the same dtype")
        ctx.x_dtype, ctx.straight_through, ctx.has_bias = x.dtype, straight_through, bias_O is not None
        x = x.to(dtype)
        ctx.save_for_backward(x, weight_OI, mask_OJ)
        with torch.autocast(device, enabled=False):
            return F.linear(x, masks.apply(weight_OI, mask_OJ, dtype), None if bias_O is None else bias_O.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, mask_OJ = ctx.saved_tensors
        grad_x = grad_weight_OI = grad_bias_O = None
        with torch.autocast(x.device.type, enabled=False):  # backward runs outside autocast unless the caller is in it
            grad = grad.to(x.dtype)
            grad_TO = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[0]:
                grad_x = grad.matmul(masks.apply(weight_OI, mask_OJ, x.dtype)).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                grad_weight_OI = grad_TO.t().mm(x.reshape(-1, x.shape[-1])).to(weight_OI.dtype)
                if not ctx.straight_through:
                    grad_weight_OI = masks.apply(grad_weight_OI, mask_OJ)
            if ctx.has_bias and ctx.needs_input_grad[3]:
                grad_bias_O = grad_TO.sum(0)
        return grad_x, grad_weight_OI, None, grad_bias_O, None


def masked_linear(
    x: Tensor, weight_OI: Tensor, mask_OJ: Tensor, bias_O: Tensor | None = None, *, straight_through: bool = True
) -> Tensor:
    """``F.linear(x, where(mask, weight, 0), bias)``, with a choice of gradient for pruned weights.

    Args:
        x: (..., I).
        weight_OI: dense parameter, kept and shadow values.
        mask_OJ: packed mask, see ``sparse_train.masks``.
        bias_O: (O,) or None.
        straight_through: pruned weights get the gradient of their masked self (Bengio et al., arXiv 1308.3432;
            Zhou et al., arXiv 2102.04010, section 3), or, if False, zero.

    Under autocast computes in its dtype, forward and backward; otherwise all dtypes must agree.
    """
    output: Tensor = _MaskedLinear.apply(x, weight_OI, mask_OJ, bias_O, straight_through)  # type: ignore[no-untyped-call]
    return output


# --- Whole models ----------------------------------------------------------------------------------------------------


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The masked layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def sparsify(model: nn.Module, layers: Iterable[nn.Linear]) -> None:
    """Turn linear layers of ``model`` into ``SparseLinear`` in place, keeping every weight; idempotent.

    Afterwards the state dict holds the masks too, a state dict without them is refused, and ``save_pretrained`` of a
    transformers model writes pruned weights as zeros.
    """
    for layer in layers:
        if isinstance(layer, SparseLinear):
            continue
        layer.__class__ = _sparse_class(type(layer))  # type: ignore[arg-type]
        assert isinstance(layer, SparseLinear)
        layer.register_buffer(MASK_NAME, masks.full(layer.out_features, layer.in_features, layer.weight.device))
        layer.straight_through, layer.statistics, layer.records, layer.recorder = True, None, True, None
        layer.reached = False
    if not _refusals(model):
        model.register_load_state_dict_pre_hook(_refuse_dense)
    _teach_save_pretrained()


@torch.no_grad()
def squash(model: nn.Module) -> None:
    """Fold masks into weights: pruned weights become exact zeros, and plain ``nn.Linear`` layers remain."""
    for layer in sparse_layers(model).values():
        layer.weight.copy_(layer.masked_weight())
        for name in (MASK_NAME, "straight_through", "statistics", "records", "recorder", "reached"):
            delattr(layer, name)
        layer.__class__ = _dense_class(type(layer))  # type: ignore[arg-type]
    for module in model.modules():
        for key in _refusals(module):
            del module._load_state_dict_pre_hooks[key]


def squashed_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that ``squash`` would leave, without changing the model."""
    return _folded(model.state_dict())


def _folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its masks folded into its weights."""
    folded = {key: value for key, value in state.items() if not _is_mask(key)}
    for key, mask_OJ in state.items():
        if _is_mask(key):
            weight = key.removesuffix(MASK_NAME) + "weight"
            folded[weight] = masks.apply(state[weight].detach(), mask_OJ)
    return folded


def _is_mask(key: str) -> bool:
    return key == MASK_NAME or key.endswith(f".{MASK_NAME}")


def _teach_save_pretrained() -> None:
    """Make ``PreTrainedModel.save_pretrained`` fold masks: once, for all models.

    On the class and not on the model: what is saved may be a model around the one that was sparsified, or a copy, and
    trainers pass a state dict of their own.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or getattr(modeling.PreTrainedModel.save_pretrained, "folds_masks", False):
        return
    original = modeling.PreTrainedModel.save_pretrained
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not sparse_layers(self):
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        state = bound.arguments.get("state_dict")
        bound.arguments["state_dict"] = _folded(self.state_dict() if state is None else state)
        return original(*bound.args, **bound.kwargs)

    save_pretrained.folds_masks = True  # type: ignore[attr-defined]
    modeling.PreTrainedModel.save_pretrained = save_pretrained


def sparsify_like(module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Sparsify the layers of ``module`` whose masks are in ``state_dict``, so that it can be loaded.

    For a checkpoint of a sparse run in a module that knows nothing of it: ``sparsify_like(module, state)``, then
    ``module.load_state_dict(state)``, and ``squash(module)`` for true zeros.
    """
    names = [key.removeprefix(prefix).removesuffix(f".{MASK_NAME}") for key in state_dict if _is_mask(key)]
    layers = [module.get_submodule(name) for name in names]
    new = [layer for layer in layers if isinstance(layer, nn.Linear) and not isinstance(layer, SparseLinear)]
    if new:
        sparsify(module, new)


def _refuse_dense(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    layers = sparse_layers(module)
    keys = [prefix + ".".join(filter(None, (name, MASK_NAME))) for name in layers]
    if keys and not any(key in state_dict for key in keys):
        raise ValueError(
            f"The model is sparsified, but this checkpoint holds no masks (no {keys[0]}): it "
            "was saved from a dense or a squashed model. To start sparse training from it, load it into the model "
            "before sparsifying, and leave ckpt_path out; to continue a sparse run, use a checkpoint that it wrote."
        )


def _refusals(module: nn.Module) -> list[int]:
    hooks = module._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if getattr(hook, "hook", hook) is _refuse_dense]


@functools.cache
def _sparse_class(cls: Any) -> type:
    if cls is nn.Linear:
        return SparseLinear
    # fully_shard has made a class FSDPLinear(FSDPModule, Linear) for this one module; it must stay an FSDPModule.
    assert cls.__bases__[-1] is nn.Linear and len(cls.__bases__) == 2, cls
    return type(f"{cls.__name__}Sparse", (cls.__bases__[0], SparseLinear), dict(cls.__dict__))


@functools.cache
def _dense_class(cls: Any) -> type:
    if cls is SparseLinear:
        return nn.Linear
    return type(cls.__name__.removesuffix("Sparse"), (cls.__bases__[0], nn.Linear), dict(cls.__dict__))
