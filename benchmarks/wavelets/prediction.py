"""The error of MRA attention at a budget, head by head, beside the metrics that might have told it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mra_attention import scaled_dot_product_attention as mra
from mra_attention.analysis import AttentionCall, attention_map
from torch import Tensor
from tqdm import tqdm

from . import statistics
from .columns import TRAINED, Columns
from .sources import layer_number
from .statistics import UNKNOWN, Estimate, Floats, Ints

BLOCK = 32

MISSED, AGAIN = "missed_share", "error_elsewhere"
"""Predictors that are no metrics: what the best blocks leave, and the error of the head on other sequences."""


class LeftOut(NamedTuple):
    """What the best blocks leave of the attention of a head, where the others have their means."""

    missed_share: float
    """Share of the attention outside of them."""
    misplaced_share: float
    """Half of the sum of the differences from the means, over the sum of the attention: total variation."""
    missed_detail: float
    """Norm of these differences, which are Haar's details finer than a block, over the norm of the attention."""


@dataclass
class HeadError:
    """A head at a budget in one sequence."""

    group: str
    layer: int
    head: int
    sequence: int
    blocks: int
    error: float
    """Norm of the error of the output over the norm of the exact one."""
    missed_share: float
    misplaced_share: float
    missed_detail: float
    """What as many blocks leave; see `LeftOut`."""


@dataclass
class Prediction:
    """How well a number of each head tells the order of their errors: Spearman's correlations."""

    group: str
    blocks: int
    predictor: str
    overall: Estimate
    within: Estimate
    """Within layers."""
    behind: Estimate
    """How much larger the size of that of `missed_share` is, over all heads; NaN where sequences are halved."""


def errors(group: str, calls: Sequence[AttentionCall], budgets: Sequence[int]) -> list[HeadError]:
    """Return the error of every head of every call, each of one sequence, at every budget."""
    found: list[HeadError] = []
    sequences: dict[str, int] = {}
    for call in tqdm(calls, desc=f"errors, {group}", unit="call"):
        sequence = sequences[call.layer] = sequences.get(call.layer, -1) + 1
        outputs = {m: _output(call, m) for m in budgets}
        for head in range(call.query.shape[1]):
            weights = attention_map(call, 0, head)
            exact = weights @ call.value[0, head * call.value.shape[1] // call.query.shape[1]].double()
            for blocks, output in outputs.items():
                error = (output[head] - exact).norm() / exact.norm()
                left = left_out(weights, blocks, pooled=_pooled(call))
                found.append(HeadError(group, layer_number(call.layer), head, sequence, blocks, error.item(), *left))
    return found


def _pooled(call: AttentionCall) -> bool:
    """Whether the queries of a block choose together, as where nothing is hidden."""
    return not call.is_causal and call.window_size == (-1, -1) and call.attn_mask is None


def _output(call: AttentionCall, blocks: int) -> Tensor:
    tensors = (call.query, call.key, call.value)
    return mra(*tensors, resolutions=(BLOCK, 1), blocks_per_row=blocks, **call.arguments())[0].double()


def left_out(weights: Tensor, blocks: int, *, pooled: bool) -> LeftOut:
    """Return what the best blocks, those with the most attention, leave of weights (Lq, Lk).

    Pooled, `blocks` times the rows of blocks are kept among all blocks of the head; else `blocks` of each query, and
    means are those of a query.
    """
    height = BLOCK if pooled else 1
    tiles, real = (_tiles(x, height) for x in (weights, torch.ones_like(weights)))
    sums = tiles.sum(-1)
    ranked = sums.view(1, -1) if pooled else sums
    best = ranked.topk(min(blocks * len(sums) if pooled else blocks, ranked.shape[1]), dim=1).indices
    others = torch.ones_like(ranked).scatter(1, best, 0.0).view_as(sums)
    off = (tiles - real * (sums / real.sum(-1)).unsqueeze(-1)) * others.unsqueeze(-1)
    missed, misplaced = (sums * others).sum() / sums.sum(), off.abs().sum() / sums.sum() / 2
    return LeftOut(missed.item(), misplaced.item(), (off.norm() / tiles.norm()).item())


def _tiles(x: Tensor, height: int) -> Tensor:
    """Return (Lq, Lk) as (rows of blocks, columns of blocks, height * BLOCK), with zeros at the ends."""
    filled = F.pad(x, (0, -x.shape[1] % BLOCK, 0, -x.shape[0] % height))
    return filled.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height)).transpose(1, 2).flatten(2)


def by_head(found: Sequence[HeadError], name: str) -> Floats:
    """Return a field of the errors for each head, mean over sequences, in the order of layers and heads."""
    heads: dict[tuple[int, int], list[float]] = {}
    for error in found:
        heads.setdefault((error.layer, error.head), []).append(getattr(error, name))
    return np.array([np.mean(heads[head]) for head in sorted(heads)])


def predictions(group: str, found: Sequence[HeadError], columns: Columns) -> list[Prediction]:
    """Return how well each metric, and what else may tell it, goes with the errors at each budget."""
    result: list[Prediction] = []
    for blocks in dict.fromkeys(error.blocks for error in found):
        here = [error for error in found if error.blocks == blocks]
        error = by_head(here, "error")
        numbers = {metric: columns.values[metric, TRAINED] for metric in columns.metrics()}
        numbers |= {name: by_head(here, name) for name in LeftOut._fields}
        for name, x in numbers.items():
            behind = statistics.lead(numbers[MISSED], x, error)
            result.append(Prediction(group, blocks, name, *_correlations(x, error, columns.layers), behind))
        even, odd = (by_head([e for e in here if e.sequence % 2 == half], "error") for half in (0, 1))
        if odd.size:
            result.append(Prediction(group, blocks, AGAIN, *_correlations(odd, even, columns.layers), UNKNOWN))
    return result


def _correlations(x: Floats, error: Floats, layers: Ints) -> tuple[Estimate, Estimate]:
    return statistics.correlation(x, error), statistics.correlation(x, error, groups=layers)
