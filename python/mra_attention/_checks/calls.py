"""The arguments of a call, checked and brought to the form that the operators take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from .. import _order
from .._ops import Inputs, Settings
from .._plan import check_plan, planned_config, use_plan
from ..config import SETTINGS, MRAConfig, configure, remembered
from . import block_mask, causal_bias, head_terms, masks, numbers, shapes, tensors
from .arguments import Arguments
from .autocast import autocast


class Prepared(NamedTuple):
    """A call that has passed all checks."""

    inputs: Inputs
    settings: Settings
    lead: shapes.Shape | None
    """The shape of everything before (length, channels), where it is not simply that of the 4-D inputs."""
    orders: _order.Orders | None = None
    """The order that queries and keys are to be brought to first, where it is not the given one."""


def prepare(inputs: tuple[Any, ...], arguments: Arguments, plain: bool = False) -> Prepared:
    """Check the arguments of a call with dense query, key and, unless it only selects, value.

    `plain` says whether `is_plain` is known to hold for the inputs. What follows from settings alone is then remembered
    from one call to the next; a tracer is to see all of it.
    """
    attn_mask, query_padding_mask = arguments.attn_mask, arguments.query_padding_mask
    config = _config(arguments, remembered if plain else configure)
    dropout_p = numbers.dropout(arguments.dropout_p)
    causal = causal_bias.is_requested(arguments.is_causal, attn_mask)
    window = visible_window(arguments.window_size, causal)
    numbers.check_bool("enable_gqa", arguments.enable_gqa)
    order = _order.requested(arguments, config)
    if order is not None:
        _order.check_beside(order, arguments, window)
    if torch.is_autocast_enabled("cpu"):
        inputs = autocast(inputs)
        if not isinstance(attn_mask, CausalBias):
            (attn_mask,) = autocast((attn_mask,))
    tensors.check_inputs(inputs, plain)
    arranged, lead = shapes.arrange(inputs, arguments.enable_gqa)
    call = Inputs(arranged[0], arranged[1], arranged[-1])
    if attn_mask is not None or query_padding_mask is not None:
        call = _with_masks(call, lead, attn_mask, query_padding_mask)
    # A small call takes as long in Python as in the native module, so what is not given is not looked at.
    lower_right = False
    if attn_mask is not None or arguments.causal_alignment != "upper_left":
        lower_right = _is_lower_right(arguments, window, call, config)
    if arguments.alibi_slopes is not None or arguments.sinks is not None:
        call = with_head_terms(call, arguments)
    if call.attn_bias is not None and call.attn_bias.requires_grad:
        _refuse_gradient_to_first_order(config, window)
    _, heads, query_length, head_dim = call.query.shape
    scale = numbers.scale_or_default(arguments.scale, head_dim)
    config = config.for_length(max(query_length, call.key.shape[2]))
    # Without softcap, which is yet to be checked, each of these has one type: 1, 1.0 and True would be one key.
    make = _remembered_settings if plain and arguments.softcap is None else settings
    ready = make(config, heads, scale, arguments.softcap, window, lower_right, dropout_p)
    if arguments.plan is not None:
        call, ready = use_plan(arguments.plan, call, ready)
    orders = None if order is None else _order.check(order, arguments, call, lead)
    return Prepared(call, ready, lead, orders)


def _config(arguments: Arguments, of_call: Callable[[Any, Mapping[str, Any]], MRAConfig]) -> MRAConfig:
    """Return the config of a call; with a plan, that of the plan where it is not given."""
    plan = arguments.plan
    if plan is None:
        return of_call(arguments.config, arguments.settings)
    check_plan(plan)
    if arguments.config is not None:
        return planned_config(plan, configure(arguments.config, arguments.settings), SETTINGS)
    # Budgets are read by the resolutions that they are for.
    given = {"resolutions": plan.config.resolutions} | dict(arguments.settings)
    return planned_config(plan, configure(None, given), arguments.settings)


def in_order(prepared: Prepared) -> Inputs:
    """Return the tensors of a call in the order in which they are cut into blocks."""
    return prepared.inputs if prepared.orders is None else _order.apply(prepared.inputs, prepared.orders)


def may_expand(config: MRAConfig, window: tuple[int, int]) -> bool:
    """Return whether coarse blocks are expanded to first order, unless a mask makes it the token form."""
    block_form = window == (-1, -1) and config.pool_queries
    return config.coarse == "first_order" and config.mode == "full" and block_form


def _refuse_gradient_to_first_order(config: MRAConfig, window: tuple[int, int]) -> None:
    if may_expand(config, window):
        raise NotImplementedError(
            "coarse='first_order' is not implemented together with an attn_mask that requires a gradient; use "
            "coarse='mean', or attn_mask.detach()"
        )


def _is_lower_right(arguments: Arguments, window: tuple[int, int], call: Inputs, config: MRAConfig) -> bool:
    attn_mask = arguments.attn_mask
    needed = (
        window != (-1, -1)
        or attn_mask is not None
        or arguments.alibi_slopes is not None
        or not config.pool_queries  # then positions say which blocks are local
    )
    by_name = is_lower_right(arguments.causal_alignment, needed)
    if not isinstance(attn_mask, CausalBias):
        return by_name
    by_bias = causal_bias.is_lower_right(attn_mask, call.query.shape[2], call.key.shape[2])
    if by_name and not by_bias:
        raise ValueError("causal_alignment='lower_right' contradicts attn_mask, a causal bias of another alignment")
    return by_bias


def is_lower_right(alignment: Any, needed: bool) -> bool:
    """Check `causal_alignment`, which says nothing unless positions are `needed`."""
    if alignment not in ("upper_left", "lower_right"):
        error = ValueError if isinstance(alignment, str) else TypeError
        raise error(f"causal_alignment must be 'upper_left' or 'lower_right', got {alignment!r}")
    if alignment == "lower_right" and not needed:
        raise ValueError(
            "causal_alignment='lower_right' is for is_causal=True, a window_size, a mask, alibi_slopes or "
            "pool_queries=False; leave it at 'upper_left'"
        )
    return alignment == "lower_right"


def finish(result: Tensor, prepared: Prepared) -> Tensor:
    """Bring a result of the operators, (B, H, Lq, ...), to the order and the leading dimensions of the inputs."""
    if prepared.orders is not None:
        result = _order.restore(result, prepared.orders)
    return result if prepared.lead is None else result.reshape(*prepared.lead, *result.shape[2:])


def visible_window(window_size: Any, causal: bool) -> tuple[int, int]:
    """Check `window_size`; return the limits of what a token sees on its left and on its right, -1 for none."""
    left, right = numbers.window(window_size)
    return left, 0 if causal else right


def settings(
    config: MRAConfig,
    heads: int,
    scale: float,
    softcap: Any,
    window: tuple[int, int],
    lower_right: bool,
    dropout_p: float,
) -> Settings:
    """Return the settings of the operators."""
    expands = may_expand(config, window)
    if expands and softcap is not None:
        raise NotImplementedError("coarse='first_order' is not implemented together with a softcap; use coarse='mean'")
    if expands and len(config.block_sizes) > 1:
        raise NotImplementedError(
            f"coarse='first_order' is not implemented for more than two resolutions, got {config.resolutions}; use "
            "coarse='mean', or two resolutions"
        )
    return Settings(
        scale=scale,
        block_sizes=[*config.block_sizes],
        sparse=config.mode == "sparse",
        first_order=expands,
        coarse_shift=config.coarse_shift,
        max_score=config.score == "max",
        pool_queries=config.pool_queries,
        window_left=window[0],
        window_right=window[1],
        lower_right=lower_right,
        softcap=None if softcap is None else numbers.softcap(softcap),
        blocks_per_row=_rates(config, heads),
        num_blocks=config.num_blocks,
        first_blocks=config.first_blocks,
        diagonal_blocks=config.diagonal_blocks,
        local_blocks=config.local_blocks,
        dropout_p=dropout_p,
    )


_remembered_settings = functools.lru_cache(maxsize=256)(settings)


def _rates(config: MRAConfig, heads: int) -> list[float]:
    """Return the budgets of all levels, one after the other; those of each are one, or as many as there are heads."""
    budgets = config.budgets()
    for rates in budgets:
        if len(rates) not in (1, heads):
            raise ValueError(
                f"blocks_per_row must be one number, or one for each of the {heads} heads of query, got {len(rates)}"
            )
    if len(budgets) == 1:
        return budgets[0]
    per_head = max(len(rates) for rates in budgets)
    return [rate for rates in budgets for rate in (rates if len(rates) == per_head else rates * per_head)]


def _with_masks(inputs: Inputs, lead: shapes.Shape | None, attn_mask: Any, query_padding_mask: Any) -> Inputs:
    batch, heads, query_length, _ = inputs.query.shape
    key_length = inputs.key.shape[2]
    full = (batch, heads) if lead is None else lead
    key_mask = bias = tiles = query_mask = None
    if block_mask.is_block_mask(attn_mask):
        bias, tiles = block_mask.grid_and_tiles(attn_mask, batch, heads, query_length, key_length)
    elif attn_mask is not None and not isinstance(attn_mask, CausalBias):
        key_mask, bias = masks.key_mask_or_bias(attn_mask, inputs.query.dtype, full, query_length, key_length)
    if query_padding_mask is not None:
        query_mask = masks.query_mask(query_padding_mask, full, query_length)
    return inputs._replace(key_mask=key_mask, query_mask=query_mask, attn_bias=bias, mask_tiles=tiles)


def with_head_terms(inputs: Inputs, arguments: Arguments) -> Inputs:
    """Check the numbers that each head has, and add them."""
    batch, heads = inputs.query.shape[:2]
    slopes = head_terms.check("alibi_slopes", arguments.alibi_slopes, batch, heads)
    head_terms.refuse_gradient_of_slopes(arguments.alibi_slopes)
    return inputs._replace(alibi_slopes=slopes, sinks=head_terms.check("sinks", arguments.sinks, batch, heads))


def draw_seed() -> Tensor:
    """Draw a seed of dropout from torch's default generator; a call without dropout must leave that alone.

    A tensor, so that a compiler does not take it for a constant.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device="cpu")
