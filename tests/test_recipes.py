"""Every YAML of recipes/ and configs/ goes through the real parser, and the small ways to name things through it."""

import runpy
from pathlib import Path

import pytest
import yaml

from sparse_train import NM, OWL, Cubic, Magnitude, MaskLoRA, OneShot, Regrow, SparseGPT, Wanda
from sparse_train.callbacks import DynamicPruning, Evaluation
from sparse_train.cli import lightning_cli
from sparse_train.cli.evaluate import evaluate
from sparse_train.cli.parser import parser_of
from sparse_train.cli.prune import prune
from sparse_train.data.texts import HubText, PackagedQuestions, PackagedWikipedia, PythonStandardLibrary, TextFiles
from sparse_train.models.causal_lm import CausalLM
from sparse_train.models.lora import LoRA
from sparse_train.models.sources import PackagedSmolLM2, Pretrained

ROOT = Path(__file__).parent.parent
RECIPES, CONFIGS = sorted((ROOT / "recipes").rglob("*.yaml")), sorted((ROOT / "configs").rglob("*.yaml"))
FOR_OTHERS = {"calibration": prune, "perplexity": evaluate}
FOR_FIT = [path for path in CONFIGS if path.parent.name not in FOR_OTHERS]
FIT = [path for path in RECIPES if "trainer" in yaml.safe_load(path.read_text())]
PRUNE = [path for path in RECIPES if path not in FIT]
BASE = ROOT / "recipes" / "smollm2_2of4.yaml"


class WithoutRunning(lightning_cli.SparseTrainCLI):
    def _run_subcommand(self, subcommand):
        pass


class WithoutObjects(WithoutRunning):
    def instantiate_classes(self):
        pass


def parse_fit(*arguments, cli=WithoutRunning):
    """The CLI with its objects made, but nothing run."""
    return lightning_cli.run(["fit", *map(str, arguments)], cli)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_there_are_recipes_for_what_the_readme_promises():
    assert {path.stem for path in PRUNE} >= {"oneshot_wanda_50", "oneshot_wanda_2of4"}
    assert {path.stem for path in FIT} >= {
        "smollm2_2of4",
        "smollm2_2of4_distill",
        "smollm2_2of4_lora",
        "smollm2_2of4_mask_lora",
        "smollm2_2of4_instruct",
        "smollm2_2of4_domain",
        "smollm2_owl70",
        "smollm2_unstructured70",
        "smollm2_gradual70",
        "pretrain_llama_2of4",
        "llama31_8b_2of4",
    }
    assert len(CONFIGS) >= 8


@pytest.mark.parametrize("path", FIT, ids=lambda p: p.stem)
def test_training_recipes(path):
    cli = parse_fit(f"--config={path}")
    assert isinstance(cli.model, CausalLM)
    assert cli.datamodule.tokenizer_source == cli.model.source or "pretrain" in path.stem
    pruning = [c for c in cli.trainer.callbacks if isinstance(c, DynamicPruning)]
    assert len(pruning) == ("dense" not in path.stem)


@pytest.mark.parametrize(
    ("overlay", "strategy"), [("fsdp2", "ModelParallelStrategy"), ("deepspeed_zero3", "DeepSpeedStrategy")]
)
def test_the_recipe_for_eight_gpus(overlay, strategy):
    path = ROOT / "recipes" / "llama31_8b_2of4.yaml"
    command = f"sparse-train fit --config recipes/{path.name} --config configs/strategy/{overlay}.yaml"
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(command in line for line in head)
    assert any("Not run" in line for line in head)
    overlay_path = ROOT / "configs" / "strategy" / f"{overlay}.yaml"
    config = parse_fit(f"--config={path}", f"--config={overlay_path}", cli=WithoutObjects).config["fit"]
    assert config.trainer.strategy.class_path.endswith(strategy)
    assert config.model.gradient_checkpointing
    assert (config.trainer.precision, config.trainer.accumulate_grad_batches) == ("bf16-mixed", 4)
    made = parse_fit(f"--config={path}")
    assert any(f"--out {made.model.source.path}" in line for line in head)
    assert made.model.distillation.teacher == Pretrained("meta-llama/Llama-3.1-8B", dtype="bfloat16")
    assert made.datamodule.text == HubText(
        "allenai/c4", "en", max_documents=150_000, splits=made.datamodule.text.splits
    )


