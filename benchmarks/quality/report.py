"""The tables of quality, and their record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import sections
from ..sections import document as document
from ..sections import table_row
from ..speed.report import folder
from .curves import Point, at_time
from .entropy import Head
from .settings import REFERENCE, TABLE_KEYS


def equal_time_table(points: Sequence[Point]) -> str:
    """Return the error of every setting in the times that the reference takes, as Markdown."""
    of_reference = {point.keys: point for point in points if point.setting == REFERENCE}
    columns = [of_reference[keys] for keys in TABLE_KEYS[points[0].causal] if keys in of_reference]
    heads = (f"in {1e3 * point.seconds:.2f} ms ({point.keys} exact keys)" for point in columns)
    lines = [table_row("setting", *heads), "|---" + "|---:" * len(columns) + "|"]
    for name in dict.fromkeys(point.setting for point in points):
        curve = [point for point in points if point.setting == name]
        errors = (at_time(curve, point.seconds) for point in columns)
        lines.append(table_row(name, *map(_beside, errors, columns)))
    note = f'- relative error of the output, and times that of "{REFERENCE}"; not every setting can be as fast'
    return "\n".join([*lines, "", note])


def _beside(error: float | None, reference: Point) -> str:
    return "" if error is None else f"{error:.4f} ({error / reference.error:.2f}x)"


def points_table(points: Sequence[Point]) -> str:
    """Return time and error of every setting at every budget, as Markdown."""
    budgets = sorted({point.keys for point in points})
    lines = [
        table_row("setting: ms, error", *(f"{keys} exact keys" for keys in budgets)),
        "|---" + "|---:" * len(budgets) + "|",
    ]
    for name in dict.fromkeys(point.setting for point in points):
        found = {point.keys: point for point in points if point.setting == name}
        lines.append(table_row(name, *(f"{1e3 * found[n].seconds:.2f}, {found[n].error:.4f}" for n in budgets)))
    return "\n".join(lines)


def entropy_table(heads: Sequence[Head]) -> str:
    """Return the mean error of every method by whole nats of the entropy of the rows, as Markdown."""
    groups = sorted({math.floor(head.entropy) for head in heads})
    lines = [
        table_row("entropy of the rows, nats", *(f"{group} to {group + 1}" for group in groups)),
        "|---" + "|---:" * len(groups) + "|",
    ]
    for name in dict.fromkeys(head.method for head in heads):
        means: list[str] = []
        for group in groups:
            errors = [head.error for head in heads if head.method == name and math.floor(head.entropy) == group]
            means.append(f"{sum(errors) / len(errors):.3f}")
        lines.append(table_row(name, *means))
    return "\n".join(lines)


def write_record(text: str, rows: Mapping[str, Sequence[Point | Head]], path: Path | None = None) -> Path:
    """Write `<cpu>/quality-<date>.md` and `.json`, or into another folder, and return the folder."""
    return sections.write("quality", text, rows, folder() if path is None else path)
