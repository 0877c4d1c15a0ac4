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

from sparse_train.sources import ModelSource, as_model_source

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
    function = partial(_logit_sums, temperature=temperature)
    sums_K = _chunked(function, tokens_N, student_BLV.flatten(0, 1), teacher_BLV.flatten(0, 1), labels_T)
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
        sums_K = _chunked(_squared_sums, tokens_N, student_BLH.flatten(0, 1), teacher_BLH.flatten(0, 1))
        distance, size = sums_K  # sums do for means: numbers of tokens and features cancel out
        losses.append(distance / size.clamp(min=torch.finfo(size.dtype).tiny))
    return torch.stack(losses).sum()


def _logit_sums(student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor, temperature: float) -> Tensor:
    student_CV, teacher_CV = student_CV.float(), teacher_CV.float()
    ce = F.cross_entropy(student_CV, labels_C, reduction="sum")
    kldiv = F.kl_div(
        F.log_softmax(student_CV / temperature, dim=-1),
        F.log_softmax(teacher_CV / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )
    return torch.stack([ce, temperature**2 * kldiv])


def _squared_sums(student_CH: Tensor, teacher_CH: Tensor) -> Tensor:
    student_CH, teacher_CH = student_CH.float(), teacher_CH.float()
    return torch.stack([(student_CH - teacher_CH).square().sum(), teacher_CH.square().sum()])


class _ChunkedSums(torch.autograd.Function):
    """The sum of ``function`` over chunks of tokens, holding its operands and nothing else until backward.

    Plain autograd would hold several float32 copies of all logits. Backward computes each chunk again, so that in both
    directions a chunk is all there is in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], tokens_N: Tensor, student_TX: Tensor, *constants_T: Tensor
    ) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(tokens_N, student_TX, *constants_T)
        chunks = tokens_N.split(_chunk_size(student_TX))
        return torch.stack(
            [function(*(each[chunk_C] for each in (student_TX, *constants_T))) for chunk_C in chunks]
        ).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:
        tokens_N, student_TX, *constants_T = ctx.saved_tensors
        grad_TX = torch.zeros_like(student_TX)
        for chunk_C in tokens_N.split(_chunk_size(student_TX)):
            student_CX = student_TX[chunk_C].requires_grad_()
            with torch.enable_grad():
                sums_K = ctx.function(student_CX, *(each[chunk_C] for each in constants_T))
            (grad_TX[chunk_C],) = torch.autograd.grad(sums_K, student_CX, grad_K)
        return None, None, grad_TX, *(None for _ in constants_T)


def _chunk_size(x_TX: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // x_TX.shape[-1])


def _chunked(function: Callable[..., Tensor], tokens_N: Tensor, student_TX: Tensor, *constants_T: Tensor) -> Tensor:
    """``function`` (K,) of the rows ``tokens_N`` of all operands, where it is a sum over them; see ``_ChunkedSums``."""
    sums_K: Tensor = _ChunkedSums.apply(function, tokens_N, student_TX, *constants_T)  # type: ignore[no-untyped-call]
    return sums_K


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
        self.model.config.use_cache = False

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)


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
            device, in the precision of the run, and goes through one forward a batch.
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
