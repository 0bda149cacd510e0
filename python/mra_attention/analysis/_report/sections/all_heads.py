"""The numbers of all heads."""

from __future__ import annotations

from ..document import Grid, Section
from ..findings import Findings
from ..head_grid import head_grid
from ..plots import number, share

_COLUMNS = (
    ("local_share", "Local share", share),
    ("positional_entropy", "Positional entropy", number),
    ("spectral_entropy", "Spectral entropy", number),
    ("entropy_correlation", "Correlation", number),
    ("low_share", "Low", share),
    ("mid_share", "Mid", share),
    ("high_share", "High", share),
    ("frequency_selectivity", "Frequency selectivity", number),
)


def all_heads(found: Findings) -> Section:
    """Return the section."""
    grids = [(head_grid(found.table, metric), write) for metric, _, write in _COLUMNS]
    layers, heads = grids[0][0].values.shape
    rows = [
        (str(layer), str(found.subject.heads[head]), *(write(float(grid.values[layer, head])) for grid, write in grids))
        for layer in range(layers)
        for head in range(heads)
        if head < found.subject.first_call(found.subject.layers[layer]).query.shape[1]
    ]
    return Section(
        "heads",
        "All heads",
        (
            "The numbers behind the maps, means over the rows that were looked at. The frequency selectivity is the "
            "largest power of a frequency over the sum of all others. Formulas and conventions are in "
            "docs/analysis.md.",
        ),
        (Grid("Numbers of all heads", ("Layer", "Head", *(title for _, title, _ in _COLUMNS)), rows, folded=True),),
    )
