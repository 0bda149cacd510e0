"""The tables."""

from __future__ import annotations

from collections.abc import Sequence

from ..sections import table_row
from . import compare, predictors

NOTE = """\
- error: `||out - exact|| / ||exact||` of a head's output, mean over heads and layers. The target is met on the text on
  which budgets are chosen (Python's documentation); all else is measured on the other one (Python's source).
- time saved: of the best uniform budget with the same error there, one setting and one budget for all heads and layers,
  interpolated between budgets. Of the default: of any block size with else the default settings. Alike: of the best of
  the settings that are free in the row. Expected: alike, as times of calls with one budget for all heads say. Chosen
  there: as expected, with budgets chosen on the text on which they are tested.
- CPU time of one thread, all configs on one layer, medians of calls in turns"""


def comparison(rows: Sequence[compare.Row], rounds: int) -> str:
    """Return what is saved."""
    saved = ("time saved of the default", "alike", "expected", "chosen there")
    lines = [table_row("chosen", "target", "error", *saved), table_row("---", *["---:"] * 6)]
    for row in rows:
        shares = (row.saved, row.saved_alike, row.expected, row.expected_at_best)
        lines.append(table_row(row.free, f"{row.target:g}", f"{row.error:.3f}", *(f"{share:.1%}" for share in shares)))
    return "\n".join([*lines, "", f"{NOTE}: {rounds} of each"])


def ranking(rows: Sequence[predictors.Row], budget: float) -> str:
    """Return what foretells errors."""
    lines = [table_row("on the one text", f"errors with {budget:g} blocks on the other"), table_row("---", "---:")]
    lines += [table_row(row.number, f"{row.correlation:+.2f}") for row in rows]
    return "\n".join([*lines, "", "- rank correlation (Spearman) over all heads of all layers"])
