"""``TextBlocks``: a LightningDataModule that gives batches of blocks of tokens.

Shape suffixes: B batch, L sequence length.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from sparse_train.data.packing import blocks_of
from sparse_train.data.texts import PackagedWikipedia, Split, TextSource
from sparse_train.models.sources import ModelSource, as_model_source


class TextBlocks(L.LightningDataModule):
    """Batches of ``{"input_ids", "attention_mask", "labels"}``, each (B, L).

    Documents become blocks of ``block_size`` tokens as ``data.packing.blocks_of`` says. The rest at the end of a split
    is dropped in training and padded in evaluation. Several processes read equally many blocks each, and leave out the
    rest. The training loader is stateful: a run resumed in the middle of an epoch continues with the next batch.

    Args:
        tokenizer: a model source, or a Hugging Face id or folder with a tokenizer.
        text: source of texts or conversations; default: the packaged Wikipedia text.
        block_size: L, tokens per block.
        batch_size: B, blocks per batch.
        pack: False gives each document or conversation its own block, cut or padded to ``block_size``.
        seed: of the order of training blocks.
        max_validation_blocks: evaluate only the first ones; None = all.
        hold_out: if the text has no validation split, the share of its training blocks, the last ones, that a run is
            validated on instead of training on them; 0 = none.
        calibration_text: documents whose training split calibrates the first mask of ``DynamicPruning``; default:
            ``text``. General text, such as C4 in the papers, shows which weights matter for what the model knew before.
    """

    def __init__(
        self,
        tokenizer: ModelSource | str,
        text: TextSource | None = None,
        block_size: int = 512,
        batch_size: int = 4,
        pack: bool = True,
        seed: int = 0,
        max_validation_blocks: int | None = None,
        hold_out: float = 0.05,
        calibration_text: TextSource | None = None,
    ) -> None:
        super().__init__()
        if block_size < 2:
            raise ValueError(f"block_size must be at least 2, a token and the next one, got {block_size}.")
        if not 0 <= hold_out < 1:
            raise ValueError(f"hold_out is a share of the training blocks, at least 0 and below 1, got {hold_out}.")
        self.text = text or PackagedWikipedia()
        self.tokenizer_source = as_model_source(tokenizer)
        self.block_size, self.batch_size, self.pack, self.seed = block_size, batch_size, pack, seed
        self.max_validation_blocks, self.hold_out = max_validation_blocks, hold_out
        self.calibration_text = calibration_text
        self._blocks: dict[Split, Any] = {}

    def setup(self, stage: str) -> None:
        measured: Split = "test" if stage == "test" else "validation"
        self._add(measured)
        if stage in ("fit", "predict"):
            self._add("train")
        if measured == "validation" and not len(self._blocks["validation"]) and self.hold_out:
            self._add("train")
            train = self._blocks["train"]
            first = len(train) - max(1, int(self.hold_out * len(train)))
            if self.batch_size * self._ranks <= first < len(train):
                rank_zero_info(
                    f"The text has no validation split: its last {len(train) - first} of {len(train)} blocks are not "
                    "trained on, but measured (data.hold_out)."
                )
                self._blocks["train"] = train.select(range(first))
                self._blocks["validation"] = train.select(range(first, len(train)))

    def _add(self, split: Split) -> None:
        if split not in self._blocks:
            self._blocks[split] = self._read(self.text, split, self.pack)

    @property
    def _ranks(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _read(self, text: TextSource, split: Split, pack: bool) -> Any:
        tokenizer = self.tokenizer_source.tokenizer()
        blocks = blocks_of(text.documents(split), tokenizer, self.block_size, pack=pack, drop_rest=split == "train")
        if split == "train" and len(blocks) < self.batch_size * self._ranks:
            raise ValueError(
                f"The training split of {text.name} gives {len(blocks)} blocks of {self.block_size} tokens, fewer than "
                f"one batch of {self.batch_size} for each of {self._ranks} processes. Use a smaller block_size, or "
                "more text."
            )
        return blocks

    def calibration_dataloader(self) -> Any:
        """Blocks for the first mask; None if they are those of training."""
        if self.calibration_text is None:
            return None
        blocks = self._read(self.calibration_text, "train", pack=True)
        order = torch.Generator().manual_seed(0)
        return DataLoader(blocks, batch_size=self.batch_size, shuffle=True, generator=order, drop_last=True)

    def train_dataloader(self) -> Any:
        blocks, rank = self._blocks["train"], 0 if self.trainer is None else self.trainer.global_rank
        # Its order depends only on seed and epoch, so that epochs after a resumed one are also the same.
        sampler = StatefulDistributedSampler(blocks, self._ranks, rank, shuffle=True, seed=self.seed, drop_last=True)
        return StatefulDataLoader(blocks, batch_size=self.batch_size, sampler=sampler, drop_last=True)

    predict_dataloader = train_dataloader  # what a teacher is asked, see ``CausalLM.predict_step``

    def val_dataloader(self) -> Any:
        return self._measured("validation", self.max_validation_blocks)

    def test_dataloader(self) -> Any:
        return self._measured("test")

    def _measured(self, split: Split, most: int | None = None) -> Any:
        blocks = self._blocks[split]
        if most is not None:
            blocks = blocks.select(range(min(most, len(blocks))))
        if not len(blocks) and (split == "test" or (self.trainer is not None and self.trainer.validating)):
            raise ValueError(f"{self.text.name} has no text in its {split} split; give a text that has one.")
        if len(blocks) > self._ranks:
            # all processes read equally many: Lightning would read blocks twice for that
            blocks = blocks.select(range(len(blocks) - len(blocks) % self._ranks))
        return DataLoader(blocks, batch_size=self.batch_size) if len(blocks) else []
