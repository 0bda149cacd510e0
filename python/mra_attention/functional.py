"""The public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from . import _arguments, _causal, _checks, _nested, _ops
from ._plan import CausalPlan, Plan

__all__ = ["plan", "scaled_dot_product_attention"]


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    resolutions: Sequence[int] = (32, 1),
    blocks_per_row: float = 4.0,
    num_blocks: int | None = None,
    mode: Literal["full", "sparse"] = "full",
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    local_blocks: int = 1,
    query_padding_mask: Tensor | None = None,
    plan: Plan | CausalPlan | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    resolutions: Sequence[int] = (32, 1),
    blocks_per_row: float = 4.0,
    num_blocks: int | None = None,
    mode: Literal["full", "sparse"] = "full",
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    local_blocks: int = 1,
    query_padding_mask: Tensor | None = None,
    plan: Plan | CausalPlan | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    resolutions: Sequence[int] = (32, 1),
    blocks_per_row: float = 4.0,
    num_blocks: int | None = None,
    mode: Literal["full", "sparse"] = "full",
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    local_blocks: int = 1,
    query_padding_mask: Tensor | None = None,
    plan: Plan | CausalPlan | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-resolution attention, with the signature of torch.nn.functional.scaled_dot_product_attention.

    Queries and keys are cut into blocks. The blocks of the attention matrix with the largest average logits are
    computed exactly, as many as the budget allows; every other block enters through the averages of its queries, keys
    and values (`mode="full"`) or not at all (`mode="sparse"`). With every block in the budget the result is softmax
    attention. Neither time nor memory for the exact part grows with the square of the length.

    Parameters
    ----------
    query : Tensor
        `(..., H, Lq, D)`, or `(Lq, D)` for one head; float32, float64, bfloat16 or float16, on the CPU. Or query, key
        and value are nested tensors `(B, H, j, D)` of layout `torch.jagged`, as for torch's own attention; then without
        masks and plan.
    key : Tensor
        `(..., Hk, Lk, D)`, dtype as `query`. `Lk` may differ from `Lq`, and no length need be a multiple of the block
        size. Leading dimensions broadcast as in torch's own attention.
    value : Tensor
        `(..., Hk, Lk, Dv)`, dtype as `query`. `Dv` may differ from `D`.
    attn_mask : Tensor, optional
        bool, True where the key may be attended to, or a bias that is added to the logits: float32 or the dtype of
        `query`, `-inf` where the key may not be attended to. Any shape that broadcasts to `(..., H, Lq, Lk)`; nothing
        that is repeated is copied. A bool mask that is the same for all queries and heads, of shape `(B, 1, 1, Lk)` for
        example, is key padding: those keys do not take part in averages either. A mask of shape `(B, Lk)` is passed as
        `mask[:, None, None, :]`. In self-attention with padding pass `query_padding_mask` as well, or padded positions
        take part in the averages of the query blocks. Any other mask or bias: a block of which some pairs are hidden
        is exact, outside the budget; one of which all are hidden is left out; any other one, where it is not exact, has
        the average of its biases. So a mask never makes a result wrong, only slower. Or a causal bias,
        `torch.nn.attention.bias.causal_upper_left(Lq, Lk)` or `causal_lower_right(Lq, Lk)`.
    dropout_p : float, default 0.0
        The probability with which a weight is dropped, as in torch's own attention: whatever the mode of a module, so
        pass 0.0 in evaluation. The others are divided by `1 - dropout_p`. A block outside the budget is dropped or kept
        as a whole. The seed is drawn from torch's default generator, and only if `dropout_p > 0`.
    is_causal : bool, default False
        Whether query `t` sees the keys up to `t` only, which `causal_upper_left` also says; with `causal_lower_right`
        it sees the keys up to `t + Lk - Lq`. Each token then chooses blocks for itself, and nothing that comes later
        has any influence on it. Excludes `attn_mask`, `num_blocks`, `diagonal_blocks` and `query_padding_mask`.
    scale : float, optional
        Factor of the logits; `1 / sqrt(D)` by default.
    enable_gqa : bool, default False
        Whether groups of `H // Hk` query heads share a head of key and value; `H` must be a multiple of `Hk`.
    resolutions : sequence of int, default (32, 1)
        `(block_size, 1)`, in tokens, with `8 <= block_size <= 128`.
    blocks_per_row : float, default 4.0
        The budget: the number of exact blocks for each query block, on average over the query blocks of a head that
        have a valid token. `floor(blocks_per_row * query_blocks + 0.5)` blocks of a head are exact. In causal attention
        `floor(blocks_per_row + 0.5)` blocks, at least 1, are exact for each token.
    num_blocks : int, optional
        The budget as the number of exact blocks of a head; overrides `blocks_per_row`. Either budget is raised to the
        forced blocks and limited to the blocks that have a valid query and a valid key.
    mode : {"full", "sparse"}, default "full"
        Whether blocks outside the budget enter through their averages or are left out.
    first_blocks : int, default 0
        Blocks of the first `first_blocks` rows and columns of blocks are always exact. In causal attention, the first
        `first_blocks` key blocks.
    diagonal_blocks : int, default 0
        If positive, blocks `(i, j)` with `|i - j| <= diagonal_blocks // 2` are always exact. So is, whatever the
        arguments, the best block of every row.
    local_blocks : int, default 1
        Only in causal attention: the `local_blocks` key blocks up to that of the token itself are always exact.
    query_padding_mask : Tensor, optional
        bool `(B, Lq)` or `(Lq,)`, True where the query is valid. Padded queries get the output 0.
    plan : Plan or CausalPlan, optional
        A selection made by `mra_attention.plan`, used in place of a new one. The arguments of the budget must then be
        left at their defaults. A `CausalPlan` is for causal attention, a `Plan` for all other.
    return_lse : bool, default False
        Whether to return the logarithm of the softmax denominators as well.

    Returns
    -------
    out : Tensor
        `(..., H, Lq, Dv)`, dtype as `query`. If `query` is stored as `(B, L, H, D)`, so is the output: transposing and
        flattening it copies nothing.
    lse : Tensor
        Only with `return_lse=True`: `(..., H, Lq)`, float64 for float64 inputs and float32 for all others. It can be
        differentiated.

    Raises
    ------
    TypeError
        If an argument has the wrong type, or a tensor a dtype or layout that is not accepted.
    ValueError
        If an argument has a value that is not accepted, or shapes do not fit together.
    NotImplementedError
        For what is to come: more than two resolutions, devices other than the CPU; when `attn_mask` requires a
        gradient; with dropout below `torch.vmap`; and when the call is differentiated in forward mode or twice.

    Notes
    -----
    Definition: docs/definitions.md, sections 2 and 5 (MRA-2 and MRA-2-s of "Multi Resolution Analysis (MRA) for
    Approximate Self-Attention", arXiv 2207.10284, algorithms 1 and 2), and section 3 for causal attention.

    A query without a visible key gets the output 0, the lse -inf and the gradient 0. What is stored at padded positions
    never reaches a result, not even a NaN; nor does, with a mask, what a query does not see.

    The result and the gradients are deterministic: the same bits on every run, for any number of threads; with dropout,
    after the same `torch.manual_seed`. As many threads are used as `torch.get_num_threads()` says. Under
    `torch.autocast("cpu")` inputs are cast as for torch's own attention. The selection of blocks is constant
    for differentiation.

    Examples
    --------
    >>> import torch
    >>> from mra_attention import scaled_dot_product_attention
    >>> query, key, value = torch.randn(3, 1, 4, 1000, 64).unbind()
    >>> scaled_dot_product_attention(query, key, value).shape
    torch.Size([1, 4, 1000, 64])
    """
    if _checks.any_nested(query, key, value):
        _nested.check_arguments(attn_mask, query_padding_mask, plan)
        return _nested.attention(
            query,
            key,
            value,
            return_lse,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            resolutions=resolutions,
            blocks_per_row=blocks_per_row,
            num_blocks=num_blocks,
            mode=mode,
            first_blocks=first_blocks,
            diagonal_blocks=diagonal_blocks,
            local_blocks=local_blocks,
        )
    sparse = _checks.is_sparse(mode)
    dropout_p = _checks.dropout(dropout_p)
    _checks.check_bool("return_lse", return_lse)
    block_size, selection = _arguments.selection(resolutions, blocks_per_row, num_blocks, first_blocks, diagonal_blocks)
    local_blocks = _checks.integer("local_blocks", local_blocks, 1)
    causal = _causal.is_requested(is_causal, attn_mask)
    if plan is not None:
        _checks.check_plan_alone(blocks_per_row, num_blocks, first_blocks, diagonal_blocks, local_blocks)
    if causal:
        _causal.check_alone(num_blocks, diagonal_blocks, query_padding_mask)
    else:
        _checks.check_not_causal(local_blocks)
    inputs, lead, masks = _arguments.arrange(
        (query, key, value), None if causal else attn_mask, enable_gqa, query_padding_mask
    )
    query, key, value = inputs
    scale = _checks.scale_or_default(scale, query.shape[3])
    # A tensor, and drawn only where it is used: a compiler must not take it for a constant, and a call without dropout
    # must leave torch's generator alone.
    seed = None if dropout_p == 0.0 else torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    if causal:
        numbers = (scale, block_size, sparse, dropout_p, selection[0], local_blocks, selection[2])
        out, lse = _causal.attention(inputs, attn_mask, plan, seed, *numbers)
    else:
        bits = None if plan is None else _checks.plan_bits(plan, query, key, block_size)
        numbers = (scale, block_size, sparse, dropout_p, *selection)
        if not return_lse:
            out = _ops.forward_out(query, key, value, *masks, bits, seed, *numbers)
            return out if lead is None else out.reshape(*lead, *out.shape[2:])
        out, lse, _ = _ops.forward(query, key, value, *masks, bits, seed, *numbers)
    if lead is not None:
        out = out.reshape(*lead, *out.shape[2:])
    if not return_lse:
        return out
    return out, lse if lead is None else lse.reshape(*lead, lse.shape[2])


