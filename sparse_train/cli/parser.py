"""What the parsers of all commands share: short errors, examples, and what users may write shorter."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped,unused-ignore]
from jsonargparse import ArgumentParser, DefaultHelpFormatter, get_loader, set_loader

from sparse_train.arguments import did_you_mean
from sparse_train.cli.commands import COMMANDS
from sparse_train.cli.mistakes import explain
from sparse_train.cli.streams import stdout_for_json, take_json

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

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        said = explain(message, parser._option_string_actions)
        sys.stderr.write(f"{command}: {said}\n{command} --help lists all options, with examples.\n")
        sys.exit(2)


def settings(name: str, debug: bool = False) -> dict[str, Any]:
    """Arguments of the parser of a command."""
    examples = "".join(f"  {line}\n" for line in COMMANDS[name].examples)
    places = "".join(f"{place.upper()} " for place in COMMANDS[name].positional)
    return {
        "usage": f"sparse-train {name} {places}[options]",
        "epilog": f"examples:\n{examples}",
        "formatter_class": _Formatter,
        "allow_abbrev": False,  # or a mistyped option would run
        "exit_on_error": not debug,
    }


def parser_of(name: str, function: Callable[..., Any], debug: bool = False) -> Parser:
    """The parser of a command that is a function; its options are the arguments of the function."""
    description = (function.__doc__ or "").split("\n\n")[0]
    parser = Parser(prog=f"sparse-train {name}", description=description, **settings(name, debug))
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments.")
    parser.add_function_arguments(function)
    return parser


def call(name: str, function: Callable[..., Any], options: Sequence[str], debug: bool = False) -> None:
    """Parse the options of a command that is a function, and call it. It shows its result, or returns it for JSON."""
    as_json, options = take_json(options)
    parser = parser_of(name, function, debug)
    options = spelt_out(options, COMMANDS[name].positional)
    config: Any = parser.parse_args([*options, *(["--json=true"] if as_json else [])])
    with stdout_for_json(bool(config.json)) as write:
        arguments = parser.instantiate(config)
        arguments.pop("config", None)
        found = function(**arguments)
        if found is not None:  # None in all processes except the first
            write(found)


# --- what users may write shorter -------------------------------------------------------------------------------------


def spelt_out(options: Sequence[str], positional: Sequence[str] = (), text: str = "--text", *splits: str) -> list[str]:
    """Options in which arguments have names, packaged recipes have paths, and files of text are a ``TextFiles``.

    ``model out --text a.txt notes/`` becomes ``--model=model --out=out --text={"class_path": "TextFiles", ...}``.

    Args:
        options: a command line.
        positional: names of arguments that may be given by their place, before all options.
        text: the option that ``--text`` stands for.
        splits: those that the files of ``--text`` are; default: all.
    """
    rest, found, places = list(options), [], list(positional)
    while rest and places and not rest[0].startswith("-"):
        several = places[0].endswith("...")
        name = f"{places[0].removesuffix('...')}+" if several else places.pop(0)
        found.append(f"--{name}={rest.pop(0)}")
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        values = [value] if equals else []
        if name in ("--config", "-c", "--text", "--perplexity"):
            while rest and not equals and not rest[0].startswith("-"):
                values.append(rest.pop(0))
        if name in ("--config", "-c"):
            values = [shipped(value) for value in values]
        elif name in ("--text", "--perplexity"):
            name = text if name == "--text" else name
            if values and all(map(_is_path, values)):
                files = [str(file) for each in values for file in _files(Path(each))]
                arguments = dict.fromkeys(splits or ("train", "validation", "test"), files)
                values = [json.dumps({"class_path": "TextFiles", "init_args": arguments})]
        found += [f"{name}={values[0]}", *values[1:]] if values else [name]
    return found


def shipped(path: str) -> str:
    """``path``, or, if there is no such file, the packaged file of that name (recipes/..., configs/...).

    Raises:
        ValueError: there is neither.
    """
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
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl"))
    if not found:
        raise ValueError(f"There is no text at {path}. Give files, or a folder that has .txt or .jsonl files.")
    return found
