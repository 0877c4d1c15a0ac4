"""Common to the parsers of all commands: short errors, no abbreviations, and help with examples."""

import argparse
import os
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from sparse_train.commands.mistakes import explain

EXAMPLES = {
    "fit": """\
sparse-train fit --config recipes/smollm2_2of4.yaml --trainer.max_steps 50 --export runs/sparse
sparse-train fit --config recipes/smollm2_2of4.yaml --trainer.callbacks.init_args.update_freq 20
sparse-train fit --config recipes/smollm2_2of4.yaml --config configs/precision/float32.yaml""",
    "validate": """\
sparse-train validate --config recipes/smollm2_2of4.yaml --ckpt_path runs/x/last.ckpt""",
    "prune": """\
sparse-train prune --config recipes/oneshot_wanda_2of4.yaml
sparse-train prune --model PackagedSmolLM2 --mask_structure 4:8 --criterion RIA --out runs/ria""",
    "evaluate": """\
sparse-train evaluate runs/oneshot_wanda_2of4
sparse-train evaluate runs/oneshot_wanda_2of4 --text TextFiles --text.test+ my_text.txt""",
    "export": """\
sparse-train export runs/x/last.ckpt runs/exported --tokenizer PackagedSmolLM2""",
    "inspect": """\
sparse-train inspect runs/oneshot_wanda_2of4
sparse-train inspect runs/oneshot_wanda_2of4 --json""",
    "pack": """\
sparse-train pack runs/exported runs/packed""",
    "unpack": """\
sparse-train unpack runs/packed runs/again""",
    "report": """\
sparse-train report runs/smollm2_2of4
sparse-train report runs/smollm2_2of4/version_0 runs/smollm2_dense/version_0""",
}
"""Example lines for each command; those that are also in the docs are the same there."""


class Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of examples."""


def settings(command: str) -> dict[str, Any]:
    """Arguments of a command's parser."""
    examples = "".join(f"  {line}\n" for line in EXAMPLES[command].splitlines())
    return {"formatter_class": Formatter, "epilog": f"examples:\n{examples}"}


class ShortErrors(ArgumentParser):
    """A parser with short errors; with JSONARGPARSE_DEBUG=true in the environment, jsonargparse's own errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if os.environ.get("JSONARGPARSE_DEBUG") == "true" or not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        said = explain(message, parser._option_string_actions)
        sys.stderr.write(f"{command}: {said}\n{command} --help lists all options, with examples.\n")
        sys.exit(2)
