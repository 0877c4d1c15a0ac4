"""Where conversations come from, for instruction tuning: a hub, files, or the Python package index.

Recipes name these classes, as ``data.text``; a new source is a subclass.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_train.data.texts import PackagedWikipedia, Split, TrainingText, column_of, fields_of
from sparse_train.models import packaged

Conversation = list[dict[str, Any]]
"""Messages, each with a ``role`` ("system", "user", "assistant") and a ``content`` of text."""


class Conversations(TrainingText):
    """Conversations in up to three splits. ``TextBlocks`` trains on what the assistant says in them."""

    @abstractmethod
    def conversations(self, split: Split) -> list[Conversation]:
        """The conversations of a split; an empty list if the source has no such split."""


_QUESTIONS = (
    "What do you know about {title}?",
    "Tell me about {title}.",
    "Explain in a few sentences: {title}",
    "Give me a short introduction to {title}.",
)


@dataclass
class PackagedQuestions(Conversations):
    """A question about each article of ``PackagedWikipedia``, in one of four wordings; its lead section is the answer.

    The text is real, the dialogue is not; enough to run instruction tuning without a hub. A hash of the title decides
    the wording. The split is that of the articles: those held out there are held out here.
    """

    @property
    def name(self) -> str:
        return f"Questions about {packaged.TEXT_NAME}"

    def conversations(self, split: Split) -> list[Conversation]:
        articles = PackagedWikipedia().articles(split)
        return [_exchange(_question(title), answer) for title, answer in articles]


@dataclass
class HubConversations(Conversations):
    """A data set of the Hugging Face hub, or a local copy of one, with a column of messages.

    Tested on local copies, because its authors had no access to a hub.

    Args:
        path: id such as "HuggingFaceTB/smoltalk", or a folder.
        subset: configuration such as "everyday-conversations".
        column: column with the messages.
        splits: the data set's names for our splits, in the syntax of datasets, such as "train[:1%]".
        max_conversations: read only the first ones of each split, by streaming; None = all.
    """

    path: str
    subset: str | None = None
    column: str = "messages"
    splits: dict[Split, str] = field(default_factory=lambda: {"train": "train", "validation": "test"})
    max_conversations: int | None = None

    @property
    def name(self) -> str:
        return f"{self.path}/{self.subset}" if self.subset else self.path

    def conversations(self, split: Split) -> list[Conversation]:
        from datasets import load_dataset

        if split not in self.splits:
            return []
        streaming = self.max_conversations is not None
        data = load_dataset(self.path, self.subset, split=self.splits[split], streaming=streaming)
        if self.max_conversations is not None:
            data = data.take(self.max_conversations)
        found: list[Conversation] = column_of(data, self.column, self.name)
        return found


@dataclass
class ConversationFiles(Conversations):
    """Local ``.jsonl`` files, one conversation per line: ``{"messages": [{"role": "user", "content": "..."}, ...]}``.

    Args:
        train, validation, test: paths, per split.
        column: field of a line that holds the messages.
    """

    train: Sequence[str] = ()
    validation: Sequence[str] = ()
    test: Sequence[str] = ()
    column: str = "messages"

    @property
    def name(self) -> str:
        return ", ".join(Path(path).name for path in [*self.train, *self.validation, *self.test])

    def conversations(self, split: Split) -> list[Conversation]:
        paths: Sequence[str] = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        return [conversation for path in paths for conversation in self._read(Path(path))]

    def _read(self, path: Path) -> list[Any]:
        try:
            return fields_of(path, self.column)
        except ValueError as error:
            raise ValueError(
                f'{error} Each line must be {{"{self.column}": [{{"role": "user", "content": "..."}}, {{"role": '
                '"assistant", "content": "..."}]}; for ShareGPT, rename "from" and "value".'
            ) from None


def _exchange(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _question(title: str) -> str:
    # not the bytes that decide the split; otherwise each split would have only some of the wordings
    return _QUESTIONS[hashlib.sha256(title.encode()).digest()[4] % len(_QUESTIONS)].format(title=title)
