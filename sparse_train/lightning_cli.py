"""``sparse-train fit`` and ``validate``: LightningCLI over ``CausalLM`` and ``TextBlocks``."""

import warnings
from dataclasses import asdict
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from sparse_train.callbacks import DynamicPruning, RunHistory  # and with them the others that recipes name
from sparse_train.card import ModelCard, training_rows
from sparse_train.data import TextBlocks
from sparse_train.module import CausalLM
from sparse_train.parsers import Formatter, ShortErrors, settings
from sparse_train.shipped import shipped
from sparse_train.yaml_numbers import install


class _Parser(ShortErrors, LightningArgumentParser):
    """Lightning's, with short errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(message.replace('"data.tokenizer"', '"model.model"'), ex)  # which it is linked to


class SparseTrainCLI(LightningCLI):
    """The tokenizer follows the model; a finished ``fit`` leaves a report, and can be exported."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--export", type=str | None, default=None, help="Folder for the trained sparse model.")
        parser.link_arguments("model.model", "data.tokenizer")

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.config.subcommand].trainer
        arguments = getattr(trainer.strategy, "init_args", None)
        if arguments is not None and isinstance(arguments.get("config"), str):
            arguments.config = shipped(arguments.config)  # DeepSpeed's JSON file

    def before_fit(self) -> None:
        from pathlib import Path

        from sparse_train.checkpoints import check_engine
        from sparse_train.files import check_free

        if self.config.fit.ckpt_path:
            check_engine(self.config.fit.ckpt_path, self.trainer.strategy)
        if (out := self.config.fit.export) and self.trainer.is_global_zero:
            check_free(Path(out))

    def after_fit(self) -> None:
        from sparse_train.export import export_model

        if out := self.config.fit.export:
            folder = export_model(self.model.model, self.model.source.tokenizer(), out, self._card())
            if self.trainer.is_global_zero:
                print(f"exported to {folder}")
        history = self.trainer_defaults["callbacks"].path
        if self.trainer.is_global_zero and history is not None and history.exists():
            from sparse_train.report import write_run_report

            print(f"report: {write_run_report([history.parent])}")

    def _card(self) -> ModelCard:
        source, made = self.model.source, {"method": "trained without re-pruning"}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, DynamicPruning) and (updater := callback.updater):
                made = training_rows(updater.settings(), asdict(updater.timing), updater.steps)
        found = self.trainer.callback_metrics.get("val/perplexity")
        text, size = self.datamodule.text.name, self.datamodule.block_size
        return ModelCard(
            source.name,
            source.hub_id,
            source.license,
            made,
            f"{found:.2f} at the last validation of the run: {text}, blocks of {size}" if found is not None else None,
            self._parser(self.subcommand).dump(self.config.fit, skip_none=False),
        )


def run(args: list[str], cli: type[SparseTrainCLI] = SparseTrainCLI) -> SparseTrainCLI:
    """Parse ``args`` (``["fit", "--config", ...]``), make the objects they name, and run them."""
    install()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # main has taken the command off sys.argv
        for message in (
            "'set_vital' is deprecated",
            r"`isinstance\(treespec",
        ):  # between torchdata, Lightning and torch
            warnings.filterwarnings("ignore", message)
        return cli(
            CausalLM,
            TextBlocks,
            args=args,
            seed_everything_default=0,
            # the check before training reads all of the validation text: what the report calls dense and one-shot
            trainer_defaults={"callbacks": RunHistory(), "num_sanity_val_steps": -1},
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_class=_Parser,
            parser_kwargs={"prog": "sparse-train", "allow_abbrev": False, "formatter_class": Formatter}
            | {name: settings(name) for name in ("fit", "validate")},
        )
