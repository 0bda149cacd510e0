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

NEEDLES = 64
"""Pairs of a key and the queries that look for it."""

SHARPNESS = 2.0
"""The standard deviation of the logits of content."""


def heads(length: int, head_dim: int = 64, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value (1, 4, length, head_dim), float32, of the heads that `HEADS` names.

    All heads see content: topics that hold for some hundreds of tokens and come back, and what is each token's own,
    turned by RoPE with base 1e4 in the local heads and 1e6 in the others, as in Gemma 3. In the local heads query and
    key share a constant, which RoPE makes a peak around the token. All but the first head have a sink: the first token,
    with a logit that takes about half of the weight, and a small value. For the needles a few keys anywhere have a
    large logit for an eighth of the queries.
    """
    generator = torch.Generator().manual_seed(seed)
    made = [_head(kind, length, head_dim, generator) for kind in HEADS]
    query, key, value = (torch.stack(tensors)[None] for tensors in zip(*made, strict=True))
    return query, key, value


def _head(kind: str, length: int, head_dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    topic = _topics(length, generator)
    key, value, other = (_content(topic, head_dim, generator) for _ in range(3))
    query = SHARPNESS * (0.5 * key.topic + 0.75**0.5 * other.tokens)
    key, value = key.tokens, value.tokens
    if kind.startswith("local"):
        constant = torch.zeros(head_dim)
        constant[: head_dim // 2] = math.sqrt(8 / math.sqrt(head_dim))  # a logit of 4 at the token itself
        query, key = query / 2 + constant, key + constant
    base = 1e4 if kind.startswith("local") else 1e6
    query, key = rotate(query, base), rotate(key, base)
    if kind == "needles":
        _hide_needles(query, key, generator)
    if kind != "local":
        _add_sink(query, key, value)
    return query, key, value


class Content(NamedTuple):
    """Topics, and tokens of which half of the variance is that of their topics; both (L, D), of variance 1."""

    topic: Tensor
    tokens: Tensor


def _topics(length: int, generator: torch.Generator) -> Tensor:
    """Return the number of each token's topic; every one comes back a few times."""
    segment = (torch.rand(length, generator=generator) < 1 / SEGMENT).cumsum(0)
    topics = length // (RETURNS * SEGMENT) + 1
    return torch.randint(topics, (length,), generator=generator)[segment]


def _content(topic: Tensor, head_dim: int, generator: torch.Generator) -> Content:
    of_topic = torch.randn(len(topic), head_dim, generator=generator)[topic]
    own = torch.randn(len(topic), head_dim, generator=generator)
    return Content(of_topic, math.sqrt(0.5) * (of_topic + own))


def rotate(x: Tensor, base: float) -> Tensor:
    """Turn channels 2 i and 2 i + 1 of (length, D) by the position times base^(-2 i / D): RoPE."""
    length, head_dim = x.shape
    rates = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    sine, cosine = angles.sin().float(), angles.cos().float()
    even, odd = x[:, ::2], x[:, 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(1)


def _hide_needles(query: Tensor, key: Tensor, generator: torch.Generator) -> None:
    length, head_dim = query.shape
    directions = torch.nn.functional.normalize(torch.randn(NEEDLES, head_dim, generator=generator), dim=-1)
    size = math.sqrt((math.log(length) + 4) * math.sqrt(head_dim))
    places = torch.randint(length, (NEEDLES,), generator=generator)
    seekers = torch.randint(length, (length // 8,), generator=generator)
    sought = torch.randint(NEEDLES, (len(seekers),), generator=generator)
    key[places] += size * directions
    query[seekers] += size * directions[sought]


def _add_sink(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Give the last two channels, which RoPE turns least, to the first token."""
    length, head_dim = query.shape
    size = math.sqrt((math.log(length) + SHARPNESS**2 / 2) * math.sqrt(head_dim))
    key[1:, -2:] = 0.0
    query[:, -2:] = torch.tensor([size, 0.0])
    key[0] = 0.0
    key[0, -2] = size
    value[0] *= 0.05
