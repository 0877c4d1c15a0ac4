"""Help of ``sparse-train`` and of its commands."""

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from sparse_train.cli import main as cli
from sparse_train.cli.commands import COMMANDS

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("elsewhere")]
ROOT = Path(__file__).parents[2]


def test_help_shows_the_commands(capsys):
    cli.main([])
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_its_form_and_examples(command, capsys):
    with nullcontext() if command in cli.OF_RECIPES else pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    places = {"prune": "MODEL OUT ", "evaluate": "MODEL ", "report": "RUNS "}.get(command, "")
    assert shown.startswith(f"usage: sparse-train {command} {places}")
    assert shown.endswith(f"example:\n  {COMMANDS[command].example}\n")


def test_help_of_fit_names_options_that_there_are(capsys):
    cli.main(["fit", "--help"])
    page = capsys.readouterr().out
    own = set(re.findall(r"^  (--[\w.]+)", page, re.M)) - {"--text", "--json"}  # which the parser does not see
    assert len(own) > 10
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help", "all"])
    listed = capsys.readouterr().out
    assert listed.index("--model.lr ") < listed.index("--data.block_size ") < listed.index("--trainer.max_steps ")
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help", "pruning"])
    listed += capsys.readouterr().out
    assert own <= set(re.findall(r"--[\w.]+", listed))


def test_help_waits_for_no_library_that_it_does_not_show():
    script = """
import contextlib, sys
from sparse_train.cli.main import main
main(["--help"]); main(["fit", "--help"])
assert not {"torch", "jsonargparse"} & {*sys.modules}
for command in ("prune", "evaluate"):
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
assert not {"lightning", "transformers", "torchmetrics", "datasets", "lm_eval"} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, env={"PYTHONPATH": str(ROOT)})


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["prun"])
    assert error.value.code == 2
    assert "there is no command 'prun'. Did you mean 'prune'" in capsys.readouterr().err
