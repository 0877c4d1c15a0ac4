import logging
import os
import random
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from sparse_train.callbacks import DynamicPruning, Evaluation, RunRecord
from sparse_train.data.texts import TextFiles
from sparse_train.evaluation import evaluate_perplexity, evaluate_zero_shot, token_ids
from sparse_train.models.causal_lm import CausalLM
from sparse_train.models.sources import Pretrained
from sparse_train.report import collect, headline, read_metrics, write_run_report
from tests.callbacks.runs import InInit, loader
from tests.conftest import shallow_llama, tiny_llama, tiny_tokenizer
from tests.evaluation.tasks import task_file
from tests.oneshot.test_prune import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(InInit):
    """Draws from every source of chance in each step, as dropout and augmentation do."""

    def __init__(self):
        super().__init__()
        self.net = shallow_llama(attention_dropout=0.2)

    def training_step(self, batch, index):
        return super().training_step(batch, index) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())


@pytest.fixture
def task(tmp_path):
    return task_file(tmp_path)


def fit(*callbacks, module=None, steps=6, **options):
    L.seed_everything(1, verbose=False)
    module = module or Module()
    trainer = L.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False} | options,
    )
    trainer.fit(module, loader())
    return module


def test_a_run_with_evaluation_is_bit_for_bit_one_without(model_folder, text_file, task, tmp_path):
    text = TextFiles(validation=[str(text_file)])
    evaluation = Evaluation(
        text,
        every_n_steps=1,
        window=32,
        max_tokens=320,
        tasks=task,
        tasks_every_n_steps=2,
        tokenizer=str(model_folder),
    )
    states, chance = [], []
    for callbacks in ([], [evaluation]):
        pruning = DynamicPruning("2:4", update_freq=2, squash=False)
        logger = CSVLogger(tmp_path, name=f"logs{len(callbacks)}", version="")
        module = fit(pruning, *callbacks, logger=logger)
        states.append({**module.state_dict(), **_tensors(pruning.updater.state_dict())})
        chance.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert states[0].keys() == states[1].keys()
    assert any("weight_mask" in key for key in states[0])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert chance[0] == chance[1]
    assert module.net.training

    rows = read_metrics(tmp_path / "logs1" / "metrics.csv")
    perplexities = [(row["step"], row["evaluation/perplexity"]) for row in rows if "evaluation/perplexity" in row]
    assert [step for step, _ in perplexities] == [1, 2, 3, 4, 5, 6]
    assert len({value for _, value in perplexities}) == 6
    assert [row["step"] for row in rows if "zero_shot/mine" in row] == [2, 4, 6]
    assert not any("zero_shot/mean" in row for row in rows)  # there is one task
    # the last ones are those of the finished model, its masks on
    ids = token_ids(text.documents("validation"), tiny_tokenizer())
    assert perplexities[-1][1] == evaluate_perplexity(module.net, ids, window=32, max_tokens=320).perplexity
    found = evaluate_zero_shot(module.net, tiny_tokenizer(), [task])
    assert rows[-1]["zero_shot/mine"] == found.tasks[0].accuracy


