"""Whether the blocks of a model can be calibrated one by one: ``check_order``."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.oneshot.forwards import Batch, call, forward_replaced, inference
from sparse_train.oneshot.store import changed, tensors_in

_log = logging.getLogger(__name__)

MISSING = (LookupError, AttributeError, TypeError)
"""What code raises that looks for something an earlier block has left, and finds nothing."""
WAY_OUT = (
    'Use Unstructured(group="model"), which calibrates the whole model in one pass; in training, calibration_batches=0 '
    "makes the first mask from the first steps."
)


def check_order(model: nn.Module, blocks: Sequence[nn.Module], sample: Batch) -> None:
    """Check, before any block is pruned, that each block runs once, and on the output of the block before it alone.

    The first block runs, all others answer with its output. Autograd tells from which of these answers an input comes;
    it does not see an output that the model has detached.

    Args:
        model: in any mode, which is restored.
        blocks: in their order.
        sample: of the calibration data.

    Raises:
        ValueError: blocks run in another order, or several times, or read the outputs of earlier blocks.
    """
    called, error = _order(model, blocks, sample, traced=True)
    if error is not None and called:  # code between blocks may refuse tensors with a gradient, as numpy() does
        called, error = _order(model, blocks, sample, traced=False)
    # otherwise it failed before the blocks, as it will again; or after them: a head that is not loaded yet
    if error is not None and called and called != list(range(len(blocks))):
        _log.warning(
            "Whether the blocks of %s run once each could not be told (%s: %s); in a model that loops over them, masks "
            "would be wrong.",
            type(model).__name__,
            type(error).__name__,
            error,
        )
    if called != list(range(len(called))):
        raise out_of_order(model, called)


@torch.inference_mode(False)
def _order(
    model: nn.Module, blocks: Sequence[nn.Module], sample: Batch, traced: bool
) -> tuple[list[int], Exception | None]:
    """The order in which blocks are called, and what the model has raised."""
    called: list[int] = []
    outputs: list[Any] = []
    made_by: dict[Tensor, int] = {}

    def answer(number: int, *inputs: Any) -> Any:
        called.append(number)
        earlier = {made_by[leaf] for leaf in _leaves(inputs) if leaf in made_by} - {number - 1}
        if earlier and called == list(range(number + 1)):
            raise needs_more(model, number, f"it reads the output of block {min(earlier)}")
        return changed(outputs[0], lambda tensor: _marked(tensor, number, made_by)) if traced else outputs[0]

    with ExitStack() as stack:
        stack.enter_context(inference(model))
        first = blocks[0].forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if not outputs:
                outputs.append(first(*args, **kwargs))
                torch.set_grad_enabled(traced)  # not before: nothing in front of the blocks has to be traced
            return answer(0)

        stack.enter_context(forward_replaced(blocks[0], run))
        for number, block in enumerate(blocks):
            if number:
                stack.enter_context(
                    forward_replaced(block, lambda *args, number=number, **kwargs: answer(number, args, kwargs))
                )
        try:
            call(model, sample)
        except (*MISSING, RuntimeError) as error:  # if a block itself fails, it will raise when its turn comes
            return called, error
    return called, None


def _marked(tensor: Tensor, number: int, made_by: dict[Tensor, int]) -> Tensor:
    """A copy that autograd can trace back to a block."""
    if not tensor.is_floating_point():
        return tensor
    leaf = tensor.detach().clone().requires_grad_()
    made_by[leaf] = number
    return leaf.clone()  # code between blocks may write into it, which autograd refuses for a leaf


def _leaves(values: Any) -> Iterator[Tensor]:
    """The leaves from which autograd has computed the tensors in nested values."""
    todo = [tensor.grad_fn for tensor in tensors_in(values) if tensor.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            yield node.variable
        new = {function for function, _ in node.next_functions if function is not None} - seen
        seen |= new
        todo.extend(new)


def out_of_order(model: nn.Module, called: Sequence[int], block: str = "") -> ValueError:
    """The error for blocks that do not run one after the other; ``called``: the order in which they came."""
    return ValueError(
        f"The blocks of {type(model).__name__} do not run one after the other, once each ({block}came "
        f"{list(called)}), so they cannot be calibrated one by one. {WAY_OUT}"
    )


def needs_more(model: nn.Module, number: int, why: str) -> ValueError:
    """The error for a block that reads more than the output of the block before it."""
    return ValueError(
        f"Block {number} of {type(model).__name__} does not run on the output of the block before it alone ({why}): "
        "it takes more from earlier ones, such as a skip connection or shared keys and values, so blocks cannot be "
        f"calibrated one by one. {WAY_OUT}"
    )
