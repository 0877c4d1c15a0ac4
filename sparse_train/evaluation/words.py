"""Where words begin in a tokenised text, for word perplexity.

Shape suffixes: L tokens.
"""

import re
from typing import Any

import torch
from torch import Tensor

from sparse_train.data.special_tokens import beginning


def word_starts(documents: list[str], tokenizer: Any, separator: str = "\n\n") -> Tensor | None:
    """How many words begin in each token that ``token_ids`` returns for the same documents.

    A word is a run of characters other than white space, as in lm-eval's ``word_perplexity``. It begins in the token
    with its first character; if several tokens hold parts of that character, in the first of them. The sum over all
    tokens is the number of words.

    Args:
        documents, separator: the text.
        tokenizer: a transformers tokenizer.

    Returns:
        Counts, int64 (L,); None for a slow tokenizer (in Python), which does not know where its tokens are in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    text = separator.join(documents)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends_L = torch.tensor([end for _, end in found["offset_mapping"]], dtype=torch.int64)
    if not len(ends_L):
        return ends_L.new_zeros(len(beginning(tokenizer)))
    starts = torch.tensor([match.start() for match in re.finditer(r"\S+", text)], dtype=torch.int64)
    # the first token that ends after the character; a character that the tokenizer drops counts with the next token
    tokens = torch.searchsorted(ends_L.cummax(0).values, starts, right=True).clamp(max=len(ends_L) - 1)
    counts_L = torch.bincount(tokens, minlength=len(ends_L))
    return torch.cat([counts_L.new_zeros(len(beginning(tokenizer))), counts_L])
