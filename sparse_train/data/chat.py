"""Conversations as tokens, written by the tokenizer's chat template, with a loss only on what the assistant says."""

import re
from collections.abc import Sequence
from typing import Any

from sparse_train.data.texts import Conversation
from sparse_train.models.losses import IGNORED

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encoded(conversations: Sequence[Conversation], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each conversation; both have the same length.

    If the template marks what the assistant says (``{% generation %}``), these marks are used. Otherwise the
    assistant's part is what the template writes for its message after the generation prompt, up to the token that ends
    the turn. A token that begins before this part has no loss, nor has a message of the assistant at the start of a
    conversation.
    """
    marked = _GENERATION.search(tokenizer.get_chat_template())
    for number, conversation in enumerate(conversations):
        # a template would write nothing for what is not there
        if not all("role" in message and isinstance(message.get("content"), str) for message in conversation):
            raise ValueError(
                'A conversation is a list of {"role": ..., "content": TEXT} (for ShareGPT, rename "from" and "value"). '
                f"Number {number} (from 0) is {str(conversation)[:200]}."
            )
    if marked:
        settings = {"return_dict": True, "return_assistant_tokens_mask": True}
        found = [tokenizer.apply_chat_template(conversation, **settings) for conversation in conversations]
        pairs = [(each["input_ids"], each["assistant_masks"]) for each in found]
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
                "conversation differently when more follows, so that the assistant's tokens cannot be found. Mark them "
                "in it with {% generation %} and {% endgeneration %}, or train on conversations of one answer."
            )
        spoken = after.rstrip()
        spans.append((len(before), len(spoken) if spoken.endswith(ends) else len(after)))
    return whole, spans
