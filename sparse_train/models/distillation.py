"""``Distillation``: train a student also on what a teacher says, such as the dense model that it is pruned from.

Shape suffixes: B batch, L sequence length, V vocabulary, H hidden width, T all tokens = B * L, N those of them that
count, C those of one chunk, K sums, X vocabulary or width.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse_train.models.sources import ModelSource, as_model_source

_log = logging.getLogger(__name__)

_CHUNK_ELEMENTS = 2**22
"""Elements of a chunk of tokens in float32, 16 MiB: large enough to keep a GPU busy, small beside any logits."""

# --- The losses, as pure functions -----------------------------------------------------------------------------------


def logit_losses(
    student_BLV: Tensor, teacher_BLV: Tensor, labels_BL: Tensor, temperature: float = 1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Cross-entropy on the labels and KL divergence from the teacher, of each token given those before it.

    The divergence is ``t**2 * KL(softmax(teacher / t) || softmax(student / t))`` with ``t`` the temperature; ``t**2``
    keeps its gradient comparable to cross-entropy's (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        student_BLV: logits in any float dtype; only they get a gradient.
        teacher_BLV: logits over the same vocabulary, in any float dtype.
        labels_BL: the token ids themselves (shifted here), ``ignore_index`` where there is no loss, of either kind.
        temperature: ``t``, above 0; larger = more weight on what the teacher holds for unlikely.
        ignore_index: label of positions without a loss.

    Returns:
        Mean cross-entropy and mean divergence over the labelled tokens (float32 scalars, nats a token; 0 where no
        token is labelled).
    """
    # The labels are shifted and not the logits: ``logits[:, :-1]`` would be copied whole.
    labels_T = F.pad(labels_BL[:, 1:], (0, 1), value=ignore_index).flatten()
    tokens_N = (labels_T != ignore_index).nonzero().squeeze(1)
    operands_T = student_BLV.flatten(0, 1), teacher_BLV.flatten(0, 1), labels_T
    sums, gradient = (partial(each, temperature=temperature) for each in (_logit_sums, _logit_gradient))
    sums_K = _chunked_sums(sums, gradient, tokens_N, *operands_T)
    ce, kldiv = sums_K / max(1, len(tokens_N))
    return ce, kldiv


def squarehead_loss(
    student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], attention_mask_BL: Tensor
) -> Tensor:
    """SquareHead: squared distance of hidden states, normalised by the teacher's size, summed over layers.

    ``sum over layers of MSE(teacher, student) / MSE(teacher, 0)`` (Kurtic et al., arXiv 2310.06927, section 2): the
    normalisation gives each layer the same weight, though states grow by orders of magnitude with depth.

    Args:
        student_states: of each layer, (B, L, H) in any float dtype; only they get a gradient.
        teacher_states: the same of the teacher.
        attention_mask_BL: 0 = padding, which is left out.

    Returns:
        A float32 scalar, 0 where every token is padding.
    """
    tokens_N = attention_mask_BL.flatten().nonzero().squeeze(1)
    losses = []
    for student_BLH, teacher_BLH in zip(student_states, teacher_states, strict=True):
        operands_TH = student_BLH.flatten(0, 1), teacher_BLH.flatten(0, 1)
        # sums do for means: numbers of tokens and features cancel out
        distance, size = _chunked_sums(_squared_sums, _squared_gradient, tokens_N, *operands_TH)
        losses.append(distance / size.clamp(min=torch.finfo(size.dtype).tiny))
    return torch.stack(losses).sum()


def _logit_sums(student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor, temperature: float) -> Tensor:
    student_CV, teacher_CV = student_CV.float(), teacher_CV.float()
    ce = F.cross_entropy(student_CV, labels_C, reduction="sum")
    log_q_CV = F.log_softmax(student_CV / temperature, dim=-1)
    log_p_CV = F.log_softmax(teacher_CV / temperature, dim=-1)
    kldiv = F.kl_div(log_q_CV, log_p_CV, reduction="sum", log_target=True)
    return torch.stack([ce, temperature**2 * kldiv])


