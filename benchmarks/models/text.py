"""The text: the chapters of Python's own reference that `help()` shows, which every Python has."""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

import torch
from torch import Tensor


def tokens(tokenizer: Any, count: int) -> Tensor:
    """Return the first tokens of the text, (count,), with what the tokenizer puts in front of a text.

    Raises
    ------
    ValueError
        If the text has less tokens.
    """
    text = "\n\n".join(pydoc_data.topics.topics.values())
    found = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if len(found) < count:
        raise ValueError(f"{count} tokens are asked for, but the text (pydoc_data.topics) has {len(found)}")
    return found[:count]
