"""The heads that the page shows one by one: those at the ends of some metrics."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..table import Table
from .head_grid import head_grid

_ENDS = (
    ("local_share", 1.0, "most local"),
    ("local_share", -1.0, "most global"),
    ("frequency_selectivity", 1.0, "most selective"),
    ("positional_entropy", -1.0, "most concentrated"),
)


class ChosenHead(NamedTuple):
    """A head by its place, and why it is shown."""

    layer: int
    head: int
    roles: str

    @property
    def key(self) -> str:
        """Letters and digits that no other head has."""
        return f"l{self.layer}h{self.head}"


def choose_heads(table: Table) -> list[ChosenHead]:
    """Return the most local, global, selective and concentrated head; one that is two of these is there once."""
    roles: dict[tuple[int, int], list[str]] = {}
    for metric, sign, role in _ENDS:
        values = sign * head_grid(table, metric).values
        if not np.isnan(values).all():
            layer, head = divmod(int(np.nanargmax(values)), values.shape[1])
            roles.setdefault((layer, head), []).append(role)
    return [ChosenHead(*place, " and ".join(names)) for place, names in roles.items()]
