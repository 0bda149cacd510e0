"""Intervals of a ratio of sums over all rows, from some of the rows.

The ratio is `sum errors / sum sizes`; rows are errors and sizes `(..., n)` in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._student import student_quantile

_RATIOS = 200


class Spread(NamedTuple):
    """A ratio as its estimate, the variance of its logarithm, and the degrees of freedom of that."""

    ratio: Tensor
    variance: Tensor
    degrees: Tensor


def pairs_of_strata(population: int, pairs: int, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw two rows of each of some strata of neighbours, without replacement: int64 `(*lead, pairs, 2)`."""
    sizes = strata(population, pairs)
    starts = sizes.cumsum(0) - sizes
    uniform = torch.rand(*lead, pairs, 2, generator=generator, dtype=torch.float64)
    first = (uniform[..., 0] * sizes).long()
    second = (first + 1 + (uniform[..., 1] * (sizes - 1)).long()) % sizes
    return starts[:, None] + torch.stack((first, second), -1)


def strata(population: int, pairs: int) -> Tensor:
    """Return the sizes of strata that differ by one at most."""
    return torch.arange(1, pairs + 1) * population // pairs - torch.arange(pairs) * population // pairs


def stratified(errors: Tensor, sizes: Tensor, population: int) -> Spread:
    """Return the ratio of rows that `pairs_of_strata` drew, with Welch's and Satterthwaite's degrees of freedom."""
    pairs = errors.shape[-2]
    weight = strata(population, pairs).double()
    total_error, total = ((weight * x.mean(-1)).sum(-1) for x in (errors, sizes))
    ratio = torch.where(total_error > 0, total_error / total, 0.0)
    residuals = errors - ratio[..., None, None] * sizes
    parts = weight * (weight - 2.0) * (residuals[..., 0] - residuals[..., 1]).square() / 4
    # Divided by their sum first: squares of small variances would be 0.
    shares = parts / parts.sum(-1, keepdim=True)
    degrees = 1.0 / shares.square().sum(-1)
    return Spread(ratio, parts.sum(-1) / total_error.square(), degrees.nan_to_num(nan=float(pairs)))


def log_limits(spread: Spread, confidence: float) -> tuple[Tensor, Tensor]:
    """Return the limits by Student's t on the scale of logarithms; 0 and infinity where no row has an error."""
    factor = (student_quantile(confidence, spread.degrees) * spread.variance.sqrt()).exp()
    nothing = spread.ratio == 0
    low = torch.where(nothing, 0.0, spread.ratio / factor)
    return low, torch.where(nothing, torch.inf, spread.ratio * factor)


def betting_limits(
    errors: Tensor, sizes: Tensor, population: int, largest: tuple[Tensor, Tensor], confidence: float
) -> tuple[Tensor, Tensor]:
    """Return limits that hold whatever the population, for rows drawn one by one without replacement, `(..., n)`.

    `largest` are bounds of every row's error and size. A ratio is rejected if a bet against it, that could not win in
    the mean if it were right, has multiplied its stake by `2 / (1 - confidence)` (Waudby-Smith and Ramdas, "Estimating
    means of bounded random variables by betting", 2024).
    """
    most = largest[0] * population / sizes.sum(-1).clamp(min=1e-300)  # beyond it the sampled sizes alone decide
    steps = torch.linspace(0.0, 1.0, _RATIOS, dtype=torch.float64) ** 3
    ratios = most[..., None] * steps
    z = errors[..., None, :] - ratios[..., None] * sizes[..., None, :]
    bounds = (-(ratios * largest[1][..., None])[..., None], largest[0][..., None, None])
    log_stake = math.log(2.0 / (1.0 - confidence))
    rejected_low = _wealth(z, bounds, population, log_stake) >= log_stake
    rejected_high = _wealth(-z, (-bounds[1], -bounds[0]), population, log_stake) >= log_stake
    return _hull(ratios, rejected_low, rejected_high)


def _hull(ratios: Tensor, rejected_low: Tensor, rejected_high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of what is not rejected, one step of the grid wider."""
    count = ratios.shape[-1]
    low = (~rejected_low).long().argmax(-1, keepdim=True) - 1
    last = count - 1 - (~rejected_high).flip(-1).long().argmax(-1, keepdim=True)
    high = ratios.gather(-1, (last + 1).clamp(max=count - 1)).masked_fill(last == count - 1, torch.inf)
    return ratios.gather(-1, low.clamp(min=0))[..., 0], high[..., 0]


def _wealth(z: Tensor, bounds: tuple[Tensor, Tensor], population: int, log_stake: float) -> Tensor:
    """Return the largest logarithm of what bets on a mean above 0 have made, `(..., ratios)`."""
    count = z.shape[-1]
    before = z.cumsum(-1) - z
    left = population - torch.arange(count, dtype=torch.float64)
    mean = -before / left  # of the rows that are left, if the ratio is right
    spread = (bounds[1] - bounds[0]).square() / 4
    variance = (spread + z.square().cumsum(-1) - z.square()) / torch.arange(1, count + 1, dtype=torch.float64)
    bet = (2.0 * log_stake / (count * variance.clamp(min=1e-300))).sqrt()
    bet = torch.minimum(bet, 0.75 / (mean - bounds[0]).clamp(min=1e-300))
    rounding = 1e-9 * (bounds[1] - bounds[0])
    impossible = (mean > bounds[1] + rounding) | (mean < bounds[0] - rounding)
    growth = torch.log1p((bet * (z - mean)).clamp(min=-0.999999))
    wealth = torch.where(impossible, torch.inf, growth).cumsum(-1)
    return wealth.amax(-1)
