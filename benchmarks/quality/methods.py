"""Coarse terms and choices of blocks in plain torch, on heads (H, L, D) whose length is a multiple of the block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """One layer cut into n blocks of b tokens, and what the mean query of a block i sees in a block j."""

    query: Tensor
    """(H, n, b, D), and likewise key and value."""
    key: Tensor
    value: Tensor
    scale: float
    pooled: Tensor
    """(H, n, n): the logit of mean query and mean key."""
    within: Tensor
    """(H, n, n, b): the mean query's softmax within the block."""
    mass: Tensor
    """(H, n, n): the logarithm of the sum of its exponentials."""
    exact: Tensor
    """(H, n, b, D): the exact output."""


def cut(query: Tensor, key: Tensor, value: Tensor, size: int) -> Blocks:
    """Cut a layer into blocks of `size` tokens."""
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    q, k, v, out = (x.unflatten(1, (-1, size)) for x in (query, key, value, exact))
    scale = query.shape[-1] ** -0.5
    logits = scale * torch.einsum("hid,hjsd->hijs", q.mean(2), k)
    mass = logits.logsumexp(-1)
    pooled = scale * q.mean(2) @ k.mean(2).transpose(1, 2)
    return Blocks(q, k, v, scale, pooled, (logits - mass[..., None]).exp(), mass, out)


Term = Callable[[Blocks], tuple[Tensor, Tensor]]
"""Returns for each query the logit of each block, (H, n, b, n), and the values of the blocks, (H, n, n, D)."""


def _all_alike(logits: Tensor, blocks: Blocks) -> Tensor:
    return logits[:, :, None].expand(-1, -1, blocks.query.shape[2], -1)


def _means(blocks: Blocks) -> tuple[Tensor, Tensor]:
    count = blocks.query.shape[2]
    values = blocks.value.mean(2)[:, None].expand(-1, blocks.query.shape[1], -1, -1)
    return _all_alike(blocks.pooled + math.log(count), blocks), values


def _own_keys(blocks: Blocks) -> tuple[Tensor, Tensor]:
    return _all_alike(blocks.mass, blocks), torch.einsum("hijs,hjsd->hijd", blocks.within, blocks.value)


def _separable(blocks: Blocks) -> tuple[Tensor, Tensor]:
    mean = blocks.key.mean(2)
    own = blocks.scale * torch.einsum("hitd,hjd->hitj", blocks.query, mean)
    return own + (blocks.mass - blocks.pooled)[:, :, None], _own_keys(blocks)[1]


def _first_order(blocks: Blocks) -> tuple[Tensor, Tensor]:
    keys = torch.einsum("hijs,hjsd->hijd", blocks.within, blocks.key)
    entropy = torch.special.entr(blocks.within).sum(-1)
    own = blocks.scale * torch.einsum("hitd,hijd->hitj", blocks.query, keys)
    return own + entropy[:, :, None], _own_keys(blocks)[1]


TERMS: dict[str, tuple[Term, int]] = {
    "means (the paper)": (_means, 0),
    "mean query, own keys": (_own_keys, 2),
    "the same, times each query with the mean key": (_separable, 4),
    "first order around the mean query": (_first_order, 5),
}
"""Every coarse term, and its products of L * L / b * D multiply-adds; an exact block has 2 of L * b * D."""


def _spread(blocks: Blocks, tokens: Tensor) -> Tensor:
    square = torch.einsum("hijs,hjs->hij", blocks.within, tokens.square().sum(-1))
    of_mean = torch.einsum("hijs,hjsd->hijd", blocks.within, tokens).square().sum(-1)
    return (square - of_mean).clamp(min=1e-12).log() / 2


def _missed(blocks: Blocks, term: Term) -> Tensor:
    """Return the logarithm of the root mean square error that a block adds to the output of its queries."""
    logits = blocks.scale * torch.einsum("hitd,hjsd->hitjs", blocks.query, blocks.key)
    total = logits.flatten(-2).logsumexp(-1)[..., None]
    weights = (logits - total[..., None]).exp()
    exact = (
        torch.einsum("hitjs,hjsd->hitjd", weights, blocks.value)
        - weights.sum(-1)[..., None] * blocks.exact[..., None, :]
    )
    coarse, values = term(blocks)
    approximate = (coarse - total).exp()[..., None] * (values[:, :, None] - blocks.exact[..., None, :])
    return (exact - approximate).square().sum(-1).mean(2).log() / 2


CHOICES: dict[str, Callable[[Blocks, Term], Tensor]] = {
    "pooled logit (the paper)": lambda blocks, _: blocks.pooled,
    "mass": lambda blocks, _: blocks.mass,
    "mass, spread of values": lambda blocks, _: blocks.mass + _spread(blocks, blocks.value),
    "mass, both spreads": lambda blocks, _: blocks.mass + _spread(blocks, blocks.value) + _spread(blocks, blocks.key),
    "what is missed (an oracle)": _missed,
}
"""Every score of blocks, (H, n, n): less the best one of its row, the highest ones of a head are exact."""


def choose(scores: Tensor, blocks_per_row: float) -> Tensor:
    """Return which blocks are exact, (H, n, n): the best one of each row, and the highest scores of each head."""
    rows = scores.shape[1]
    below = (scores - scores.amax(-1, keepdim=True)).flatten(1)
    chosen = below.topk(round(blocks_per_row * rows)).indices
    return torch.zeros_like(below, dtype=torch.bool).scatter_(1, chosen, True).view_as(scores)


def error(blocks: Blocks, term: Term, exact: Tensor) -> float:
    """Return the mean over heads of ||out - exact|| / ||exact||."""
    coarse, values = term(blocks)
    logits = blocks.scale * torch.einsum("hitd,hjsd->hitjs", blocks.query, blocks.key)
    hidden = logits.masked_fill(~exact[:, :, None, :, None], -math.inf).flatten(-2)
    weights = torch.cat([hidden, coarse.masked_fill(exact[:, :, None], -math.inf)], -1).softmax(-1)
    keys = hidden.shape[-1]
    out = torch.einsum("hits,hsd->hitd", weights[..., :keys], blocks.value.flatten(1, 2))
    out = out + torch.einsum("hitj,hijd->hitd", weights[..., keys:], values)
    away = (out - blocks.exact).flatten(1).norm(dim=1) / blocks.exact.flatten(1).norm(dim=1)
    return away.mean().item()
