"""Zero-shot accuracy of a model in memory by lm-eval, with its masks, and with the protocol of each measurement.

The accuracy is lm-eval's ``acc``, the choice with the largest log-likelihood, if a task reports it, as all seven tasks
of the paper do. Wanda's code does not say which metric counts, but its tables hold ``acc``: dense LLaMA-7B has 34 % on
OpenBookQA there, and 44 % by ``acc_norm``.
"""

import copy
import io
import logging
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn

from sparse_train.arguments import check_positive, did_you_mean
from sparse_train.environment import isolated_rng
from sparse_train.evaluation.perplexity import computed_in, undisturbed
from sparse_train.files import reading

WANDA7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The tasks of arXiv 2306.11695, section 4, in the order of its tables, by their names in lm-eval."""
_METRICS = ("acc", "acc_norm", "exact_match")
"""Metrics that count as accuracy; the first one that a task reports is used."""


@dataclass(frozen=True)
class TaskAccuracy:
    """The result of one task."""

    task: str
    accuracy: float
    """Share of the items, 0 to 1."""
    stderr: float | None
    """Of the accuracy, over items; None if lm-eval has none, as for a single item."""
    n: int
    """Number of items."""
    metric: str
    """lm-eval's name of the metric in ``accuracy``."""
    others: dict[str, float]
    """Other metrics that lm-eval reports, by name."""
    items: tuple[float, ...] = ()
    """The metric of each item, 1 = right, for comparing models item by item; empty for a group. Not in ``as_dict``."""


@dataclass(frozen=True)
class ZeroShotResult:
    """Accuracies and how they were measured."""

    tasks: tuple[TaskAccuracy, ...]
    model: str
    data: str
    num_fewshot: int
    limit: int | None
    """Number of items per task, its first ones; None = all."""
    max_length: int
    """Maximum number of tokens that the model sees; of a longer prompt, the last ones."""
    batch_size: int
    computed_in: str
    """Dtype of the forward, from autocast or the weights."""
    lm_eval: str
    """Version of lm-eval."""

    @property
    def protocol(self) -> str:
        """How they were measured, in a sentence."""
        items = "all items" if self.limit is None else f"the first {self.limit} items of each task"
        return (
            f"zero-shot accuracy of {self.model}, {items}, data: {self.data}, {self.num_fewshot} examples in the "
            f"prompt, at most {self.max_length} tokens, batches of {self.batch_size}, computed in {self.computed_in}, "
            f"log-likelihoods in float32, lm-eval {self.lm_eval}"
        )

    @property
    def mean(self) -> float:
        """Mean over tasks, each with the same weight, as in the paper's tables."""
        return math.fsum(task.accuracy for task in self.tasks) / len(self.tasks)

    @property
    def mean_stderr(self) -> float | None:
        """Standard error of the mean, over items, for a fixed set of tasks."""
        errors = [task.stderr for task in self.tasks if task.stderr is not None]
        return math.hypot(*errors) / len(errors) if len(errors) == len(self.tasks) else None

    @property
    def metrics(self) -> dict[str, float]:
        """For loggers: each task, and the mean if there are several."""
        accuracies = {f"zero_shot/{task.task}": task.accuracy for task in self.tasks}
        return accuracies | ({"zero_shot/mean": self.mean} if len(accuracies) > 1 else {})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = {"mean": self.mean, "mean_stderr": self.mean_stderr, **asdict(self)}
        for task in content["tasks"]:
            del task["items"]
        return content


