import copy
import json
import logging
import random
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
import torch
from datasets import Dataset
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import sparse_train
from sparse_train.evaluation import WANDA7, TaskAccuracy, ZeroShotResult, evaluate_zero_shot, zeroshot
from sparse_train.evaluation.task_data import TASKS_FOLDER, read
from sparse_train.export import export_model
from tests.conftest import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
STOCK = Path(lm_eval.tasks.__file__).parent
STOCK_FOLDERS = [
    STOCK / name for name in ("arc", "super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "openbookqa")
]

ARC = {"label": ["A", "B", "C", "D"], "text": ["a scale", "a 'ruler'", 'a "cup"', "Bob's clock"]}
# For each task: an item as the data set on the hub has it, and the same as our files have it.
ITEMS = {
    "boolq": (
        {"passage": "Ice -- Ice is frozen water.\nIt floats.", "question": "does ice float", "idx": 0, "label": 1},
        {
            "query": "Passage: Ice -- Ice is frozen water.\nIt floats.\nQuestion: does ice float?",
            "choices": ["no", "yes"],
            "gold": 1,
        },
    ),
    "rte": (
        {"sentence1": "Ann sold her car.", "sentence2": "Ann had a car.", "label": 0, "idx": 0},
        {"premise": "Ann sold her car.", "hypothesis": "Ann had a car.", "gold": 0},
    ),
    "hellaswag": (
        {
            "activity_label": "Home and Garden",
            "ctx_a": "[header] How to mend a roof [title] Climb up. [step] Take a ladder.",
            "ctx_b": "then",
            "endings": [
                "[substeps] Nail the shingles  down.",
                "climb down",
                "paint it [title] Use red.",
                "call a friend.",
            ],
            "label": "2",
        },
        {
            "query": "Home and Garden: How to mend a roof. Climb up. Take a ladder. Then",
            "choices": [" Nail the shingles down.", "climb down", "paint it. Use red.", "call a friend."],
            "gold": 2,
        },
    ),
    "winogrande": (
        {"sentence": "The cat fled the dog as the _ was big.", "option1": "cat", "option2": "dog", "answer": "2"},
        {
            "context_options": ["The cat fled the dog as the cat", "The cat fled the dog as the dog"],
            "continuation": "was big.",
            "gold": 1,
        },
    ),
    "arc_easy": (
        {"id": "1", "question": "What measures length?", "choices": ARC, "answerKey": "B"},
        {"query": "Question: What measures length?", "choices": ARC["text"], "gold": 1},
    ),
    "arc_challenge": (
        {"id": "2", "question": "What measures time?", "choices": {**ARC, "label": list("1234")}, "answerKey": "4"},
        {"query": "Question: What measures time?", "choices": ARC["text"], "gold": 3},
    ),
    "openbookqa": (
        {"id": "3", "question_stem": "A thing that measures mass is", "choices": ARC, "answerKey": " A"},
        {"query": "A thing that measures mass is", "choices": ARC["text"], "gold": 0},
    ),
}


def write(folder, **tasks):
    folder.mkdir(exist_ok=True)
    for task, items in tasks.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.fixture
def seven(tmp_path):
    """Each task with nine random items."""
    chance = random.Random(0)

    def text(count=3):
        return " ".join("".join(chance.choices("abcdefgh", k=4)) for _ in range(count))

    def changed(task):
        item = copy.deepcopy(ITEMS[task][1])
        for name, value in item.items():
            if name in ("query", "premise", "hypothesis", "continuation"):
                item[name] = f"{value.split(' ', 1)[0]} {text()}"
            if name == "context_options" or (name == "choices" and task != "boolq"):
                item[name] = [text(chance.randint(1, 4)) for _ in value]
        item["gold"] = chance.randrange(len(item.get("choices", "12")))
        return item

    return write(tmp_path / "seven", **{task: [changed(task) for _ in range(9)] for task in WANDA7})


def plain(value):
    """The same in lists and numbers, to be compared."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


def local_manager(folder):
    return TaskManager(include_defaults=False, include_path=str(TASKS_FOLDER), metadata={"task_data": str(folder)})


@pytest.fixture
def hub(monkeypatch):
    """lm-eval's own definitions of a few tasks, and a hub with one item of each data set."""
    data = {
        ("aps/super_glue", "boolq"): "boolq",
        ("nyu-mll/glue", "rte"): "rte",
        ("Rowan/hellaswag", None): "hellaswag",
        ("allenai/winogrande", "winogrande_xl"): "winogrande",
        ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
        ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
        ("allenai/openbookqa", "main"): "openbookqa",
    }

    def load_dataset(path, name=None, **_):
        items = Dataset.from_list([ITEMS[data[path, name]][0]])
        return {"train": items, "validation": items, "test": items}

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load_dataset)
    return TaskManager(include_defaults=False, include_path=STOCK_FOLDERS)


