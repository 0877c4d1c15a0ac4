"""One line for a mistake on the command line or in a recipe: what is wrong, where, and what to write instead.

jsonargparse reports what every member of a union of types would have accepted. For Lightning's trainer that is a page
in which the actual cause is easily missed. ``explain`` finds the first cause in the message.
"""

import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from itertools import accumulate
from typing import Any, get_args

from jsonargparse import ArgumentParser

from sparse_train.arguments import did_you_mean

_FILES = "Files are given by --text FILE, or in a recipe by TextFiles with train: [FILE]."
_LONG = 4000  # characters; a longer text is the content of a file, or of a model
_KEY = re.compile(r'Parser key "([^"]+)"')
_CAUSE = re.compile(
    r"""
      (?:[Uu]nrecognized\ arguments:\ |does\ not\ accept\ option\ ['"]|^Option\ ['"])(?P<option>[^\s'"=]+)
    | Problem\ with\ given\ class_path\ '(?P<owner>[^']+)':\s+Option\ '(?P<argument>[^']+)'\ is\ not\ accepted
    | (?:dot\ import\ path\ string|Unexpected\ import\ path\ format):\ (?P<name>\S+)
    | Expected\ an\ instantiatable\ class,\ but\ (?P<abstract>\S+)
    | Problem\ with\ given\ class_path\ '(?P<missing>[^']+)':\s+(?:No\ module\ named|module\ '\S+'\ has\ no\ attr)
    | (?P<required>the\ following\ arguments\ are\ required:\ .*|Requirement\ '.*|Neither\ `\w+`\ nor\ .*)
    | Unable\ to\ load\ config\ '(?P<group>[^']+)'
    | Expected\ a\ path\ but\ (?P<text>\S+\.(?:txt|jsonl))\ either
    | Expected\ an?\ (?P<type>\S.*)\.\ Got\ value:\ (?P<value>.*)
    | Subtypes:\ \[(?P<types>.*)\]\s+Errors:\n
      (?:\s*(?:-\ Expected\ (?!a\ dot|an\ inst)|-\ Not\ a\ valid|Subclass\ types|-\ a\ class|-\ a\ dict).*\n)+?
      \s*Given\ value\ type:\ .*\s+Given\ value:\ (?P<given>.*)
    | Union\ subtypes(?:.*\n)+?  # a ValueError of a class that was being created, which is listed among others
      \s*-\ (?!Expected|Not\ a\ valid|Problem|Does\ not|Import\ path|Unexpected\ import|Parser\ key|a\ class|a\ dict)
      (?P<own>[^\n]+(?:\n(?!\s*-\ |\s*Given\ value).*)*)
    """,
    re.VERBOSE,
)
"""The causes that a message can have; the leftmost is what went wrong."""


def explain(message: str, options: Mapping[str, Any]) -> str:
    """The part of a message of jsonargparse that a user needs.

    Args:
        message: the argument of ``ArgumentParser.error``.
        options: actions of the parser by option string, such as "--trainer.max_steps".

    Returns:
        The first cause in the message, the key that it is about and, if there is one, a similar name. Messages of
        another form are returned unchanged.
    """
    cause = _CAUSE.search(message)
    if cause is None:
        return message if len(message) < _LONG else message[:_LONG] + " ..."
    before = message[: cause.start()]
    where = ".".join(_KEY.findall(before))
    if cause["option"]:
        return _no_option(cause["option"].rstrip("+"), options, "--" if "nrecognized" in cause[0] else "")
    if cause["argument"]:
        accepted = _arguments_of(cause["owner"])
        name = cause["argument"].rstrip("+")
        similar = did_you_mean(name.partition(".")[0], [*accepted, "init_args"])
        similar = similar or (f" It has {', '.join(accepted)}." if accepted else "")
        if name == "class_path":
            similar = " Beside class_path, arguments are below init_args."
        elif cause["owner"].endswith(".Callback"):  # recipes had DynamicPruning in trainer.callbacks
            similar = f" Name a callback before; DynamicPruning's arguments are options such as --pruning.{name}."
        said = f"{cause['owner'].rpartition('.')[2]} has no argument {name!r}.{similar}"
    elif name := cause["name"] or cause["missing"]:
        own, known, owners = name.rpartition(".")[2], _classes(), re.findall(r"given class_path '([^']+)'", before)
        action = _arguments_of(owners[-1]).get(where.rpartition(".")[2]) if owners else options.get(f"--{where}")
        parts = [hint := getattr(action, "_typehint", object), *get_args(hint)]  # of a union, and of lists in it
        kinds = tuple(each for part in parts for each in (part, *get_args(part)) if isinstance(each, type))
        fitting = [each for each, cls in known.items() if issubclass(cls, kinds) and not inspect.isabstract(cls)]
        if own in fitting and name in (own, f"sparse_train.{own}"):  # the class fits another member of the union
            return explain(message[: cause.start()] + message[cause.end() :], options)
        similar = did_you_mean(own, fitting)
        other = _FILES if where == "data.text" else "Name your own as MODULE.CLASS."
        said = f"there is no class {name!r}.{similar or f' {other}'}"
        if name == "None":
            said = "takes null and not None; an argument of a class only in a YAML file."
        elif name.endswith((".yaml", ".yml")):
            said = f"there is no file {name}."
        elif where == "pruning" and not similar and "." not in name:
            said = "takes null or a YAML file; its arguments are options, such as --pruning.mask_structure."
        elif own in known:
            said = f"{name} is none of {', '.join(sorted(fitting))}.{getattr(known[own], 'way_out', similar)}"
    elif cause["abstract"]:
        said = "say which class these arguments are for, by its name. Beside class_path, they are below init_args."
    elif cause["text"]:
        said = f"takes a class. {_FILES}"
    elif cause["group"]:
        said = f"takes a YAML file, got {cause['group']!r}. Its keys are also options, such as --{where}.KEY."
    elif said_so := cause["required"] or cause["own"]:
        said = said_so
    elif "None" in (cause["value"], cause["given"]):
        return f"{where} must be given, by --{where} or in a --config."
    else:
        said = _wrong_value(cause["type"] or cause["types"], cause["value"] or cause["given"] or "")
    return f"{where}: {said}" if where else said