def test_the_settings_of_a_run_as_one_object(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("pruning:\n  config:\n    update_freq: 7\n    mask_structure: 1:4\n")
    cli = parse_fit(f"--config={ROOT / 'recipes' / 'smollm2_dense.yaml'}", f"--config={recipe}")
    (pruning,) = (each for each in cli.trainer.callbacks if isinstance(each, DynamicPruning))
    assert pruning.config.update_freq == 7 and pruning.config.pattern == NM(1, 4)


def test_recipes_of_other_texts():
    for name, text in (("instruct", PackagedQuestions()), ("domain", PythonStandardLibrary())):
        cli = parse_fit(f"--config={ROOT / 'recipes' / f'smollm2_2of4_{name}.yaml'}")
        assert cli.datamodule.text == text
        assert (cli.model.distillation is not None) == (name == "instruct")
    files = ["--data.text=TextFiles", "--data.text.train=[a.jsonl]", "--data.text.column=messages"]
    text = parse_fit(f"--config={BASE}", *files).datamodule.text
    assert isinstance(text, TextFiles) and (text.train, text.column) == (["a.jsonl"], "messages")


@pytest.mark.parametrize("path", PRUNE, ids=lambda p: p.stem)
def test_pruning_recipes(path):
    parser = parser_of("prune", prune)
    arguments = parser.instantiate(parser.parse_args([f"--config={path}"]))
    assert isinstance(arguments.model, PackagedSmolLM2)
    assert isinstance(arguments.text, PackagedWikipedia)
    assert isinstance(arguments.criterion, (Wanda, SparseGPT))


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path not in FOR_FIT], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_overlays_of_prune_and_evaluate(path):
    command = FOR_OTHERS[path.parent.name]
    parser = parser_of(command.__name__, command)
    arguments = parser.instantiate(
        parser.parse_args(["--model=x", *["--out=y"] * (command is prune), f"--config={path}"])
    )
    for key, value in yaml.safe_load(path.read_text()).items():
        if isinstance(value, dict):
            assert isinstance(getattr(arguments, key), HubText)
        else:
            assert getattr(arguments, key) == value


