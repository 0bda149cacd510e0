"""One test for every argument that is a number or a switch; it names the argument, its value and what would do.

A wrong type raises TypeError, a wrong value ValueError, and what is not implemented yet NotImplementedError. Each test
begins with the cheapest condition that a valid call meets; only a call that fails it pays for finding out why.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 4, 128


def check_bool(name: str, value: Any) -> None:
    """Check that a switch is True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, str]) -> None:
    """Check a setting that is one of two strings."""
    first, second = choices
    if not isinstance(value, str):
        raise TypeError(f"{name} must be the string {first!r} or {second!r}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be {first!r} or {second!r}, got {value!r}")


def _as_float(name: str, value: Any, accepted: str) -> float:
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex() and not value.requires_grad:
        return float(value)  # as torch's own functions take it
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {accepted}, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def dropout(dropout_p: Any) -> float:
    """Check `dropout_p`; True and False are 1 and 0, as for torch."""
    if type(dropout_p) is float and dropout_p == 0.0:
        return 0.0
    if dropout_p is True or dropout_p is False:
        return float(dropout_p)
    number = _as_float("dropout_p", dropout_p, "a number in [0, 1]")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"dropout_p must be a number in [0, 1], got {dropout_p!r}")
    return number


def scale_or_default(scale: Any, head_dim: int) -> float:
    """Check `scale` and put its default in its place."""
    if scale is None:
        return 1.0 / head_dim**0.5
    if isinstance(scale, torch.SymFloat):  # a float that is known later, while torch traces
        return scale  # pyright: ignore[reportReturnType]
    number = scale if type(scale) is float else _as_float("scale", scale, "None or a number")
    if number != number:
        raise ValueError(f"scale must be None or a number, got {scale!r}")
    return number


def coarse_shift(value: Any) -> float:
    """Check `coarse_shift`."""
    number = value if type(value) is float else _as_float("coarse_shift", value, "a finite number")
    if not -math.inf < number < math.inf:
        raise ValueError(f"coarse_shift must be a finite number, got {value!r}")
    return number


def finite(name: str, value: Any, minimum: float = -math.inf) -> float:
    """Check a finite number that is not below a minimum."""
    accepted = "a finite number" if minimum == -math.inf else f"a finite number of at least {minimum:g}"
    number = _as_float(name, value, accepted)
    if not (math.isfinite(number) and number >= minimum):
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
    return number


def integer(name: str, value: Any, minimum: int) -> int:
    """Check a whole number that is not below a minimum."""
    number = value
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer of at least {minimum}, got {value!r}")
        number = int(value)
    if not minimum <= number < 2**63:
        raise ValueError(f"{name} must be an integer of at least {minimum} (and below 2**63), got {value!r}")
    return number


def softcap(given: Any) -> float | None:
    """Check `softcap`, if it is given; 0, as in flash-attention, is none."""
    number = _as_float("softcap", given, "None or a positive number")
    if number == 0.0:
        return None
    if not 0.0 < number < math.inf:
        raise ValueError(f"softcap must be None or a positive number, got {given!r}")
    return number


def optional_integer(name: str, value: Any, minimum: int) -> int | None:
    """Check a whole number that may be left out."""
    return None if value is None else integer(name, value, minimum)


def _rate(name: str, value: Any) -> float:
    number = value if type(value) is float else _as_float(name, value, "a positive number")
    if not number > 0.0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return number


Rates = float | tuple[float, ...]
"""A budget: one number, or one for each head."""