def _logit_gradient(
    grad_K: Tensor, student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor, temperature: float
) -> Tensor:
    # cross-entropy: softmax(student) - one_hot(label); divergence: t * (q - p), p and q at temperature t
    ce, kldiv = grad_K
    student_CV, teacher_CV = student_CV.float(), teacher_CV.float()
    grad_CV = F.softmax(student_CV, dim=-1).mul_(ce)
    grad_CV.scatter_add_(1, labels_C[:, None], -ce.expand(len(labels_C), 1))
    q_CV = F.softmax(student_CV / temperature, dim=-1)
    p_CV = F.softmax(teacher_CV / temperature, dim=-1)
    return grad_CV.add_(q_CV.sub_(p_CV).mul_(temperature * kldiv))


def _squared_sums(student_CH: Tensor, teacher_CH: Tensor) -> Tensor:
    student_CH, teacher_CH = student_CH.float(), teacher_CH.float()
    return torch.stack([(student_CH - teacher_CH).square().sum(), teacher_CH.square().sum()])


def _squared_gradient(grad_K: Tensor, student_CH: Tensor, teacher_CH: Tensor) -> Tensor:
    return (student_CH.float() - teacher_CH.float()).mul_(2 * grad_K[0])


class _ChunkedSums(torch.autograd.Function):
    """Sums over tokens, chunk by chunk, holding the operands and nothing else until backward.

    Plain autograd would hold several float32 copies of all logits. Backward computes each chunk again, so that in both
    directions a chunk is all there is in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sums: Callable[..., Tensor],
        gradient: Callable[..., Tensor],
        tokens_N: Tensor,
        student_TX: Tensor,
        *constants_T: Tensor,
    ) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(tokens_N, student_TX, *constants_T)
        chunks = tokens_N.split(_chunk_size(student_TX))
        operands_T = (student_TX, *constants_T)
        return torch.stack([sums(*(each[chunk_C] for each in operands_T)) for chunk_C in chunks]).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:
        tokens_N, student_TX, *constants_T = ctx.saved_tensors
        grad_TX = torch.zeros_like(student_TX)
        for chunk_C in tokens_N.split(_chunk_size(student_TX)):
            grad_CX = ctx.gradient(grad_K, student_TX[chunk_C], *(each[chunk_C] for each in constants_T))
            grad_TX[chunk_C] = grad_CX.to(grad_TX.dtype)
        return None, None, None, grad_TX, *(None for _ in constants_T)


def _chunk_size(x_TX: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // x_TX.shape[-1])


def _chunked_sums(
    sums: Callable[..., Tensor],
    gradient: Callable[..., Tensor],
    tokens_N: Tensor,
    student_TX: Tensor,
    *constants_T: Tensor,
) -> Tensor:
    """``sums(student, *constants)`` (K,) over the tokens ``tokens_N``; a gradient goes to the student alone.

    Args:
        sums: of rows of all operands, added up over them, float32 (K,).
        gradient: of ``grad_K`` and the same rows, for those of the student, float32.
        tokens_N: rows that count, int64.
        student_TX: a row a token.
        constants_T: whatever else has an entry a token.
    """
    found_K: Tensor = _ChunkedSums.apply(sums, gradient, tokens_N, student_TX, *constants_T)  # type: ignore[no-untyped-call]
    return found_K


# --- The teacher -----------------------------------------------------------------------------------------------------


class Teacher:
    """A frozen model in eval mode.

    No ``nn.Module``: what holds one has none of its weights among its parameters, in its state dict or in checkpoints,
    and pruning, optimizers and sharding engines do not find them.

    Args:
        model: a transformers causal language model; frozen in place.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        return self.model(use_cache=False, **inputs)


