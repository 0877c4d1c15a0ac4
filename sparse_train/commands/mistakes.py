"""One line for a mistake on the command line or in a recipe: what is wrong, where, and how to fix it.

jsonargparse reports what every member of a union of types would have accepted. For Lightning's trainer that is a page
in which the actual cause is easily missed. ``explain`` finds the cause in the message.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from sparse_train.commands.shipped import shipped_names
from sparse_train.suggestions import did_you_mean

_LONG = 4000  # characters; a longer text is the content of a file, or of a model
_KEY = re.compile(r'Parser key "([^"]+)"')
_TYPES = re.compile(r"Subtypes: \[(.*)\]$", re.MULTILINE)
_PLAIN_TYPES = {"int": "an int", "float": "a float", "str": "text", "bool": "true or false", "list": "a list"}


def explain(message: str, options: Iterable[str]) -> str:
    """The part of a message of jsonargparse that a user needs.

    Args:
        message: the argument of ``ArgumentParser.error``.
        options: option strings of the parser, such as "--trainer.max_steps".

    Returns:
        The first cause in the message, the key that it is about and, if there is one, a similar name. Messages of
        another form are returned unchanged.
    """
    options = [option for option in options if not option.endswith((".help", "+"))]
    found = [(match.start(1), match, say) for pattern, say in _CAUSES for match in [pattern.search(message)] if match]
    if not found:
        return message if len(message) < _LONG else message[:_LONG] + " ..."
    start, match, say = min(found, key=lambda cause: cause[0])
    where = ".".join(_KEY.findall(message[:start]))
    return say(match, where, message[:start], options)


def _no_option(match: re.Match[str], where: str, before: str, options: list[str]) -> str:
    name = match[1].partition("=")[0].rstrip("+")
    if not name.startswith("-"):
        return f"unexpected argument {name!r}."
    wrong, similar = _unknown(name.lstrip("-"), options, "--")
    return f"there is no option --{wrong}.{similar or _elsewhere(wrong, options, '--')}"


def _no_key(match: re.Match[str], where: str, before: str, options: list[str]) -> str:
    wrong, similar = _unknown(match[1], options, "")
    return f"there is no key {wrong!r}.{similar or _elsewhere(wrong, options)}"


def _elsewhere(name: str, options: list[str], dashes: str = "") -> str:
    """Keys of other sections with a similar last part, since a message may name a key without its section."""
    keys = [option.lstrip("-") for option in options]
    close = difflib.get_close_matches(name, {key.rpartition(".")[2] for key in keys}, n=1, cutoff=0.6)
    found = [key for key in keys if close and key.rpartition(".")[2] == close[0]]
    return f" Did you mean {' or '.join(repr(dashes + key) for key in found[:3])}?" if found else ""


def _unknown(name: str, options: list[str], dashes: str) -> tuple[str, str]:
    """The shortest beginning of a name such as "trainer.max_step" that does not exist, and names to use instead."""
    keys, parts = [option.lstrip("-") for option in options], name.split(".")
    for depth, part in enumerate(parts):
        group = "".join(f"{outer}." for outer in parts[:depth])
        neighbours = list(dict.fromkeys(key.removeprefix(group).split(".")[0] for key in keys if key.startswith(group)))
        if part not in neighbours:
            break
    few = f" {group[:-1]} has {', '.join(neighbours)}." if group and len(neighbours) < 15 else ""
    return group + part, did_you_mean(part, neighbours, prefix=dashes + group) or few


def _no_argument(match: re.Match[str], where: str, before: str, options: list[str]) -> str:
    path, name = match[1], match[2].rstrip("+")
    accepted = list(inspect.signature(_imported(path) or object).parameters)
    similar = did_you_mean(name.partition(".")[0], [*accepted, "init_args"])
    others = f" It has {', '.join(accepted) or 'none'}."
    return f"{where}: {path.rpartition('.')[2]} has no argument {name!r}.{similar or others}"


def _no_class(match: re.Match[str], where: str, before: str, options: list[str]) -> str:
    known = sorted(_class_names(before))
    files = f" Text files: --{where} TextFiles --{where}.train+ FILE (or test+)." if "TextFiles" in known else ""
    if "format" in match[0]:  # not a name, but the content of a file that jsonargparse has read
        return f"{where} is the name of a class: {', '.join(known)}, or your own as MODULE.CLASS.{files}"
    similar = did_you_mean(match[1].rpartition(".")[2], known)
    return f"{where}: there is no class {match[1]!r}." + (
        similar or f" There are {', '.join(known)}; name your own as MODULE.CLASS.{files}"
    )


def _abstract(match: re.Match[str], where: str, before: str, options: list[str]) -> str:
    known = ", ".join(sorted(_class_names(before)))
    recipe = " Is this a recipe of sparse-train fit?" if where == "model" else ""
    return f"{where}: say which {match[1].rpartition('.')[2]} these arguments are for: {known}.{recipe}"


def _wrong_value(match: re.Match[str], where: str, before: str, options: list[str]) -> str:
    types, value = match[1], match[2]
    if value == "None":
        return _must_be_given(where)
    if nested := re.fullmatch(r"NestedArg\(key='(.*)', val='(.*)'\)", value):
        where, value = f"{where}.{nested[1]}", nested[2]
    way_out = did_you_mean(value, _choices(types))
    if "Sequence" in types and not value.startswith("["):
        way_out = f" Write it as a list: [{value}]."
    elif value.startswith(("{", "[{")):  # probably meant as objects
        way_out = " A class is given by its name, or by a mapping with class_path and init_args."
    return f"{where} takes {_words(types)}, got {value!r}.{way_out}"


def _required(match: re.Match[str], where: str, before: str, options: list[str]) -> str:
    return _must_be_given(*(f"{where}.{name}" if where else name for name in match[1].split(", ")))


def _must_be_given(*names: str) -> str:
    return f"{' and '.join(names)} must be given, by {' and '.join(f'--{name}' for name in names)} or in a --config."


def _own(match: re.Match[str], where: str, before: str, options: list[str]) -> str:
    return match[1] if not where else f"{where}: {match[1]}"


def _no_group_file(match: re.Match[str], where: str, before: str, options: list[str]) -> str:
    keys = [option for option in options if option.startswith(f"--{where}.")]
    recipe = " Is this a recipe of sparse-train prune?" if where == "model" else ""
    return f"--{where} takes a YAML file, got {match[1]!r}. Its keys are also options: {', '.join(keys[:8])}.{recipe}"


def _no_file(match: re.Match[str], where: str, before: str, options: list[str]) -> str:
    path = match[1].removeprefix(f"{Path.cwd()}/")
    return f"{where}: there is no file {path}." + did_you_mean(path, shipped_names())


_CAUSES: list[tuple[re.Pattern[str], Callable[[re.Match[str], str, str, list[str]], str]]] = [
    (re.compile(r"[Uu]nrecognized arguments: (\S+)"), _no_option),
    (re.compile(r"does not accept option '([^']+)'"), _no_key),
    (re.compile(r"^Option '([^']+)' is not accepted"), _no_key),
    (re.compile(r"Problem with given class_path '([^']+)':\s+Option '([^']+)' is not accepted"), _no_argument),
    (re.compile(r"(?:Expected a dot import path string|Unexpected import path format): (\S+)"), _no_class),
    (re.compile(r"Expected an instantiatable class, but (\S+) is abstract"), _abstract),
    (re.compile(r"Problem with given class_path '([^']+)':\s+(?:No module named|module '\S+' has no attr)"), _no_class),
    (re.compile(r"Expected an? (\S.*)\. Got value: (.*)"), _wrong_value),
    (
        re.compile(
            r"Subtypes: \[(.*)\]\s+Errors:\n"
            r"(?:\s*(?:- Expected (?!a dot|an inst)|- Not a valid|Subclass types|- a class|- a dict).*\n)+?"
            r"\s*Given value type: .*\s+Given value: (.*)"
        ),
        _wrong_value,
    ),
    (re.compile(r"the following arguments are required: (.+)"), _required),
    (re.compile(r"File does not exist: '([^']+)'"), _no_file),
    (re.compile(r"Unable to load config '([^']+)'"), _no_group_file),
    (  # a ValueError of a class that was being created, which jsonargparse lists among its own errors
        re.compile(
            r"Union subtypes(?:.*\n)+?"
            r"\s*- (?!Expected|Not a valid|Problem|Does not|Import path|Parser key|a class|a dict)"
            r"([^\n]+(?:\n(?!\s*- |\s*Given value).*)*)"
        ),
        _own,
    ),
]
"""How each cause looks in a message, and the function that explains it."""


def _words(types: str) -> str:
    """ "an int or a float" for "<class 'int'>, <class 'float'>"."""
    if choices := _choices(types):
        return f"one of {', '.join(choices)}"
    names = [
        name.partition("[")[0].rpartition(".")[2] for name in re.sub(r"<class '([^']+)'>", r"\1", types).split(", ")
    ]
    return " or ".join(dict.fromkeys(_PLAIN_TYPES.get(name, name) for name in names if name != "NoneType"))


def _choices(types: str) -> list[str]:
    return [
        choice for literal in re.findall(r"Literal\[([^\]]*)\]", types) for choice in re.findall(r"'([^']*)'", literal)
    ]


def _class_names(message: str) -> set[str]:
    """Names of classes that match the last union of types in a message."""
    types = _TYPES.findall(message)
    paths = re.findall(r"[\w.]+\.\w+", types[-1]) if types else re.findall(r"[\w.]+\.\w+", message)[-1:]
    bases: list[type] = [base for base in map(_imported, paths) if inspect.isclass(base)]
    return {known.__name__ for base in bases for known in _subclasses(base)}


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
