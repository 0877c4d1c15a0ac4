"""``Distillation``: train a student also on the outputs of a teacher, such as the dense model that it was pruned from.

Shape suffixes: B batch, L sequence length, V vocabulary, H hidden width.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_train.models.losses import logit_losses, squarehead_loss
from sparse_train.models.sources import ModelSource, as_model_source


class Teacher:
    """A transformers model, frozen in place, in eval mode.

    Not an ``nn.Module``, so that a module that holds a teacher does not have its weights among its parameters, in its
    state dict or in checkpoints, and pruning, optimizers and sharding engines do not find them.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        return self.model(use_cache=False, **inputs)


class Distillation:
    """Train on ``hardness_ce * CE + hardness_kldiv * KL + hardness_squarehead * SquareHead``, see the functions
    ``logit_losses`` and ``squarehead_loss``.

    The defaults are the plain sum of the two most common terms. What others use: AST (Huang et al., arXiv 2407.20584),
    2:4 with changing masks, weights CE and KL 1 to 2 at temperature 2, and found KL alone better than distances of
    hidden states; SquareHead's authors (arXiv 2310.06927) train with CE and SquareHead 1 to 1, without KL.

    A teacher that has not seen the run's kind of text can end up worse at it than the student, and hold it back. Then
    train the dense model on the same text first and use that as the teacher, or lower ``hardness_kldiv``.

    Args:
        teacher: a model source, or a Hugging Face id or local folder, with the student's tokenizer. Default: the
            student's own source, that is the model before it was pruned. Every device holds the whole teacher, in the
            dtype that its source gives (under true half precision, in that of the run).
        hardness_ce: weight of cross-entropy on the text.
        hardness_kldiv: weight of the KL divergence from the teacher's next-token distribution.
        hardness_squarehead: weight of the normalised distance of the hidden states of each layer, over all tokens
            except padding, including those without a label. Needs a teacher with the student's depth and width.
        temperature: of both distributions in the divergence.
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
                "one of them, or leave distillation out to train only on cross-entropy."
            )
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature divides logits, so it is above 0 and finite, got {temperature}.")
        self.teacher = None if teacher is None else as_model_source(teacher)
        self.temperature = temperature

    @property
    def uses_hidden_states(self) -> bool:
        """Whether ``losses`` needs outputs with ``hidden_states``."""
        return self.hardness["squarehead"] > 0

    def load_teacher(self, source: ModelSource, student: Any) -> Teacher:
        """The teacher, on the CPU and in the dtype of its source.

        Args:
            source: that of the student, used if ``teacher`` is None.
            student: the transformers model to be trained, which the teacher has to match.
        """
        chosen = self.teacher or source
        teacher = chosen.load()
        theirs, own = teacher.config.get_text_config(), student.config.get_text_config()
        for name in ("vocab_size", "num_hidden_layers", "hidden_size") if self.uses_hidden_states else ("vocab_size",):
            if getattr(theirs, name) != getattr(own, name):
                raise ValueError(
                    f"The teacher {chosen.name} has a {name} of {getattr(theirs, name)} and the student {source.name} "
                    f"one of {getattr(own, name)}. Choose a teacher that fits, or none: the default is the student's "
                    "dense model."
                )
        return Teacher(teacher)

    def losses(self, student: Any, teacher: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The unweighted losses of one batch: "ce", "kldiv" and, if it has a weight, "squarehead".

        Args:
            student, teacher: outputs of transformers models for ``batch``, with ``logits`` (B, L, V) and, if
                ``uses_hidden_states``, ``hidden_states``.
            batch: with ``labels`` and ``attention_mask``, each (B, L).
        """
        ce, kldiv = logit_losses(student.logits, teacher.logits, batch["labels"], self.temperature)
        losses = {"ce": ce, "kldiv": kldiv}
        if self.uses_hidden_states:  # the first ones are the embeddings, which are not pruned
            states = student.hidden_states[1:], teacher.hidden_states[1:]
            losses["squarehead"] = squarehead_loss(*states, batch["attention_mask"])
        return losses

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The loss to train on, from the result of ``losses``."""
        weighted = [self.hardness[name] * loss for name, loss in losses.items() if self.hardness[name] > 0]
        return torch.stack(weighted).sum()
