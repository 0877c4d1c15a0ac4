"""A command that cannot do what it is asked to ends with one line."""

import signal

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from sparse_train.cli import main as cli

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("elsewhere")]


def test_an_interruption_is_one_line(monkeypatch, capsys):
    # a shell lets what it runs in the background ignore the signal
    monkeypatch.setattr(cli, "run", lambda *args: signal.default_int_handler(signal.SIGINT, None))
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", "x"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "sparse-train inspect: interrupted.\n"
    with pytest.raises(KeyboardInterrupt):
        cli.main(["inspect", "x", "--debug"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "model", "--text=TextFiles", "--window=32"], "TextFiles has no files"),
        (["evaluate", "model", "--text=TextFiles", "--text.train+=a.txt"], "has no text in its test split"),
        (["export", "nowhere.ckpt", "out"], "There is no checkpoint at nowhere.ckpt"),
        (["prune", "--model=model", "--out=~/out"], "~ in ~/out was not replaced by a shell"),
        (["evaluate", "no/such-model"], "no/such-model"),
        (["evaluate", "model", "--window=8", "--batch_size=0"], "batch_size must be at least 1, got 0"),
        (["evaluate", "model", "--window=8", "--max_tokens=-1"], "max_tokens must be at least 1, got -1"),
    ],
)
def test_mistakes_are_one_line(arguments, message, model_folder):
    arguments = [str(model_folder) if argument == "model" else argument for argument in arguments]
    with pytest.raises(SystemExit, match="sparse-train") as error:
        cli.main(arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("error", "is_a_line"),
    [
        (MisconfigurationException("no GPU was found"), True),
        (ModuleNotFoundError("No module named 'peft'"), True),
        (RuntimeError("shapes differ"), False),
        (KeyError("text"), False),
    ],
)
def test_what_is_no_bug_is_a_line(error, is_a_line, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda *arguments: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit if is_a_line else type(error)) as raised:
        cli.main(["fit"])
    assert not is_a_line or str(raised.value) == f"sparse-train fit: {error}"
    with pytest.raises(type(error)):
        cli.main(["fit", "--debug"])
