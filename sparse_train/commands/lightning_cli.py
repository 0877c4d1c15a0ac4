"""``sparse-train fit`` and ``validate``: LightningCLI over ``CausalLM`` and ``TextBlocks``."""

import argparse
import functools
import logging
import signal
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sparse_train.callbacks import DynamicPruning, RunHistory  # also imports the others that recipes name
from sparse_train.commands.parsers import Formatter, ShortErrors, settings
from sparse_train.commands.shipped import shipped
from sparse_train.commands.training_progress import TrainingBar, TrainingLines
from sparse_train.commands.yaml_numbers import install
from sparse_train.data.text_blocks import TextBlocks
from sparse_train.export.card import ModelCard, training_rows
from sparse_train.models.module import CausalLM
from sparse_train.terminal.streams import bars_are_seen, stdout_for_json, take_json

_log = logging.getLogger(__name__)


class _Parser(ShortErrors, LightningArgumentParser):
    """Lightning's parser, with short errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(message.replace('"data.tokenizer"', '"model.model"'), ex)  # the two are linked


class _ShownInHelp(argparse.Action):
    """``--json``, for the help only: ``run`` removes it before parsing, so that it is not saved in a run's recipe."""

    def __init__(self, option_strings: list[str], **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=kwargs["help"])

    def __call__(self, *_: Any) -> None: ...


