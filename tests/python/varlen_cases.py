"""Lengths of packed sequences and forms of attention that the tests of packed and of nested sequences share."""

from __future__ import annotations

import math
from typing import Any

import pytest

LENGTHS = [7, 0, 33, 8, 1, 64]
KEY_LENGTHS = [7, 5, 20, 41, 0, 64]
FORMS: dict[str, dict[str, Any]] = {
    "two-level": {"blocks_per_row": 1.5},
    "num-blocks": {"num_blocks": 3, "diagonal_blocks": 1, "first_blocks": 1},
    "sparse": {"blocks_per_row": 2, "mode": "sparse"},
    "causal": {"is_causal": True, "blocks_per_row": 2},
    "causal-sparse": {"is_causal": True, "blocks_per_row": 3, "mode": "sparse", "local_blocks": 2, "first_blocks": 1},
    "causal-everything": {"is_causal": True, "blocks_per_row": math.inf},
    "window": {"window_size": (9, 4), "blocks_per_row": math.inf},
}
by_form = pytest.mark.parametrize("form", FORMS)
