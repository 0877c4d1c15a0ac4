"""From a recipe to an exported model, and one-shot pruning, in two processes each."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from sparse_train.cli import lightning_cli
from sparse_train.cli.main import main
from tests.conftest import without_pictures
from tests.ranks import launch

STRATEGIES = {
    "ddp": ["--config=configs/strategy/ddp.yaml"],
    "fsdp2": ["--config=configs/strategy/fsdp2.yaml", "--trainer.strategy.init_args.data_parallel_size=2"],
}
for stage in (1, 2, 3):
    STRATEGIES[f"zero{stage}"] = [
        f"--config=configs/strategy/deepspeed_zero{stage}.yaml",
        "--trainer.strategy=tests.ranks.engines.CPUDeepSpeed",  # which takes the CPU
        f"--trainer.strategy.init_args.config=configs/strategy/deepspeed_zero{stage}.json",
        "--trainer.strategy.init_args.process_group_backend=gloo",
    ]


def read(text: Path) -> str:
    files = {"train": [str(text)], "validation": [str(text)], "test": [str(text)]}
    return json.dumps({"class_path": "TextFiles", "init_args": files})


def fit(engine: str, folder: Path, model: Path, text: Path) -> Any:
    """The stage of ZeRO that ran, or the name of another strategy."""
    os.chdir(folder)
    options = [
        "fit",
        "--config=recipes/smollm2_2of4.yaml",
        "--config=configs/precision/bf16_mixed.yaml",
        *STRATEGIES[engine],
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        f"--model.model={model}",
        f"--data.text={read(text)}",
        "--data.block_size=32",
        "--data.batch_size=2",
        "--data.max_validation_blocks=4",
        "--trainer.max_steps=6",
        "--trainer.val_check_interval=3",
        "--trainer.default_root_dir=run",
        "--trainer.enable_model_summary=false",
        "--trainer.enable_progress_bar=false",
        "--pruning.update_freq=2",
        "--pruning.first_mask=FirstWindow",
        "--model.distillation=Distillation",
        "--model.distillation.cache=answers",
        "--export=exported",
    ]
    with without_pictures():
        strategy = lightning_cli.run(options).trainer.strategy
    return getattr(strategy, "config", {}).get("zero_optimization", {}).get("stage", type(strategy).__name__)


@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_from_a_recipe_to_an_exported_model(tmp_path, model_folder, text_file, engine):
    ran = {"ddp": "DDPStrategy", "fsdp2": "ModelParallelStrategy", "zero1": 1, "zero2": 2, "zero3": 3}
    assert launch.run(fit, engine, tmp_path, model_folder, text_file) == [ran[engine]] * 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "| up_proj | 2 | 0.5000 | 2:4 |" in card  # counted on whole weights, whoever held them
    for name, weight in model.named_parameters():
        if "proj" in name:
            assert ((weight.view(-1, 4) == 0).sum(1) == 2).all(), name
    answers = list((tmp_path / "answers").glob("*/*"))  # of both processes, which may have asked for the same
    assert len(answers) == 6 * 2 * 2 and {path.suffix for path in answers} == {".safetensors"}
    metrics = next(tmp_path.rglob("metrics.csv")).read_text()
    for name in ("train/loss", "val/perplexity", "sparsity/flip_rate"):
        assert name in metrics
    assert "at the end" in next(tmp_path.rglob("report.html")).read_text()

    checkpoint = next((tmp_path / "run").rglob("*.ckpt"))
    main(["export", str(checkpoint), str(tmp_path / "from_checkpoint")])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "from_checkpoint").state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(again[key] == 0, value == 0), key
        assert torch.allclose(again[key].float(), value.float(), rtol=1e-2, atol=1e-3), key


def prune(folder: Path, model: Path, text: Path, *options: str) -> None:
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    main(
        [
            "prune",
            f"--model={model}",
            "--out=pruned",
            f"--text={read(text)}",
            "--num_calibration_samples=12",
            "--max_seq_length=32",
            "--batch_size=2",
            *options,
        ]
    )


def test_prune_over_two_processes_is_pruning_in_one(tmp_path, model_folder, text_file):
    criteria: dict[str, list[str]] = {
        "Wanda": [],
        "SparseGPT": [],
        # dampened, with many iterations: few samples, and rounding grows from layer to layer
        "IHT": [f"--criterion.{each}" for each in ("asymmetric=true", "dampening_frac=1", "iterations=50", "rounds=0")],
    }
    for ranks in (1, 2):
        cases = [
            (tmp_path / f"{name}{ranks}", model_folder, text_file, f"--criterion={name}", *options)
            for name, options in criteria.items()
        ]
        launch.each(prune, cases, ranks=ranks)
    for criterion in criteria:
        one, two = (
            AutoModelForCausalLM.from_pretrained(tmp_path / f"{criterion}{ranks}" / "pruned").state_dict()
            for ranks in (1, 2)
        )
        differing = sum(int(((one[key] == 0) != (two[key] == 0)).sum()) for key in one)
        size = sum(weight.numel() for weight in one.values())
        assert differing <= 1e-4 * size, criterion  # near-ties: sums are rounded otherwise
        for key in one:
            assert (one[key] - two[key]).float().norm() <= 0.02 * one[key].float().norm(), (criterion, key)
        details = json.loads((tmp_path / f"{criterion}2" / "pruned" / "pruning.json").read_text())
        assert details["calibration"]["processes"] == 2
        assert details["sparsity"] == 0.5


def joins_by_itself(folder: Path, model: Path, text: Path, port: int) -> str:
    """As under torchrun, where the command makes the process group and ends it."""
    dist.barrier()  # the other process may still be connecting
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        prune(folder, model, text, "--criterion=Magnitude", "--json")
    return out.getvalue()


def test_only_the_first_process_prints(tmp_path, model_folder, text_file):
    args = tmp_path, model_folder, text_file, launch.free_port()
    first, second = launch.run(joins_by_itself, *args, survivors=True)
    assert json.loads(first)["sparsity"] == 0.5
    assert not second


def mistaken(folder: Path, model: Path, text: Path, *options: str) -> Any:
    with pytest.raises(SystemExit) as error:
        prune(folder, model, text, *options)
    return str(error.value)


def test_mistakes_of_several_processes(tmp_path, model_folder, text_file):
    for message in launch.run(mistaken, tmp_path, model_folder, text_file, "--batch_size=12"):
        assert "There are 1 calibration batches for 2 processes" in message
    for message in launch.run(mistaken, tmp_path, model_folder, text_file, "--streaming=true"):
        assert "streaming runs in one process" in message