def _no_option(name: str, options: Iterable[str], dashes: str) -> str:
    if dashes and not name.startswith("-"):
        return f"unexpected argument {name!r}.{' A recipe is given by --config.' if name.endswith('.yaml') else ''}"
    options = [option for option in options if option.startswith("--") and not option.endswith((".help", "+"))]
    if "--pruning" in options:  # its arguments are those of a class, and no options of the parser
        options += [f"--pruning.{each}" for each in _arguments_of("sparse_train.callbacks.DynamicPruning")]
    keys = [option.removeprefix("--").split(".") for option in options]
    known = [".".join(key[: depth + 1]) for key in keys for depth in range(len(key))]
    beginnings = accumulate(name.lstrip("-").split("."), "{}.{}".format)
    name = next((each for each in beginnings if each not in known), name)  # the shortest that does not exist
    lasts = {each.rpartition(".")[2]: each for each in reversed(known)}  # users leave out sections
    close = difflib.get_close_matches(name.rpartition(".")[2], lasts, n=1)
    section = name.rpartition(".")[0]
    beside = {last for parent, _, last in (key.rpartition(".") for key in known) if parent == section}
    beside -= {"h", "help", "print_shtab"}
    similar = f" Did you mean {dashes + lasts[close[0]]!r}?" if close else f" There are {', '.join(sorted(beside))}."
    return f"there is no {'option' if dashes else 'key'} {dashes}{name}.{similar}"


def _arguments_of(path: str) -> dict[str, Any]:
    """The actions of jsonargparse for a class's arguments, also for those that it hands on as ``**settings``."""
    module, _, owner = path.rpartition(".")
    parser = ArgumentParser()
    names = parser.add_class_arguments(getattr(import_module(module), owner), fail_untyped=False)
    return {name: parser._option_string_actions.get(f"--{name}") for name in names}


def _classes() -> dict[str, type]:
    modules = [module for name, module in sys.modules.items() if re.match(r"sparse_train\.(?!cli|report)", name)]
    classes = {name: each for module in modules for name, each in vars(module).items() if inspect.isclass(each)}
    return {name: each for name, each in classes.items() if not name.startswith("_")}


def _wrong_value(types: str, value: str) -> str:
    literals = re.findall(r"Literal\[([^\]]*)\]", types)
    choices = [choice for literal in literals for choice in re.findall(r"'([^']*)'", literal)]
    plain = re.sub(r"<class '([^']+)'>", r"\1", types).replace(", NoneType", "")
    takes = f"one of {', '.join(choices)}" if choices else plain.replace(", ", " or ")
    if re.search(r"\b(Sequence|list)\b", types) and not value.startswith("["):
        return f"takes a list, such as [{value}], got {value!r}."
    way_out = " A class is given by its name, or by a mapping with class_path and init_args." if "{" in value else ""
    return f"takes {takes}, got {value!r}.{did_you_mean(value, choices) or way_out}"
