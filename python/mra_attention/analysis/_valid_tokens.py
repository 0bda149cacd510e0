"""Which tokens are padding: docs/definitions.md, section 6, for one batch item."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ValidTokens(NamedTuple):
    """What masks say of single tokens."""

    keys: Tensor
    """bool `(Lk,)`: seen by a query, as far as masks go."""
    answers: Tensor
    """bool `(Lq,)`: the query has an output."""
    queries: Tensor
    """bool `(Lq,)`: it is not padding; among those that have an output."""


def valid_tokens(query_length: int, key_length: int, key_mask: Tensor | None, allowed: Tensor | None) -> ValidTokens:
    """Read a mask of keys, `(Lk,)`, and one of pairs that broadcasts to `(H, Lq, Lk)`; True where attention may go."""
    keys = torch.ones(key_length, dtype=torch.bool) if key_mask is None else key_mask
    answers = torch.ones(query_length, dtype=torch.bool)
    if allowed is not None:
        answers = answers & (allowed & keys).any(-1).any(0)
        keys = keys & (allowed & answers[:, None]).any(1).any(0)
    return ValidTokens(keys, answers, answers & keys if query_length == key_length else answers)
