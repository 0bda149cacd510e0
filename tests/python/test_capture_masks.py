"""What masks of pairs are taken for: padding, causality, windows; and that nothing else is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import named
from mra_attention.analysis.visibility import Visibility, recognise
from torch import Tensor

QUERIES = 13


def band(queries: int, keys: int, left: int, right: int, offset: int = 0) -> Tensor:
    """Pairs of a query at `t + offset` with the keys from `left` before it to `right` behind it, -1 for all."""
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - offset
    after = distance >= -left if left >= 0 else torch.ones_like(distance, dtype=torch.bool)
    return after & (distance <= right) if right >= 0 else after


def padded(batch: int, keys: int) -> Tensor:
    """Nothing, the left end and the right end of the items."""
    valid = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    valid[1, ..., :3] = False
    valid[2, ..., -4:] = False
    return valid


def pairs(seen: Visibility, queries: int, keys: int) -> Tensor:
    """The pairs that are visible by what was told, from the definitions of the arguments."""
    offset = keys - queries if seen.causal_alignment == "lower_right" else 0
    left, right = seen.window_size
    visible = band(queries, keys, left, 0 if seen.is_causal else right, offset)[None, None]
    return visible if seen.attn_mask is None else visible & seen.attn_mask


def as_bias(mask: Tensor, hidden: float) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, hidden)


LOWEST = torch.finfo(torch.float32).min
# Where the lowest number is all that a query has, it hides nothing.
SPELLINGS = {
    "bool": lambda mask: mask,
    "-inf": lambda mask: as_bias(mask, -math.inf),
    "all heads": lambda mask: mask.expand(-1, 4, -1, -1),
    "stored for all heads": lambda mask: mask.repeat(1, 4, 1, 1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_bands(spelling):
    for left, right in [(-1, -1), (-1, 0), (4, 0), (0, 0), (-1, 2), (3, -1), (2, 5), (0, 3)]:
        for valid in (torch.ones(3, 1, 1, QUERIES, dtype=torch.bool), padded(3, QUERIES)):
            mask = (band(QUERIES, QUERIES, left, right) & valid).expand(3, 1, QUERIES, QUERIES)
            seen = recognise(SPELLINGS[spelling](mask), QUERIES, QUERIES)
            with named((left, right, bool(valid.all()))):
                assert seen.is_causal == (right == 0)
                assert seen.window_size == ((-1, -1) if (left, right) == (-1, 0) else (left, right))
                assert seen.causal_alignment == "upper_left"
                assert (seen.attn_mask is None) == bool(valid.all())
                assert seen.attn_mask is None or torch.equal(seen.attn_mask, valid)


def test_rectangles():
    for queries, keys, aligned in itertools.product((5, 9), (7, 12), ("upper_left", "lower_right")):
        offset = keys - queries if aligned == "lower_right" else 0
        for left in (-1, 3):
            mask = band(queries, keys, left, 0, offset)[None, None]
            seen = recognise(mask, queries, keys)
            with named((queries, keys, aligned, left)):
                assert torch.equal(pairs(seen, queries, keys), mask)
                assert seen.attn_mask is None
                assert (seen.is_causal, seen.causal_alignment) == (True, aligned)
    # A window of which causality is no side says positions only where queries and keys are as many.
    mask = band(5, 12, -1, 3)[None, None]
    assert torch.equal(recognise(mask, 5, 12).attn_mask, mask)


def test_the_lowest_number_hides_beside_others_only():
    causal = band(QUERIES, QUERIES, -1, 0)[None, None]
    assert recognise(as_bias(causal, LOWEST), QUERIES, QUERIES) == Visibility(None, True)
    valid = padded(3, QUERIES)
    mask = as_bias(causal & valid, LOWEST)  # the first queries of an item see no key
    seen = recognise(mask, QUERIES, QUERIES)
    assert torch.equal(seen.attn_mask, mask)
    assert seen[1:] == Visibility()[1:]


def test_nothing_else_is_recognised():
    """One pair that differs, other heads, biases, and bands beside the diagonal."""
    causal = band(QUERIES, QUERIES, -1, 0)
    others = [causal.roll(shift, 0) for shift in (1, -1)]
    others += [torch.stack([causal, causal.T])[None], (0.1 * causal).double(), as_bias(causal, -1e4)]
    window = band(QUERIES, QUERIES, 4, 2)
    for base, (row, column) in itertools.product((causal, window), [(5, 4), (5, 5), (5, 9), (12, 1), (0, 12)]):
        other = base.clone()
        other[row, column] ^= True
        others.append(other)
    for number, other in enumerate(others):
        mask = other[(None,) * (4 - other.dim())]
        seen = recognise(mask, QUERIES, QUERIES)
        with named(number):
            assert seen.attn_mask.dtype is mask.dtype
            assert torch.equal(seen.attn_mask, mask)
            assert seen[1:] == Visibility()[1:]


def test_random_masks_keep_their_pairs():
    """Whatever it is taken for, a mask shows the same pairs."""
    generator = torch.Generator().manual_seed(0)
    for case in range(300):
        queries, keys = (int(torch.randint(1, 6, (), generator=generator)) for _ in range(2))
        share = float(torch.rand((), generator=generator))
        mask = torch.rand(2, 1, queries, keys, generator=generator) < share
        if case % 2:  # more of those that are nearly bands
            left, right = (int(torch.randint(-1, 4, (), generator=generator)) for _ in range(2))
            mask = mask[:, :, :1] & band(queries, keys, left, right)
        with named(case):
            assert torch.equal(pairs(recognise(mask, queries, keys), queries, keys).expand_as(mask), mask)
