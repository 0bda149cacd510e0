"""The page in short."""

from __future__ import annotations

import numpy as np

from ..document import Grid, Section
from ..findings import Findings
from ..head_grid import head_grid, mean
from ..plots import number, share
from .words import null_name

_METRICS = (
    ("local_share", "Local share: attention to keys less than 32 tokens away", share),
    ("positional_entropy", "Positional entropy, nats", number),
    ("spectral_entropy", "Spectral entropy, nats", number),
    ("entropy_correlation", "Correlation of the two entropies", number),
    ("low_share", "Power in low frequencies", share),
    ("high_share", "Power in high frequencies", share),
)


def summary(found: Findings) -> Section:
    """Return the section."""
    table = found.table
    nulls = table.nulls()
    rows: list[list[str]] = []
    for metric, label, write in _METRICS:
        grid = head_grid(table, metric)
        known = grid.values[np.isfinite(grid.values)]
        ends = f"{write(float(known.min()))} to {write(float(known.max()))}" if known.size else "not defined"
        nearest = grid.nearest_null()
        rows.append(
            [
                label,
                write(grid.mean()),
                ends,
                *(write(mean(grid.nulls[name])) for name in nulls),
                "none" if nearest is None else null_name(nearest.name),
            ]
        )
    header = (
        "Mean over heads",
        "Model",
        "Least and most",
        *(f"Null: {null_name(name)}" for name in nulls),
        "Nearest null",
    )
    return Section(
        "summary",
        "In short",
        _paragraphs(found),
        (
            Grid(
                "The model beside null models",
                header,
                rows,
                "The nearest null model is the one whose numbers, head by head, are least away from those of the "
                "model.",
            ),
        ),
    )


def _paragraphs(found: Findings) -> list[str]:
    grid = head_grid(found.table, "local_share")
    layers, heads = len(found.subject.layers), int((~np.isnan(grid.values)).sum())
    keys = max(call.key.shape[-2] for call in found.subject.calls)
    local = int((grid.values > 0.5).sum())
    paragraphs = [
        f"This page looks at {heads} heads in {layers} layers, on a text of {keys} tokens. {local} of them pay more "
        "than half of their attention to keys less than 32 tokens away."
    ]
    if found.budgets is not None:
        chosen = found.budgets.calibration
        paragraphs.append(
            f"For a mean error of {share(found.budgets.target)} of their outputs, heads need "
            f"{share(chosen.cost / chosen.exact_cost)} of the floating-point operations of exact attention if each "
            f"has the budget that suits it, and {share(found.budgets.cheapest_alike(found.budgets.target)[1].cost)} "
            "if all have the same."
        )
    amounts: dict[str, list[str]] = {}
    for metric, label, _ in _METRICS:
        nearest = head_grid(found.table, metric).nearest_null()
        if nearest is not None:
            amounts.setdefault(nearest.explains, []).append(label.split(":")[0].split(",")[0].lower())
    said = [
        f"{amount} of: {', '.join(amounts[amount])}" for amount in ("most", "a part", "little") if amount in amounts
    ]
    if said:
        paragraphs.append(f"The nearest null model explains {'; '.join(said)}.")
    return paragraphs