# --- The same prompts and scores as lm-eval's own tasks --------------------------------------------------------------


@pytest.mark.parametrize("name", WANDA7)
def test_local_items_are_asked_and_scored_as_lm_evals_own(name, hub, tmp_path):
    stock = hub.load([name])["tasks"][name]
    ours = local_manager(write(tmp_path, **{name: [ITEMS[name][1]]})).load([name])["tasks"][name]
    for task in (stock, ours):
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=None, rank=0, world_size=1)
    arguments = [instance.args for instance in stock.instances]
    assert [instance.args for instance in ours.instances] == arguments
    assert len(arguments) >= 2
    assert {instance.request_type for instance in ours.instances} == {"loglikelihood"}
    for winner in range(len(arguments)):
        likelihoods = [(-3.0 if i == winner else -20.0 - i, False) for i in range(len(arguments))]
        scores = stock.process_results(stock.eval_docs[0], likelihoods)
        assert ours.process_results(ours.eval_docs[0], likelihoods) == scores
        assert scores["acc"] == (winner == ITEMS[name][1]["gold"])
    assert ours.VERSION == stock.VERSION
    assert ours.aggregation() == stock.aggregation()


def test_a_masked_live_model_has_the_numbers_of_stock_lm_eval_on_its_export(seven, tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    dense = evaluate_zero_shot(model, tokenizer, task_data=seven)
    sparse_train.prune(model, criterion=sparse_train.Magnitude(), squash=False)
    live = evaluate_zero_shot(model, tokenizer, task_data=seven)

    folder = export_model(model, tokenizer, tmp_path / "exported")
    lm = HFLM(pretrained=str(folder), device="cpu", batch_size=4)
    manager = local_manager(seven)
    stock = simple_evaluate(lm, tasks=list(WANDA7), num_fewshot=0, task_manager=manager, log_samples=False)["results"]
    assert [row.task for row in live.tasks] == list(WANDA7)
    for row in live.tasks:
        assert row.accuracy == stock[row.task]["acc,none"]
        assert row.stderr == stock[row.task]["acc_stderr,none"]
        assert row.others == {k: stock[row.task][f"{k},none"] for k in ("acc_norm",) if f"{k},none" in stock[row.task]}
        assert (row.n, row.metric) == (9, "acc")
        assert len(row.items) == 9 and sum(row.items) / 9 == pytest.approx(row.accuracy)
    assert live != dense  # the masks were on
    assert {row.task for row in live.tasks if row.others} == {"hellaswag", "arc_easy", "arc_challenge", "openbookqa"}


def test_log_likelihoods_are_summed_in_float32(seven, monkeypatch):
    """Sums of bfloat16 have steps of a quarter at 50, and choices come out equal that are not."""
    found = []
    stock = HFLM.loglikelihood
    monkeypatch.setattr(HFLM, "loglikelihood", lambda self, *a, **k: found.append(stock(self, *a, **k)) or found[-1])
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    evaluate_zero_shot(model, tokenizer, ["arc_easy"], task_data=seven, batch_size=1, autocast=torch.bfloat16)
    lm = HFLM(model, tokenizer=tokenizer, backend="causal")
    task = local_manager(seven).load(["arc_easy"])["tasks"]["arc_easy"]
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    for (likelihood, _), instance in zip(found[0], task.instances, strict=True):
        context, choice = (torch.tensor(lm.tok_encode(text)) for text in instance.args)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=torch.cat([context, choice])[None, :-1]).logits[0, -len(choice) :]
        assert logits.dtype == torch.bfloat16
        exact = logits.double().log_softmax(-1).gather(1, choice[:, None]).sum().item()
        assert likelihood == pytest.approx(exact, rel=1e-5)


def test_tasks_of_lm_eval_by_name(hub, monkeypatch):
    monkeypatch.setattr(zeroshot, "_task_manager", lambda *_: hub)
    result = evaluate_zero_shot(tiny_llama(), tiny_tokenizer(), ["winogrande", "arc_easy", "winogrande"])
    assert [(row.task, row.n, row.stderr) for row in result.tasks] == [("winogrande", 1, None), ("arc_easy", 1, None)]
    assert result.mean_stderr is None
    assert result.data == "lm-eval's data sets"
    tag = evaluate_zero_shot(tiny_llama(), tiny_tokenizer(), ["ai2_arc"])
    assert [row.task for row in tag.tasks] == ["arc_challenge", "arc_easy"]


