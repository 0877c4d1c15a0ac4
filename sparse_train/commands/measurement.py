"""The perplexity that ``sparse-train prune`` measures afterwards."""

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_train.arguments import check_positive
from sparse_train.data.special_tokens import beginning
from sparse_train.data.texts import TextSource
from sparse_train.evaluation import evaluate_perplexity, token_ids, word_starts
from sparse_train.evaluation.perplexity import check_length, check_window
from sparse_train.models.sources import ModelSource


@dataclass(frozen=True)
class Perplexity:
    """The measurement. What can be wrong with it is found when it is created, and by ``check``.

    Args:
        source: of the tokenizer.
        text: its test split is read.
        window: tokens per window.
        max_tokens: use only the first tokens; None = all.
        bos: put the tokens with which the text begins in front of every window.
    """

    source: ModelSource
    text: TextSource
    window: int
    max_tokens: int | None
    bos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_positive("max_tokens", self.max_tokens)
        if not self._documents:
            raise ValueError(f"{self.text.name} has no text in its test split; give --perplexity a text that has one.")
        check_length(self._ids[: self.max_tokens], self.window)

    @functools.cached_property
    def _documents(self) -> list[str]:
        return self.text.documents("test")

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return self.source.tokenizer()

    @functools.cached_property
    def _ids(self) -> Tensor:
        return token_ids(self._documents, self._tokenizer, self.text.separator)

    @functools.cached_property
    def _prefix(self) -> list[int]:
        return beginning(self._tokenizer) if self.bos else []

    def check(self, model: Any) -> None:
        """Raise ValueError if windows are longer than the model's positions; its weights are not looked at."""
        check_window(model, self.window, len(self._prefix))

    def __call__(self, model: Any) -> dict[str, Any]:
        words, own = word_starts(self._documents, self._tokenizer, self.text.separator), len(self._prefix)
        found = evaluate_perplexity(
            model,
            self._ids[own:],  # the text begins with it, too
            words=None if words is None else words[own:],
            window=self.window,
            prefix=self._prefix,
            batch_size=1,
            max_tokens=self.max_tokens,
            model_name=self.source.name,
            data_name=self.text.name,
            progress=True,
        )
        return found.as_dict()