@overload
def plan(  # pyright: ignore[reportOverlappingOverload] : a CausalBias is a Tensor
    query: Tensor,
    key: Tensor,
    attn_mask: CausalBias,
    is_causal: Literal[False] = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    resolutions: Sequence[int] = (32, 1),
    blocks_per_row: float = 4.0,
    num_blocks: int | None = None,
    mode: Literal["full", "sparse"] = "full",
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    local_blocks: int = 1,
    query_padding_mask: Tensor | None = None,
) -> CausalPlan: ...


@overload
def plan(
    query: Tensor,
    key: Tensor,
    attn_mask: None = None,
    *,
    is_causal: Literal[True],
    scale: float | None = None,
    enable_gqa: bool = False,
    resolutions: Sequence[int] = (32, 1),
    blocks_per_row: float = 4.0,
    num_blocks: int | None = None,
    mode: Literal["full", "sparse"] = "full",
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    local_blocks: int = 1,
    query_padding_mask: Tensor | None = None,
) -> CausalPlan: ...


@overload
def plan(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: Literal[False] = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    resolutions: Sequence[int] = (32, 1),
    blocks_per_row: float = 4.0,
    num_blocks: int | None = None,
    mode: Literal["full", "sparse"] = "full",
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    local_blocks: int = 1,
    query_padding_mask: Tensor | None = None,
) -> Plan: ...


