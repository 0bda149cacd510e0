"""The texts, which every Python has: the chapters of its reference that `help()` shows, and some of its source."""

from __future__ import annotations

import argparse
import inspect
import pydoc_data.topics
import statistics
import typing
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


def source_tokens(tokenizer: Any, count: int) -> Tensor:
    """Return the first tokens of Python's source, (count,), with what the tokenizer puts in front of a text."""
    source = "\n\n".join(inspect.getsource(module) for module in (argparse, statistics, typing))
    return torch.tensor(tokenizer(source, verbose=False)["input_ids"])[:count]
