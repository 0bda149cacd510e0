"""What the choice of a token's blocks, and the weight of the others, do to the error of the token form: prototypes.

Of each global layer of Gemma 3 270M, 8192 tokens, some queries of the second half of each head are computed exactly and
with each method. The table has the relative error of the output, and in parentheses how it compares with the choice by
means and the same number of exact blocks. "MACs" are multiply-adds per channel of a token in the middle of the
sequence with 8 exact blocks, beyond the 128 of the scores by means, the 128 of the mean values and the 512 of exact
blocks. Those of 8-bit codes count a quarter: AVX-512 VNNI computes four in the time of one.

    python -m benchmarks.quality.token gemma_qkv.npz
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gemma_qkv
from .gemma_qkv import LENGTH, SCALE

BLOCK = 32
BLOCKS = LENGTH // BLOCK
BUDGETS = (8, 16, 32)
FORCED = 2
"""The block of the token, and the first one."""


class Layer:
    """The queries that are looked at, with what every method needs of them."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, samples: int) -> None:
        generator = torch.Generator().manual_seed(1)
        half = LENGTH // 2
        places = [torch.randperm(half, generator=generator)[:samples] + half for _ in query]
        tokens = torch.cat(places)
        self.query = torch.cat([rows[t] for rows, t in zip(query, places, strict=True)])
        self.heads = torch.arange(len(query)).repeat_interleave(samples)
        self.keys, self.value = key[0].reshape(BLOCKS, BLOCK, -1), value[0]
        self.means = self.keys.mean(1)
        self.differences = self.keys - self.means[:, None]
        self.mean_values = self.value.reshape(BLOCKS, BLOCK, -1).mean(1)
        logits = (SCALE * (self.query @ key[0].T)).masked_fill(torch.arange(LENGTH) > tokens[:, None], -math.inf)
        self.out = torch.softmax(logits, 1) @ self.value
        self.logits = logits.reshape(-1, BLOCKS, BLOCK)
        self.mean = SCALE * (self.query @ self.means.T)
        own = tokens // BLOCK
        self.is_open = torch.arange(BLOCKS) < own[:, None]
        self.is_forced = (torch.arange(BLOCKS) == own[:, None]) | (torch.arange(BLOCKS) == 0)

    def choose(self, scores: Tensor, number: int) -> Tensor:
        """Return which blocks are exact: forced ones, and those with the largest scores."""
        ranked = scores.masked_fill(~self.is_open, -math.inf).masked_fill(self.is_forced, math.inf)
        chosen = torch.zeros_like(self.is_open)
        return chosen.scatter_(1, ranked.topk(min(number, BLOCKS), 1).indices, True)

    def error(self, chosen: Tensor, coarse: Tensor) -> float:
        """Return the relative error of the output, the mean over heads."""
        rest = (coarse + math.log(BLOCK)).masked_fill(chosen | ~self.is_open, -math.inf)
        exact = self.logits.masked_fill(~chosen[..., None], -math.inf).flatten(1)
        weights = torch.softmax(torch.cat([exact, rest], 1), 1)
        out = weights[:, :LENGTH] @ self.value + weights[:, LENGTH:] @ self.mean_values
        heads = [self.heads == head for head in self.heads.unique()]
        errors = [((out - self.out)[rows].norm() / self.out[rows].norm()).item() for rows in heads]
        return sum(errors) / len(errors)


