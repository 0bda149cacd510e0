"""The blocks of a plan, for one batch item at a time: who is coarse at which level (docs/definitions.md, section 5)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from .._checks import calls
from .._checks.arguments import Arguments
from .._ops import Inputs, Settings, forward
from .._plan import Plan
from ._valid_tokens import ValidTokens, valid_tokens
from .attention_call import AttentionCall
from .pairs import pairs_of_rows


class Planned(NamedTuple):
    """A call with its plan, in the order of the plan."""

    prepared: calls.Prepared
    inputs: Inputs
    settings: Settings
    plan: Plan
    sparse_lse: Tensor
    """`(B, H, Lq)`: the log-sum-exp over exact keys alone, without sinks."""
    sparse_out: Tensor
    """`(B, H, Lq, Dv)`: the output of these."""


class Level(NamedTuple):
    """The blocks of one size."""

    size: int
    block_of: Tensor
    """int64 `(Lk,)`: the block of every valid key, -1 for others."""
    keys: Tensor
    """float64 `(nk,)`: valid keys."""
    row_of: Tensor
    """int64 `(Lq,)`: the row of every query."""
    pooled: Tensor
    """bool `(Lq,)`: the query is one of those whose mean stands for the row."""
    coarse: Tensor
    """bool `(H, rows, nk)`: a candidate that is not refined; in the token form perhaps one that is not seen."""


class Item(NamedTuple):
    """One batch item in float64, with zeros where nothing is to be read."""

    number: int

    query: Tensor
    key: Tensor
    value: Tensor
    tokens: ValidTokens
    levels: list[Level]


def planned(call: AttentionCall, plan: Plan) -> Planned:
    """Check a call and its plan, and compute the part that is exact."""
    _check_call(call)
    if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"plan must be a mra_attention.Plan, got {type(plan).__name__}")
    for which, mask in (("plan was made with", plan.masks[1]), ("call has", call.query_padding_mask)):
        if mask is not None:
            raise NotImplementedError(f"{which} a query_padding_mask, which is not implemented here; leave it out")
    if plan.config.coarse == "first_order" and plan.config.mode == "full":
        raise NotImplementedError("coarse='first_order' is not implemented here; make the plan with coarse='mean'")
    given: dict[str, Any] = call.arguments()
    arguments = Arguments(**given, plan=plan, settings={"mode": plan.config.mode})
    query, key, value = (x.detach().double() for x in (call.query, call.key, call.value))
    mask = given["attn_mask"]
    if mask is not None and mask.is_floating_point():
        arguments = arguments._replace(attn_mask=mask.detach().double())
    prepared = calls.prepare((query, key, value), arguments)
    inputs = calls.in_order(prepared)
    _check_key_mask(plan.masks[0], inputs.key_mask)
    out, lse, _ = forward(inputs._replace(sinks=None), prepared.settings._replace(sparse=True))
    return Planned(prepared, inputs, prepared.settings, plan, lse, out)


def _check_call(call: AttentionCall) -> None:
    for name in ("query", "key", "value"):
        tensor = getattr(call, name)
        if tensor.dim() != 4:
            raise ValueError(
                f"call.{name} must have the 4 dimensions (B, H, L, D), got the shape {tuple(tensor.shape)}"
            )
    mask = call.attn_mask
    if isinstance(mask, CausalBias) or not (mask is None or isinstance(mask, Tensor)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotImplementedError(
            f"call.attn_mask={type(mask).__name__} is not implemented here; a causal bias is is_causal=True with "
            "causal_alignment, and any other mask a bool tensor"
        )


def _check_key_mask(made: Tensor | None, used: Tensor | None) -> None:
    if (made is None) != (used is None) or (made is not None and used is not None and not torch.equal(made, used)):
        raise ValueError("plan was made with another attn_mask of keys than call.attn_mask; make it with that one")


def bias_of(found: Planned, item: Item, head: int) -> Tensor | None:
    """Return what is added to the logits of a head, `(Lq, Lk)`, 0 where it hides; None for nothing."""
    _, bias = _pairs_of_head(found, item, head)
    if bias is None:
        return None
    lengths = item.tokens.answers.shape[0], item.tokens.keys.shape[0]
    return torch.where(bias.isfinite(), bias, 0.0)[0].expand(lengths)


def visible_pairs(found: Planned, item: Item, head: int, keys: Tensor | None = None) -> Tensor:
    """Return who sees whom, bool `(Lq, Lk)`, or of some keys only."""
    seen = item.tokens.answers[:, None] & (item.tokens.keys if keys is None else item.tokens.keys[keys])
    visible, _ = _pairs_of_head(found, item, head, keys)
    return seen if visible is None else seen & visible.expand(1, *seen.shape)[0]


def _pairs_of_head(
    found: Planned, item: Item, head: int, keys: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    queries = torch.arange(item.tokens.answers.shape[0])[None]
    heads = slice(head, head + 1)
    return pairs_of_rows(found.inputs, found.settings, item.number, heads, queries, torch.float64, keys)


def item_of(found: Planned, index: int) -> Item:
    """Return a batch item and its blocks of all levels."""
    inputs, settings = found.inputs, found.settings
    lengths = inputs.query.shape[2], inputs.key.shape[2]
    tokens = valid_tokens(inputs, index)
    query, key, value = (
        torch.where(valid[:, None], x[index], 0.0)
        for x, valid in ((inputs.query, tokens.answers), (inputs.key, tokens.keys), (inputs.value, tokens.keys))
    )
    first_key, first_query = (int(x.long().argmax()) if x.any() else 0 for x in (tokens.keys, tokens.queries))
    refined = [found.plan.block_masks(level)[index] for level in range(len(settings.block_sizes))]
    levels: list[Level] = []
    # With as many rows as queries every query has its own, also in the block form: then there are two at most.
    each = refined[-1].shape[1] == lengths[0]
    above: tuple[Tensor, int, int] | None = None
    for size, of_level in zip(settings.block_sizes, refined, strict=True):
        numbers = torch.arange(lengths[0]) if each else _blocks(lengths[0], first_query, size)
        first_row = 0 if each or not tokens.answers.any() else int(numbers[tokens.answers].min())
        candidates = torch.ones_like(of_level)
        if above is not None:
            times = above[2] // size
            rows = (torch.arange(of_level.shape[1]) + first_row).div(1 if each else times, rounding_mode="floor")
            candidates = above[0][:, rows - above[1]][..., torch.arange(of_level.shape[2]) // times]
        levels.append(_level(tokens, first_key, numbers - first_row, size, candidates & ~of_level))
        above = of_level, first_row, size
    return Item(index, query, key, value, tokens, levels)


def _blocks(length: int, first: int, size: int) -> Tensor:
    return (torch.arange(length) - first).div(size, rounding_mode="floor")


def _level(tokens: ValidTokens, first_key: int, row_of: Tensor, size: int, coarse: Tensor) -> Level:
    rows, columns = coarse.shape[1:]
    block_of = torch.where(tokens.keys, _blocks(tokens.keys.shape[0], first_key, size), -1)
    count = torch.bincount(block_of[tokens.keys], minlength=columns)
    row_of = row_of.clamp(0, max(0, rows - 1))
    live = torch.zeros(max(rows, 1), dtype=torch.bool)
    live[row_of[tokens.queries]] = True
    pooled = torch.where(live[row_of], tokens.queries, tokens.answers)
    return Level(size, block_of, count.double(), row_of, pooled, coarse & (count > 0))
