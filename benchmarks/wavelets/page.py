"""The tables of docs/wavelets.md, which are those of the last record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "wavelets.md"

TABLE = re.compile(r"<!-- (.+) -->\n+(?:\|.*\n)*\n*")
"""A comment with the heading that the table has in the record, the table if there is one yet, and empty lines."""


def with_tables(text: str, sections: Mapping[str, str]) -> str:
    """Return the page with its tables replaced; those of sections that were not measured stay.

    Raises
    ------
    ValueError
        If none of the tables was measured.
    """
    found = set(TABLE.findall(text))
    if not found & sections.keys():
        raise ValueError(f"the page has the tables {sorted(found)}, and none of them was measured")

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{sections[match[1]]}\n\n" if match[1] in sections else match[0]

    return TABLE.sub(table, text).rstrip("\n") + "\n"
