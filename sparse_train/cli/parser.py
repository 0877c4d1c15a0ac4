"""What the parsers of all commands share: short errors, examples, and what users may write shorter."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped,unused-ignore]
from jsonargparse import ArgumentParser, DefaultHelpFormatter, get_loader, set_loader

from sparse_train.arguments import did_you_mean
from sparse_train.cli.commands import COMMANDS
from sparse_train.cli.mistakes import explain
from sparse_train.files import reading

# --- YAML: 2:4 without quotes, which YAML 1.1 reads as 124, a number in base 60 ---------------------------------------

_N_OF_M = re.compile(r"((?:^|[:\-,\[{])[ \t]+|^)(\d+:\d+)(?=[ \t]*(?:$|[,}\]]|[ \t]#))", re.MULTILINE)
_load_yaml = get_loader("yaml")


def _load_with_n_of_m(stream: str) -> Any:
    return _load_yaml(_N_OF_M.sub(r'\1"\2"', stream))


set_loader("yaml", _load_with_n_of_m, exceptions=(yaml.YAMLError,))


# --- parsers ----------------------------------------------------------------------------------------------------------


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of examples."""


class Parser(ArgumentParser):
    """A parser with short errors; with ``exit_on_error=False``, it raises jsonargparse's own."""

    help_option = "--help"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser: Parser = getattr(ex, "subcommand_parser", None) or self
        command = " ".join((parser.usage or parser.prog).split()[:2])  # Lightning has another name for cache-teacher
        said = explain(message, parser._option_string_actions)
        option = "--help pruning" if said.startswith("pruning") else parser.help_option
        sys.stderr.write(f"{command}: {said}\n{command} {option} lists all options.\n")
        sys.exit(2)


def parser_arguments(name: str, debug: bool = False, positional: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "usage": " ".join(["sparse-train", name, *(place.upper() for place in positional), "[options]"]),
        "epilog": f"example:\n  {COMMANDS[name].example}",
        "formatter_class": _Formatter,
        "allow_abbrev": False,  # or a mistyped option would run
        "exit_on_error": not debug,
    }


def places(function: Callable[..., Any]) -> list[str]:
    """Arguments that may also be given by their place: those that must be given."""
    return [name for name, each in signature(function).parameters.items() if each.default is each.empty]


def parser_of(name: str, function: Callable[..., Any], debug: bool = False) -> Parser:
    """The parser of a command that is a function; its options are the arguments of the function."""
    description = (function.__doc__ or "").split("\n\n")[0]
    parser = Parser(
        prog=f"sparse-train {name}", description=description, **parser_arguments(name, debug, places(function))
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_function_arguments(function)
    return parser


def call(name: str, function: Callable[..., Any], options: Sequence[str], debug: bool = False) -> Any:
    """Parse the options of a command that is a function, and call it. Returns its result, for JSON."""
    parser = parser_of(name, function, debug)
    arguments = parser.instantiate(parser.parse_args(spelt_out(options, places(function))))
    return function(**{key: value for key, value in arguments.items() if key not in ("config", "json")})


# --- what users may write shorter -------------------------------------------------------------------------------------


_FLAGS = ("--verify", "--streaming", "--bos")
"""Options that are on or off, and mean on if nothing follows."""


def spelt_out(options: Sequence[str], positional: Sequence[str] = (), text: str = "--text", *splits: str) -> list[str]:
    """Options in which arguments have names, packaged recipes have paths, and files of text are a ``TextFiles``.

    ``model out --text a.txt notes/`` becomes ``--model=model --out=out --text={"class_path": "TextFiles", ...}``.
    Recipes come first, wherever they stand: options change recipes, and for the parser, what comes later wins.

    Args:
        options: a command line.
        positional: names of arguments that may be given by their place, before all options.
        text: the option that ``--text`` stands for.
        splits: those that the files of ``--text`` are; default: all.
    """
    groups: list[list[str]] = [[]]  # an option and its words; first those before all options
    for word in options:
        if word.startswith("-"):
            groups.append([])
        of_flag = groups[-1][:1] and groups[-1][0] in _FLAGS and word not in ("true", "false")
        groups[0 if of_flag else -1].append(word)
    first, *rest = groups
    if positional == ["runs"] and first:
        first = [json.dumps(first)]
    recipes: list[str] = []
    spelt = [f"--{name}={word}" for name, word in zip(positional, first, strict=False)] + first[len(positional) :]
    for option, *words in rest:
        name, equals, value = option.partition("=")
        values = [value, *words] if equals else words
        if name in ("--config", "-c") and values:
            path = shipped(values[0])
            if Path(path).is_file():  # the parser's own error would name no file
                with reading(path):
                    _load_with_n_of_m(Path(path).read_text())
            recipes += [f"{name}={path}", *values[1:]]
        elif name == "--text" and values:
            if all(map(_is_path, values)):
                files = [str(file) for each in values for file in _files(Path(each))]
                arguments = dict.fromkeys(splits or ("train", "validation", "test"), files)
                values = [json.dumps({"class_path": "TextFiles", "init_args": arguments})]
            spelt += [f"{text}={values[0]}", *values[1:]]
        elif name in _FLAGS and not values:
            spelt.append(f"{name}=true")
        else:
            spelt += [option, *words]
    return recipes + spelt


def shipped(path: str) -> str:
    """``path``, or, if there is no such file, the packaged file of that name (recipes/..., configs/...)."""
    if Path(path).exists() or not path.startswith(("recipes/", "configs/")):
        return path
    root = Path(str(resources.files("sparse_train")))
    if (root / path).is_file():
        return str(root / path)
    names = [each.relative_to(root).as_posix() for name in ("recipes", "configs") for each in (root / name).rglob("*")]
    raise ValueError(f"There is no file {path}, here or in the package.{did_you_mean(path, names)}")


def _is_path(value: str) -> bool:
    """Whether this is no name of a class, no JSON, and no YAML with one."""
    if value.startswith(("{", "[")) or value.endswith((".yaml", ".yml", ".json")):
        return False
    return "/" in value or value.endswith((".txt", ".jsonl")) or Path(value).exists()


def _files(path: Path) -> list[Path]:
    """The text files that a path of ``--text`` means, for a folder all .txt and .jsonl in it."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl"))
    if not files:
        raise ValueError(f"There is no text at {path}. Give files, or a folder that has .txt or .jsonl files.")
    return files
