"""What foretells the errors of heads on another text: numbers of the attention weights, and errors themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from mra_attention import plan
from mra_attention.analysis import AttentionCall
from torch import Tensor

from .compare import Curves
from .data import Case

ROWS = 128
"""Queries of each head of which the weights are looked at."""

LOW = 1 / 4
"""Of the frequencies up to Nyquist's: the low ones."""


@dataclass
class Row:
    """How well a number of the heads on one text ranks their errors on the other: Spearman's correlation."""

    data: str
    number: str
    correlation: float


@dataclass
class Sample:
    """Attention weights of some queries of a layer: (B, H, rows, Lk)."""

    weights: Tensor
    logits: Tensor
    exact: Tensor
    """Which of them lie in exact blocks."""
    block: int


def rows_of(case: Case, chosen_on: Curves, tested_on: Curves) -> list[Row]:
    """Return a row for each number."""
    place = [*chosen_on[0][0][0].budgets].index(case.budget)
    target = _errors(case, tested_on, place)
    found = {name: [] for name in NUMBERS}
    for call in case.chosen_on:
        sample = _sample(call, case)
        for name, number in NUMBERS.items():
            found[name].append(number(sample).mean(0))
    numbers = {name: torch.cat(values) for name, values in found.items()}
    first, second = (_errors(case, chosen_on, i) for i in (0, 1))
    numbers |= {
        f"error with {case.budgets[0]:g}": first,
        f"error with {case.budgets[0]:g}, less that with {case.budgets[1]:g}": first - second,
        f"error with {case.budget:g}": _errors(case, chosen_on, place),
    }
    return [Row(case.name, name, spearman(values, target)) for name, values in numbers.items()]


def spearman(left: Tensor, right: Tensor) -> float:
    """Return the correlation of the ranks; equal numbers are ranked as they come."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (left, right)])
    return torch.corrcoef(ranks)[0, 1].item()


def _errors(case: Case, curves: Curves, place: int) -> Tensor:
    heads = [head for layer in curves for of_config in layer if of_config[0].config == case.plain for head in of_config]
    return torch.tensor([head.errors[place] for head in heads], dtype=torch.float64)


@torch.inference_mode()
def _sample(call: AttentionCall, case: Case) -> Sample:
    length, heads = call.query.shape[-2], call.query.shape[-3]
    rows = torch.arange(length // (2 * ROWS), length, max(length // ROWS, 1))
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    key = call.key.repeat_interleave(heads // call.key.shape[-3], 1)
    logits = scale * call.query[..., rows, :] @ key.mT
    if call.is_causal:
        logits.masked_fill_(torch.arange(length) > rows[:, None], -torch.inf)
    config = replace(case.plain, blocks_per_row=case.budget)
    arguments: Any = {name: value for name, value in call.arguments().items() if name != "sinks"}
    chosen = plan(call.query, call.key, config=config, **arguments).block_mask()
    block = config.block_size
    of_rows = chosen[:, :, rows if chosen.shape[2] == length else rows // block]
    exact = of_rows.repeat_interleave(block, -1)[..., :length]
    return Sample(logits.softmax(-1), logits, exact, block)


def _entropy(sample: Sample) -> Tensor:
    return torch.special.entr(sample.weights).sum(-1).mean(-1)


def _mass_left(sample: Sample) -> Tensor:
    return sample.weights.masked_fill(sample.exact, 0).sum(-1).mean(-1)


def _variance(sample: Sample) -> Tensor:
    """Return the variance of logits within blocks that are not exact, by their weight."""
    finite = sample.logits.isfinite() & ~sample.exact
    pieces = [
        torch.nn.functional.pad(x, (0, -x.shape[-1] % sample.block)).unflatten(-1, (-1, sample.block))
        for x in (sample.logits.masked_fill(~finite, 0), finite.float(), sample.weights * finite)
    ]
    logits, counts, weights = pieces
    number = counts.sum(-1).clamp(min=1)
    mean = logits.sum(-1) / number
    variance = ((logits - mean[..., None]).square() * counts).sum(-1) / number
    mass = weights.sum(-1)
    return (variance * mass).sum((-2, -1)) / mass.sum((-2, -1)).clamp(min=1e-30)


def _spectrum(sample: Sample) -> Tensor:
    """Return the power spectrum of each row (Hann window), as shares of its sum."""
    window = torch.hann_window(sample.weights.shape[-1], periodic=False)
    power = torch.fft.rfft(sample.weights * window).abs().square()
    return power / power.sum(-1, keepdim=True).clamp(min=1e-30)


def _low_share(sample: Sample) -> Tensor:
    spectrum = _spectrum(sample)
    return spectrum[..., : int(LOW * spectrum.shape[-1])].sum(-1).mean(-1)


def _spectral_entropy(sample: Sample) -> Tensor:
    return torch.special.entr(_spectrum(sample)).sum(-1).mean(-1)


NUMBERS: dict[str, Callable[[Sample], Tensor]] = {
    "entropy of the weights": _entropy,
    "low share of their spectrum": _low_share,
    "entropy of their spectrum": _spectral_entropy,
    "weight outside of exact blocks": _mass_left,
    "variance of logits within the others": _variance,
}
