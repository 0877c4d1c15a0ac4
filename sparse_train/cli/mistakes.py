"""The part of jsonargparse's messages that a user needs, and the name that was meant.

jsonargparse reports what every member of a union of types would have accepted. For Lightning's trainer that is a page
in which the actual cause is easily missed: the first line that is not about a type.
"""

import difflib
import inspect
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from itertools import accumulate

from jsonargparse import ArgumentParser

from sparse_train.arguments import did_you_mean

_LONG = 1000  # characters; a longer value is the content of a file, or of a model
_ABOUT_TYPES = re.compile(
    r"$|Parser key \S+:$|Does not validate|Subtypes|Errors:$|Expected [^:]*$|Not a valid|Subclass types|a class path|"
    r"a dict|Given value type|Problem with given|Import path"
)
_NO_OPTION = re.compile(r"[Uu]nrecognized arguments: (\S+)|.*accept option ['\"]([^'\"]+)|Option '([^']+)'")
_NO_CLASS = re.compile(
    r"(?:Expected a dot import path string|Unexpected import path format): (\S+)|(?:No module named|module) '"
)


def explain(message: str, options: Iterable[str]) -> str:
    """The cause in a message of jsonargparse, its key, and a similar name, or all names that there are.

    Args:
        message: the argument of ``ArgumentParser.error``.
        options: option strings of the parser, such as "--trainer.max_steps".
    """
    lines = [line.strip(" -") for line in message.splitlines()]
    cause = next((line for line in lines if not _ABOUT_TYPES.match(line)), message)
    before = message.partition(cause)[0]
    *_, owner = ["", *re.findall(r"given class_path '([^']+)'", before)]
    if found := _NO_OPTION.match(cause):
        name = next(filter(None, found.groups())).partition("=")[0].rstrip("+")
        if not owner:
            return _no_option(name, options, "--" if found[1] else "")
        module, _, cls = owner.rpartition(".")
        # jsonargparse also finds the arguments that a class hands on as ``**settings``
        accepted = ArgumentParser().add_class_arguments(getattr(import_module(module), cls), fail_untyped=False)
        similar = did_you_mean(name.partition(".")[0], [*accepted, "init_args"]) or f" It has {', '.join(accepted)}."
        cause = f"{cls} has no argument {name!r}.{similar}"
    elif found := _NO_CLASS.match(cause):
        name = found[1] or owner
        modules = [module for known, module in sys.modules.items() if known.startswith("sparse_train")]
        classes = {known for module in modules for known, each in vars(module).items() if inspect.isclass(each)}
        similar = did_you_mean(name.rpartition(".")[2], classes) or " Name your own as MODULE.CLASS."
        cause = f"there is no class {name!r}.{similar}"
    elif cause.startswith("Given value:"):  # of the innermost union, whose types have come last
        *_, types = ["others", *re.findall(r"Subtypes: (.*)", before)]
        cause = f"expected one of {types}, got {cause.partition(': ')[2]!r}."
    where = ".".join(re.findall(r'Parser key "([^"]+)"', before))
    return (f"{where}: {cause}" if where else cause)[:_LONG]


def _no_option(name: str, options: Iterable[str], dashes: str) -> str:
    if dashes and not name.startswith("-"):
        return f"unexpected argument {name!r}."
    keys = [option.lstrip("-").split(".") for option in options if not option.endswith((".help", "+"))]
    known = [".".join(key[: depth + 1]) for key in keys for depth in range(len(key))]
    beginnings = accumulate(name.lstrip("-").split("."), "{}.{}".format)
    name = next((each for each in beginnings if each not in known), name)  # the shortest that does not exist
    section, _, last = name.rpartition(".")
    lasts = {each.rpartition(".")[2]: each for each in reversed(known)}  # users leave out sections
    if close := difflib.get_close_matches(last, lasts, n=1):
        similar = f"Did you mean {dashes + lasts[close[0]]!r}?"
    else:
        beside = {key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section}
        similar = f"There are {', '.join(sorted(beside))}."
    return f"there is no {'option' if dashes else 'key'} {dashes}{name}. {similar}"
