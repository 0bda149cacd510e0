"""What is compared: two levels, the ladder that "auto" stands for, and a ladder that was chosen by measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

BUDGET = {False: 4, True: 8}
"""Exact blocks of a row, and of a token (causal), in the tables of times."""

RATIO, MOST_BLOCKS, REFINED = 16, 128, 8
"""Of the chosen ladder: the ratio of its sizes, the most blocks of the coarsest level, and those refined in a row."""


def chosen_resolutions(length: int) -> tuple[int, ...]:
    """Return the resolutions of the chosen ladder: (32, 1), above 4096 tokens (512, 32, 1), and so on."""
    sizes = [32]
    while length > MOST_BLOCKS * sizes[0]:
        sizes.insert(0, RATIO * sizes[0])
    return (*sizes, 1)


def two_levels(length: int, budget: float) -> dict[str, Any]:
    """Return the settings of the paper's MRA-2, which chooses by means."""
    return {"resolutions": (32, 1), "blocks_per_row": budget, "score": "mean"}


def auto(length: int, budget: float) -> dict[str, Any]:
    """Return the settings of the ladder that the package chooses by the length."""
    return {"resolutions": "auto", "blocks_per_row": budget}


def chosen(length: int, budget: float) -> dict[str, Any]:
    """Return the settings of the chosen ladder."""
    return ladder(chosen_resolutions(length), REFINED, budget)


def ladder(resolutions: tuple[int, ...], refined: float, budget: float) -> dict[str, Any]:
    """Return settings that refine as many blocks at every level but the finest one.

    Blocks are chosen by the default of `score`: where attention is causal, by the largest member.
    """
    levels = len(resolutions) - 1
    budgets = budget if levels == 1 else (*((refined,) * (levels - 1)), budget)
    return {"resolutions": resolutions, "blocks_per_row": budgets}


@dataclass(frozen=True)
class Setting:
    """One row of the tables of times."""

    name: str
    keywords: Callable[[int, float], Mapping[str, Any]]
    """From length and budget."""
    longest: int | None = None
    """Tokens beyond which it is not run."""


SETTINGS = (
    Setting("two levels", two_levels, longest=65536),  # its time grows with the square of the length
    Setting("auto", auto),
    Setting("chosen", chosen),
)

BY_NAME = {setting.name: setting for setting in SETTINGS}


def compared(length: int, *, causal: bool) -> dict[str, Mapping[str, Any]]:
    """Return the settings whose errors are compared at one length, by the name that tables have for them."""
    budgets = (4, 8, 16)
    found = {f"two levels, {budget}": two_levels(length, budget) for budget in budgets}
    found |= {f"auto, {budget}": auto(length, budget) for budget in budgets}
    for refined in (REFINED, 2 * REFINED, 4 * REFINED):
        for budget in (8, 12, 16):
            found[f"(512, 32, 1), {refined} and {budget}"] = ladder((512, 32, 1), refined, budget)
    if causal:
        found |= {f"two levels by largest key, {n}": two_levels(length, n) | {"score": "max"} for n in budgets}
    # The token form has the first block exact by default; without causality it holds the sink, too.
    return found if causal else {name: keywords | {"first_blocks": 1} for name, keywords in found.items()}
