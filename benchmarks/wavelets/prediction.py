"""The error of MRA attention at a budget, head by head, beside the metrics that might have told it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

MISSED, DETAIL, AGAIN = "missed_share", "missed_detail", "error_elsewhere"
"""Predictors that are no metrics: what the best blocks leave, and the error of the same head on other sequences."""


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
    missed: float
    """Share of the attention outside of as many blocks, those with the most attention."""
    detail: float
    """Norm of the differences from the means of the blocks outside, over the norm of the attention."""


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


def left_out(weights: Tensor, blocks: int, *, pooled: bool) -> tuple[float, float]:
    """Return what the best blocks leave of the attention (Lq, Lk): a share of its sum, and a norm over its norm.

    The norm is that of the differences from the means of the other blocks: of Haar's details finer than a block there.
    Pooled, `blocks` times the rows of blocks are kept among all blocks of the head; else `blocks` of each query, and
    means are those of a query.
    """
    height = BLOCK if pooled else 1
    filled = F.pad(weights, (0, -weights.shape[1] % BLOCK, 0, -weights.shape[0] % height))
    tiles = filled.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height)).transpose(1, 2).flatten(2)
    rows, columns = tiles.shape[:2]
    real = torch.ones_like(weights)
    sizes = F.pad(real, (0, filled.shape[1] - weights.shape[1], 0, filled.shape[0] - weights.shape[0]))
    sizes = sizes.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height)).sum((1, 3))
    sums, squares = tiles.sum(-1), tiles.square().sum(-1)
    ranked = sums.view(1, -1) if pooled else sums
    count = min(blocks * rows if pooled else blocks, ranked.shape[1])
    others = torch.ones_like(ranked).scatter(1, ranked.topk(count, dim=1).indices, 0.0).view(rows, columns)
    detail = ((squares - sums.square() / sizes) * others).sum().clamp(min=0.0) / squares.sum()
    return ((sums * others).sum() / sums.sum()).item(), detail.sqrt().item()


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
        error, missed = by_head(here, "error"), by_head(here, "missed")
        numbers = {metric: columns.values[metric, TRAINED] for metric in columns.metrics()} | {
            MISSED: missed,
            DETAIL: by_head(here, "detail"),
        }
        for name, x in numbers.items():
            behind = statistics.lead(missed, x, error)
            result.append(Prediction(group, blocks, name, *_correlations(x, error, columns.layers), behind))
        even, odd = (by_head([e for e in here if e.sequence % 2 == half], "error") for half in (0, 1))
        if odd.size:
            result.append(Prediction(group, blocks, AGAIN, *_correlations(odd, even, columns.layers), UNKNOWN))
    return result


def _correlations(x: Floats, error: Floats, layers: Ints) -> tuple[Estimate, Estimate]:
    return statistics.correlation(x, error), statistics.correlation(x, error, groups=layers)