def _tensors(state, prefix="updater"):
    """The tensors of a nested state by their path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    entries = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {key: value for name, entry in entries for key, value in _tensors(entry, f"{prefix}.{name}").items()}


def test_at_the_end_only(model_folder, text_file, task, tmp_path, caplog):
    evaluation = Evaluation(
        TextFiles(test=[str(text_file)]),
        split="test",
        window=16,
        max_tokens=160,
        tasks=[task],
        limit=3,
        tokenizer=Pretrained(str(model_folder)),
    )
    logging.getLogger("lightning.pytorch").addHandler(caplog.handler)
    with caplog.at_level(logging.INFO):
        fit(evaluation, steps=3, precision="bf16-mixed", logger=CSVLogger(tmp_path, name="logs", version=""))
    rows = read_metrics(tmp_path / "logs" / "metrics.csv")
    assert [row["step"] for row in rows if "evaluation/perplexity" in row] == [3]
    assert [row["step"] for row in rows if "zero_shot/mine" in row] == [3]
    assert f"tokenizer of {model_folder}" in caplog.text
    for said in ("150 tokens scored, windows of 16", "the first 3 items of each task", "computed in bfloat16"):
        assert said in caplog.text


def test_a_causal_lm_brings_its_tokenizer(model_folder, text_file, tmp_path):
    evaluation = Evaluation(TextFiles(validation=[str(text_file)]), window=16, max_tokens=64)
    logger = CSVLogger(tmp_path, name="logs", version="")
    module = fit(evaluation, module=CausalLM(str(model_folder)), steps=2, logger=logger)
    metrics = read_metrics(tmp_path / "logs" / "metrics.csv")[-1]
    ids = token_ids(TextFiles(validation=[str(text_file)]).documents("validation"), tiny_tokenizer())
    expected = evaluate_perplexity(module.model, ids, window=16, max_tokens=64).perplexity
    assert metrics["evaluation/perplexity"] == expected


def test_under_ddp(model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("os.environ", dict(os.environ))  # Lightning leaves the group's address there
    text = TextFiles(validation=[str(text_file)])
    evaluation = Evaluation(text, every_n_steps=1, window=16, max_tokens=64, tokenizer=str(model_folder))
    logger = CSVLogger(tmp_path, name="logs", version="")
    try:
        fit(evaluation, steps=2, strategy=DDPStrategy(process_group_backend="gloo"), devices=1, logger=logger)
    finally:
        torch.distributed.destroy_process_group()
    rows = read_metrics(tmp_path / "logs" / "metrics.csv")
    assert [row["step"] for row in rows if "evaluation/perplexity" in row] == [1, 2]


def test_measuring_asks_nothing_of_other_processes(task, tmp_path, monkeypatch):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for name in ("barrier", "all_gather", "all_reduce", "broadcast"):
            monkeypatch.setattr(torch.distributed, name, lambda *_, **__: pytest.fail("waits for the others"))
        evaluate_perplexity(shallow_llama(), torch.arange(3, 67), window=16)
        evaluate_zero_shot(shallow_llama(), tiny_tokenizer(), [task])
    finally:
        torch.distributed.destroy_process_group()


def test_other_processes_get_what_the_first_has_measured(monkeypatch):
    asked, logged = [], []

    def broadcast(found):
        asked.append(found)
        return {"evaluation/perplexity": 9.0}, "protocol"

    evaluation, module = Evaluation(TextFiles(), every_n_steps=2, tasks="rte"), Module()
    strategy = SimpleNamespace(broadcast=broadcast)
    trainer = SimpleNamespace(is_global_zero=False, global_step=0, strategy=strategy, lightning_module=module)
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.append((trainer.global_step, name, value)))
    evaluation.on_fit_start(trainer, module)
    evaluation.on_train_start(trainer, module)
    for trainer.global_step in (1, 1, 2, 2, 3, 3, 4):
        evaluation.on_train_batch_end(trainer, module, None, None, 0)
    evaluation.on_train_end(trainer, module)
    assert asked == [({}, "")] * 3  # two of perplexity, one of tasks at the end
    assert logged == [(step, "evaluation/perplexity", 9.0) for step in (2, 4)]
    assert [result["step"] for result in evaluation.results] == [2, 4, 4]


@pytest.mark.parametrize("behind", [True, False])
def test_what_was_measured_stops_runs_and_stands_in_the_report(model_folder, text_file, tmp_path, behind):
    text = TextFiles(validation=[str(text_file)])
    evaluation = Evaluation(text, every_n_steps=2, window=16, max_tokens=64, tokenizer=str(model_folder))
    record = RunRecord()
    callbacks = [evaluation, record] if behind else [record, evaluation]
    stop = EarlyStopping("evaluation/perplexity", mode="max", stopping_threshold=1.0, check_on_train_epoch_end=True)
    module = fit(*callbacks, stop, steps=30, default_root_dir=tmp_path, limit_train_batches=8)
    assert 4 <= module.trainer.global_step < 30
    (run,) = collect([tmp_path])
    name, last = "evaluation/perplexity", evaluation.results[-1]
    assert run.curve(name) == [(each["step"], each["metrics"][name]) for each in evaluation.results]
    assert headline(run)["evaluation"] == last["metrics"]
    page = write_run_report([tmp_path]).read_text()
    assert f"{last['metrics']['evaluation/perplexity']:.4f} at step {last['step']}" in page
    assert "windows of 16" in page


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_sharded_models_are_refused(strategy):
    trainer = SimpleNamespace(strategy=object.__new__(strategy))  # making one would ask for GPUs
    with pytest.raises(ValueError, match=f"{strategy.__name__} shards it"):
        Evaluation(tasks="rte").setup(trainer, Module(), "fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "something to measure"),
        ({"tasks": "rte", "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tasks": "rte", "limit": 0}, "limit must be at least 1, got 0"),
        ({"tasks": "rte", "tasks_every_n_steps": 0}, "tasks_every_n_steps must be at least 1"),
        ({"text": TextFiles(), "every_n_steps": -1}, "every_n_steps must be at least 1, got -1"),
        ({"tasks": ["", " "]}, "names no task"),
    ],
)
def test_mistakes_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**arguments)


def test_what_would_fail_after_the_last_step_fails_before_the_first(model_folder, text_file):
    measured = {"text": TextFiles(validation=[str(text_file)]), "tokenizer": str(model_folder)}
    short, few = Module(), Module()
    short.net = tiny("gpt2")  # which has 64 positions
    few.net = tiny_llama(vocab_size=8)
    for module, window, message in ((short, 65, "has 64 positions"), (few, 16, "Token ids go from")):
        with pytest.raises(ValueError, match=message):
            fit(Evaluation(window=window, **measured), module=module)
        assert not module.seen


def test_mistakes_before_the_first_step(model_folder, tmp_path):
    folder = str(model_folder)
    for evaluation, message in [
        (Evaluation(TextFiles()), "does not know the tokenizer of Module"),
        (Evaluation(TextFiles(), tokenizer=folder), "TextFiles has no files"),
        (Evaluation(TextFiles(test=[folder + "/config.json"]), tokenizer=folder), "fewer than one window of 512"),
        (Evaluation(tasks="absent.yaml", tokenizer=folder), "Cannot load 'absent.yaml'"),
    ]:
        module = Module()
        with pytest.raises(ValueError, match=message):
            fit(evaluation, module=module)
        assert not module.seen

    class NoLanguageModel(Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

    with pytest.raises(ValueError, match="needs a transformers model"):
        fit(Evaluation(TextFiles(), tokenizer=folder), module=NoLanguageModel())
