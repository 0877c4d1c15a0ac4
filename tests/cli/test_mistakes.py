"""Mistakes as users make them, through the real parsers: a short answer with what, where and the way out."""

import sys
from pathlib import Path

import pytest
from transformers.utils import is_peft_available

from sparse_train.cli import main as cli
from sparse_train.cli.mistakes import explain

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]
FIT = ["fit", "--config", "recipes/smollm2_2of4.yaml"]
PRUNE = ["prune", "--model", "x", "--out", "y"]
PRUNING = "--pruning"


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sparse-train"])


def answer(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as error:
        cli.main(list(map(str, arguments)))
    assert error.value.code == 2
    said, way_out = capsys.readouterr().err.splitlines()  # two lines, whatever was wrong
    command = f"sparse-train {arguments[0]} --help"
    said = said.removeprefix(f"sparse-train {arguments[0]}: ")
    page = " pruning" if said.startswith("pruning") else " all" if arguments[0] in ("fit", "validate") else ""
    assert way_out == f"{command}{page} lists all options."
    return said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        # options; an abbreviation is none, or a typo would run
        ([*FIT, f"{PRUNING}.targets", "mlp"], "targets: takes a list, such as [mlp], got 'mlp'."),
        (
            [*FIT, "--trainer.max_step", "5"],
            "there is no option --trainer.max_step. Did you mean '--trainer.max_steps'",
        ),
        ([*FIT, "--model.learning_rate=1"], "there is no option --model.learning_rate. There are betas, "),
        (["validate", "--ckpt", "x"], "there is no option --ckpt. Did you mean '--ckpt_path'"),
        (["evaluate", "x", "--windw", "3"], "there is no option --windw. Did you mean '--window'"),
        (["fit", "--max_steps", "4"], "there is no option --max_steps. Did you mean '--trainer.max_steps'?"),
        (["fit", "--update_freq", "4"], "there is no option --update_freq. Did you mean '--pruning.update_freq'?"),
        (["evaluate", "x", "y"], "unexpected argument 'y'."),
        # arguments of classes
        ([*FIT, f"{PRUNING}.update_frq=5"], "pruning: DynamicPruning has no argument 'update_frq'. Did you"),
        (
            [*FIT, f"{PRUNING}.schedule=Cubic", f"{PRUNING}.schedule.final_sparsty=1"],
            "pruning.schedule: Cubic has no argument 'final_sparsty'. Did you mean 'final_sparsity'",
        ),
        ([*PRUNE, "--criterion=mypkg.Wanda"], "criterion: mypkg.Wanda is none of IHT,"),
        ([*PRUNE, "--criterion=RIA", "--criterion.alpha=1"], "criterion: RIA has no argument 'alpha'. It has a."),
        ([*PRUNE, "--criterion.a", "1"], "criterion: say which class these arguments are for, by its name."),
        ([*FIT, "--trainer.callbacks.update_freq=5"], "arguments are options such as --pruning.update_freq."),
        ([*FIT, f"{PRUNING}.first_mask=FromZeros", f"{PRUNING}.first_mask.x=1"], "FromZeros has no argument 'x'."),
        ([*FIT, f"{PRUNING}=nowhere.yaml"], "pruning: there is no file nowhere.yaml."),
        (
            [*FIT, f"{PRUNING}=mine.Pruning"],
            "there is no class 'mine.Pruning'. Did you mean",
        ),
        ([*FIT, f"{PRUNING}=DynamicPrunning"], "there is no class 'DynamicPrunning'. Did you mean 'DynamicPruning'?"),
        ([*FIT, f"{PRUNING}=1:4"], "its arguments are options, such as --pruning.mask_structure."),
        ([*FIT, f"{PRUNING}.ignore=mlp"], "pruning.ignore: takes a list, such as [mlp], got 'mlp'."),
        # classes
        (
            [*FIT, f"{PRUNING}.criterion=Wonda"],
            "pruning.criterion: there is no class 'Wonda'. Did you mean 'Wanda'?",
        ),
        (
            [*FIT, f"{PRUNING}.first_mask=OneShot", f"{PRUNING}.first_mask.criterion=Fixed"],
            "pruning.first_mask.criterion: Fixed is none of IHT, Magnitude, RIA, SparseGPT, Wanda",
        ),
        ([*FIT, f"{PRUNING}.criterion=SparseGPT"], "can make the first mask: first_mask=OneShot(IHT())"),
        ([*FIT, f"{PRUNING}.first_mask=OneShot", f"{PRUNING}.first_mask.criterion=null"], "only in a YAML file"),
        ([*PRUNE, "--criterion=Wnda"], "criterion: there is no class 'Wnda'. Did you mean 'Wanda'?"),
        (
            [*PRUNE, "--criterion=Unstructured"],
            "criterion: Unstructured is none of IHT, Magnitude, RIA, SparseGPT, Wanda",
        ),
        ([*PRUNE, "--text=PackagedText"], "Did you mean 'PackagedQuestions' or 'PackagedWikipedia'?"),
        ([*FIT, "--trainer.callbacks+=Evaluaton"], "there is no class 'Evaluaton'. Did you mean 'Evaluation'"),
        ([*PRUNE, "--criterion=nowhere.Score"], "criterion: there is no class 'nowhere.Score'."),
        ([*PRUNE, "--criterion=sparse_train.Wonda"], "there is no class 'sparse_train.Wonda'. Did you mean 'Wanda'"),
        # values
        ([*FIT, f"{PRUNING}.end_step=late"], "pruning.end_step: takes int or float, got 'late'."),
        ([*FIT, "--trainer.precision=bf17"], ", bf16, got 'bf17'. Did you mean 'bf16'?"),
        ([*PRUNE, "--sampling=packd"], "sampling: takes one of packed, documents, got 'packd'. Did you mean 'packed'?"),
        (["evaluate", "x", "--bos="], "bos: takes bool, got ''."),
        ([*PRUNE, "--ignore=[a"], "ignore: takes list, got '[a'."),
        ([*PRUNE, "--ignore=a"], "ignore: takes a list, such as [a], got 'a'."),
        (
            ["fit", "--model", "x"],
            "model: takes a YAML file, got 'x'. Its keys are also options, such as --model.KEY.",
        ),
        # what is missing
        (["fit"], "model.model must be given, by --model.model or in a --config."),
        (["inspect"], "the following arguments are required: model"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_on_the_command_line(arguments, said, capsys):
    assert said in answer(arguments, capsys)


@pytest.mark.parametrize(
    ("recipe", "right", "wrong", "said"),
    [
        (
            "smollm2_2of4",
            "update_freq:",
            "update_frq:",
            "DynamicPruning has no argument 'update_frq'. Did you mean 'update_freq'",
        ),
        (
            "smollm2_2of4",
            "max_steps:",
            "max_step:",
            "there is no key trainer.max_step. Did you mean 'trainer.max_steps'",
        ),
        (
            "smollm2_2of4",
            "OneShot\n    init_args:",
            "OneShot\n    init_arg:",
            "OneShot has no argument 'init_arg.criterion.init_args.dampening_frac'. Did you mean 'init_args'",
        ),
        (
            "smollm2_2of4",
            "dampening_frac:",
            "dampening:",
            "first_mask.criterion: IHT has no argument 'dampening'. Did you mean 'dampening_frac'",
        ),
        ("smollm2_2of4", "class_path: One", "clas_path: One", "or by a mapping with class_path and init_args."),
        ("smollm2_2of4", "seed_everything: 0", "txt: x", "there is no key txt. Did you mean 'data.text'"),
        ("oneshot_owl_60", "OWL", "OWLs", "distribution: there is no class 'OWLs'. Did you mean 'OWL'?"),
    ],
)
def test_in_a_recipe(recipe, right, wrong, said, capsys):
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
    command = "fit" if "\ntrainer:" in text else "prune"
    Path("own.yaml").write_text(replaced_outside_comments(text, right, wrong))
    assert said in answer([command, "--config", "own.yaml"], capsys)


@pytest.mark.parametrize("text", ["* is no YAML", "A sentence, which is YAML."])
def test_a_file_of_text_is_no_class(text, capsys):
    Path("mine.txt").write_text(text)
    said = answer([*FIT, "--data.text=mine.txt"], capsys)
    assert said.startswith("data.text: ")
    assert said.endswith(". Files are given by --text FILE, or in a recipe by TextFiles with train: [FILE].")


def replaced_outside_comments(text, right, wrong):
    body = text[text.index("\n", text.rindex("\n#") + 1) :]
    assert right in body
    return body.replace(right, wrong)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([f"{PRUNING}.mask_structure=2;4"], 'must be "unstructured" or "N:M"'),
        (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches counts steps"),
        ([f"{PRUNING}.update_freq=0"], "update_freq is the number of steps between mask updates"),
        ([f"{PRUNING}.schedule=Cubic", f"{PRUNING}.schedule.final_sparsity=1.5"], "final_sparsity must be at least 0"),
    ],
)
def test_mistakes_that_classes_find(options, said):
    """Their own message alone, although jsonargparse wraps it as it makes them."""
    with pytest.raises(SystemExit) as error:
        cli.main([*FIT, *options])
    message = str(error.value)
    assert message.startswith("sparse-train fit: ")
    assert said in message
    assert "\n" not in message
    assert "Callback" not in message


def test_an_argument_that_a_class_lacks(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([*FIT, "--trainer.logger=CSVLogger"])
    assert "trainer.logger: the following arguments are required: save_dir\n" in capsys.readouterr().err


def test_a_model_that_was_meant_to_be_a_class(monkeypatch):
    with pytest.raises(SystemExit, match="Did you mean 'PackagedSmolLM2'"):
        cli.main(["inspect", "PackagedSmolLM"])


def test_a_mistyped_recipe():
    for command in ("fit", "prune"):
        with pytest.raises(SystemExit, match="Did you mean 'recipes/oneshot_wanda_50.yaml'"):
            cli.main([command, "--config", "recipes/oneshot_wnda_50.yaml"])


def test_devices_that_are_not_there():
    for command in (["evaluate", "x"], [*PRUNE]):
        with pytest.raises(SystemExit, match="torch cannot compute on device='gpu' here"):
            cli.main([*command, "--device=gpu"])


def test_debug_gives_all_of_it():
    for command in ([*PRUNE, "--criterion=Wonda"], [*FIT, f"{PRUNING}.criterion=Wonda"]):
        with pytest.raises(Exception, match="Does not validate against any of the Union subtypes"):
            cli.main([*command, "--debug"])


def test_a_package_that_is_missing_is_named_with_its_extra(model_folder, text_file, monkeypatch):
    is_peft_available()  # transformers remembers the first answer
    monkeypatch.setitem(sys.modules, "peft", None)
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"peft.*. In the clone, install it: pip install '.\[peft\]'"):
        cli.main(["evaluate", str(model_folder), "--adapter=adapter", f"--text={text_file}", "--window=32"])


def test_unknown_messages_stay_as_they_are():
    assert explain("the parser said something new", {"--model": None}) == "the parser said something new"


def test_a_recipe_that_is_no_yaml_is_named_with_the_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("model:\n  lr: 1\n data: [\n")
    with pytest.raises(SystemExit, match=r"mine\.yaml.*line 3"):
        cli.main(["fit", "--config", "mine.yaml"])
