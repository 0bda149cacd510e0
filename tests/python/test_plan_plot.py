"""A plan as a picture."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from mra_attention import plan

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.mark.parametrize("more", [{}, {"is_causal": True}], ids=["block form", "token form"])
def test_every_pixel_says_which_level_its_block_is_left_to(more: dict[str, Any]) -> None:
    query, key = torch.randn(2, 2, 200, 8), torch.randn(2, 2, 170, 8)
    chosen = plan(query, key, resolutions=(64, 16, 4, 1), blocks_per_row=(1, 2, 4), **more)
    axes = chosen.plot(item=1, head=1)
    pixels = torch.as_tensor(axes.images[0].get_array().filled())
    masks = [chosen.block_masks(level)[1][1] for level in range(3)]
    assert pixels.shape == masks[2].shape
    for row in range(pixels.shape[0]):
        for column in range(pixels.shape[1]):
            refined = [
                bool(mask[row if more else row // n, column // n]) for mask, n in zip(masks, (16, 4, 1), strict=True)
            ]
            assert pixels[row, column] == sum(refined)
    labels = [label.get_text() for label in axes.figure.axes[1].get_yticklabels()]
    assert labels == ["coarse, 64", "coarse, 16", "coarse, 4", "exact"]
    assert axes.get_xlabel() == "key block of 4 tokens"
    assert axes.get_ylabel() == ("query" if more else "query block of 4 tokens")
    matplotlib.pyplot.close("all")


def test_axes_may_be_given_and_what_is_not_there_raises() -> None:
    chosen = plan(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8))
    _, axes = matplotlib.pyplot.subplots()
    assert chosen.plot(axes=axes) is axes
    with pytest.raises(IndexError):
        chosen.plot(head=2)
    with pytest.raises(IndexError):
        chosen.plot(item=1)
    matplotlib.pyplot.close("all")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plan(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)).plot()
