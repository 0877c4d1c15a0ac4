import copy
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import sparse_train
from sparse_train.evaluation import TaskAccuracy, ZeroShotResult, evaluate_zero_shot, zeroshot
from sparse_train.export import export_model
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.evaluation.tasks import STOCK, STOCK_FOLDERS, hub, task_file  # noqa: F401  (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore")


def plain(value):
    """The same in lists and numbers, to be compared."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


def test_a_masked_live_model_has_the_numbers_of_stock_lm_eval_on_its_export(tmp_path):
    tasks = [
        task_file(tmp_path, "one", count=20),
        task_file(tmp_path, "two", count=30, metric_list=[{"metric": "acc"}]),
    ]
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    dense = evaluate_zero_shot(model, tokenizer, tasks)
    sparse_train.prune(model, criterion=sparse_train.Magnitude(), squash=False)
    live = evaluate_zero_shot(model, tokenizer, tasks)

    folder = export_model(model, tokenizer, tmp_path / "exported")
    lm = HFLM(pretrained=str(folder), device="cpu", batch_size=4)
    manager = TaskManager(include_defaults=False)
    stock = simple_evaluate(lm, tasks=tasks, num_fewshot=0, task_manager=manager, log_samples=False)["results"]
    assert [(row.task, row.n) for row in live.tasks] == [("one", 20), ("two", 30)]
    for row in live.tasks:
        assert row.accuracy == stock[row.task]["acc,none"]
        assert row.stderr == stock[row.task]["acc_stderr,none"]
        assert row.others == {k: stock[row.task][f"{k},none"] for k in ("acc_norm",) if f"{k},none" in stock[row.task]}
        assert row.metric == "acc"
        assert len(row.items) == row.n and sum(row.items) / row.n == pytest.approx(row.accuracy)
    assert live != dense  # the masks were on
    assert [bool(row.others) for row in live.tasks] == [True, False]


def test_log_likelihoods_are_summed_in_float32(tmp_path, monkeypatch):
    """Sums of bfloat16 have steps of a quarter at 50, and choices come out equal that are not."""
    found = []
    stock = HFLM.loglikelihood
    monkeypatch.setattr(HFLM, "loglikelihood", lambda self, *a, **k: found.append(stock(self, *a, **k)) or found[-1])
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    file = task_file(tmp_path)
    evaluate_zero_shot(model, tokenizer, [file], batch_size=1, autocast=torch.bfloat16)
    lm = HFLM(model, tokenizer=tokenizer, backend="causal")
    task = TaskManager(include_defaults=False).load([file])["tasks"]["mine"]
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    for (likelihood, _), instance in zip(found[0], task.instances, strict=True):
        context, choice = (torch.tensor(lm.tok_encode(text)) for text in instance.args)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=torch.cat([context, choice])[None, :-1]).logits[0, -len(choice) :]
        assert logits.dtype == torch.bfloat16
        exact = logits.double().log_softmax(-1).gather(1, choice[:, None]).sum().item()
        assert likelihood == pytest.approx(exact, rel=1e-5)


def test_tasks_of_lm_eval_by_name(hub, monkeypatch):  # noqa: F811
    monkeypatch.setattr(zeroshot, "_task_manager", lambda *_: hub)
    result = evaluate_zero_shot(tiny_llama(), tiny_tokenizer(), ["winogrande", "arc_easy", "winogrande"])
    assert [(row.task, row.n, row.stderr) for row in result.tasks] == [("winogrande", 1, None), ("arc_easy", 1, None)]
    assert result.mean_stderr is None
    assert result.data == "lm-eval's data sets"
    tag = evaluate_zero_shot(tiny_llama(), tiny_tokenizer(), ["ai2_arc"])
    assert [row.task for row in tag.tasks] == ["arc_challenge", "arc_easy"]


def test_a_group_with_a_mean_of_its_own_is_one_row(tmp_path, monkeypatch):
    files = [task_file(tmp_path, name, count=9) for name in ("one", "two")]
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(zeroshot, "_task_manager", lambda *_: manager)
        both = evaluate_zero_shot(tiny_llama(), tiny_tokenizer(), ["both"]).tasks
    members = evaluate_zero_shot(tiny_llama(), tiny_tokenizer(), files)
    assert [(row.task, row.n) for row in both] == [("both", 18)]
    assert both[0].accuracy == pytest.approx(members.mean)
    assert both[0].items == ()


def test_a_task_file_of_ones_own(tmp_path):
    file = Path(task_file(tmp_path, count=3))
    result = evaluate_zero_shot(tiny_llama(), tiny_tokenizer(), [str(file)])
    assert [(row.task, row.n, row.metric) for row in result.tasks] == [("mine", 3, "acc")]
    assert result.data == str(file)
    for text in ("[1", "task: other", None):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(ValueError, match=r"Cannot load .*mine\.yaml|no accuracy"):
            evaluate_zero_shot(tiny_llama(), tiny_tokenizer(), [str(file)])


# --- What is reported ------------------------------------------------------------------------------------------------


def test_mean_and_its_standard_error():
    rows = [TaskAccuracy("a", 0.5, 0.03, 100, "acc", {}), TaskAccuracy("b", 0.25, 0.04, 100, "acc", {"acc_norm": 0.5})]
    result = ZeroShotResult(tuple(rows), "M", "D", 0, 100, 2048, 4, "bfloat16", "0.4.13")
    assert result.mean == 0.375
    assert result.mean_stderr == pytest.approx((0.03**2 + 0.04**2) ** 0.5 / 2)
    assert result.protocol == (
        "zero-shot accuracy of M, the first 100 items of each task, data: D, 0 examples in the prompt, at most 2048 "
        "tokens, batches of 4, computed in bfloat16, log-likelihoods in float32, lm-eval 0.4.13"
    )
    assert result.as_dict()["tasks"][1]["others"] == {"acc_norm": 0.5}
    assert all("items" not in task for task in result.as_dict()["tasks"])
    json.dumps(result.as_dict())


def test_limit_and_protocol(tmp_path, capsys):
    tasks = [task_file(tmp_path, "one"), task_file(tmp_path, "two")]
    result = evaluate_zero_shot(
        tiny_llama(),
        tiny_tokenizer(),
        tasks,
        limit=4,
        autocast=torch.bfloat16,
        model_name="tiny",
    )
    assert [row.n for row in result.tasks] == [4, 4]
    assert (result.model, result.limit, result.max_length) == ("tiny", 4, 128)
    assert (result.computed_in, result.num_fewshot) == ("bfloat16", 0)
    assert result.data == ", ".join(tasks)
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_nothing_is_left_of_an_evaluation(tmp_path):
    model, tokenizer = tiny_llama(attention_dropout=0.1).train(), tiny_tokenizer()
    tokenizer.pad_token = None
    updater = sparse_train.MaskUpdater(model, "2:4", update_freq=2, window=1.0, total_steps=8)
    model.model.layers[1].eval()
    ids = torch.randint(3, 100, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    layers = sparse_train.sparse_layers(model)
    assert layers["model.layers.0.mlp.up_proj"].recorder.when == "training"
    random.seed(7), np.random.seed(7)

    def state():
        return plain(
            {
                "modes": {name: module.training for name, module in model.named_modules()},
                "parameters": [(id(p), p.clone(), p.grad.clone()) for p in model.parameters()],
                "statistics": copy.deepcopy(updater.state_dict()),
                "chance": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
                "tokenizer": tokenizer.pad_token,
                "log": logging.getLogger("lm_eval").level,
            }
        )

    before = state()
    evaluate_zero_shot(model, tokenizer, [task_file(tmp_path)], limit=2)
    assert state() == before
    with pytest.raises(ValueError, match="Cannot load"):
        evaluate_zero_shot(model, tokenizer, [task_file(tmp_path, "empty", count=0)])
    assert state() == before


# --- Mistakes --------------------------------------------------------------------------------------------------------


def test_other_mistakes(monkeypatch):
    manager = TaskManager(include_defaults=False, include_path=[*STOCK_FOLDERS, STOCK / "wikitext", STOCK / "sciq"])
    monkeypatch.setattr(zeroshot, "_task_manager", lambda *_: manager)
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with pytest.raises(ValueError, match="no task 'arc_eazy'. Did you mean 'arc_easy'"):
        evaluate_zero_shot(model, tokenizer, ["arc_eazy"])
    with pytest.raises(ValueError, match="Did you mean 'wanda7'"):
        evaluate_zero_shot(model, tokenizer, ["wanda_7"])
    with pytest.raises(ValueError, match="names no task"):
        evaluate_zero_shot(model, tokenizer, [""])
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        evaluate_zero_shot(model, tokenizer, limit=0)
    with pytest.raises(ValueError, match=r"Cannot load 'sciq'.*Without a hub"):
        evaluate_zero_shot(model, tokenizer, ["sciq"])
    pages = Dataset.from_list([{"page": "A text."}])
    splits = dict.fromkeys(("train", "validation", "test"), pages)
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", lambda **_: splits)
    with pytest.raises(ValueError, match="wikitext reports word_perplexity.* that is no accuracy"):
        evaluate_zero_shot(model, tokenizer, ["wikitext"])