class Distillation:
    """Train on ``hardness_ce * CE + hardness_kldiv * KL + hardness_squarehead * SquareHead``, see the functions above.

    The defaults are the plain sum of the field's two most used terms. What others use: AST (Huang et al., arXiv
    2407.20584), 2:4 with changing masks, weighs 1 CE : 2 KL at temperature 2 and found KL alone better than distances
    of hidden states; SquareHead's authors (arXiv 2310.06927) train with 1 CE : 1 SquareHead and no KL.

    A teacher that has not seen the run's kind of text can end up worse there than a student that has, and hold it back.
    Then train the dense model on the same text first and give that, or lower ``hardness_kldiv``.

    Args:
        teacher: a model source, or a Hugging Face id or local folder, with the student's tokenizer. Default: the
            student's own source, that is the model as it was before it was pruned. The teacher is held whole on every
            device, in the dtype that its source gives (in that of the run under true half precision), and goes through
            one forward a batch.
        hardness_ce: weight of cross-entropy on the text.
        hardness_kldiv: weight of the KL divergence from the teacher's next-token distribution.
        hardness_squarehead: weight of the normalised distance of hidden states, each layer's; over all tokens but
            padding, also those without a label. Wants a teacher as deep and as wide as the student.
        temperature: of both distributions in the divergence.

    Raises:
        ValueError: a weight is negative, nothing is learnt from the teacher, or the temperature is not above 0.
    """

    def __init__(
        self,
        teacher: ModelSource | str | None = None,
        hardness_ce: float = 1.0,
        hardness_kldiv: float = 1.0,
        hardness_squarehead: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        self.hardness = {"ce": hardness_ce, "kldiv": hardness_kldiv, "squarehead": hardness_squarehead}
        for name, value in self.hardness.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"hardness_{name} is the weight of a loss, at least 0 and finite, got {value}.")
        if hardness_kldiv == hardness_squarehead == 0:
            raise ValueError(
                "hardness_kldiv and hardness_squarehead are both 0, so nothing would be learnt from the teacher. Raise "
                "one of them, or leave distillation out to train on cross-entropy alone."
            )
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature divides logits, so it is above 0 and finite, got {temperature}.")
        self.teacher = None if teacher is None else as_model_source(teacher)
        self.temperature = temperature

    @property
    def uses_hidden_states(self) -> bool:
        """Whether ``losses`` wants outputs with ``hidden_states``."""
        return self.hardness["squarehead"] > 0

    def load_teacher(self, source: ModelSource, student: Any) -> Teacher:
        """The teacher, on CPU and as its source gives it.

        Args:
            source: the student's, for a teacher that is None.
            student: the transformers model to be trained, for what has to fit.

        Raises:
            ValueError: another vocabulary than the student's; or another depth or width, which SquareHead compares.
        """
        chosen = self.teacher or source
        teacher = chosen.load()
        theirs, own = teacher.config.get_text_config(), student.config.get_text_config()
        if theirs.vocab_size != own.vocab_size:
            raise ValueError(
                f"The teacher {chosen.name} has a vocabulary of {theirs.vocab_size} tokens and the student "
                f"{source.name} one of {own.vocab_size}, and they are compared token by token. Choose a teacher with "
                "the student's tokenizer, or none: then it is the student's dense model."
            )
        shapes = [(config.num_hidden_layers, config.hidden_size) for config in (theirs, own)]
        if self.uses_hidden_states and shapes[0] != shapes[1]:
            raise ValueError(
                f"SquareHead compares hidden states layer by layer, but the teacher {chosen.name} has {shapes[0][0]} "
                f"layers of width {shapes[0][1]} and the student {source.name} {shapes[1][0]} of {shapes[1][1]}. "
                "Choose a teacher of the student's shape, or set hardness_squarehead to 0 and distil by hardness_kldiv."
            )
        zeros = _share_of_zeros(teacher)
        if zeros > 0.2:
            _log.warning(
                "The teacher %s is sparse itself: %.0f %% of the weights of its linear layers are zero. To learn from "
                "the dense model, name that as the distillation's teacher.",
                chosen.name,
                100 * zeros,
            )
        return Teacher(teacher)

    def losses(self, student: Any, teacher: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the student can learn from one batch: "ce", "kldiv" and, where it is weighted, "squarehead".

        Args:
            student, teacher: outputs of transformers models for ``batch``, with ``logits`` (B, L, V) and, where
                ``uses_hidden_states``, ``hidden_states``.
            batch: with ``labels`` and ``attention_mask``, each (B, L).

        Returns:
            Unweighted float32 scalars.
        """
        ce, kldiv = logit_losses(student.logits, teacher.logits, batch["labels"], self.temperature)
        losses = {"ce": ce, "kldiv": kldiv}
        if self.uses_hidden_states:  # the first of them are the embeddings, which are not pruned
            states = student.hidden_states[1:], teacher.hidden_states[1:]
            losses["squarehead"] = squarehead_loss(*states, batch["attention_mask"])
        return losses

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The loss to train on, from what ``losses`` gives."""
        weighted = [self.hardness[name] * loss for name, loss in losses.items() if self.hardness[name] > 0]
        return torch.stack(weighted).sum()


def _share_of_zeros(model: nn.Module) -> float:
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    nonzero = sum(int(weight.count_nonzero()) for weight in weights)
    size = sum(weight.numel() for weight in weights)
    return 1 - nonzero / size if size else 0.0
