"""Conversations as blocks of tokens, with a loss only on what the assistant says.

Shape suffixes: L sequence length.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

from sparse_train.data.conversations import Conversation
from sparse_train.models.losses import IGNORED

_log = logging.getLogger(__name__)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def conversation_blocks(
    conversations: Sequence[Conversation], tokenizer: Any, block_size: int, *, pack: bool = True
) -> Any:
    """A ``datasets.Dataset`` of torch rows with ``input_ids``, ``attention_mask`` and ``labels``, each (L,).

    Each conversation is written by the tokenizer's chat template. ``labels`` are the token ids where ``encoded`` gives
    a loss, and -100 elsewhere; padding has an ``attention_mask`` of 0. A conversation longer than a block is cut at the
    end, and is left out, with a warning, if no token with a loss is left.

    Args:
        conversations: each a list of messages.
        tokenizer: with a chat template.
        block_size: L.
        pack: put as many whole conversations into a block as fit, in their order. As in packed text, a token attends to
            everything before it in its block, including earlier conversations. False gives each conversation its own
            block.

    Raises:
        ValueError: see ``encoded``.
    """
    from datasets import Dataset

    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows: list[tuple[list[int], list[int]]] = []
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
            cut,
            len(conversations),
            block_size,
            without_loss,
        )
    blanks = [block_size - len(ids) for ids, _ in rows]
    pairs = list(zip(rows, blanks, strict=True))
    return Dataset.from_dict(
        {
            "input_ids": [ids + [padding] * blank for (ids, _), blank in pairs],
            "attention_mask": [[1] * len(ids) + [0] * blank for (ids, _), blank in pairs],
            "labels": [labels + [IGNORED] * blank for (_, labels), blank in pairs],
        }
    ).with_format("torch")


def encoded(conversations: Sequence[Conversation], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each conversation; both have the same length.

    If the template marks what the assistant says (``{% generation %}``), these marks are used. Otherwise the
    assistant's part is what the template writes for its message after the generation prompt, up to the token that ends
    the turn. A token that begins before this part has no loss, nor has a message of the assistant at the start of a
    conversation.

    Raises:
        ValueError: the tokenizer has no chat template, or is a slow one; a conversation has no answer of the
            assistant, or a message without role and text; the template writes the beginning of a conversation
            differently when more follows, so that the assistant's part cannot be found.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template, so it cannot write conversations. Use one "
            "of an instruct model, or set tokenizer.chat_template, save it with tokenizer.save_pretrained in the "
            "folder of the model, and name that folder as the model."
        )
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} cannot say where its tokens are in the text. Use a fast one.")
    for number, conversation in enumerate(conversations):
        _check(number, conversation)
    if _GENERATION.search(tokenizer.get_chat_template()):
        return [_marked(conversation, tokenizer) for conversation in conversations]
    if not conversations:
        return []
    ends = _ends_of_turn(tokenizer)
    texts, answers = zip(*(_written(conversation, tokenizer, ends) for conversation in conversations), strict=True)
    # templates write all special tokens
    tokens = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        (ids, [token if _inside(at, spans) else IGNORED for token, at in zip(ids, offsets, strict=True)])
        for ids, offsets, spans in zip(tokens["input_ids"], tokens["offset_mapping"], answers, strict=True)
    ]


def _check(number: int, conversation: Any) -> None:
    rule = 'A conversation is a list of {"role": ..., "content": TEXT}, at least one of them an answer of the assistant'
    whole = isinstance(conversation, list) and all(
        isinstance(message, dict) and isinstance(message.get("content"), str) and "role" in message
        for message in conversation
    )
    if not whole:
        raise ValueError(f"{rule}. Number {number} (from 0) is {str(conversation)[:200]}.")
    if not any(message["role"] == "assistant" for message in conversation[1:]):
        roles = [message["role"] for message in conversation]
        raise ValueError(f"{rule}. Number {number} (from 0) has the roles {roles}. Leave it out of the data.")


def _marked(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[int]]:
    found = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    ids = found["input_ids"]
    return ids, [token if own else IGNORED for token, own in zip(ids, found["assistant_masks"], strict=True)]


def _written(conversation: Conversation, tokenizer: Any, ends: tuple[str, ...]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where the assistant's words begin and end in it."""

    def write(messages: Conversation, **arguments: Any) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        return text

    whole, spans = write(conversation), []
    for index, message in enumerate(conversation):
        if message["role"] != "assistant" or not index:  # a first message is not an answer
            continue
        before = write(conversation[:index], add_generation_prompt=True)
        after = write(conversation[: index + 1])
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"The chat template of {tokenizer.name_or_path!r} writes the first {index + 1} messages of a "
                "conversation differently when more follows, or when an answer is asked for, so that the "
                "assistant's tokens cannot be found. Give the tokenizer a template that marks them with "
                "{% generation %} and {% endgeneration %}, or train on conversations of one answer."
            )
        spoken = after.rstrip()
        spans.append((len(before), len(spoken) if spoken.endswith(ends) else len(after)))
    return whole, spans


def _ends_of_turn(tokenizer: Any) -> tuple[str, ...]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(special | set(tokenizer.all_special_tokens))


def _inside(token: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    return any(start <= token[0] < stop for start, stop in spans)
