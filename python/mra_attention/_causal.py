"""Causal attention on checked inputs: which arguments ask for it, and which ones it takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from . import _causal_ops, _checks
from ._outputs import budget_of_a_token
from ._plan import CausalPlan


def is_requested(is_causal: Any, attn_mask: Any) -> bool:
    """Return whether a call is causal, and check the two arguments that say so."""
    if is_causal is False:
        return isinstance(attn_mask, CausalBias)
    _checks.check_bool("is_causal", is_causal)
    if isinstance(attn_mask, CausalBias):
        raise ValueError(
            "is_causal=True cannot be used together with an attn_mask that is a CausalBias; pass one of them"
        )
    if attn_mask is not None:
        raise ValueError(
            "is_causal=True cannot be used together with attn_mask. Padding on the right needs no mask, since no valid "
            "query sees it; for sequences of other lengths use mra_attention.varlen_attention or nested tensors"
        )
    return True


def check_alone(num_blocks: Any, diagonal_blocks: Any, query_padding_mask: Any) -> None:
    """Check that no argument comes along that only attention without a causal mask has."""
    for name, value, default, instead in (
        ("num_blocks", num_blocks, None, "every token has a budget of its own: use blocks_per_row"),
        ("diagonal_blocks", diagonal_blocks, 0, "use local_blocks, the number of blocks up to the token's own"),
        (
            "query_padding_mask",
            query_padding_mask,
            None,
            "queries are not averaged, so padded ones disturb no other; leave it out and ignore their outputs, or use "
            "mra_attention.varlen_attention",
        ),
    ):
        if value is not default and (isinstance(value, Tensor) or value != default):
            shown = "a mask" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name}={shown} cannot be used in causal attention; {instead}")


def offset(attn_mask: Any, query_length: int, key_length: int) -> int:
    """Return the position of the first query among the keys."""
    if attn_mask is None:
        return 0
    made_for = (getattr(attn_mask, "seq_len_q", None), getattr(attn_mask, "seq_len_kv", None))
    if made_for[0] is None:  # indexing and copying give a CausalBias that does not say what it is
        raise TypeError(
            "attn_mask is a CausalBias that has lost its lengths, as the result of an operation on one; pass what "
            "causal_upper_left or causal_lower_right returned"
        )
    if made_for != (query_length, key_length):
        raise ValueError(
            f"attn_mask is a CausalBias for (query length, key length) = {made_for}, but query and key have "
            f"{(query_length, key_length)}"
        )
    return 0 if attn_mask.variant == CausalVariant.UPPER_LEFT else key_length - query_length


def check_plan(plan: Any, query: Tensor, key: Tensor, size: int, position: int) -> None:
    """Check that a plan was made for these 4-D inputs, this block size and this position of the queries."""
    if not isinstance(plan, CausalPlan):
        raise TypeError(
            f"plan must be None or a mra_attention.CausalPlan in causal attention, got {type(plan).__name__}"
        )
    _checks.check_cpu("plan.blocks", plan.blocks)
    if plan.block_size != size:
        raise ValueError(
            f"plan was made with block_size={plan.block_size}, but the block size in resolutions is {size}; "
            f"pass resolutions=({plan.block_size}, 1) or make the plan anew"
        )
    made_for = (*plan.blocks.shape[:3], plan.key_length, plan.offset)
    used_for = (*query.shape[:3], key.shape[2], position)
    if made_for != used_for:
        raise ValueError(
            "plan was made for other inputs: (batch, heads, query length, key length, position of the first query) is "
            f"{made_for} in the plan and {used_for} in query and key"
        )


def attention(
    inputs: tuple[Tensor, ...],
    attn_mask: Any,
    plan: Any,
    seed: Tensor | None,
    scale: float,
    block_size: int,
    sparse: bool,
    dropout_p: float,
    blocks_per_row: float,
    local_blocks: int,
    first_blocks: int,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of 4-D inputs."""
    query, key, value = inputs
    position = offset(attn_mask, query.shape[2], key.shape[2])
    given, blocks = None, budget_of_a_token(blocks_per_row)
    if plan is not None:
        check_plan(plan, query, key, block_size, position)
        given, blocks = plan.blocks, plan.blocks.shape[3]
    numbers = (scale, block_size, sparse, blocks, local_blocks, first_blocks, dropout_p)
    out, lse, _ = _causal_ops.causal_forward(query, key, value, given, seed, [position], None, *numbers)
    return out, lse


def select(
    inputs: tuple[Tensor, ...],
    attn_mask: Any,
    scale: float,
    block_size: int,
    blocks_per_row: float,
    local_blocks: int,
    first_blocks: int,
) -> CausalPlan:
    """Return the plan of 4-D inputs: that of attention over values without channels."""
    query, key = (tensor.detach() for tensor in inputs)
    position = offset(attn_mask, query.shape[2], key.shape[2])
    numbers = (scale, block_size, True, budget_of_a_token(blocks_per_row), local_blocks, first_blocks, 0.0)
    _, _, plan = _causal_ops.causal_forward(query, key, key[..., :0], None, None, [position], None, *numbers)
    return CausalPlan(plan, key.shape[2], block_size, position)
