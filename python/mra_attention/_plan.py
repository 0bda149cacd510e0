"""The selection of blocks as a value."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import _core  # pyright: ignore[reportPrivateUsage]
from ._checks.tensors import check_cpu
from ._native.descriptors import describe
from ._native.tracing import untraced
from ._ops import Inputs, Settings
from ._ops.cpu import describe_masks
from ._plan_plot import draw, levels_of
from .config import MRAConfig


@dataclass(frozen=True, eq=False)
class Plan:
    """Which blocks are computed exactly; the result of `mra_attention.plan`, and made by nothing else.

    A plan belongs to one problem: its shapes, its masks and its settings. It holds on to the masks.

    Parameters
    ----------
    data : Tensor
        uint8 of shape `(B, bytes)` on the CPU: the selection of each batch item, in a form that may change. The size
        follows from shapes and settings alone. Two plans of the same problem are the same if `data` is.
    config : MRAConfig
        The settings with which the plan was made.
    query_shape, key_shape : tuple of int
        `(B, H, Lq, D)` and `(B, Hk, Lk, D)`: all batch dimensions are flattened into `B`; inputs without a batch count
        as `B = 1`, and without heads as `H = 1`.
    settings : tuple
        What else the operators were given.
    masks : tuple of Tensor or None
        The masks that the operators were given.
    orders : tuple of Tensor or None
        The `query_order` and `key_order` with which the plan was made.

    Raises
    ------
    ValueError
        By `block_mask`, if batch items differ in what a row is.

    Notes
    -----
    docs/definitions.md, sections 2 to 4, defines the selection. In the block form a row of it is a block of queries, in
    the token form a single query. With a `grid`, a `query_order` or a `key_order` (section 8), rows and columns are
    those of the reordered tokens. The methods read the plan outside of torch, so `torch.compile` splits a graph there.
    """

    data: Tensor
    config: MRAConfig
    query_shape: tuple[int, int, int, int]
    key_shape: tuple[int, int, int, int]
    settings: Settings = field(repr=False)
    masks: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = field(repr=False)
    orders: tuple[Tensor | None, Tensor | None] = field(default=(None, None), repr=False)

    @untraced
    def block_masks(self, level: int = -1) -> list[Tensor]:
        """Return which blocks are exact, for each batch item; or which are refined at a level.

        Parameters
        ----------
        level : int, default -1
            The level, counted from the coarsest one; by default the finest one, whose refined blocks are exact.

        Returns
        -------
        list of Tensor
            bool of shape `(H, rows, nk)`, True where the block is exact, be it chosen or cut by a mask. `rows` is `Lq`
            in the token form, and in the block form the number of query blocks of the item. The first block begins with
            the first valid token, so an item with padding may have fewer blocks than its length has room for.

        Raises
        ------
        IndexError
            If there is no such level.
        """
        refined = _core.refined_blocks(
            self.query_shape,
            self.key_shape,
            describe_masks(self.query_shape, self.key_shape, self.masks),
            describe(self.data.contiguous()),
            settings=self.settings,
            sequences=None,
        )
        return [torch.from_numpy(item) for item in refined[level]]  # pyright: ignore[reportUnknownMemberType]

    @untraced
    def block_mask(self) -> Tensor:
        """Return which blocks are exact, of all batch items together.

        Returns
        -------
        Tensor
            bool of shape `(B, H, rows, nk)`: see `block_masks`. Items with fewer blocks than others have False behind
            them.

        Raises
        ------
        ValueError
            If some items are in the block form and some in the token form, as the contents of a mask may ask; then
            `block_masks` has them one by one.
        """
        items = self.block_masks()
        (_, heads, length, _), block = self.query_shape, self.settings.block_size
        if not items:
            rows, columns = -(-length // block), -(-self.key_shape[2] // block)
            return torch.zeros((0, heads, rows, columns), dtype=torch.bool, device="cpu")
        rows = [item.shape[1] for item in items]
        if min(rows) < max(rows) == length > -(-length // block) + 1:
            raise ValueError(
                "in some batch items a row of the plan is a block of queries, in others a single query; use "
                f"block_masks(), which returns them one by one (rows: {rows})"
            )
        columns = max(item.shape[2] for item in items)
        mask = torch.zeros((len(items), heads, max(rows), columns), dtype=torch.bool, device="cpu")
        for target, item in zip(mask, items, strict=True):
            target[:, : item.shape[1], : item.shape[2]] = item
        return mask

    @untraced
    def plot(self, item: int = 0, head: int = 0, axes: Any = None) -> Any:
        """Draw the selection of a head: the darker, the smaller the blocks; exact ones are black.

        Parameters
        ----------
        item, head : int, default 0
            The batch item, and the head of the query.
        axes : matplotlib.axes.Axes, optional
            Where to draw; by default the axes of a new figure.

        Returns
        -------
        matplotlib.axes.Axes
            With one pixel for each finest block of keys and each row of the plan.

        Raises
        ------
        ImportError
            Without matplotlib.
        IndexError
            If there is no such item or head.
        """
        sizes = self.settings.block_sizes
        masks = [self.block_masks(level)[item][head] for level in range(len(sizes))]
        by_token = masks[-1].shape[0] == self.query_shape[2] > 1
        return draw(
            levels_of(masks, sizes),
            sizes,
            axes,
            title=f"item {item}, head {head}",
            xlabel=f"key block of {sizes[-1]} tokens",
            ylabel="query" if by_token else f"query block of {sizes[-1]} tokens",
        )

    @property
    @untraced
    def num_blocks(self) -> Tensor:
        """Number of exact blocks of each head, over all rows: int64 of shape `(B, H)`."""
        counts = [item.sum((-2, -1)) for item in self.block_masks()]
        return torch.stack(counts) if counts else torch.zeros((0, self.query_shape[1]), dtype=torch.int64, device="cpu")

    @property
    @untraced
    def density(self) -> Tensor:
        """Exact fraction of the blocks of all rows: float32 of shape `(B, H)`; 0 where there are no blocks."""
        items = self.block_masks()
        shares = [item.sum((-2, -1)) / max(item.shape[1] * item.shape[2], 1) for item in items]
        return torch.stack(shares) if shares else torch.zeros((0, self.query_shape[1]), device="cpu")


_FREE = ("mode", "coarse", "coarse_shift")
"""What does not concern the selection."""


def check_plan(plan: Any) -> None:
    """Check the type of a plan."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be None or a mra_attention.Plan, got {type(plan).__name__}")


