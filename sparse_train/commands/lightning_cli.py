"""``sparse-train fit`` and ``validate``: LightningCLI over ``CausalLM`` and ``TextBlocks``."""

import argparse
import functools
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from sparse_train.callbacks import DynamicPruning, RunHistory  # and with them the others that recipes name
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
    """Lightning's, with short errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(message.replace('"data.tokenizer"', '"model.model"'), ex)  # which it is linked to


class _ShownInHelp(argparse.Action):
    """``--json``, which ``run`` has taken off: no part of the recipe that a run leaves behind."""

    def __init__(self, option_strings: list[str], **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=kwargs["help"])

    def __call__(self, *_: Any) -> None: ...


class _SavedConfig(SaveConfigCallback):
    """Lightning's, which also tells which folders of loggers had nothing in them but its file.

    Args:
        made: gets them.
    """

    def __init__(self, *args: Any, made: list[Path], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._made = made

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = Path(trainer.log_dir or "")  # which loggers have made by now
        empty = folder.is_dir() and not any(folder.iterdir())
        super().setup(trainer, pl_module, stage)
        if empty and trainer.loggers and trainer.is_global_zero:  # without a logger it is the user's own folder
            self._made.append(folder)


def _remove_empty(folders: list[Path]) -> None:
    """Take away folders of a run that failed before anything was written beside its recipe: reports look for runs."""
    for folder in filter(Path.is_dir, folders):
        files = list(folder.iterdir())
        if {file.name for file in files} <= {"config.yaml", "hparams.yaml"}:  # Lightning's, of all runs
            for file in files:
                file.unlink()
            folder.rmdir()


class SparseTrainCLI(LightningCLI):
    """The tokenizer follows the model; a finished ``fit`` leaves a report, and can be exported."""

    result: dict[str, Any] | None = None
    """What came out, for JSON; None in all processes but the first."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--export", type=str | None, default=None, help="Folder for the trained sparse model.")
        parser.add_argument("--json", action=_ShownInHelp, help="Print one JSON object at the end, and nothing else.")
        parser.link_arguments("model.model", "data.tokenizer")

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.config.subcommand].trainer
        arguments = getattr(trainer.strategy, "init_args", None)
        if arguments is not None and isinstance(arguments.get("config"), str):
            arguments.config = shipped(arguments.config)  # DeepSpeed's JSON file

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """With progress as the terminal can show it, where the recipe says nothing else."""
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

        if out := self.config.fit.export:
            export_model(self.model.model, self.model.source.tokenizer(), out, self._card())
        if not self.trainer.is_global_zero:
            return
        found: dict[str, Any] = {"export": out, "report": None, "checkpoint": None}
        for callback in self.trainer.checkpoint_callbacks:
            own = getattr(callback, "best_model_path", "") or getattr(callback, "last_model_path", "")
            found["checkpoint"] = found["checkpoint"] or own or None
        if not (out or found["checkpoint"] or self.config.fit.ckpt_path) and self.trainer.checkpoint_callbacks:
            _log.warning(
                "The run ended before its first checkpoint, so the trained model is not kept. Give --export FOLDER, or "
                "let checkpoints come earlier (trainer.val_check_interval, or every_n_train_steps of ModelCheckpoint)."
            )
        history = self.trainer_defaults["callbacks"].path
        if history is not None and history.exists():
            from sparse_train.report import collect, headline, write_run_report

            found["report"] = str(write_run_report([history.parent]))
            found |= headline(collect([history.parent])[0])
        self.result = found

    def validate(self, **arguments: Any) -> None:
        """``Trainer.validate``, whose own table has frames wherever it goes."""
        self.trainer.validate(**arguments | {"verbose": False})
        if self.trainer.is_global_zero:
            self.result = {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def _card(self) -> ModelCard:
        source, made = self.model.source, {"method": "trained without re-pruning"}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, DynamicPruning) and (updater := callback.updater):
                made = training_rows(updater.settings(), asdict(updater.timing), updater.steps)
            elif isinstance(callback, DynamicPruning) and (state := callback.state_dict()):  # at its end already
                made = training_rows(state["settings"], state["timing"], state["steps"])
        found = self.trainer.callback_metrics.get("val/perplexity")
        text, size = self.datamodule.text.name, self.datamodule.block_size
        return ModelCard(
            source.name,
            source.hub_id,
            source.license,
            made,
            f"{found:.2f} at the last validation of the run: {text}, blocks of {size}" if found is not None else None,
            # skip_unset from jsonargparse 4.49 on; Lightning, too, still calls it by the name that all versions know
            self._parser(self.subcommand).dump(self.config.fit, skip_none=False),
        )


def run(args: list[str], cli: type[SparseTrainCLI] = SparseTrainCLI) -> SparseTrainCLI:
    """Parse ``args`` (``["fit", "--config", ...]``), make the objects they name, and run them."""
    install()
    json, args = take_json(args)
    with stdout_for_json(json) as write, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # main has taken the command off sys.argv
        for message in (
            "'set_vital' is deprecated",
            r"`isinstance\(treespec",
        ):  # between torchdata, Lightning and torch
            warnings.filterwarnings("ignore", message)
        folders: list[Path] = []
        make = functools.partial(
            cli,
            CausalLM,
            TextBlocks,
            args=args,
            seed_everything_default=0,
            # the check before training reads all of the validation text: what the report calls dense and one-shot
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
        except BaseException:
            _remove_empty(folders)  # loggers have written their last by now
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
    if result["export"]:
        print(f"exported to {result['export']}")
    if result["report"]:
        print(f"report: {result['report']}")
