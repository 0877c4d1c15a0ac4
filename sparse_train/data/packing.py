"""Documents as blocks of tokens of one length, for training, evaluation and calibration.

Shape suffixes: L tokens of a block.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import default_collate

from sparse_train.arguments import check_positive
from sparse_train.data.texts import Conversation, TextSource, only_texts
from sparse_train.models.losses import IGNORED

_log = logging.getLogger(__name__)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_Row = tuple[list[int], list[int]]  # token ids and labels


def blocks_of(
    documents: Iterable[str | Conversation],
    tokenizer: Any,
    block_size: int,
    *,
    pack: bool = True,
    drop_rest: bool = True,
) -> Any:
    """A ``datasets.Dataset`` of torch rows with ``input_ids``, ``attention_mask`` and ``labels``, each (L,).

    Each text starts with the tokens that the tokenizer puts in front of a text (Llama and Gemma: a beginning-of-text
    token) and ends with an end-of-text token. Conversations are written by the tokenizer's chat template, and only what
    the assistant says has labels, see ``encoded``; one that is longer than a block is cut at its end, or left out if no
    token with a loss is left, with a warning. Padding has an ``attention_mask`` of 0 and, like all that has no loss,
    labels of -100. In a packed block, a token attends to everything before it.

    Args:
        documents: all of them texts or all conversations.
        tokenizer: with an end-of-text token; for conversations, with a chat template.
        block_size: L.
        pack: fill blocks: texts are joined and cut, and as many whole conversations as fit are put into a block, in
            their order. False gives each document its own block.
        drop_rest: leave out the last block of joined texts if it is not full.
    """
    from datasets import Dataset

    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no end-of-text token, which separates the documents of a "
            "block. Set its eos_token, in tokenizer_config.json or by tokenizer.eos_token = ..."
        )
    documents = list(documents)
    if documents and not isinstance(documents[0], str):
        rows = _of_conversations(documents, tokenizer, block_size, pack)
    else:
        rows = _of_texts(documents, tokenizer, block_size, pack, drop_rest)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (block_size - len(values))

    columns = {
        "input_ids": [padded(ids, padding) for ids, _ in rows],
        "attention_mask": [padded([1] * len(ids), 0) for ids, _ in rows],
        "labels": [padded(labels, IGNORED) for _, labels in rows],
    }
    return Dataset.from_dict(columns).with_format("torch")


def _of_texts(texts: list[Any], tokenizer: Any, block_size: int, pack: bool, drop_rest: bool) -> list[_Row]:
    begin, end = beginning(tokenizer), tokenizer.eos_token_id
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    sequences = [[*begin, *ids, end] for ids in tokens]
    if pack:
        joined = list(chain.from_iterable(sequences))
        stop = len(joined) - len(joined) % block_size if drop_rest else len(joined)
        sequences = [joined[start : start + block_size] for start in range(0, stop, block_size)]
    return [(ids[:block_size], ids[:block_size]) for ids in sequences]


def _of_conversations(conversations: list[Any], tokenizer: Any, block_size: int, pack: bool) -> list[_Row]:
    rows: list[_Row] = []
    cut = without_loss = 0
    for ids, labels in encoded(conversations, tokenizer):
        cut += len(ids) > block_size
        ids, labels = ids[:block_size], labels[:block_size]
        if all(label == IGNORED for label in labels[1:]):  # the first token is never predicted
            without_loss += 1
        elif pack and rows and len(rows[-1][0]) + len(ids) <= block_size:
            rows[-1] = rows[-1][0] + ids, rows[-1][1] + labels
        else:
            rows.append((ids, labels))
    if cut or without_loss:
        _log.warning(
            "%d of %d conversations are longer than block_size=%d and were cut there; %d had no token of the "
            "assistant left and were left out.",
            *(cut, len(conversations), block_size, without_loss),
        )
    return rows


def beginning(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts in front of a text, such as Llama's beginning-of-text token; often none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_special: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(with_special)):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


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
        num_calibration_samples: number of samples; all, with a warning, if there are fewer.
        max_seq_length: L, tokens per sample.
        batch_size: samples per batch.
        seed: of the choice of samples.
        sampling: "packed" joins all documents and cuts them into samples; "documents" uses, for each sample, a random
            part of a document that is longer than a sample (as in the Wanda and SparseGPT scripts).
    """
    check_positive("num_calibration_samples", num_calibration_samples)
    check_positive("max_seq_length", max_seq_length)
    check_positive("batch_size", batch_size)
    documents, generator = text.documents("train"), torch.Generator().manual_seed(seed)
    if sampling == "documents":
        parts = _parts(only_texts(documents), tokenizer, max_seq_length, generator)
        samples = list(islice(parts, num_calibration_samples))
    else:
        blocks = blocks_of(documents, tokenizer, max_seq_length)
        order = torch.randperm(len(blocks), generator=generator)[:num_calibration_samples]
        samples = list(blocks.select(order.tolist()).remove_columns("labels"))
        if all(sample["attention_mask"].all() for sample in samples):  # only conversations are padded
            samples = [{"input_ids": sample["input_ids"]} for sample in samples]
    if not samples:
        raise ValueError(
            f"The training split of {text.name} gives no calibration sample of {max_seq_length} tokens. Give more "
            "text, or a smaller max_seq_length."
        )
    if len(samples) < num_calibration_samples:
        _log.warning(
            "%d samples were asked for, and the training split of %s gives %d calibration samples of %d tokens.",
            *(num_calibration_samples, text.name, len(samples), max_seq_length),
        )
    return [default_collate(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]


def _parts(texts: list[str], tokenizer: Any, length: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """A random part of each text that is longer than ``length`` tokens, in random order."""
    begin = beginning(tokenizer)
    for index in torch.randperm(len(texts), generator=generator).tolist():
        ids = torch.tensor(begin + tokenizer(texts[index], add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) > length:
            start = int(torch.randint(len(ids) - length, (), generator=generator))
            yield {"input_ids": ids[start : start + length]}


# --- conversations, written by the tokenizer's chat template ----------------------------------------------------------


def encoded(conversations: Sequence[Conversation], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each conversation; both have the same length.

    If the template marks what the assistant says (``{% generation %}``), these marks are used. Otherwise the
    assistant's part is what the template writes for its message after the generation prompt, up to the token that ends
    the turn. A token that begins before this part has no loss, nor has a message of the assistant at the start of a
    conversation.
    """
    for number, conversation in enumerate(conversations):
        # a template would write nothing for what is not there
        if not all("role" in message and isinstance(message.get("content"), str) for message in conversation):
            raise ValueError(
                'A conversation is a list of {"role": ..., "content": TEXT} (for ShareGPT, rename "from" and "value"). '
                f"Number {number} (from 0) is {str(conversation)[:200]}."
            )
    if _GENERATION.search(tokenizer.get_chat_template()):
        settings = {"return_dict": True, "return_assistant_tokens_mask": True}
        written = [tokenizer.apply_chat_template(conversation, **settings) for conversation in conversations]
        pairs = [(each["input_ids"], each["assistant_masks"]) for each in written]
        return [(ids, [i if own else IGNORED for i, own in zip(ids, mask, strict=True)]) for ids, mask in pairs]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = tuple(special | set(tokenizer.all_special_tokens))
    texts, answers = zip(*(_written(conversation, tokenizer, ends) for conversation in conversations), strict=True)
    # templates write all special tokens
    tokens = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        (ids, [i if any(a <= at < b for a, b in spans) else IGNORED for i, (at, _) in zip(ids, offsets, strict=True)])
        for ids, offsets, spans in zip(tokens["input_ids"], tokens["offset_mapping"], answers, strict=True)
    ]


def _written(conversation: Conversation, tokenizer: Any, ends: tuple[str, ...]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where the assistant's words begin and end in it."""

    def write(messages: Conversation, **arguments: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)

    whole, spans = write(conversation), []
    for index, message in enumerate(conversation):
        if message["role"] != "assistant" or not index:  # a first message is not an answer
            continue
        before = write(conversation[:index], add_generation_prompt=True)
        after = write(conversation[: index + 1])
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"The chat template of {tokenizer.name_or_path!r} writes the first {index + 1} messages of a "
                "conversation differently when more follows, so that the assistant's tokens cannot be found. Mark them "
                "in it with {% generation %} and {% endgeneration %}, or train on conversations of one answer."
            )
        spoken = after.rstrip()
        spans.append((len(before), len(spoken) if spoken.endswith(ends) else len(after)))
    return whole, spans
