"""``Evaluation``: perplexity and zero-shot accuracy of the model that Lightning trains, while it trains."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from sparse_train.architecture import transformers_models
from sparse_train.arguments import check_positive
from sparse_train.callbacks.lightning_trainer import steps_done
from sparse_train.data.texts import Split, TextSource
from sparse_train.environment import isolated_rng
from sparse_train.evaluation import PerplexityResult, ZeroShotResult, evaluate_perplexity, evaluate_zero_shot, token_ids
from sparse_train.evaluation.perplexity import check_length, check_window
from sparse_train.evaluation.zeroshot import check_tasks, task_names
from sparse_train.layers.masked_layer import sparse_layers
from sparse_train.models.sources import AUTOCAST_OF, ModelSource, as_model_source
from sparse_train.oneshot.forwards import check_ids


class Evaluation(L.Callback):
    """Measure the model during training, without changing the run, and log the results to all loggers.

    ::

        Evaluation(PackagedWikipedia(), every_n_steps=100, tasks="wanda7", limit=200)

    Logs ``evaluation/perplexity`` every ``every_n_steps`` optimizer steps and at the end; ``zero_shot/TASK`` (accuracy,
    0 to 1) and, if there are several tasks, ``zero_shot/mean`` every ``tasks_every_n_steps`` steps and at the end. A
    run with this callback ends with the same weights and masks as one without. The model is measured with its masks
    on: at an update, with the new ones if this callback comes after ``DynamicPruning`` in the list. With several
    processes (DDP), the first one measures and the others wait.

    Args:
        text: the text on which perplexity is measured; None = no perplexity.
        every_n_steps: optimizer steps between perplexity measurements; None = only at the end.
        split: split of the text: train, validation or test.
        window: tokens per window; windows do not overlap.
        max_tokens: use only the first tokens of the text.
        tasks: zero-shot tasks, a list or a comma-separated text; see ``evaluate_zero_shot``. None = no tasks.
        tasks_every_n_steps: optimizer steps between zero-shot evaluations; None = only at the end.
        limit: use only the first items of each task, during training and at the end.
        batch_size: windows, or zero-shot requests, per forward pass.
        tokenizer: the model's tokenizer: a model source, Hugging Face id or local folder. Default: that of
            ``CausalLM``.

    Raises:
        ValueError: there is nothing to measure, or a number is below 1; at ``fit``, the model is sharded or not one of
            transformers, or its tokenizer, text or tasks are missing.
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
        limit: int | None = None,
        batch_size: int = 4,
        tokenizer: ModelSource | str | None = None,
    ) -> None:
        if text is None and not tasks:
            raise ValueError("Evaluation needs something to measure: a text for perplexity, or tasks, such as wanda7.")
        check_positive("every_n_steps", every_n_steps)
        check_positive("tasks_every_n_steps", tasks_every_n_steps)
        check_positive("limit", limit)
        check_positive("batch_size", batch_size)
        self._text, self._split, self._window, self._max_tokens = text, split, window, max_tokens
        self._tasks, self._limit = task_names(tasks) if tasks else [], limit
        self._batch_size, self._source = batch_size, None if tokenizer is None else as_model_source(tokenizer)
        every = {"perplexity": (text is not None, every_n_steps), "zero_shot": (bool(tasks), tasks_every_n_steps)}
        self._every = {kind: steps for kind, (wanted, steps) in every.items() if wanted}
        """Kinds of measurement that are wanted, and the steps between them."""
        self._measure_by: dict[str, Callable[[nn.Module], PerplexityResult | ZeroShotResult]] = {}
        self._step = 0
        self._measured: dict[str, int] = {}
        """Step of the last measurement of each kind."""
        self.results: list[dict[str, Any]] = []
        """What this run has measured: ``step``, ``metrics`` and ``protocol`` per evaluation; the same on all ranks."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
        if stage == "fit" and (not whole or isinstance(strategy, DeepSpeedStrategy)):
            raise ValueError(
                f"Evaluation measures on one process, which must hold the whole model: on a single device or under "
                f"DDP. {type(strategy).__name__} shards it. Leave Evaluation out, and evaluate the exported model."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measured, self.results = {}, []
        if not trainer.is_global_zero:
            return
        model = _model(pl_module)  # what would fail when it is measured, perhaps after the last step, fails here
        source = self._source or getattr(pl_module, "source", None)
        if not isinstance(source, ModelSource):
            raise ValueError(
                f"Evaluation does not know the tokenizer of {type(pl_module).__name__}. Give it as tokenizer=, a model "
                "source, Hugging Face id or local folder."
            )
        common: dict[str, Any] = {
            "autocast": AUTOCAST_OF.get(str(trainer.precision)),
            "batch_size": self._batch_size,
            "model_name": "the model in training",
        }
        with isolated_rng():
            tokenizer = source.tokenizer()
            if (text := self._text) is not None:
                ids = token_ids(text.documents(self._split), tokenizer, text.separator)
                ids = check_length(ids, self._window, self._max_tokens)
                check_window(model, self._window)
                check_ids(model, ids)
                self._measure_by["perplexity"] = partial(
                    evaluate_perplexity,
                    ids=ids,
                    window=self._window,
                    data_name=text.name,
                    split=self._split,
                    tokenizer_name=source.name,
                    **common,
                )
            if self._tasks:
                check_tasks(self._tasks)
                own = {"tasks": self._tasks, "limit": self._limit, **common}
                self._measure_by["zero_shot"] = partial(evaluate_zero_shot, tokenizer=tokenizer, **own)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # micro-batches do not change global_step; with several optimizers it grows by more than 1
        before, self._step = self._step, trainer.global_step
        for kind, every in self._every.items():
            if every is not None and self._step // every > before // every:
                for name, value in self._measure(trainer, pl_module, kind, steps_done(trainer)).items():
                    pl_module.log(name, value, logger=False)  # for callbacks that monitor; loggers have them already

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for kind in self._every:
            if self._measured.get(kind) != trainer.global_step:
                self._measure(trainer, pl_module, kind, steps_done(trainer, in_batch=False))

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, kind: str, step: int) -> dict[str, float]:
        measured: tuple[dict[str, float], str] = {}, ""
        if trainer.is_global_zero:
            result = self._measure_by[kind](_model(pl_module))
            measured = result.metrics, result.protocol
            for logger in trainer.loggers:  # directly: evaluations need not coincide with log_every_n_steps
                logger.log_metrics(result.metrics, step=step)
            if kind not in self._measured:
                rank_zero_info(f"Evaluation: {result.protocol}")
        self._measured[kind] = trainer.global_step
        # a metric that stops the run must stop it on every rank
        metrics, protocol = trainer.strategy.broadcast(measured)
        self.results.append({"step": step, "metrics": metrics, "protocol": protocol})
        return metrics


def _model(pl_module: L.LightningModule) -> nn.Module:
    models = transformers_models(pl_module, sparse_layers(pl_module).values())
    if not models:
        raise ValueError(
            f"Evaluation needs a transformers model that holds all masked layers, and {type(pl_module).__name__} has "
            "none. Leave Evaluation out, and measure in validation_step."
        )
    return models[0]