def budget(blocks_per_row: Any, levels: int) -> Rates | tuple[Rates, ...]:
    """Check `blocks_per_row`: one budget or, where more than one level is refined, also one for each level."""
    if type(blocks_per_row) is float and blocks_per_row > 0.0:
        return blocks_per_row
    if levels == 1:
        return _budget_of_level("blocks_per_row", blocks_per_row)
    if isinstance(blocks_per_row, Tensor) and blocks_per_row.dim() in (1, 2):
        blocks_per_row = cast("Any", blocks_per_row.tolist())  # pyright: ignore[reportUnknownMemberType]
    if not isinstance(blocks_per_row, (tuple, list)):
        return _budget_of_level("blocks_per_row", blocks_per_row)
    of_levels = tuple(cast("Sequence[Any]", blocks_per_row))
    if len(of_levels) != levels:
        raise ValueError(
            f"blocks_per_row must be one number, or one for each of the {levels} levels that resolutions refine (each "
            f"of them a number, or one for each head), got {len(of_levels)}: {blocks_per_row!r}"
        )
    return tuple(_budget_of_level(f"blocks_per_row[{level}]", x) for level, x in enumerate(of_levels))


def _budget_of_level(name: str, rates: Any) -> Rates:
    if isinstance(rates, Tensor) and rates.dim() == 1:
        rates = cast("Any", rates.tolist())  # pyright: ignore[reportUnknownMemberType]
    if not isinstance(rates, (tuple, list)):
        return _rate(name, rates)
    checked = tuple(_rate(f"{name}[{i}]", x) for i, x in enumerate(cast("Sequence[Any]", rates)))
    if not checked:
        raise ValueError(f"{name} must be a positive number, or one for each head, got none")
    return checked


def window(window_size: Any) -> tuple[int, int]:
    """Check `window_size`: how many tokens on the left and on the right are visible, -1 for all."""
    if not isinstance(window_size, (tuple, list)) or len(cast("Sequence[Any]", window_size)) != 2:
        raise TypeError(f"window_size must be two integers (left, right), -1 for no limit, got {window_size!r}")
    left, right = cast("Sequence[Any]", window_size)
    if type(left) is int and type(right) is int and left == right == -1:
        return -1, -1
    return integer("window_size[0]", left, -1), integer("window_size[1]", right, -1)


def grid(given: Any) -> tuple[int, int] | None:
    """Check `grid`: rows and columns, if it is given."""
    if given is None:
        return None
    if not isinstance(given, (tuple, list)) or len(cast("Sequence[Any]", given)) != 2:
        raise TypeError(f"grid must be None or two integers (rows, columns), got {given!r}")
    rows, columns = cast("Sequence[Any]", given)
    return integer("grid[0]", rows, 1), integer("grid[1]", columns, 1)


def resolutions(given: Any) -> tuple[int, ...] | Literal["auto"]:
    """Check `resolutions`."""
    if isinstance(given, str) and given == "auto":
        return "auto"
    if type(given) is tuple and len(cast("tuple[Any, ...]", given)) == 2:
        size, last = cast("tuple[Any, Any]", given)
        if type(size) is int and type(last) is int and last == 1 and MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE:
            return size, last
    return _ladder(given)


def _ladder(given: Any) -> tuple[int, ...]:
    accepted = (
        f"(block_size, 1) or several sizes, the last of them before the 1 from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
    )
    accepted += ", for example (32, 1) or (512, 32, 1), or the string 'auto'"
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"resolutions must be a tuple of integers, {accepted}; got {given!r}")
    given = tuple(cast("Sequence[Any]", given))
    for size in given:
        if isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise TypeError(f"resolutions must be a tuple of integers, {accepted}; got {given!r}")
    sizes = [int(size) for size in given]
    if len(sizes) < 2 or sizes[-1] != 1:
        raise ValueError(f"resolutions must end in 1 and have at least two entries: {accepted}; got {given!r}")
    for larger, smaller in itertools.pairwise(sizes):
        if smaller < 1 or larger <= smaller or larger % smaller or larger > MAX_BLOCK_SIZE * smaller:
            raise ValueError(
                f"resolutions must decrease, each dividing the one before and at least a {MAX_BLOCK_SIZE}th of it: "
                f"{smaller} does not follow {larger} in {given!r}; accepted: {accepted}"
            )
    if not MIN_BLOCK_SIZE <= sizes[-2] <= MAX_BLOCK_SIZE:
        raise ValueError(f"resolutions must be {accepted}; got {given!r}")
    return tuple(sizes)