def codes(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Round to 255 steps between plus and minus the largest size."""
    unit = x.abs().amax(dims, keepdim=True) / 127
    return (x / unit).round() * unit


def variance(layer: Layer) -> Tensor:
    """Half the variance of the logits of each block."""
    return 0.5 * (SCALE * torch.einsum("td,jsd->tjs", layer.query, layer.keys)).var(2, correction=0)


def fine_means(layer: Layer, size: int) -> Tensor:
    """Return the logarithm of the mean exponential of the logits of finer means."""
    means = layer.keys.reshape(BLOCKS * BLOCK // size, size, -1).mean(1)
    logits = SCALE * (layer.query @ means.T)
    return torch.logsumexp(logits.reshape(len(logits), BLOCKS, -1), 2) - math.log(BLOCK // size)


def largest_difference(layer: Layer, groups: int) -> Tensor:
    """Return how far the largest logit of a key is above that of the mean, from codes of some channels."""
    squares = layer.differences.square().sum(1).reshape(BLOCKS, -1, 4).sum(2)
    kept = torch.zeros_like(squares).scatter_(1, squares.topk(groups, 1).indices, 1.0).repeat_interleave(4, 1)
    keys = codes(layer.differences, (1, 2)) * kept[:, None]
    return (SCALE * torch.einsum("td,jsd->tjs", codes(layer.query, (1,)), keys)).amax(2)


class Method(NamedTuple):
    """How blocks are ranked, and what is added to the logits of the others."""

    score: Callable[[Layer], Tensor]
    macs: float = 0.0
    candidates: int | None = None
    """Only so many times the blocks that are chosen are ranked, the best by their means."""
    shift: float = 0.0
    clip: float | None = None
    """Half the variance up to this is added, too."""

    def error(self, layer: Layer, scores: Tensor, number: int) -> float:
        """Return the error with a number of exact blocks."""
        if self.candidates is not None:
            candidates = layer.choose(layer.mean, FORCED + self.candidates * (number - FORCED))
            scores = scores.masked_fill(~candidates, -1e9)
        coarse = layer.mean + self.shift
        if self.clip is not None:
            coarse = coarse + variance(layer).clamp(max=self.clip)
        return layer.error(layer.choose(scores, number), coarse)


def _largest(groups: int) -> Callable[[Layer], Tensor]:
    return lambda layer: layer.mean + 0.85 * largest_difference(layer, groups)


def _diagonal(layer: Layer) -> Tensor:
    return layer.mean + 0.5 * SCALE**2 * (layer.query.square() @ layer.differences.square().mean(1).T)


def _exact_mass(layer: Layer) -> Tensor:
    return torch.logsumexp(layer.logits, 2)


def _codes_macs(groups: int, candidates: int) -> float:
    return candidates * (8 - FORCED) * BLOCK * (4 * groups / 256) / 4


METHODS = {
    "mean": Method(lambda layer: layer.mean),
    "mean, shift 0.8": Method(lambda layer: layer.mean, shift=0.8),
    "mean, half variance up to 0.6": Method(lambda layer: layer.mean, 128 * BLOCK, clip=0.6),
    "log-sum-exp of means of 8": Method(lambda layer: fine_means(layer, 8), 4 * 128 / 4),
    "the same of 4m candidates": Method(lambda layer: fine_means(layer, 8), 4 * 4 * 6 / 4, 4),
    "mean + half diagonal variance": Method(_diagonal, 128),
    "mean + half variance": Method(lambda layer: layer.mean + variance(layer), 128 * BLOCK),
    "mean + half variance, 4m candidates": Method(lambda layer: layer.mean + variance(layer), 4 * 6 * BLOCK, 4),
    "largest key, 2m candidates, 32 groups": Method(_largest(32), _codes_macs(32, 2), 2),
    "largest key, 4m candidates, 16 groups": Method(_largest(16), _codes_macs(16, 4), 4),
    "largest key, 4m candidates, 32 groups": Method(_largest(32), _codes_macs(32, 4), 4),
    "largest key, 4m candidates, 64 groups": Method(_largest(64), _codes_macs(64, 4), 4),
    "largest key, 6m candidates, 32 groups": Method(_largest(32), _codes_macs(32, 6), 6),
    "largest key, 4m, 32 groups, shift 0.8": Method(_largest(32), _codes_macs(32, 4), 4, shift=0.8),
    "exact mass": Method(_exact_mass, 128 * BLOCK),
    "exact mass, shift 0.8": Method(_exact_mass, 128 * BLOCK, shift=0.8),
}


def main(arguments: Any = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="queries, keys and values; made if it is not there")
    parser.add_argument("--samples", type=int, default=128, help="queries of each head")
    given = parser.parse_args(arguments)
    if not given.path.exists():
        with tempfile.TemporaryDirectory() as cache:
            gemma_qkv.capture(given.path, Path(cache))
    errors: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    for text in gemma_qkv.TEXTS:
        for number in range(gemma_qkv.LAYERS):
            layer = Layer(*gemma_qkv.load(given.path, text, number), given.samples)
            for name, method in METHODS.items():
                scores = method.score(layer)
                errors[name].append([method.error(layer, scores, budget) for budget in BUDGETS])
    print(f"{'method':40}{'MACs':>6}  " + "".join(f"{f'{budget} blocks':>14}" for budget in BUDGETS))
    base = torch.tensor(errors["mean"])
    for name, method in METHODS.items():
        of_method = torch.tensor(errors[name])
        cells = zip(of_method.mean(0).tolist(), (of_method / base).mean(0).tolist(), strict=True)
        print(f"{name:40}{method.macs:6.0f}  " + "".join(f"{error:7.3f} ({ratio:.2f})" for error, ratio in cells))


if __name__ == "__main__":
    main()
