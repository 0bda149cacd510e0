"""The scores by which candidates are chosen with `score="max"`: docs/definitions.md, sections 4.1 and 5."""

from __future__ import annotations

import torch
from oracle_terms import Item
from torch import Tensor

WEIGHT = 0.85
LARGEST_CODE = 127
CHANNELS = 4
FEW_GROUPS = 16


def codes(x: Tensor) -> tuple[Tensor, float]:
    """Whole numbers from -127 to 127, and what 1 stands for."""
    largest = x.abs().max().item() if x.numel() else 0.0
    if largest == 0.0:
        return torch.zeros_like(x), 0.0
    return (x * (LARGEST_CODE / largest)).round(), largest / LARGEST_CODE


def kept_channels(differences: Tensor) -> Tensor:
    """(D) bool from the differences (keys, D): the groups of channels that a block keeps."""
    dim = differences.shape[1]
    squares = differences.square().sum(0)
    groups = [squares[first : first + CHANNELS].sum().item() for first in range(0, dim, CHANNELS)]
    number = min(len(groups), max(FEW_GROUPS, (len(groups) + 1) // 2))
    best = sorted(range(len(groups)), key=lambda group: (-groups[group], group))[:number]
    return torch.isin(torch.arange(dim) // CHANNELS, torch.tensor(best))


def max_scores(x: Item, below: Item | None = None, times: int = 1) -> Tensor:
    """(H, Lq, nk): the scores of all blocks, as if each were a candidate.

    A block consists of its keys, or of `times` blocks of the level below, as far as they hold keys.
    """
    scores = x.coarse_logits.clone()
    heads, queries, blocks = scores.shape
    for head in range(heads):
        query_codes = [codes(x.scale * x.query[head, t]) for t in range(queries)]
        for j in range(blocks):
            if not x.g.member[j].any():
                continue
            if below is None:
                members = x.key[head, x.g.member[j]]
            else:
                children = slice(j * times, (j + 1) * times)
                members = below.key_mean[head, children][below.g.count[children] > 0]
            differences = members - x.key_mean[head, j]
            key_codes, key_unit = codes(differences)
            key_codes = key_codes * kept_channels(differences)
            for t, (row, unit) in enumerate(query_codes):
                scores[head, t, j] += WEIGHT * key_unit * unit * (key_codes @ row).max()
    return scores
