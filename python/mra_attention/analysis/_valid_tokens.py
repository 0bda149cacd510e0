"""Which tokens are padding: docs/definitions.md, section 6, for one batch item."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import Inputs


class ValidTokens(NamedTuple):
    """What masks say of single tokens."""

    keys: Tensor
    """bool `(Lk,)`: seen by a query, as far as masks go."""
    answers: Tensor
    """bool `(Lq,)`: the query has an output."""
    queries: Tensor
    """bool `(Lq,)`: it is not padding; among those that have an output."""


def valid_tokens(inputs: Inputs, item: int) -> ValidTokens:
    """Return the valid tokens of a batch item."""
    query_length, key_length = inputs.query.shape[2], inputs.key.shape[2]
    keys = torch.ones(key_length, dtype=torch.bool) if inputs.key_mask is None else inputs.key_mask[item]
    answers = torch.ones(query_length, dtype=torch.bool) if inputs.query_mask is None else inputs.query_mask[item]
    if inputs.attn_bias is not None:
        mask = inputs.attn_bias[item if inputs.attn_bias.shape[0] > 1 else 0]
        allowed = mask if mask.dtype is torch.bool else mask > -math.inf
        answers = answers & (allowed & keys).any(-1).any(0)
        keys = keys & (allowed & answers[:, None]).any(1).any(0)
    # Without a mask of queries, the padding of keys is taken for that of as many queries.
    is_shared = inputs.query_mask is None and query_length == key_length
    return ValidTokens(keys, answers, answers & keys if is_shared else answers)
