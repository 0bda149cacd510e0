"""Queries, keys and values like those of a decoder's heads, of any length."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

HEADS = ("local", "local and sink", "needles", "content")
"""What each head looks at, in the order of the heads."""

SEGMENT = 512
"""Tokens of a topic, on average."""

RETURNS = 4
"""Segments of each topic, on average."""

NEEDLES, NEEDLE_TOKENS = 64, 4
"""Places that some queries look for, and the tokens of each: a name, a number."""

SHARPNESS = 2.0
"""The standard deviation of the logits of content, about."""


def heads(length: int, head_dim: int = 64, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value (1, 4, length, head_dim), float32, of the heads that `HEADS` names.

    All heads see content: topics that hold for some hundreds of tokens and come back, and what is each token's own,
    turned by RoPE with base 1e4 in the local heads and 1e6 in the others, as in Gemma 3. In the local heads query and
    key share a constant, which RoPE makes a peak around the token. All but the first head have a sink: the first token,
    with a logit that takes about half of the weight, and a small value. In the head of needles a few keys somewhere
    have a large logit for an eighth of the queries, and stand among tokens that these look at, too.
    """
    generator = torch.Generator().manual_seed(seed)
    made = [_head(kind, length, head_dim, generator) for kind in HEADS]
    query, key, value = (torch.stack(tensors)[None] for tensors in zip(*made, strict=True))
    return query, key, value


def _head(kind: str, length: int, head_dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    topic = _topics(length, generator)
    needles = _needles(length, generator)
    wanted = topic.clone()  # tokens of one topic look at each other, and those that seek something at its surroundings
    if kind == "needles":
        wanted[needles.seekers] = topic[needles.places[needles.sought]]
    table, value_table = (torch.randn(int(topic.max()) + 1, head_dim, generator=generator) for _ in range(2))
    own, value_own, other = (torch.randn(length, head_dim, generator=generator) for _ in range(3))
    query = SHARPNESS * (0.5 * table[wanted] + 0.75**0.5 * other)
    key, value = (0.5**0.5 * (x[topic] + y) for x, y in ((table, own), (value_table, value_own)))
    if kind.startswith("local"):
        constant = torch.zeros(head_dim)
        peak = math.log(length) + 1  # the logit at the token itself: most of the weight is near it
        constant[: head_dim // 2] = math.sqrt(peak * math.sqrt(head_dim) / (head_dim // 2))
        query, key = query / 2 + constant, key + constant
    base = 1e4 if kind.startswith("local") else 1e6
    query, key = rotate(query, base), rotate(key, base)
    if kind == "needles":
        _hide(needles, query, key, generator)
    if kind != "local":
        _add_sink(query, key, value, math.log(length) + (4 if kind.startswith("local") else 2))
    return query, key, value


def _topics(length: int, generator: torch.Generator) -> Tensor:
    """Return the number of each token's topic; every one comes back a few times."""
    segment = (torch.rand(length, generator=generator) < 1 / SEGMENT).cumsum(0)
    topics = length // (RETURNS * SEGMENT) + 1
    return torch.randint(topics, (length,), generator=generator)[segment]


class Needles(NamedTuple):
    """Where they begin, the queries that seek one, and which one each of these seeks."""

    places: Tensor
    seekers: Tensor
    sought: Tensor


def _needles(length: int, generator: torch.Generator) -> Needles:
    places = torch.randint(length - NEEDLE_TOKENS, (NEEDLES,), generator=generator)
    seekers = torch.randint(length, (length // 8,), generator=generator)
    return Needles(places, seekers, torch.randint(NEEDLES, (len(seekers),), generator=generator))


def rotate(x: Tensor, base: float) -> Tensor:
    """Turn channels 2 i and 2 i + 1 of (length, D) by the position times base^(-2 i / D): RoPE."""
    length, head_dim = x.shape
    rates = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    sine, cosine = angles.sin().float(), angles.cos().float()
    even, odd = x[:, ::2], x[:, 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(1)


def _hide(needles: Needles, query: Tensor, key: Tensor, generator: torch.Generator) -> None:
    """Give the first half of the channels, which RoPE turns most, to what some queries seek."""
    length, head_dim = query.shape
    half = head_dim // 2
    query[:, :half] = key[:, :half] = 0.0
    directions = torch.nn.functional.normalize(torch.randn(NEEDLES, half, generator=generator), dim=-1)
    directions *= math.sqrt((math.log(length) + 2) * math.sqrt(head_dim))
    for token in range(NEEDLE_TOKENS):
        key[needles.places + token, :half] = directions
    query[needles.seekers, :half] = directions[needles.sought]


def _add_sink(query: Tensor, key: Tensor, value: Tensor, logit: float) -> None:
    """Give the last two channels, which RoPE turns least, to the first token."""
    size = math.sqrt(logit * math.sqrt(query.shape[1]))
    key[1:, -2:] = 0.0
    query[:, -2:] = torch.tensor([size, 0.0])
    key[0] = 0.0
    key[0, -2] = size
    value[0] *= 0.05