def planned_orders(plan: Any, query_order: Any, key_order: Any) -> tuple[MRAConfig, Tensor | None, Tensor | None]:
    """Return the config and the orders that a plan was made with, and check that no others are given."""
    check_plan(plan)
    for name, given, planned in zip(("query_order", "key_order"), (query_order, key_order), plan.orders, strict=True):
        if given is not None and given is not planned:
            raise ValueError(
                f"{name} is not the tensor with which plan was made, which already fixes the order; leave it out, or "
                "pass it to mra_attention.plan"
            )
    return plan.config, *plan.orders


def planned_config(plan: Plan, config: MRAConfig, given: Collection[str]) -> MRAConfig:
    """Return the config of a call with a plan.

    What is selected is a matter of the plan. So every setting that is given must be the one of the plan, and those that
    are not given are taken from it. What does not concern the selection is free: `coarse`, `coarse_shift`, and `mode`,
    which is that of the call in any case.
    """
    for name in given:
        value, planned = getattr(config, name), getattr(plan.config, name)
        if name not in _FREE and value != planned:
            raise ValueError(
                f"{name}={value!r} does not fit plan, which was made with {name}={planned!r} and already fixes the "
                "selection; leave it out, or pass it to mra_attention.plan"
            )
    return replace(plan.config, **{name: getattr(config, name) for name in _FREE if name in given or name == "mode"})


def use_plan(plan: Plan, inputs: Inputs, settings: Settings) -> tuple[Inputs, Settings]:
    """Check that a plan was made for these inputs; return them with it, and the settings with those of the plan."""
    made_for = (*plan.query_shape[:3], plan.key_shape[2])
    used_for = (*inputs.query.shape[:3], inputs.key.shape[2])
    if made_for != used_for:
        raise ValueError(
            "plan was made for other inputs: (batch, heads, query length, key length) is "
            f"{made_for} in the plan and {used_for} in query and key"
        )
    for name in ("window_left", "window_right", "lower_right"):
        if getattr(plan.settings, name) != getattr(settings, name):
            raise ValueError(
                "plan was made for another is_causal or window_size: "
                f"(left, right, aligned lower right) is {_visible(plan.settings)} in the plan and "
                f"{_visible(settings)} in the call"
            )
    if (plan.masks[2] is None) != (inputs.attn_bias is None):
        made, used = ("without" if bias is None else "with" for bias in (plan.masks[2], inputs.attn_bias))
        raise ValueError(
            f"plan was made {made} an attn_mask of pairs, but is used {used} one; pass the masks that it was made with"
        )
    settings = plan.settings._replace(
        scale=settings.scale,
        softcap=settings.softcap,
        sparse=settings.sparse,
        first_order=settings.first_order,
        coarse_shift=settings.coarse_shift,
        dropout_p=settings.dropout_p,
    )
    return inputs._replace(plan=_checked_data(plan)), settings


def _checked_data(plan: Plan) -> Tensor:
    data: Any = plan.data
    if not isinstance(data, Tensor) or data.dtype is not torch.uint8:
        found = f"a {data.dtype} tensor" if isinstance(data, Tensor) else type(data).__name__
        raise TypeError(f"plan.data must be a torch.uint8 tensor, got {found}")
    check_cpu("plan.data", data)
    return data


def _visible(settings: Settings) -> tuple[int, int, bool]:
    return settings.window_left, settings.window_right, settings.lower_right
