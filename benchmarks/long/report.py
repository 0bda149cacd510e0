"""The tables of long sequences, their aims, and their record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .. import sections
from ..sections import document as document
from ..sections import table_row
from ..speed.report import folder
from .measure import GROWTH, SDPA, Point, Step, Time
from .settings import BUDGET

MOST_GROWTH = 20.0
"""Times the time of a 16th of the length, where 16 would be linear."""

LONGEST = 1048576
LONGEST_SPEEDUP, LONGEST_BYTES = 2000, 3 * 2**30
STEP_GROWTH = 3.0
LADDER_SPEEDUP = 1.3
LADDER_LENGTH = 32768
"""Tokens from which a ladder is to be faster."""


def times_table(rows: Sequence[Time]) -> str:
    """Return the times as Markdown, and below them which aims are reached."""
    lines = [
        table_row(
            "setting",
            "tokens",
            "forward + backward, ms",
            f"over that of a {GROWTH}th of the length",
            "SDPA / this",
            "extra MiB",
        ),
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seconds = f"{1e3 * row.seconds:.1f}" if row.measured else f"({1e3 * row.seconds:.0f})"
        extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.0f}"
        growth = "" if row.growth is None else f"{row.growth:.1f}x"
        speedup = "" if row.speedup is None else f"{row.speedup:.{1 if row.speedup < 100 else 0}f}x"
        lines.append(table_row(row.setting, str(row.length), seconds, growth, speedup, extra))
    return "\n".join([*lines, "", *_times_aims(rows)])


def _times_aims(rows: Sequence[Time]) -> Iterable[str]:
    last = max(row.length for row in rows if row.measured and row.setting == SDPA)
    if any(not row.measured for row in rows):
        yield f"- in parentheses: extrapolated from {last} tokens, by the square of the length"
    for row in rows:
        if row.setting in (SDPA, "two levels"):
            continue
        name = f"{row.setting}, {row.length} tokens"
        if row.growth is not None and row.length in (LONGEST // GROWTH, LONGEST):
            wanted = f"at most {MOST_GROWTH:g}x the time of {row.length // GROWTH} tokens"
            yield f"- {name}: {wanted}: {_verdict(row.growth <= MOST_GROWTH)}"
        if row.length == LONGEST and not row.causal:
            fast = row.speedup is not None and row.speedup >= LONGEST_SPEEDUP
            yield f"- {name}: at least {LONGEST_SPEEDUP}x as fast as SDPA would be: {_verdict(fast)}"
        if row.length == LONGEST and row.extra_bytes is not None:
            yield f"- {name}: within 3 GiB of extra memory: {_verdict(row.extra_bytes <= LONGEST_BYTES)}"


def steps_table(rows: Sequence[Step]) -> str:
    """Return the steps of decoding as Markdown, and below them which aims are reached."""
    lines = [
        table_row("setting", "tokens", "a step, us", f"over that of a {GROWTH}th of the length"),
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        growth = "" if row.growth is None else f"{row.growth:.2f}x"
        lines.append(table_row(row.setting, str(row.length), f"{1e6 * row.seconds:.0f}", growth))
    aims = [
        f"- {row.setting}, {row.length} tokens: a step at most {STEP_GROWTH:g}x one at {row.length // GROWTH}: "
        f"{_verdict(row.growth <= STEP_GROWTH)}"
        for row in rows
        if row.growth is not None and row.setting != "two levels"
    ]
    return "\n".join([*lines, "", *aims])


def comparison_table(points: Sequence[Point]) -> str:
    """Return times and errors as Markdown, and below them what ladder takes the place of each two levels."""
    lines = [
        table_row("setting, exact blocks", "forward, ms", "forward + backward, ms", "relative error"),
        "|---|---:|---:|---:|",
    ]
    for point in points:
        numbers = (f"{1e3 * point.forward:.1f}", f"{1e3 * point.both:.1f}", f"{point.error:.4f}")
        lines.append(table_row(point.setting, *numbers))
    return "\n".join([*lines, "", *(_replacement(point, points) for point in points if _is_two_levels(point))])


def _is_two_levels(point: Point) -> bool:
    return point.setting.startswith("two levels")


def _replacement(two: Point, points: Iterable[Point]) -> str:
    """Say how much faster the fastest ladder is that has no more error."""
    name = f"- {two.setting}: "
    found = [point for point in points if not _is_two_levels(point) and point.error <= two.error]
    if not found:
        return f"{name}no ladder here has as little error"
    best = min(found, key=lambda point: point.both)
    ratio = two.both / best.both
    aim = f", aim {LADDER_SPEEDUP}x: {_verdict(ratio >= LADDER_SPEEDUP)}" if two.length >= LADDER_LENGTH else ""
    return (
        f"{name}{best.setting} takes {ratio:.2f}x less time forward + backward, {two.forward / best.forward:.2f}x less "
        f"forward, with {best.error / two.error:.2f} of the error{aim}"
    )


def budgets() -> str:
    """Return the budget of the tables of times."""
    return f"{BUDGET[False]} exact blocks of a row, {BUDGET[True]} of a token where causal"


def write_record(text: str, rows: Mapping[str, Sequence[Time | Step | Point]], path: Path | None = None) -> Path:
    """Write `<cpu>/long-<date>.md` and `.json`, or into another folder, and return the folder."""
    return sections.write("long", text, rows, folder() if path is None else path)


def _verdict(holds: bool) -> str:
    return "reached" if holds else "not reached"
