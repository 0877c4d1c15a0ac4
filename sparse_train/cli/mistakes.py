"""One line for a mistake on the command line or in a recipe: what is wrong, where, and what to write instead.

jsonargparse reports what every member of a union of types would have accepted. For Lightning's trainer that is a page
in which the actual cause is easily missed. ``explain`` finds the first cause in the message.
"""

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser

import sparse_train
from sparse_train.arguments import did_you_mean

_LONG = 4000  # characters; a longer text is the content of a file, or of a model
_KEY = re.compile(r'Parser key "([^"]+)"')
_TYPES = re.compile(r"Subtypes: \[(.*)\]$", re.MULTILINE)
_CAUSE = re.compile(
    r"""
      (?:[Uu]nrecognized\ arguments:\ |does\ not\ accept\ option\ ['"]|^Option\ ['"])(?P<option>[^\s'"=]+)
    | Problem\ with\ given\ class_path\ '(?P<owner>[^']+)':\s+Option\ '(?P<argument>[^']+)'\ is\ not\ accepted
    | (?:dot\ import\ path\ string|Unexpected\ import\ path\ format):\ (?P<name>\S+)
    | Expected\ an\ instantiatable\ class,\ but\ (?P<abstract>\S+)
    | Problem\ with\ given\ class_path\ '(?P<missing>[^']+)':\s+(?:No\ module\ named|module\ '\S+'\ has\ no\ attr)
    | Unable\ to\ load\ config\ '(?P<group>[^']+)'
    | Expected\ an?\ (?P<type>\S.*)\.\ Got\ value:\ (?P<value>.*)
    | Subtypes:\ \[(?P<types>.*)\]\s+Errors:\n
      (?:\s*(?:-\ Expected\ (?!a\ dot|an\ inst)|-\ Not\ a\ valid|Subclass\ types|-\ a\ class|-\ a\ dict).*\n)+?
      \s*Given\ value\ type:\ .*\s+Given\ value:\ (?P<given>.*)
    | Union\ subtypes(?:.*\n)+?  # a ValueError of a class that was being created, which is listed among others
      \s*-\ (?!Expected|Not\ a\ valid|Problem|Does\ not|Import\ path|Parser\ key|a\ class|a\ dict)
      (?P<own>[^\n]+(?:\n(?!\s*-\ |\s*Given\ value).*)*)
    """,
    re.VERBOSE,
)
"""The causes that a message can have; the leftmost is what went wrong."""


def explain(message: str, options: Iterable[str]) -> str:
    """The part of a message of jsonargparse that a user needs.

    Args:
        message: the argument of ``ArgumentParser.error``.
        options: option strings of the parser, such as "--trainer.max_steps".

    Returns:
        The first cause in the message, the key that it is about and, if there is one, a similar name. Messages of
        another form are returned unchanged.
    """
    found = _CAUSE.search(message)
    if found is None:
        return message if len(message) < _LONG else message[:_LONG] + " ..."
    keys = [option.lstrip("-") for option in options if not option.endswith((".help", "+"))]
    before = message[: found.start()]
    where = ".".join(_KEY.findall(before))
    if found["option"]:
        return _no_option(found["option"].rstrip("+"), keys, "--" if "nrecognized" in found[0] else "")
    if found["argument"]:
        said = _no_argument(found["owner"], found["argument"].rstrip("+"))
    elif name := found["name"] or found["missing"]:
        said = f"there is no class {name!r}.{_classes(name, before)}"
    elif found["abstract"]:
        said = f"say which class these arguments are for.{_classes('', before)}"
    elif found["group"]:
        own = ", ".join(f"--{key}" for key in keys if key.startswith(f"{where}."))
        said = f"takes a YAML file, got {found['group']!r}. Its keys are also options: {own}."
    elif found["own"]:
        said = found["own"]
    elif "None" in (found["value"], found["given"]):
        return f"{where} must be given, by --{where} or in a --config."
    else:
        said = _wrong_value(found["type"] or found["types"], found["value"] or found["given"])
    return f"{where}: {said}" if where else said


def _no_option(name: str, keys: Sequence[str], dashes: str) -> str:
    if dashes and not name.startswith("-"):
        return f"unexpected argument {name!r}."
    parts = name.lstrip("-").split(".")
    for depth, part in enumerate(parts):  # the shortest beginning that does not exist
        group = "".join(f"{outer}." for outer in parts[:depth])
        there = list(dict.fromkeys(key.removeprefix(group).split(".")[0] for key in keys if key.startswith(group)))
        if part not in there:
            break
    similar = did_you_mean(part, there, prefix=dashes + group)
    if not similar:  # users leave out sections
        lasts = {key.rpartition(".")[2]: key for key in reversed(keys)}
        close = difflib.get_close_matches(parts[-1], lasts, n=1)
        similar = f" Did you mean {dashes + lasts[close[0]]!r}?" if close else ""
    few = f" {group[:-1]} has {', '.join(there)}." if group and len(there) < 15 else ""
    return f"there is no {'option' if dashes else 'key'} {dashes}{group}{part}.{similar or few}"


def _no_argument(owner: str, name: str) -> str:
    owned = _imported(owner)
    # jsonargparse also finds the arguments that a class hands on as ``**settings``
    accepted = ArgumentParser().add_class_arguments(owned, fail_untyped=False) if owned else []
    similar = did_you_mean(name.partition(".")[0], [*accepted, "init_args"])
    return f"{owner.rpartition('.')[2]} has no argument {name!r}." + (similar or f" It has {', '.join(accepted)}.")


def _classes(name: str, before: str) -> str:
    """What to write instead of the name of a class: a similar one, or all that the last types in a message allow."""
    types = _TYPES.findall(before)
    paths = re.findall(r"[\w.]+\.\w+", types[-1] if types else before)
    bases = [base for base in map(_imported, paths) if inspect.isclass(base)]
    known = sorted({each.__name__ for base in bases for each in _subclasses(base)})
    module, _, last = name.rpartition(".")
    ours = () if module else sparse_train.__all__  # some messages name no type
    similar = did_you_mean(last, known) or did_you_mean(last, ours)
    return similar or f" There are {', '.join(known)}; name your own as MODULE.CLASS."


def _wrong_value(types: str, value: str) -> str:
    literals = re.findall(r"Literal\[([^\]]*)\]", types)
    choices = [choice for literal in literals for choice in re.findall(r"'([^']*)'", literal)]
    plain = re.sub(r"<class '([^']+)'>", r"\1", types).replace(", NoneType", "")
    takes = f"one of {', '.join(choices)}" if choices else plain.replace(", ", " or ")
    way_out = " A class is given by its name, or by a mapping with class_path and init_args." if "{" in value else ""
    return f"takes {takes}, got {value!r}.{did_you_mean(value, choices) or way_out}"


def _subclasses(base: type) -> Iterator[type]:
    if not inspect.isabstract(base) and not base.__name__.startswith("_"):
        yield base
    subclasses: list[type] = base.__subclasses__()
    for subclass in subclasses:
        yield from _subclasses(subclass)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
