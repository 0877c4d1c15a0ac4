"""LightningCLI over ``CausalLM`` and ``TextBlocks``, with a report and an export after ``fit``."""

import logging
import signal
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sparse_train import terminal
from sparse_train.callbacks import DynamicPruning, RunRecord
from sparse_train.cli.parser import Parser, parser_arguments, shipped, spelt_out
from sparse_train.data.text_blocks import TextBlocks
from sparse_train.export import ModelCard, export_model
from sparse_train.export.card import training_rows
from sparse_train.export.hf_folder import renamed, size_of
from sparse_train.files import check_free, check_space, replacing
from sparse_train.models.causal_lm import CausalLM
from sparse_train.models.checkpoints import check_runs_no_code, newest_checkpoint
from sparse_train.models.sources import Dtype, torch_dtype
from sparse_train.report import Run, closing, collect, headline, write_run_report
from sparse_train.report.runs import without_homes

_log = logging.getLogger(__name__)
_SPLITS = {"fit": ("train",), "validate": ("validation",), "test": ("test",), "predict": ("train",)}
"""The split that the files of ``--text`` are, by Lightning's command."""
_RUNS = "lightning_logs"
"""Where a run without ``default_root_dir`` writes."""


class _Parser(Parser, LightningArgumentParser):
    help_option = "--help all"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(message.replace('"data.tokenizer"', '"model.model"'), ex)  # the two are linked