def test_a_group_with_a_mean_of_its_own_is_one_row(seven, tmp_path, monkeypatch):
    folder = tmp_path / "group"
    folder.mkdir()
    for name in ("arc_easy", "rte"):
        (folder / f"{name}.yaml").write_text(f"include: {TASKS_FOLDER / name}.yaml\n")
    (folder / "both.yaml").write_text(
        "group: both\ntask: [arc_easy, rte]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    manager = TaskManager(include_defaults=False, include_path=str(folder), metadata={"task_data": str(seven)})
    with monkeypatch.context() as patch:
        patch.setattr(zeroshot, "_task_manager", lambda *_: manager)
        both = evaluate_zero_shot(tiny_llama(), tiny_tokenizer(), ["both"]).tasks
    members = evaluate_zero_shot(tiny_llama(), tiny_tokenizer(), ["arc_easy", "rte"], task_data=seven)
    assert [(row.task, row.n) for row in both] == [("both", 18)]
    assert both[0].accuracy == pytest.approx(members.mean)
    assert both[0].items == ()


def test_a_task_file_of_ones_own(tmp_path):
    items = [{"question": f"q{i}", "options": ["a b", "c"], "answer": i % 2} for i in range(3)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "options",
        "metric_list": [{"metric": "acc"}],
    }
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(task))
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


def test_limit_and_protocol(seven, capsys):
    (seven / "arc_easy.jsonl").rename(seven / "arc_easy9.jsonl")
    result = evaluate_zero_shot(
        tiny_llama(),
        tiny_tokenizer(),
        ["arc_easy", "rte"],
        task_data=seven,
        limit=4,
        autocast=torch.bfloat16,
        model_name="tiny",
    )
    assert [row.n for row in result.tasks] == [4, 4]
    assert (result.model, result.limit, result.max_length) == ("tiny", 4, 128)
    assert (result.computed_in, result.num_fewshot) == ("bfloat16", 0)
    assert result.data == f"{seven}/arc_easy9.jsonl, {seven}/rte.jsonl"
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_nothing_is_left_of_an_evaluation(seven):
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
    evaluate_zero_shot(model, tokenizer, ["boolq"], task_data=seven, limit=2)
    assert state() == before
    with pytest.raises(ValueError, match="has no items"):
        evaluate_zero_shot(model, tokenizer, ["boolq"], task_data=write(seven, boolq=[]))
    assert state() == before


# --- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("rte", ["{"], "rte.jsonl.*Expecting property name"),
        ("rte", ["", "3"], "rte.jsonl"),
        ("rte", ['{"premise": "a", "gold": 0}'], "'hypothesis'"),
        ("rte", ['{"premise": "a", "hypothesis": "b", "gold": 2}'], "Item 1 is to have premise, hypothesis and gold"),
        ("rte", ['{"premise": "a", "hypothesis": "b", "gold": true}'], "'gold': True"),
        ("rte", ['{"premise": "a", "hypothesis": "", "gold": 0}'], "'hypothesis': ''"),
        ("arc_easy", ['{"query": "a", "choices": ["b"], "gold": 0}'], "Item 1"),
        ("arc_easy", ['{"query": "a", "choices": ["b", 3], "gold": 0}'], "Item 1"),
        ("arc_easy", ['{"query": "a", "choices": "bc", "gold": 0}'], "Item 1"),
        ("winogrande", ['{"context_options": ["a", "b"], "gold": 0}'], "'continuation'"),
        ("winogrande", ["", ""], "winogrande.jsonl.* It has no items"),
    ],
)
def test_items_that_do_not_fit(task, lines, message, tmp_path):
    (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read(tmp_path, task)


def test_a_line_separator_in_a_text_is_no_new_line(tmp_path):
    item = {"premise": "a\u2028b", "hypothesis": "c", "gold": 0}
    (tmp_path / "rte.jsonl").write_text(json.dumps(item, ensure_ascii=False), encoding="utf-8")
    assert read(tmp_path, "rte") == [item]


def test_files_that_are_missing(tmp_path):
    folder = write(tmp_path / "data", rte5=[ITEMS["rte"][1]], rte7=[ITEMS["rte"][1]], boolq=[ITEMS["boolq"][1]])
    for tasks, message in [
        (["boolq", "openbookqa"], "openbookqa expects its items in .*openbookqa.jsonl .*there is none"),
        (["rte"], "rte expects its items in one file.*rte5.jsonl and rte7.jsonl"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_zero_shot(tiny_llama(), tiny_tokenizer(), tasks, task_data=folder)


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
    with pytest.raises(ValueError, match=r"Cannot load 'sciq'.*Without a hub, --task_data"):
        evaluate_zero_shot(model, tokenizer, ["sciq"])
    pages = Dataset.from_list([{"page": "A text."}])
    splits = dict.fromkeys(("train", "validation", "test"), pages)
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", lambda **_: splits)
    with pytest.raises(ValueError, match="wikitext reports word_perplexity.* that is no accuracy"):
        evaluate_zero_shot(model, tokenizer, ["wikitext"])
