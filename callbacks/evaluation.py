"""``Evaluation``: perplexity and zero-shot accuracy of the model that Lightning trains, while it trains.

What happens when, in Lightning's order:

    setup                  strategies that shard the model are refused
    on_fit_start           text is tokenised and tasks are looked up, so that mistakes show before the first step
    on_train_batch_end     after an optimizer step: the evaluations that are due
    on_train_end           what the last step has not measured already; masks are still on, nothing is squashed yet
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from sparse_train.callbacks.steps import steps_done
from sparse_train.data.texts import Split, TextSource
from sparse_train.evaluation import evaluate_perplexity, evaluate_zero_shot, token_ids
from sparse_train.evaluation.zeroshot import check_tasks, task_names
from sparse_train.layers.sparse_linear import sparse_layers
from sparse_train.models.sources import ModelSource, as_model_source
from sparse_train.oneshot.training_data import causal_lm
from sparse_train.rng import isolated_rng

_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class Evaluation(L.Callback):
    """Measure the model during training, without changing the run, and log the results to all loggers.

    ::

        Evaluation(PackagedWikipedia(), every_n_steps=100, tasks="wanda7", task_data="data/zeroshot", limit=200)

    Logs ``evaluation/perplexity`` every ``every_n_steps`` optimizer steps and at the end; ``zero_shot/TASK`` (accuracy,
    0 to 1) and, if there are several tasks, ``zero_shot/mean`` every ``tasks_every_n_steps`` steps and at the end. The
    protocol is printed with the first measurement of each kind. A run with this callback ends with the same weights
    and masks as one without: training modes, random states, gradients and activation statistics stay untouched.

    The model is measured with its masks on. If this callback comes after ``DynamicPruning`` in the list, an update step
    is measured with the new masks; if it comes before, with the old ones. With several processes (DDP), the first one
    measures and the others wait. Callbacks that monitor a metric (``EarlyStopping``, ``ModelCheckpoint``) can use these
    once they have been measured, and ``RunHistory`` puts them into the report.

    Args:
        text: the text on which perplexity is measured; None = no perplexity.
        every_n_steps: optimizer steps between perplexity measurements; None = only at the end.
        split: split of the text: train, validation or test.
        window: tokens per window; windows do not overlap.
        max_tokens: use only the first tokens of the text.
        tasks: zero-shot tasks, a list or a comma-separated text; see ``evaluate_zero_shot``. None = no tasks.
        tasks_every_n_steps: optimizer steps between zero-shot evaluations; None = only at the end.
        task_data: folder with the items of wanda7's tasks; None = from the hub.
        limit: use only the first items of each task, during training and at the end.
        batch_size: windows, or zero-shot requests, per forward pass.
        tokenizer: the model's tokenizer: a model source, Hugging Face id or local folder. Default: that of
            ``CausalLM``.

    Raises:
        ValueError: at construction, if there is nothing to measure or a number is below 1; at ``fit``, if the strategy
            is neither a single device nor DDP, if there is no transformers model, no tokenizer or too little text, or
            if tasks are missing.
    """

    def __init__(
        self,
        text: TextSource | None = None,
        *,
        every_n_steps: int | None = None,
        split: Split = "validation",
        window: int = 512,
        max_tokens: int | None = None,
        tasks: str | Sequence[str] | None = None,
        tasks_every_n_steps: int | None = None,
        task_data: str | None = None,
        limit: int | None = None,
        batch_size: int = 4,
        tokenizer: ModelSource | str | None = None,
    ) -> None:
        if text is None and not tasks:
            raise ValueError("Evaluation needs something to measure: a text for perplexity, or tasks, such as wanda7.")
        counts = {"every_n_steps": every_n_steps, "tasks_every_n_steps": tasks_every_n_steps, "limit": limit}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}; leave it out for None.")
        names = tasks.split(",") if isinstance(tasks, str) else tasks or []
        self._text, self._split = text, split
        self._every_n_steps, self._tasks_every_n_steps = every_n_steps, tasks_every_n_steps
        self._windows: dict[str, Any] = {"window": window, "max_tokens": max_tokens}
        self._tasks = task_names([name.strip() for name in names]) if names else []
        self._asking: dict[str, Any] = {"task_data": task_data, "limit": limit}
        self._batch_size = batch_size
        self._tokenizer_source = None if tokenizer is None else as_model_source(tokenizer)
        self._tokenizer: Any = None
        self._tokenizer_name = ""
        self._ids: Tensor | None = None
        self._step = 0
        self._measured: dict[str, int] = {}
        """Step of the last measurement of each kind."""
        self.results: list[dict[str, Any]] = []
        """What this run has measured: ``step``, ``metrics`` and ``protocol`` per evaluation; the same on all ranks."""

    # --- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            _refuse_shards(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measured, self.results = {}, []
        if not trainer.is_global_zero:
            return
        _model(pl_module)  # raises if there is none
        with isolated_rng():
            source = self._source(pl_module)
            self._tokenizer, self._tokenizer_name = source.tokenizer(), source.name
            if self._text is not None:
                self._ids = self._tokenised(self._text)
            if self._tasks:
                check_tasks(self._tasks, self._asking["task_data"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def _source(self, pl_module: L.LightningModule) -> ModelSource:
        source = self._tokenizer_source or getattr(pl_module, "source", None)
        if not isinstance(source, ModelSource):
            raise ValueError(
                f"Evaluation does not know the tokenizer of {type(pl_module).__name__}. Give it as tokenizer=, a model "
                "source, Hugging Face id or local folder."
            )
        return source

    def _tokenised(self, text: TextSource) -> Tensor:
        ids = token_ids(text.documents(self._split), self._tokenizer, text.separator)
        if len(ids) < self._windows["window"]:
            raise ValueError(
                f"The {self._split} split of {text.name} has {len(ids)} tokens, fewer than one window of "
                f"{self._windows['window']}. Use another split, or a smaller window."
            )
        return ids

    # --- in training and at its end ----------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # micro-batches do not change global_step; with several optimizers it grows by more than 1
        before, self._step = self._step, trainer.global_step
        metrics: dict[str, float] = {}
        if self._text is not None and _due(self._every_n_steps, before, self._step):
            metrics |= self._measure(trainer, pl_module, "perplexity", steps_done(trainer))
        if self._tasks and _due(self._tasks_every_n_steps, before, self._step):
            metrics |= self._measure(trainer, pl_module, "zero_shot", steps_done(trainer))
        for name, value in metrics.items():
            pl_module.log(name, value, logger=False)  # for callbacks that monitor metrics; loggers have them already

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for kind, wanted in (("perplexity", self._text is not None), ("zero_shot", bool(self._tasks))):
            if wanted and self._measured.get(kind) != trainer.global_step:
                self._measure(trainer, pl_module, kind, steps_done(trainer, in_batch=False))

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, kind: str, step: int) -> dict[str, float]:
        found: tuple[dict[str, float], str] = {}, ""
        if trainer.is_global_zero:
            model, autocast = _model(pl_module), _AUTOCAST.get(str(trainer.precision))
            measure = self._perplexity if kind == "perplexity" else self._zero_shot
            metrics, protocol = found = measure(model, autocast)
            for logger in trainer.loggers:  # directly: evaluations need not coincide with log_every_n_steps
                logger.log_metrics(metrics, step=step)
            if kind not in self._measured:
                rank_zero_info(f"Evaluation: {protocol}")
        self._measured[kind] = trainer.global_step
        metrics, protocol = trainer.strategy.broadcast(found)  # a metric that stops the run must stop it on every rank
        self.results.append({"step": step, "metrics": metrics, "protocol": protocol})
        return metrics

    def _perplexity(self, model: nn.Module, autocast: torch.dtype | None) -> tuple[dict[str, float], str]:
        assert self._ids is not None and self._text is not None
        result = evaluate_perplexity(
            model,
            self._ids,
            batch_size=self._batch_size,
            model_name="the model in training",
            data_name=self._text.name,
            split=self._split,
            tokenizer_name=self._tokenizer_name,
            autocast=autocast,
            **self._windows,
        )
        return {"evaluation/perplexity": result.perplexity}, str(result.protocol)

    def _zero_shot(self, model: nn.Module, autocast: torch.dtype | None) -> tuple[dict[str, float], str]:
        result = evaluate_zero_shot(
            model,
            self._tokenizer,
            self._tasks,
            batch_size=self._batch_size,
            model_name="the model in training",
            autocast=autocast,
            **self._asking,
        )
        metrics = {f"zero_shot/{row.task}": row.accuracy for row in result.tasks}
        return metrics | ({"zero_shot/mean": result.mean} if len(metrics) > 1 else {}), str(result.protocol)


def _due(every: int | None, before: int, now: int) -> bool:
    return every is not None and now // every > before // every


def _model(pl_module: L.LightningModule) -> nn.Module:
    model = causal_lm(pl_module, sparse_layers(pl_module))
    if model is None:
        raise ValueError(
            f"Evaluation needs a transformers model that holds all masked layers, and {type(pl_module).__name__} has "
            "none. Leave Evaluation out, and measure in validation_step."
        )
    return model


def _refuse_shards(trainer: L.Trainer) -> None:
    strategy = trainer.strategy
    whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)
    if not whole:
        raise ValueError(
            f"Evaluation measures on one process, which must hold the whole model: on a single device or under DDP. "
            f"{type(strategy).__name__} shards it. Leave Evaluation out, and evaluate the exported model."
        )