def plan(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    resolutions: Sequence[int] = (32, 1),
    blocks_per_row: float = 4.0,
    num_blocks: int | None = None,
    mode: Literal["full", "sparse"] = "full",
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    local_blocks: int = 1,
    query_padding_mask: Tensor | None = None,
) -> Plan | CausalPlan:
    """Select the blocks that `scaled_dot_product_attention` computes exactly, without computing attention.

    With the same arguments, `scaled_dot_product_attention` makes the same selection; given as its argument `plan`, the
    selection stays fixed while the inputs change.

    Parameters
    ----------
    query : Tensor
        `(..., H, Lq, D)`; see `scaled_dot_product_attention`, as for all other arguments.
    key : Tensor
        `(..., Hk, Lk, D)`, dtype as `query`.
    attn_mask : Tensor, optional
        bool, an additive bias, or a causal bias. Blocks that a mask cuts are in the plan beside those of the budget.
    is_causal : bool, default False
        Whether the plan is one of causal attention.
    scale : float, optional
        Factor of the logits; `1 / sqrt(D)` by default.
    enable_gqa : bool, default False
        Whether groups of `H // Hk` query heads share a head of the key.
    resolutions : sequence of int, default (32, 1)
        `(block_size, 1)`, in tokens, with `8 <= block_size <= 128`.
    blocks_per_row : float, default 4.0
        The budget: blocks for each query block, on average.
    num_blocks : int, optional
        The budget: blocks of a head; overrides `blocks_per_row`.
    mode : {"full", "sparse"}, default "full"
        Accepted so that both functions take the same arguments; the selection is the same in both modes.
    first_blocks, diagonal_blocks : int, default 0
        Blocks that are always selected.
    local_blocks : int, default 1
        Blocks that are always selected in causal attention.
    query_padding_mask : Tensor, optional
        bool `(B, Lq)` or `(Lq,)`, True where the query is valid.

    Returns
    -------
    Plan or CausalPlan
        For each of the `B * H` heads of the inputs, batch dimensions flattened; of causal attention, for each token.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `scaled_dot_product_attention`.

    Notes
    -----
    Definition: docs/definitions.md, section 2 (arXiv 2207.10284, algorithm 1), and section 3 for causal attention.
    Deterministic: the same selection on every run, for any number of threads; of equal scores the lower block index is
    taken. Nothing is differentiated.

    Examples
    --------
    >>> import torch
    >>> import mra_attention
    >>> query, key = torch.randn(2, 1, 4, 1000, 64).unbind()
    >>> selection = mra_attention.plan(query, key, blocks_per_row=2)
    >>> selection.num_blocks
    tensor([[64, 64, 64, 64]])
    """
    _checks.is_sparse(mode)
    block_size, selection = _arguments.selection(resolutions, blocks_per_row, num_blocks, first_blocks, diagonal_blocks)
    local_blocks = _checks.integer("local_blocks", local_blocks, 1)
    causal = _causal.is_requested(is_causal, attn_mask)
    if causal:
        _causal.check_alone(num_blocks, diagonal_blocks, query_padding_mask)
    else:
        _checks.check_not_causal(local_blocks)
    inputs, _, masks = _arguments.arrange((query, key), None if causal else attn_mask, enable_gqa, query_padding_mask)
    query, key = inputs
    scale = _checks.scale_or_default(scale, query.shape[3])
    if causal:
        return _causal.select(inputs, attn_mask, scale, block_size, selection[0], local_blocks, selection[2])
    bits = _ops.select_blocks(query, key, *masks, scale, block_size, *selection)
    return Plan(bits, query.shape[2], key.shape[2], block_size)
