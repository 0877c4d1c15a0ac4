"""Entry point of ``sparse-train``.

The function of a command is in the module of the same name beside this one, and is imported when it is called: a help
page should not wait for Lightning. Those that read a recipe (``OF_RECIPES``) share ``sparse_train.cli.lightning_cli``.
"""

import signal
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from sparse_train.arguments import did_you_mean
from sparse_train.cli.commands import COMMANDS, USAGE, USAGE_OF_FIT
from sparse_train.cli.streams import dumps, nothing_on_stdout, quiet_libraries

OF_RECIPES = ("fit", "validate", "test", "cache-teacher")
_EXTRAS = {"accelerate": "trainer", "deepspeed": "deepspeed", "gguf": "gguf", "lm_eval": "eval", "peft": "peft"}
"""Packages that ``pip install sparse-train`` leaves out, and the extra that has them."""


def main(args: list[str] | None = None) -> None:
    """Run a command line; ``args`` default to that of the process.

    Raises:
        SystemExit: 1 for a value, file or package that does not do, 2 for a command line or recipe that cannot be read,
            130 for Ctrl-C.
    """
    args = sys.argv[1:] if args is None else args
    debug = "--debug" in args
    args = [argument for argument in args if argument != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS)) + 2
        rows = (f"  {name:{width}}{command.summary:36}{command.example}\n" for name, command in COMMANDS.items())
        print(USAGE.format(commands="".join(rows)), end="")
        return
    name, *options = args
    if name not in COMMANDS:
        similar = did_you_mean(name, COMMANDS) or f" There are {', '.join(COMMANDS)}."
        sys.stderr.write(f"sparse-train: there is no command {name!r}.{similar}\n")
        sys.exit(2)
    sys.path.append(str(Path.cwd()))  # recipes may name classes of local modules; last, so that these hide nothing
    try:
        run(name, options, debug)
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"sparse-train {name}: interrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if debug or not _is_the_users(error):
            raise
        said = str(error)
        if "Union subtypes" in said:  # jsonargparse has wrapped the error of a class that it created
            from sparse_train.cli.mistakes import explain

            said = explain(said, {})
        if isinstance(error, IsADirectoryError) and name in OF_RECIPES:
            said += ". A checkpoint that is a folder is read by the strategy that wrote it (docs/scaling.md)."
        if extra := _EXTRAS.get((getattr(error, "name", None) or "").partition(".")[0]):
            said += f". In the clone, install it: pip install '.[{extra}]'."
        sys.exit(f"sparse-train {name}: {said}")


def run(name: str, options: list[str], debug: bool = False) -> None:
    """Run one command, which prints its result; with ``--json``, print only that."""
    as_json, options = "--json" in options, [option for option in options if option != "--json"]
    quiet_libraries()
    with nothing_on_stdout() if as_json else nullcontext():
        if name in OF_RECIPES:
            result = _of_recipe(name, options, debug)
        else:
            from sparse_train.cli.parser import call

            result = call(name, getattr(import_module(f"sparse_train.cli.{name}"), name), options, debug)
    if as_json and result is not None:  # None in all processes except the first
        print(dumps(result))


def _of_recipe(command: str, options: list[str], debug: bool) -> dict[str, Any] | None:
    """Run a command of ``OF_RECIPES``, and return its result for JSON; or print its help."""
    if options[-1:] in (["--help"], ["-h"]):
        print(USAGE_OF_FIT.format(command=command, example=COMMANDS[command].example), end="")
        return None
    if options[-2:] == ["--help", "all"]:
        options = ["--help"]
    elif options[-2:] == ["--help", "pruning"]:
        options = ["--pruning.help"]
    from sparse_train.cli.lightning_cli import run as run_lightning

    return run_lightning([command, *options], debug=debug).result


def _is_the_users(error: Exception) -> bool:
    """Whether the message is enough: a wrong value, a missing file or package, or something Lightning cannot do."""
    of_others = (  # RuntimeErrors
        *("more than one stateful callback", "Early stopping conditioned on metric", "Error(s) in loading state_dict"),
        "but checkpoint contains only the model",
        "maximum recursion depth exceeded",  # a YAML file that contains itself
    )
    expected = isinstance(error, (ValueError, OSError, ImportError)) or any(each in str(error) for each in of_others)
    return expected or type(error).__name__ == "MisconfigurationException"  # importing it would take seconds


if __name__ == "__main__":
    main()