@pytest.mark.parametrize("path", FOR_FIT, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_overlays(path):
    config = parse_fit(f"--config={BASE}", f"--config={path}", cli=WithoutObjects).config["fit"]
    changed = yaml.safe_load(path.read_text())
    for section, values in changed.items():
        for key, value in values.items():
            found = config[section][key]
            if isinstance(value, dict):
                assert found["class_path"].endswith(value["class_path"])
                for name, given in value["init_args"].items():
                    if str(given).endswith(".json"):  # the packaged file, from whatever folder
                        assert Path(found["init_args"][name]).read_text() == (ROOT / given).read_text()
                    else:
                        assert found["init_args"][name] == given
            else:
                assert found == value


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_open_with_their_command_and_what_came_out(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = "fit" if path in FIT else "prune"
    assert any(f"sparse-train {command} --config recipes/{path.name}" in line for line in head)
    assert any("Measured" in line for line in head)


def test_the_small_ways_to_name_things():
    cli = parse_fit(
        f"--config={BASE}",
        "--trainer.max_steps=50",
        "--model.model=org/some-model",
        "--pruning.criterion=Magnitude",
        "--pruning.mask_structure=1:4",
        "--pruning.schedule=Cubic",
        "--pruning.schedule.final_sparsity=0.75",
    )
    assert cli.trainer.max_steps == 50
    assert cli.model.source == Pretrained("org/some-model") == cli.datamodule.tokenizer_source
    pruning = next(c for c in cli.trainer.callbacks if isinstance(c, DynamicPruning))
    assert pruning.config.pattern == NM(1, 4)
    assert pruning.config.criterion == Magnitude()
    assert pruning.config.schedule == Cubic(0.75)


def test_every_variant_of_updates_can_be_named():
    pruning = "--pruning"
    cli = parse_fit(
        f"--config={BASE}",
        *(f"{pruning}.mask_structure=unstructured", f"{pruning}.sparsity=0.7", f"{pruning}.norm_decay=0.9"),
        *(f"{pruning}.distribution=OWL", f"{pruning}.distribution.owl_lmbda=0.1"),
    )
    config = next(c for c in cli.trainer.callbacks if isinstance(c, DynamicPruning)).config
    assert (config.distribution, config.norm_decay) == (OWL(owl_lmbda=0.1), 0.9)
    changes = ("policy=Regrow", "policy.drop_fraction=0.2", "norm_decay=0.5", "window=4")
    cli = parse_fit(f"--config={BASE}", *(f"{pruning}.{change}" for change in changes))
    config = next(c for c in cli.trainer.callbacks if isinstance(c, DynamicPruning)).config
    assert (config.policy, config.norm_decay, config.window) == (Regrow(0.2), 0.5, 4)


def test_arms_of_the_benchmark_are_runs_of_their_own(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    arms = runpy.run_path(str(ROOT / "benchmarks" / "arms.py"))["ARMS"]
    settings, parsed = {}, set()
    for name, arm in sorted(arms.items(), key=lambda item: -len(item[1].changes)):
        found = str([arm.recipe, sorted(arm.changes), arm.start, arm.teacher])
        assert found not in settings.values(), name
        settings[name] = found
        options = {arm.recipe, *(change.partition("=")[0] for change in arm.changes)}
        if options <= parsed:  # parsing takes half a second, and such an arm only combines what others have
            continue
        parsed |= options
        teacher = ["--model.distillation.teacher=folder"] if arm.teacher else []
        cli = parse_fit(*arm.options(), *teacher)
        pruning = [each for each in cli.trainer.callbacks if isinstance(each, DynamicPruning)]
        if not arm.start and not any("first_mask" in change for change in arm.changes):
            assert all(each.config.first_mask == OneShot() for each in pruning), name  # though the recipe may have IHT
        distillation = cli.model.distillation
        named = arm.teacher or "--model.distillation.teacher=PackagedSmolLM2" in arm.changes
        assert (distillation is not None and distillation.teacher is not None) == named
        assert type(cli.datamodule.text) is type(arm.text)  # what it is read on


def test_distillation_is_a_class_or_the_mapping_of_its_arguments(tmp_path):
    by_class = tmp_path / "by_class.yaml"
    by_class.write_text(
        "model: {distillation: {class_path: Distillation, init_args: {teacher: {class_path: Pretrained, init_args: "
        "{path: org/finetuned, dtype: bfloat16}}, hardness_kldiv: 2.0}}}"
    )
    by_mapping = tmp_path / "by_mapping.yaml"
    by_mapping.write_text("model: {distillation: {teacher: org/finetuned, hardness_kldiv: 2.0}}")
    for path, dtype in ((by_class, "bfloat16"), (by_mapping, "float32")):
        found = parse_fit(
            f"--config={BASE}", f"--config={path}", "--model.distillation.temperature=3"
        ).model.distillation
        assert found.teacher == Pretrained("org/finetuned", dtype=dtype)
        assert (found.hardness_ce, found.hardness_kldiv) == (1.0, 2.0)
        assert found.temperature == 3.0
    recipe = ROOT / "recipes" / "smollm2_2of4_distill.yaml"
    found = parse_fit(f"--config={recipe}", "--model.distillation.cache=runs/teacher").model.distillation
    assert found.teacher is None
    assert (found.hardness_ce, found.hardness_kldiv, found.cache) == (0.33, 0.67, "runs/teacher")
    assert parse_fit(f"--config={recipe}", "--model.distillation=null").model.distillation is None


def test_low_rank_recipes_are_the_papers_and_can_be_changed():
    recipe = f"--config={ROOT / 'recipes' / 'smollm2_2of4_lora.yaml'}"
    for changes, model, rank in (
        ([], PackagedSmolLM2(), 8),
        (["--model.model=org/x", "--model.lora.r=4"], Pretrained("org/x"), 4),
    ):
        module = parse_fit(recipe, *changes).model
        assert (module.source, module.lora) == (model, LoRA(rank, 16, 0.05, ["q_proj", "v_proj"]))
    recipe, given = ROOT / "recipes" / "smollm2_2of4_mask_lora.yaml", "--pruning.mask_lora"
    for changes, expected in (
        ([], MaskLoRA(8, 16, ["q_proj", "v_proj"])),
        ([f"{given}.r=4", f"{given}.target_modules=all-linear"], MaskLoRA(4, 16, "all-linear")),
        ([f"{given}=null"], None),
    ):
        cli = parse_fit(f"--config={recipe}", *changes)
        assert next(c for c in cli.trainer.callbacks if isinstance(c, DynamicPruning))._mask_lora == expected


def test_one_folder_is_that_of_logs_and_checkpoints():
    trainer = parse_fit(f"--config={BASE}", "--trainer.default_root_dir=elsewhere").trainer
    assert Path(trainer.log_dir) == Path("elsewhere/version_0")
    assert Path(trainer.default_root_dir).name == "elsewhere"
    assert parse_fit(f"--config={BASE}", "--trainer.logger=false").trainer.loggers == []


def test_evaluation_joins_a_recipe_by_its_name():
    cli = parse_fit(
        f"--config={BASE}",
        "--trainer.callbacks+=Evaluation",
        "--trainer.callbacks.text=PackagedWikipedia",
        "--trainer.callbacks.every_n_steps=20",
        "--trainer.callbacks.tasks=boolq,rte",
    )
    evaluation = next(c for c in cli.trainer.callbacks if isinstance(c, Evaluation))
    assert evaluation._text == PackagedWikipedia()
    assert evaluation._tasks == ["boolq", "rte"]
    assert any(isinstance(c, DynamicPruning) for c in cli.trainer.callbacks)


def test_a_pattern_needs_no_quotes(tmp_path):
    path = tmp_path / "quotes.yaml"
    path.write_text(BASE.read_text().replace('"2:4"', "2:4"))
    cli = parse_fit(f"--config={path}")
    assert next(c for c in cli.trainer.callbacks if isinstance(c, DynamicPruning)).config.pattern == NM(2, 4)