def evaluate_zero_shot(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] = ("wanda7",),
    *,
    limit: int | None = None,
    batch_size: int = 4,
    model_name: str = "model",
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> ZeroShotResult:
    """Zero-shot accuracy of ``model``; its training mode and all random states are restored afterwards.

    No export is needed: masked layers compute with their masks.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        tasks: names of lm-eval's tasks, groups or tags, or files of one's own in its format (``TASK.yaml``); "wanda7"
            stands for the seven tasks of the Wanda paper.
        limit: use only the first items of each task.
        batch_size: requests per forward pass.
        model_name: for the protocol.
        autocast: compute in this dtype.
        progress: show lm-eval's progress bars.

    Raises:
        ValueError: a task or its items are not there or do not fit, or an argument is out of range.
    """
    check_positive("limit", limit)
    check_positive("batch_size", batch_size)
    names = task_names(tasks)
    with undisturbed(model), _quiet(progress):
        # The same as lm-eval's simple_evaluate, in the same order: some tasks shuffle their choices when they are
        # loaded. simple_evaluate would also query nvidia-smi, pip and git at every call.
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval may give it a padding token
            backend="causal",
            batch_size=batch_size,
            mixed_precision_dtype=autocast,
            softmax_dtype=torch.float32,  # in bfloat16, sums of different choices can become equal
        )
        loaded, reported = _load_tasks(names)
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        # standard errors of accuracies have a closed form; two bootstrap draws for others, which are not reported
        try:
            report = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=True, bootstrap_iters=2)
        except AssertionError as error:  # most say nothing
            likely = f"most likely an answer alone has more than the {lm.max_length} tokens that the model reads"
            raise ValueError(f"lm-eval stopped at one of its checks: {str(error) or likely}.") from error
    return ZeroShotResult(
        tasks=tuple(_accuracy(name, report["results"][name], report["samples"].get(name, [])) for name in reported),
        model=model_name,
        data=", ".join(dict.fromkeys(name if _is_file(name) else "lm-eval's data sets" for name in names)),
        num_fewshot=0,
        limit=limit,
        max_length=lm.max_length,
        batch_size=batch_size,
        computed_in=computed_in(model, autocast),
        lm_eval=version("lm_eval"),
    )


def task_names(tasks: str | Sequence[str]) -> list[str]:
    """The tasks of a list or a comma-separated text, each once, with "wanda7" replaced by its seven."""
    given = [task.strip() for task in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    names = [name for task in given for name in (WANDA7 if task == "wanda7" else (task,)) if name]
    if not names:
        raise ValueError("tasks names no task. There is wanda7, and every task of lm-eval, separated by commas.")
    return list(dict.fromkeys(names))


def check_tasks(names: Sequence[str], *, progress: bool = False) -> None:
    """Check before a long run that ``evaluate_zero_shot`` can load its tasks; downloads them from the hub."""
    with isolated_rng(), _quiet(progress):
        _load_tasks(names)


def _load_tasks(names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """lm-eval's tasks, and what it reports of them: tasks, those of tags, and groups with a common mean."""
    manager = _task_manager(not all(map(_is_file, names)))
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    reported: list[str] = []
    for name in names:
        if name not in manager.task_index and not _is_file(name):
            close = did_you_mean(name, {*manager.task_index, "wanda7", "perplexity"})
            raise ValueError(f"lm-eval has no task {name!r}.{close} lm_eval ls tasks shows all.")
        with reading(name, lambda: " Without a hub, a task needs a file of its own (docs/evaluation.md)."):
            named = manager.load([name])
        group = named["groups"].get(name)
        reported += [name] if group is not None and group.has_aggregation else named["tasks"]
        for kind, own in loaded.items():
            own |= named[kind]
    for name, task in loaded["tasks"].items():
        if not set(_METRICS) & set(task.aggregation()):
            raise ValueError(
                f"{name} reports {', '.join(task.aggregation())}, and none of {', '.join(_METRICS)}: that is no "
                "accuracy. Leave it out; lm_eval itself runs it."
            )
    return loaded, list(dict.fromkeys(reported))


@cache  # lm-eval has more than ten thousand definitions, and reading them takes ten seconds
def _task_manager(stock: bool) -> Any:
    """Loads tasks from files and, if they are wanted, lm-eval's own by name."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=stock)


def _accuracy(name: str, report: dict[str, Any], samples: list[dict[str, Any]]) -> TaskAccuracy:
    """From lm-eval's report, ``{"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 26, ...}``, and its samples."""
    keys = [key for key in report if "," in key and "_stderr," not in key]
    chosen = next(key for metric in _METRICS for key in keys if key.startswith(f"{metric},"))
    metric, _, pipeline = chosen.partition(",")
    stderr = report.get(f"{metric}_stderr,{pipeline}")
    return TaskAccuracy(
        task=name,
        accuracy=float(report[chosen]),
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        n=int(report["sample_len"]),
        metric=chosen.removesuffix(",none"),
        others={key.removesuffix(",none"): float(report[key]) for key in keys if key != chosen},
        items=tuple(float(sample[metric]) for sample in samples if sample["filter"] == pipeline),
    )


def _is_file(name: str) -> bool:
    return name.endswith(".yaml")


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keep lm-eval from writing to stdout, and to stderr unless progress is wanted, since its bars have no switch.

    Its log is reduced to errors: everything in its many warnings is also in the protocol.
    """
    log = logging.getLogger("lm_eval")
    level, out = log.level, sys.stderr if progress else io.StringIO()
    log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(out), redirect_stderr(out):
            yield
    finally:
        log.setLevel(level)
