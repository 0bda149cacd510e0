"""What one head attends to, and which blocks the plan selected for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from mra_attention import Plan
from torch import Tensor, nn
from torch.nn.functional import pad

from .model import HEAD_DIM, Attention, Encoder
from .text import MaskedBatch


@dataclass(frozen=True)
class HeadView:
    """One head's attention to one window.

    `attention` is the exact softmax map (length, length), `selected` the plan's blocks, bool (rows, columns), of
    `block_size` tokens. `captured` lists, for each head of each layer, the share of the exact attention that
    falls into its selected blocks.
    """

    layer: int
    head: int
    attention: Tensor
    selected: Tensor
    block_size: int
    captured: list[list[float]]


@torch.no_grad()
def view_head(model: Encoder, batch: MaskedBatch, make_plan: Callable[[Tensor, Tensor], Plan]) -> HeadView:
    """View the head whose selected blocks away from the diagonal hold most of its attention.

    The blocks at the diagonal are the easy part of a selection; this head shows the rest at work.
    """
    views: list[tuple[float, int, int, Tensor, Tensor]] = []
    captured: list[list[float]] = []
    block_size = 0
    for layer, (query, key) in enumerate(attention_inputs(model, batch)):
        plan = make_plan(query, key)
        selected, block_size = plan.block_mask()[0], plan.config.block_size
        attention = (query @ key.transpose(-2, -1) * HEAD_DIM**-0.5).softmax(dim=-1)[0]
        mass = block_sums(attention, block_size) / attention.shape[-2] * selected
        captured.append(mass.sum(dim=(-2, -1)).tolist())
        far = (mass - near_diagonal(mass)).sum(dim=(-2, -1))
        head = int(far.argmax())
        views.append((float(far[head]), layer, head, attention[head].clone(), selected[head]))
    _, layer, head, attention, selected = max(views, key=lambda view: view[0])
    return HeadView(layer, head, attention, selected, block_size, captured)


def attention_inputs(model: Encoder, batch: MaskedBatch) -> list[tuple[Tensor, Tensor]]:
    """Return the query and key of every layer, each (1, heads, length, head dim)."""
    inputs: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        inputs.append(arguments[:2])

    hooks = [m.register_forward_pre_hook(keep) for m in model.modules() if isinstance(m, Attention)]
    model(batch.inputs, batch.masked)
    for hook in hooks:
        hook.remove()
    return inputs


def block_sums(attention: Tensor, block_size: int) -> Tensor:
    """Sum (..., length, length) over blocks; the last block may be short."""
    missing = -attention.shape[-1] % block_size
    padded = pad(attention, (0, missing, 0, missing))
    count = padded.shape[-1] // block_size
    return padded.unflatten(-1, (count, block_size)).unflatten(-3, (count, block_size)).sum(dim=(-3, -1))


def near_diagonal(blocks: Tensor) -> Tensor:
    """Keep the diagonal and its two neighbours of (..., rows, columns); the rest becomes 0."""
    return blocks.tril(1).triu(-1)