class SparseTrainCLI(LightningCLI):
    """LightningCLI in which the tokenizer follows the model, and a finished ``fit`` writes a report and can export."""

    result: dict[str, Any] | None = None
    """The results, for JSON; None in all processes except the first."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is called: a parser takes a tenth of a second, and three are two too many."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in self.parser_kwargs}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lightning's, with the page of its trainer last in help."""
        parser.add_lightning_class_args(CausalLM, "model")
        parser.add_lightning_class_args(TextBlocks, "data")
        # not an entry of trainer.callbacks, which a later list would take out of the run without a word
        about = "a YAML file with arguments of DynamicPruning, which --help pruning lists; null: a dense run"
        parser.add_argument("--pruning", type=DynamicPruning | None, default=None, help=about, sub_configs=True)
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        # the sanity check reads the whole validation text: it gives the report's dense and one-shot rows
        parser.set_defaults({"trainer.num_sanity_val_steps": -1})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--export", type=str | None, default=None, help="folder for the trained sparse model")
        parser.add_argument(
            "--dtype", type=Dtype | None, default=None, help="of its weights; default: that of the model's files"
        )
        parser.link_arguments("model.model", "data.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Finds the "last" checkpoint, and refuses one that would run code, before Lightning or an engine reads it."""
        super().parse_arguments(parser, args)
        options = self.config[self.config.subcommand]
        if options.ckpt_path == "last":  # Lightning looks in the folder of this run, which is new, and trains anew
            options.ckpt_path = str(newest_checkpoint(options.trainer.default_root_dir or _RUNS))
        if options.ckpt_path:
            check_runs_no_code(options.ckpt_path)
            if options.get("weights_only", True) is None:  # where this is not set, Lightning trusts what it downloads
                options.weights_only = True

    def before_instantiate_classes(self) -> None:
        options = self.config[self.config.subcommand]
        if "verbose" in options:  # validate and test: Lightning's table has frames, even outside a terminal
            options.verbose = False
        trainer = options.trainer
        for name in ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"):
            if trainer.get(name) == 0:  # Lightning would divide by it in the middle of an epoch
                raise ValueError(f"trainer.{name} counts steps, batches or epochs, and must be above 0.")
        arguments = getattr(trainer.strategy, "init_args", None)
        if arguments is not None and isinstance(arguments.get("config"), str):
            arguments.config = shipped(arguments.config)  # DeepSpeed's JSON file

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds logs beside the checkpoints and progress that suits the terminal, unless the recipe sets others."""
        options, seen = self.config_init[self.subcommand], terminal.bars_are_seen()
        own = options.trainer
        if own.logger is None:
            kwargs["logger"] = CSVLogger(own.default_root_dir or _RUNS, name="")
        given = own.callbacks if isinstance(own.callbacks, list) else [own.callbacks] if own.callbacks else []
        if any(isinstance(callback, DynamicPruning) for callback in given):
            raise ValueError("DynamicPruning is in trainer.callbacks. Its arguments are the key pruning of a recipe.")
        callbacks = [*filter(None, [options.pruning]), *given]
        if own.enable_progress_bar is None and not any(isinstance(callback, ProgressBar) for callback in given):
            callbacks.append(RichProgressBar(console_kwargs={"stderr": True}) if seen else TrainingLines())
        kwargs["callbacks"] = callbacks
        if self.subcommand == "predict" and own.limit_predict_batches is None and own.max_steps > 0:
            kwargs["limit_predict_batches"] = own.max_steps * own.accumulate_grad_batches  # those of the run
        if own.enable_model_summary is None:
            kwargs["enable_model_summary"] = sys.stdout.isatty()
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        return trainer

    def before_fit(self) -> None:
        self.trainer.callbacks.append(LambdaCallback(on_exception=_say_how_to_go_on))  # type: ignore[attr-defined]
        if out := self.config.fit.export:
            check_free(Path(out))
            dtype = torch_dtype(self.config.fit.dtype)  # the size is known when there is a model
            in_time = LambdaCallback(on_fit_start=lambda *_: check_space(Path(out), size_of(self.model.model, dtype)))
            self.trainer.callbacks.append(in_time)  # type: ignore[attr-defined]

    def after_fit(self) -> None:
        out = self.config.fit.export
        try:
            if self.trainer.is_global_zero:
                self.result = self._report(out)
        finally:  # neither is lost if the other fails
            if out:
                tokenizer, dtype = self.model.source.tokenizer(), torch_dtype(self.config.fit.dtype)
                export_model(self.model.model, tokenizer, out, self._card(), dtype=dtype)
        if self.result is not None:
            if self.result["report"]:
                show_run(collect([self.result["folder"]])[0])
            for name, said in {"checkpoint": "checkpoint:", "export": "exported to", "report": "report:"}.items():
                if self.result[name]:
                    print(said, self.result[name])

    def _report(self, out: str | None) -> dict[str, Any]:
        """Write the report of the run. Returns the results, for JSON."""
        checkpoint = _checkpoint(self.trainer, "best_model_path", "last_model_path")
        results: dict[str, Any] = {"export": out, "report": None, "checkpoint": checkpoint}
        if not (out or checkpoint or self.config.fit.ckpt_path) and self.trainer.checkpoint_callbacks:
            _log.warning(
                "The run ended before its first checkpoint, so the trained model is not kept. Give --export FOLDER, or "
                "write checkpoints earlier (trainer.val_check_interval, or every_n_train_steps of ModelCheckpoint)."
            )
        folder = next(each.folder for each in self.trainer.callbacks if isinstance(each, RunRecord))  # type: ignore[attr-defined]
        if folder is not None:
            results["report"] = str(write_run_report([folder]))
            results |= headline(collect([folder])[0])
        return results

    def _card(self) -> ModelCard:
        source, made, pruning = self.model.source, {"method": "trained without re-pruning"}, None
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, DynamicPruning):
                pruning = callback.pruning_json and renamed(callback.pruning_json)
                if updater := callback.updater:
                    made = training_rows(updater.settings(), asdict(updater.timing), updater.steps)
                elif state := callback.state_dict():  # the state at the end
                    made = training_rows(state["settings"], state["timing"], state["steps"])
        if (distillation := self.model.distillation) is not None:
            teacher = distillation.teacher
            made["teacher"] = f"{source.name}, dense" if teacher is None else teacher.name
        measured, perplexity = self.trainer.callback_metrics.get("val/perplexity"), None
        if measured is not None:
            text = f"{self.datamodule.text.name}, blocks of {self.datamodule.block_size}"
            perplexity = f"{measured:.2f} at the last validation of the run: {text}"
        recipe = without_homes(self._parser(self.subcommand).dump(self.config.fit, skip_none=False))
        return ModelCard(source.name, source.hub_id, source.license, made, perplexity, recipe, pruning, source.stages)

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            self.result = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            for name, value in self.result.items():
                print(f"{name}  {value:.4f}")

    after_test = after_validate

    def after_predict(self) -> None:
        self.trainer.strategy.barrier()  # until the others have written theirs
        if self.trainer.is_global_zero:
            folder = self.model.teacher_cache().folder
            self.result = {"folder": str(folder), "blocks": sum(1 for _ in folder.glob("*.safetensors"))}
            print(f"{self.result['blocks']} blocks of tokens in {folder}")


def run(args: list[str], cli: type[SparseTrainCLI] = SparseTrainCLI, debug: bool = False) -> SparseTrainCLI:
    """Parse ``args`` (``["fit", "--config", ...]``), create the objects that they name, and run them.

    ``cache-teacher`` is Lightning's ``predict``, in which the teacher reads the batches of training.
    """
    name, *options = args
    command = "predict" if name == "cache-teacher" else name
    try:
        return cli(
            CausalLM,
            TextBlocks,
            args=[command, *spelt_out(options, (), "--data.text", *_SPLITS[command])],
            seed_everything_default=0,
            trainer_defaults={"callbacks": RunRecord()},
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_class=_Parser,
            parser_kwargs={"prog": "sparse-train", "allow_abbrev": False, "exit_on_error": not debug}
            | {command: parser_arguments(name, debug)},
        )
    except SIGTERMException:  # its own exit status is that of a finished run
        print(f"sparse-train {name}: ended by SIGTERM, before the run was complete.", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


def show_run(run: Run) -> None:
    """The model before training and at the end, as the report of a run begins."""
    terminal.print_table(*closing([run]))
    took = timedelta(seconds=round(run.facts["seconds"]))
    *_, peak = (value for name, value in run.facts["about"].items() if name.startswith("peak memory"))
    print(f"{took} of training, peak memory {peak:.2f} GiB")


def _say_how_to_go_on(trainer: L.Trainer, pl_module: L.LightningModule, error: BaseException) -> None:
    """After Ctrl-C, which Lightning ends with an exit status and no word on what is left."""
    if isinstance(error, KeyboardInterrupt) and trainer.is_global_zero:
        last = _checkpoint(trainer, "last_model_path", "best_model_path")
        left = f"To go on: --ckpt_path {last}" if last else "It has written no checkpoint"
        print(f"sparse-train fit: interrupted at step {trainer.global_step}. {left}.", file=sys.stderr)


def _checkpoint(trainer: L.Trainer, *kinds: str) -> str | None:
    """The checkpoint of the first of these kinds that the run has written."""
    paths = (getattr(callback, kind, None) for kind in kinds for callback in trainer.checkpoint_callbacks)
    return next(filter(None, paths), None)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that on a full disk, or after a kill, ``last.ckpt`` is
    the one before. Lightning's own writer copies it there, from memory and a temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as beside, beside.open("wb") as file:
            torch.save(checkpoint, file)
        return None


class TrainingLines(ProgressBar):
    """A line on stderr after each validation, and every minute in between, with what Lightning's bar shows.

    "step: 25/100, 01:20 left, train/loss 3.245, val/perplexity 25.17, sparsity/actual 0.5, ..."
    """

    disabled = False

    def disable(self) -> None:
        self.disabled = True  # in all processes except the first, and while Lightning looks for a learning rate

    def enable(self) -> None:
        self.disabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total, begun = trainer.estimated_stepping_batches, trainer.global_step
        self._steps = terminal.lines("step", total=total, initial=begun, disable=self.disabled)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._say(trainer)
        self._steps.update(trainer.global_step - self._steps.n)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batches = terminal.lines("validation", total=sum(trainer.num_val_batches), disable=self.disabled)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._batches.update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._say(trainer)
            self._steps.refresh()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batches = terminal.lines("teacher", total=sum(trainer.num_predict_batches), disable=self.disabled)

    on_predict_batch_end = on_validation_batch_end

    def _say(self, trainer: L.Trainer) -> None:
        metrics = (f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items())
        self._steps.set_postfix_str(", ".join(metrics), refresh=False)
