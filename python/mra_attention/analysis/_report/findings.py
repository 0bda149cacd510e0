"""Everything that a page is made of, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...config import MRAConfig
from .._analyze import analyze
from .._extra import require
from ..table import Table
from .budget_findings import BudgetFindings, measure_budgets
from .chosen_heads import ChosenHead, choose_heads
from .head_maps import HeadMap, map_head
from .scalograms import Scalogram, scalogram_of
from .subject import Subject, heads_within, rows_within

METRICS = (
    "band_shares",
    "frequency_selectivity",
    "entropies",
    "entropy_correlation",
    "wavelet_energy",
    "local_global_ratio",
)


@dataclass(frozen=True)
class Findings:
    """What was measured of a subject."""

    subject: Subject
    table: Table
    rows: int
    """How many queries of a head, at most, metrics are of."""
    chosen: list[ChosenHead]
    scalograms: dict[ChosenHead, Scalogram]
    budgets: BudgetFindings | None
    """None where only some queries of the calls were kept, or all keys are in one block."""
    maps: dict[ChosenHead, HeadMap]
    """Empty where `budgets` is None."""
    config: MRAConfig
    """How the blocks of the maps are chosen."""
    seed: int


def find(
    subject: Subject,
    *,
    rows: int | None,
    candidates: Sequence[MRAConfig],
    target: float,
    seed: int,
    progress: bool,
) -> Findings:
    """Measure everything; see `report` for the parameters."""
    rows = rows_within(subject.calls) if rows is None else rows
    table = analyze(subject.calls, metrics=METRICS, max_rows=rows, seed=seed, progress=progress)
    chosen = choose_heads(table)
    scalograms: dict[ChosenHead, Scalogram] = {}
    maps: dict[ChosenHead, HeadMap] = {}
    budgets: BudgetFindings | None = None
    longest = max(call.key.shape[-2] for call in subject.calls)
    is_whole = longest > candidates[0].block_size and all(call.query_rows is None for call in subject.calls)
    with _Stages(progress, 1 + is_whole + len(chosen)) as stages:
        if is_whole:
            stages.next("errors at budgets")
            budgets = measure_budgets(subject.calls, heads_within(subject.calls), candidates, target, seed)
        for head in chosen:
            stages.next(f"maps of {subject.name(*head[:2])}")
            call = subject.first_call(subject.layers[head.layer])
            scalogram = scalogram_of(call, head.head, seed)
            if scalogram is not None:
                scalograms[head] = scalogram
            if is_whole:
                maps[head] = map_head(call, head.head, candidates[0])
        stages.next("figures")
    return Findings(subject, table, rows, chosen, scalograms, budgets, maps, candidates[0], seed)


class _Stages:
    """A bar that says what is being computed."""

    def __init__(self, shown: bool, count: int) -> None:
        self._bar: Any = require("tqdm", "tqdm", "progress=True").tqdm(total=count, desc="report") if shown else None
        self._begun = False

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            if raised[0] is None:
                self._bar.update(1)
            self._bar.close()

    def next(self, what: str) -> None:
        """Show that the next stage begins."""
        if self._bar is not None:
            self._bar.update(int(self._begun))
            self._bar.set_postfix_str(what)
        self._begun = True
