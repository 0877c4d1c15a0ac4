"""Text as blocks of tokens: ``TextBlocks``, a LightningDataModule, and the packing that calibration shares with it.

Shape suffixes: B batch, L sequence length.
"""

from collections.abc import Iterable
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from sparse_train.arguments import check_positive
from sparse_train.data.chat import conversation_blocks
from sparse_train.data.conversations import Conversations
from sparse_train.data.special_tokens import beginning, end_of_text
from sparse_train.data.texts import PackagedWikipedia, Split, TextSource, TrainingText
from sparse_train.models.losses import IGNORED
from sparse_train.models.sources import ModelSource, as_model_source


class TextBlocks(L.LightningDataModule):
    """Batches of ``{"input_ids", "attention_mask", "labels"}``, each (B, L).

    Each document starts with the tokens that the tokenizer puts in front of a text (Llama and Gemma: a
    beginning-of-text token) and ends with an end-of-text token. Documents are joined and cut into blocks of
    ``block_size`` tokens. The rest at the end of a split is dropped in training and padded in evaluation; padding has
    an ``attention_mask`` of 0 and no loss. The training loader is stateful: a run resumed in the middle of an epoch
    continues with the next batch.

    Conversations, instead of documents, are written by the tokenizer's chat template, and only what the assistant says
    has a loss (and a perplexity). They are packed whole, so training blocks also have padding. In a packed block, every
    token attends to all tokens before it, including those of earlier documents or conversations.

    Args:
        tokenizer: a model source, or a Hugging Face id or folder with a tokenizer.
        text: source of documents or conversations.
        block_size: L, tokens per block.
        batch_size: B, blocks per batch.
        pack: False gives each document or conversation its own block, cut or padded to ``block_size``.
        seed: of the order of training blocks.
        max_validation_blocks: evaluate only the first ones; None = all.
        calibration_text: documents whose training split is used to calibrate the first mask of ``DynamicPruning``;
            default: ``text``. General text, such as C4 in the papers, shows which weights matter for what the model
            knew before.
    """

    def __init__(
        self,
        tokenizer: ModelSource | str,
        text: TrainingText | None = None,
        block_size: int = 512,
        batch_size: int = 4,
        pack: bool = True,
        seed: int = 0,
        max_validation_blocks: int | None = None,
        calibration_text: TextSource | None = None,
    ) -> None:
        super().__init__()
        if block_size < 2 or batch_size < 1:
            raise ValueError(
                f"block_size must be at least 2 and batch_size at least 1, got {block_size} and {batch_size}."
            )
        self.text: TrainingText = text or PackagedWikipedia()
        self.tokenizer_source = as_model_source(tokenizer)
        self.block_size, self.batch_size, self.pack, self.seed = block_size, batch_size, pack, seed
        self.max_validation_blocks = max_validation_blocks
        self.calibration_text = calibration_text
        self._blocks: dict[Split, Any] = {}

    def setup(self, stage: str) -> None:
        wanted: dict[str, list[Split]] = {"fit": ["train", "validation"], "test": ["test"]}
        tokenizer = self.tokenizer_source.tokenizer()
        for split in wanted.get(stage, ["validation"]):
            if split in self._blocks:
                continue
            blocks = self._blocks_of(split, tokenizer)
            if split == "train" and len(blocks) < self.batch_size:
                raise ValueError(
                    f"The training split of {self.text.name} gives {len(blocks)} blocks of {self.block_size} tokens, "
                    f"fewer than one batch of {self.batch_size}. Use a smaller block_size, or more text."
                )
            if split == "validation" and self.max_validation_blocks is not None:
                blocks = blocks.select(range(min(len(blocks), self.max_validation_blocks)))
            self._blocks[split] = blocks

    def _blocks_of(self, split: Split, tokenizer: Any) -> Any:
        if isinstance(self.text, Conversations):
            return conversation_blocks(self.text.conversations(split), tokenizer, self.block_size, pack=self.pack)
        if not isinstance(self.text, TextSource):
            raise ValueError(f"TextBlocks reads a TextSource or Conversations, got {type(self.text).__name__}.")
        documents = self.text.documents(split)
        return blocks_of(documents, tokenizer, self.block_size, pack=self.pack, drop_rest=split == "train")

    def calibration_dataloader(self) -> Any:
        """Blocks for the first mask; None if they are those of training."""
        if self.calibration_text is None:
            return None
        documents = self.calibration_text.documents("train")
        blocks = blocks_of(documents, self.tokenizer_source.tokenizer(), self.block_size)
        if len(blocks) < self.batch_size:
            raise ValueError(
                f"The training split of calibration_text, {self.calibration_text.name}, gives {len(blocks)} blocks of "
                f"{self.block_size} tokens, fewer than one batch of {self.batch_size}. Give more text."
            )
        order = torch.Generator().manual_seed(0)
        return DataLoader(blocks, batch_size=self.batch_size, shuffle=True, generator=order, drop_last=True)

    def train_dataloader(self) -> Any:
        blocks, world_size, rank = self._blocks["train"], 1, 0
        if self.trainer is not None:
            world_size, rank = self.trainer.world_size, self.trainer.global_rank
        # Its order depends only on seed and epoch, so that epochs after a resumed one are also the same.
        sampler = StatefulDistributedSampler(blocks, world_size, rank, shuffle=True, seed=self.seed, drop_last=True)
        return StatefulDataLoader(blocks, batch_size=self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> Any:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> Any:
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: Split) -> Any:
        blocks = self._blocks[split]
        return DataLoader(blocks, batch_size=self.batch_size) if len(blocks) else []