class _SavedConfig(SaveConfigCallback):
    """Lightning's callback, which also collects the logger folders that contain only its file.

    Args:
        made: the list to which these folders are added.
    """

    def __init__(self, *args: Any, made: list[Path], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._made = made

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = Path(trainer.log_dir or "")  # created by loggers before this
        empty = folder.is_dir() and not any(folder.iterdir())
        super().setup(trainer, pl_module, stage)
        if empty and trainer.loggers and trainer.is_global_zero:  # without a logger, it is the user's folder
            self._made.append(folder)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders of a run that failed before it wrote more than its recipe, because reports search for runs."""
    for folder in filter(Path.is_dir, folders):
        files = list(folder.iterdir())
        if {file.name for file in files} <= {"config.yaml", "hparams.yaml"}:  # Lightning writes these in every run
            for file in files:
                file.unlink()
            folder.rmdir()


class SparseTrainCLI(LightningCLI):
    """LightningCLI in which the tokenizer follows the model, and a finished ``fit`` writes a report and can export."""

    result: dict[str, Any] | None = None
    """The results, for JSON; None in all processes except the first."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--export", type=str | None, default=None, help="Folder for the trained sparse model.")
        parser.add_argument("--json", action=_ShownInHelp, help="Print only one JSON object, at the end.")
        parser.link_arguments("model.model", "data.tokenizer")

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.config.subcommand].trainer
        arguments = getattr(trainer.strategy, "init_args", None)
        if arguments is not None and isinstance(arguments.get("config"), str):
            arguments.config = shipped(arguments.config)  # DeepSpeed's JSON file

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds progress that suits the terminal, unless the recipe sets something else."""
        own = self.config_init[self.subcommand].trainer
        given = own.callbacks if isinstance(own.callbacks, list) else [own.callbacks] if own.callbacks else []
        if own.enable_progress_bar is None and not any(isinstance(callback, ProgressBar) for callback in given):
            kwargs["enable_progress_bar"] = bars_are_seen()
            kwargs["callbacks"] = [*given, TrainingBar() if bars_are_seen() else TrainingLines()]
        if own.enable_model_summary is None:
            kwargs["enable_model_summary"] = sys.stdout.isatty()
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        from sparse_train.files import check_free
        from sparse_train.models.checkpoints import check_engine

        if self.config.fit.ckpt_path:
            check_engine(self.config.fit.ckpt_path, self.trainer.strategy)
        if (out := self.config.fit.export) and self.trainer.is_global_zero:
            check_free(Path(out))

    def after_fit(self) -> None:
        from sparse_train.export import export_model

        out = self.config.fit.export
        try:
            if self.trainer.is_global_zero:
                self.result = self._report(out)
        finally:  # neither is lost if the other fails
            if out:
                export_model(self.model.model, self.model.source.tokenizer(), out, self._card())

    def _report(self, out: str | None) -> dict[str, Any]:
        """Write the report of the run. Returns the results, for JSON."""
        found: dict[str, Any] = {"export": out, "report": None, "checkpoint": None}
        for callback in self.trainer.checkpoint_callbacks:
            own = getattr(callback, "best_model_path", "") or getattr(callback, "last_model_path", "")
            found["checkpoint"] = found["checkpoint"] or own or None
        if not (out or found["checkpoint"] or self.config.fit.ckpt_path) and self.trainer.checkpoint_callbacks:
            _log.warning(
                "The run ended before its first checkpoint, so the trained model is not kept. Give --export FOLDER, or "
                "write checkpoints earlier (trainer.val_check_interval, or every_n_train_steps of ModelCheckpoint)."
            )
        history = self.trainer_defaults["callbacks"].path
        if history is not None and history.exists():
            from sparse_train.report import collect, headline, write_run_report

            found["report"] = str(write_run_report([history.parent]))
            found |= headline(collect([history.parent])[0])
        return found

    def validate(self, **arguments: Any) -> None:
        """``Trainer.validate`` without its own table, which has frames even outside a terminal."""
        self.trainer.validate(**arguments | {"verbose": False})
        if self.trainer.is_global_zero:
            self.result = {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def _card(self) -> ModelCard:
        source, made = self.model.source, {"method": "trained without re-pruning"}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, DynamicPruning) and (updater := callback.updater):
                made = training_rows(updater.settings(), asdict(updater.timing), updater.steps)
            elif isinstance(callback, DynamicPruning) and (state := callback.state_dict()):  # the state at the end
                made = training_rows(state["settings"], state["timing"], state["steps"])
        if (distillation := self.model.distillation) is not None:
            teacher = (distillation.teacher or source).name
            made["teacher"] = f"{teacher}, dense" if distillation.teacher is None else teacher
        found = self.trainer.callback_metrics.get("val/perplexity")
        text, size = self.datamodule.text.name, self.datamodule.block_size
        return ModelCard(
            source.name,
            source.hub_id,
            source.license,
            made,
            f"{found:.2f} at the last validation of the run: {text}, blocks of {size}" if found is not None else None,
            # named skip_unset from jsonargparse 4.49 on; like Lightning, use the name that all versions know
            self._parser(self.subcommand).dump(self.config.fit, skip_none=False),
        )


def run(args: list[str], cli: type[SparseTrainCLI] = SparseTrainCLI) -> SparseTrainCLI:
    """Parse ``args`` (``["fit", "--config", ...]``), create the objects that they name, and run them."""
    install()
    json, args = take_json(args)
    with stdout_for_json(json) as write, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # main has removed the command from sys.argv
        for message in (
            "'set_vital' is deprecated",
            r"`isinstance\(treespec",
        ):  # these come from torchdata, Lightning and torch
            warnings.filterwarnings("ignore", message)
        folders: list[Path] = []
        make = functools.partial(
            cli,
            CausalLM,
            TextBlocks,
            args=args,
            seed_everything_default=0,
            # the sanity check reads the whole validation text: it gives the report's dense and one-shot rows
            trainer_defaults={"callbacks": RunHistory(), "num_sanity_val_steps": -1},
            save_config_callback=_SavedConfig,
            save_config_kwargs={"overwrite": True, "made": folders},
            auto_configure_optimizers=False,
            parser_class=_Parser,
            parser_kwargs={"prog": "sparse-train", "allow_abbrev": False, "formatter_class": Formatter}
            | {name: settings(name) for name in ("fit", "validate")},
        )
        try:
            made = make()
        except BaseException as error:
            _remove_empty(folders)  # loggers have finished writing
            if isinstance(error, SIGTERMException):  # its own exit status is that of a finished run
                print(f"sparse-train {args[0]}: ended by SIGTERM, before the run was complete.", file=sys.stderr)
                sys.exit(128 + signal.SIGTERM)
            raise
        if made.result is not None:
            write(made.result)
            if not json:
                _show(args[0], made.result)
    return made


def _show(command: str, result: dict[str, Any]) -> None:
    if command == "validate":
        for name, value in result.items():
            print(f"{name}  {value:.4f}")
        return
    if result["checkpoint"]:
        print(f"checkpoint: {result['checkpoint']}")
    if result["export"]:
        print(f"exported to {result['export']}")
    if result["report"]:
        print(f"report: {result['report']}")
