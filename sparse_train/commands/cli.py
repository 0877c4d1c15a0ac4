"""The command line: ``sparse-train fit | validate | prune | evaluate | export | inspect | pack | unpack | report``.

``fit`` and ``validate`` are LightningCLI; the others are plain functions whose arguments jsonargparse reads.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_train.commands.mistakes import explain
from sparse_train.commands.shipped import shipped
from sparse_train.suggestions import did_you_mean
from sparse_train.terminal.noise import kept_back
from sparse_train.terminal.streams import take_json

_USAGE = """\
usage: sparse-train COMMAND [options]

Keep a language model at a target sparsity while it trains.

commands:
  fit        train sparse with re-pruning       sparse-train fit --config recipes/smollm2_2of4.yaml
  validate   perplexity of a training run       sparse-train validate --config CONFIG --ckpt_path last.ckpt
  prune      one-shot pruning                   sparse-train prune --config recipes/oneshot_wanda_2of4.yaml
  evaluate   perplexity, zero-shot accuracy     sparse-train evaluate PATH_OR_HUB_ID --tasks perplexity,wanda7
  export     checkpoint to Hugging Face folder  sparse-train export runs/x/last.ckpt runs/x/model
  inspect    sparsity by layer                  sparse-train inspect PATH_OR_HUB_ID
  pack       smaller file of a pruned model     sparse-train pack runs/x/model runs/x/packed
  unpack     the model again, bit for bit       sparse-train unpack runs/x/packed runs/x/model
  report     a page about training runs         sparse-train report RUN_DIR [RUN_DIR ...]

"sparse-train COMMAND --help" lists a command's options. --json prints the result as one JSON object; --debug shows
where an error came from. --config also finds the recipes/ and configs/ that come with the package, from any folder, and
may be given several times; later files win.
"""


def main(args: list[str] | None = None) -> None:
    """Entry point of ``sparse-train``; ``args`` default to the command line."""
    args = sys.argv[1:] if args is None else args
    debug = "--debug" in args
    args = [argument for argument in args if argument != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return
    command, *options = args
    sys.path.append(str(Path.cwd()))  # recipes may name classes of local modules; last, so that these hide nothing
    options = _find_shipped(options)
    try:
        with _debugging(debug), kept_back(quiet=take_json(options)[0]):
            _run(command, options)
    except Exception as error:
        if debug or not _is_the_users(error):
            raise
        wrapped = "Union subtypes" in str(error)  # jsonargparse has wrapped the error of a class that it created
        sys.exit(f"sparse-train {command}: {explain(str(error), []) if wrapped else error}")


@contextmanager
def _debugging(debug: bool) -> Iterator[None]:
    """Make jsonargparse show full errors during this command; then restore the environment for later ones."""
    before = os.environ.get("JSONARGPARSE_DEBUG")
    if debug:
        os.environ["JSONARGPARSE_DEBUG"] = "true"
    try:
        yield
    finally:
        if debug and before is None:
            del os.environ["JSONARGPARSE_DEBUG"]
        elif debug and before is not None:
            os.environ["JSONARGPARSE_DEBUG"] = before


def _is_the_users(error: Exception) -> bool:
    """Whether the message is enough: a wrong value, a missing file or package, or something Lightning cannot do."""
    of_lightning = ("more than one stateful callback", "Early stopping conditioned on metric")  # RuntimeErrors
    expected = isinstance(error, (ValueError, OSError, ImportError)) or any(each in str(error) for each in of_lightning)
    return expected or type(error).__name__ == "MisconfigurationException"  # importing it would take seconds


def _run(command: str, options: list[str]) -> None:
    if command in ("fit", "validate"):
        from sparse_train.commands.lightning_cli import run

        run([command, *options])
        return
    from sparse_train.commands.model_commands import COMMANDS, run_command

    if command not in COMMANDS:
        names = ["fit", "validate", *COMMANDS]
        similar = did_you_mean(command, names) or f" There are {', '.join(names)}."
        sys.exit(f"sparse-train: there is no command {command!r}.{similar}\nsparse-train --help says what each does.")
    run_command(command, options)


def _find_shipped(options: list[str]) -> list[str]:
    """Let ``--config recipes/x.yaml`` name a file that ships with the package, if there is no local file."""
    found = []
    for previous, option in zip(["", *options], options, strict=False):
        prefix, _, path = option.partition("=") if option.startswith("--config=") else ("", "", option)
        is_config = previous == "--config" or bool(prefix)
        if is_config:
            option = f"{prefix}={shipped(path)}" if prefix else shipped(path)
        found.append(option)
    return found


if __name__ == "__main__":
    main()