def blocks_of(
    documents: Iterable[str], tokenizer: Any, block_size: int, *, pack: bool = True, drop_rest: bool = True
) -> Any:
    """A ``datasets.Dataset`` of torch rows with ``input_ids``, ``attention_mask`` and ``labels``, each (L,).

    Each document starts with the tokens that the tokenizer puts in front of a text and ends with an end-of-text token.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    from datasets import Dataset

    begin, end = beginning(tokenizer), end_of_text(tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end

    def to_blocks(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        sequences = [[*begin, *ids, end] for ids in tokenizer(rows["text"], add_special_tokens=False)["input_ids"]]
        if pack:
            tokens = [token for sequence in sequences for token in sequence]
            stop = len(tokens) - len(tokens) % block_size if drop_rest else len(tokens)
            sequences = [tokens[start : start + block_size] for start in range(0, stop, block_size)]
        else:
            sequences = [sequence[:block_size] for sequence in sequences]
        blanks = [block_size - len(sequence) for sequence in sequences]
        pairs = list(zip(sequences, blanks, strict=True))
        return {
            "input_ids": [ids + [padding] * blank for ids, blank in pairs],
            "attention_mask": [[1] * len(ids) + [0] * blank for ids, blank in pairs],
            "labels": [ids + [IGNORED] * blank for ids, blank in pairs],
        }

    texts = Dataset.from_dict({"text": list(documents)})
    columns = ["input_ids", "attention_mask", "labels"]
    if not len(texts):
        return Dataset.from_dict({column: [] for column in columns}).with_format("torch")
    # one call for all documents, because packing must not stop at the borders of chunks
    return texts.map(to_blocks, batched=True, batch_size=None, remove_columns=["text"], desc="tokenising").with_format(
        "torch"
    )


def calibration_batches(
    text: TextSource,
    tokenizer: Any,
    *,
    num_calibration_samples: int = 32,
    max_seq_length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    sampling: Literal["packed", "documents"] = "packed",
) -> list[dict[str, Tensor]]:
    """Random samples of the training split, in the form that ``prune`` needs.

    Args:
        text, tokenizer: the text, and how it is tokenised.
        num_calibration_samples: number of samples.
        max_seq_length: L, tokens per sample.
        batch_size: samples per batch.
        seed: of the choice of samples.
        sampling: "packed" joins all documents and cuts them into samples; "documents" uses, for each sample, a random
            part of a document that is longer than a sample (as in the Wanda and SparseGPT scripts).

    Raises:
        ValueError: the text is too short for the samples; fewer than asked for are an error too.
    """
    if num_calibration_samples < 1 or max_seq_length < 1:
        raise ValueError(
            f"Calibration needs at least one sample of one token, got num_calibration_samples={num_calibration_samples}"
            f" and max_seq_length={max_seq_length}."
        )
    check_positive("batch_size", batch_size)
    generator = torch.Generator().manual_seed(seed)
    if sampling == "documents":
        ids = _parts_of_documents(text, tokenizer, num_calibration_samples, max_seq_length, generator)
    else:
        ids = _packed(text, tokenizer, num_calibration_samples, max_seq_length, generator)
    return [{"input_ids": part} for part in ids.split(batch_size)]


def _packed(text: TextSource, tokenizer: Any, samples: int, length: int, generator: torch.Generator) -> Tensor:
    blocks = blocks_of(text.documents("train"), tokenizer, length)
    if len(blocks) < samples:
        raise ValueError(
            f"The training split of {text.name} gives {len(blocks)} calibration samples of {length} tokens, "
            f"fewer than num_calibration_samples={samples}. Give more text, or ask for less: "
            + (f"num_calibration_samples={len(blocks)}, or " if len(blocks) else "")
            + "a smaller max_seq_length."
        )
    order = torch.randperm(len(blocks), generator=generator)[:samples]
    ids: Tensor = blocks[order.tolist()]["input_ids"]
    return ids


def _parts_of_documents(
    text: TextSource, tokenizer: Any, samples: int, length: int, generator: torch.Generator
) -> Tensor:
    documents, begin = text.documents("train"), beginning(tokenizer)
    found: list[Tensor] = []
    for index in torch.randperm(len(documents), generator=generator).tolist():
        ids = torch.tensor(begin + tokenizer(documents[index], add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) > length:
            start = int(torch.randint(len(ids) - length, (), generator=generator))
            found.append(ids[start : start + length])
        if len(found) == samples:
            return torch.stack(found)
    raise ValueError(
        f"Only {len(found)} documents of the training split of {text.name} are longer than max_seq_length={length} "
        f"tokens, fewer than num_calibration_samples={samples}. Ask for shorter or fewer samples, or use "
        'sampling="packed".'
    )
