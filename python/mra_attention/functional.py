"""The public functions."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from . import _nested, _observers
from ._checks import calls, numbers, tensors
from ._checks.arguments import Arguments
from ._ops import forward, forward_out, is_plain, select
from ._ops.refusals import refuse_forward_ad
from ._plan import Plan
from .config import MRAConfig, MRASettings, Unpack, configure, with_settings

__all__ = ["can_run", "plan", "scaled_dot_product_attention"]


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | BlockMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    causal_alignment: Literal["upper_left", "lower_right"] = "upper_left",
    query_padding_mask: Tensor | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    plan: Plan | None = None,
    return_lse: Literal[False] = False,
    config: MRAConfig | None = None,
    **settings: Unpack[MRASettings],
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | BlockMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    causal_alignment: Literal["upper_left", "lower_right"] = "upper_left",
    query_padding_mask: Tensor | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    plan: Plan | None = None,
    return_lse: Literal[True],
    config: MRAConfig | None = None,
    **settings: Unpack[MRASettings],
) -> tuple[Tensor, Tensor]: ...


@with_settings
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | BlockMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    causal_alignment: Literal["upper_left", "lower_right"] = "upper_left",
    query_padding_mask: Tensor | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
    config: MRAConfig | None = None,
    **settings: Unpack[MRASettings],
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-resolution attention, with the signature of torch.nn.functional.scaled_dot_product_attention.

    Queries and keys are cut into blocks. The blocks of the attention matrix with the largest average logits are
    computed exactly, as many as the budget allows; every other block enters through the averages of its keys and values
    (`mode="full"`) or not at all (`mode="sparse"`). With every block in the budget the result is softmax attention.
    Neither time nor memory for the exact part grows with the square of the length.

    Parameters
    ----------
    query : Tensor
        `(..., H, Lq, D)`, or `(Lq, D)` for one head; float32, float64, bfloat16 or float16, on the CPU. Or query, key
        and value are nested tensors `(B, H, j, D)` of layout `torch.jagged`, as for torch's own attention; then without
        masks, orders and plan.
    key : Tensor
        `(..., Hk, Lk, D)`, dtype as `query`. `Lk` may differ from `Lq`, and no length need be a multiple of the block
        size. Leading dimensions broadcast as in torch's own attention.
    value : Tensor
        `(..., Hk, Lk, Dv)`, dtype as `query`. `Dv` may differ from `D`.
    attn_mask : Tensor or BlockMask, optional
        bool, True where the key may be attended to, or a bias that is added to the logits: float32 or the dtype of
        `query`, `-inf` where the key may not be attended to. Any shape that broadcasts to `(..., H, Lq, Lk)`; nothing
        that is repeated is copied. A mask that is the same for all queries and heads is key padding: those keys do not
        take part in averages either. A mask of shape `(B, Lk)` is passed as `mask[:, None, None, :]`. Any other mask
        that hides something makes every token choose blocks for itself, and no token learns from what it does not see;
        blocks of which some pairs are hidden are exact, outside the budget. A finite bias hides nothing; a block that
        is not exact has the average of its biases. A bias may require a gradient, which has its shape and dtype: a bias
        that is broadcast rather than expanded has a small one. Or a `BlockMask` of torch.nn.attention.flex_attention,
        whose `mask_mod` is called for partial blocks only. Or a causal bias,
        `torch.nn.attention.bias.causal_upper_left(Lq, Lk)` or `causal_lower_right(Lq, Lk)`.
    dropout_p : float, default 0.0
        The probability with which a weight is dropped, as in torch's own attention: whatever the mode of a module, so
        pass 0.0 in evaluation. The others are divided by `1 - dropout_p`. A block outside the budget is dropped or kept
        as a whole. The seed is drawn from torch's default generator, and only if `dropout_p > 0`.
    is_causal : bool, default False
        Whether query `t` sees the keys up to its own position only. May come together with masks and a window: a query
        sees what all allow.
    scale : float, optional
        Factor of the logits; `1 / sqrt(D)` by default.
    enable_gqa : bool, default False
        Whether groups of `H // Hk` query heads share a head of key and value; `H` must be a multiple of `Hk`. Key and
        value may have different numbers of heads.
    window_size : tuple of two int, default (-1, -1)
        How many keys before and behind its own position a query sees; -1 for all. No mask of pairs is made for it.
    causal_alignment : {"upper_left", "lower_right"}, default "upper_left"
        Whether the first queries are beside the first keys or the last queries beside the last keys: the position of
        query `t` among the keys is `t`, or `t + Lk - Lq`, as for the new tokens of a cache. A causal bias as
        `attn_mask` says it itself.
    query_padding_mask : Tensor, optional
        bool `(B, Lq)` or `(Lq,)`, True where the query is valid. Padded queries get the output 0. Without it, and with
        `Lq == Lk`, padded keys are taken for padded queries, which take no part in averages and budgets.
    query_order, key_order : Tensor, optional
        int64 `(Lq,)` and `(Lk,)`, or `(B, Lq)` and `(B, Lk)`: permutations. Blocks are cut from the tokens in this
        order, `query[..., query_order, :]`; masks and results stay in the order of the caller. Tokens that are alike
        should be neighbours: a block is summed up by its mean. For self-attention pass one tensor as both. For images
        there is the setting `grid`. Not together with what speaks of positions: `is_causal`, `window_size`,
        `alibi_slopes`, a `BlockMask`; a mask or bias of pairs says the same. With a plan they are those of the plan.
    softcap : float, optional
        A bound on the logits: `x` becomes `softcap * tanh(x / softcap)`, before biases are added, as in Gemma 2. 0 is
        none, as in flash-attention.
    alibi_slopes : Tensor, optional
        Floating point `(H,)`: the bias `-alibi_slopes[h] * |p - s|` for the query at position `p` and the key at `s`,
        as in ALiBi, without a mask of pairs. It takes no gradient.
    sinks : Tensor, optional
        Floating point `(H,)`: one more logit for every query of a head, which counts in the denominator only, as in
        GPT-OSS. It has a gradient, and no say in the selection.
    plan : Plan, optional
        A selection made by `mra_attention.plan` with the same masks, used in place of a new one. Settings are then
        those of the plan, but for `mode`; one that is given and differs is refused, but for `coarse` and
        `coarse_shift`.
    return_lse : bool, default False
        Whether to return the logarithm of the softmax denominators as well.
    config : MRAConfig, optional
        How attention is approximated.
    **settings
        Fields of `MRAConfig`, which explains them; they take the place of those of `config`.

    Returns
    -------
    out : Tensor
        `(..., H, Lq, Dv)`, dtype as `query`. The dimensions lie in memory as those of `query`: where that is stored as
        `(B, L, H, D)` or `(L, B, H, D)`, flattening the output of that layout copies nothing.
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
        For what is to come: devices other than the CPU; with dropout below `torch.vmap`; when the call is
        differentiated in forward mode or twice; and with `coarse="first_order"` where `MRAConfig` says so.

    Notes
    -----
    Definition: docs/definitions.md, sections 2 to 6 and 8 (MRA-2 and MRA-2-s of "Multi Resolution Analysis (MRA) for
    Approximate Self-Attention", arXiv 2207.10284, algorithms 1 and 2).

    A query without a visible key gets the output 0, the lse -inf and the gradient 0, with sinks too. What is stored at
    padded positions never reaches a result, not even a NaN; nor does what a query does not see.

    The result and the gradients are deterministic: the same bits on every run, for any number of threads; with dropout,
    after the same `torch.manual_seed`. As many threads are used as `torch.get_num_threads()` says. Under
    `torch.autocast("cpu")` inputs are cast as for torch's own attention. The selection of blocks is constant
    for differentiation. `torch.compile`, `torch.export` and `torch.jit.trace` take the function, `torch.jit.script`
    does not.

    Examples
    --------
    >>> import torch
    >>> from mra_attention import scaled_dot_product_attention
    >>> query, key, value = torch.randn(3, 1, 4, 1000, 64).unbind()
    >>> scaled_dot_product_attention(query, key, value, blocks_per_row=2).shape
    torch.Size([1, 4, 1000, 64])
    """
    numbers.check_bool("return_lse", return_lse)
    arguments = Arguments(
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        window_size,
        query_padding_mask,
        plan,
        softcap,
        alibi_slopes,
        sinks,
        causal_alignment,
        query_order,
        key_order,
        config=config,
        settings=settings,
    )
    plain = is_plain(query, key, value)
    if not plain and tensors.any_nested(query, key, value):
        return _nested.attention(query, key, value, arguments, return_lse)
    prepared = calls.prepare((query, key, value), arguments, plain)
    _observers.tell((query, key, value), arguments)
    inputs, ready = calls.in_order(prepared), prepared.settings
    if ready.dropout_p != 0.0:
        inputs = inputs._replace(seed=calls.draw_seed())
    if not return_lse:
        return calls.finish(forward_out(inputs, ready, plain), prepared)
    out, lse, _ = forward(inputs, ready)
    return calls.finish(out, prepared), calls.finish(lse, prepared)


@with_settings
def plan(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | BlockMask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    causal_alignment: Literal["upper_left", "lower_right"] = "upper_left",
    query_padding_mask: Tensor | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    config: MRAConfig | None = None,
    **settings: Unpack[MRASettings],
) -> Plan:
    """Select the blocks that `scaled_dot_product_attention` computes exactly, without computing attention.

    With the same arguments, `scaled_dot_product_attention` makes the same selection; given as its argument `plan`, the
    selection stays fixed while the inputs change.

    Parameters
    ----------
    query : Tensor
        `(..., H, Lq, D)`; see `scaled_dot_product_attention`, as for all other arguments.
    key : Tensor
        `(..., Hk, Lk, D)`, dtype as `query`.
    attn_mask, is_causal, scale, enable_gqa, window_size, causal_alignment, query_padding_mask, softcap, alibi_slopes
        Likewise. Blocks that a mask cuts are exact beside those of the budget.
    query_order, key_order
        Likewise. The plan speaks of the blocks of the reordered tokens.
    config : MRAConfig, optional
        How attention is approximated. The selection is the same in both modes.
    **settings
        Fields of `MRAConfig`; they take the place of those of `config`.

    Returns
    -------
    Plan
        For each of the `B * H` heads of the inputs, batch dimensions flattened.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `scaled_dot_product_attention`.

    Notes
    -----
    Definition: docs/definitions.md, sections 2 to 5 (arXiv 2207.10284, algorithm 1). Deterministic: the same selection
    on every run, for any number of threads; of equal scores the lower block index is taken. Nothing is differentiated.

    Examples
    --------
    >>> import torch
    >>> import mra_attention
    >>> query, key = torch.randn(2, 1, 4, 1000, 64).unbind()
    >>> selection = mra_attention.plan(query, key, blocks_per_row=2)
    >>> selection.num_blocks
    tensor([[64, 64, 64, 64]])
    """
    arguments = Arguments(
        attn_mask,
        0.0,
        is_causal,
        scale,
        enable_gqa,
        window_size,
        query_padding_mask,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        causal_alignment=causal_alignment,
        query_order=query_order,
        key_order=key_order,
        config=config,
        settings=settings,
    )
    prepared = calls.prepare((query, key), arguments)
    inputs, ready = calls.in_order(prepared), prepared.settings
    batch, heads, query_length, head_dim = inputs.query.shape
    _, key_heads, key_length, _ = inputs.key.shape
    bias = None if inputs.attn_bias is None else inputs.attn_bias.detach()
    return Plan(
        data=select(inputs, ready),
        config=configure(config, settings),
        query_shape=(batch, heads, query_length, head_dim),
        key_shape=(batch, key_heads, key_length, head_dim),
        settings=ready,
        masks=(inputs.key_mask, inputs.query_mask, bias, inputs.mask_tiles),
        orders=(query_order, key_order),
    )


@with_settings
def can_run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | BlockMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    causal_alignment: Literal["upper_left", "lower_right"] = "upper_left",
    query_padding_mask: Tensor | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
    config: MRAConfig | None = None,
    **settings: Unpack[MRASettings],
) -> str | None:
    """Return why `scaled_dot_product_attention` would refuse these arguments, or None if it takes them.

    The checks are those of the call itself, and nothing is computed. So a model can fall back to another attention
    without catching errors.

    Parameters
    ----------
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window_size, query_padding_mask
        As for `scaled_dot_product_attention`.
    causal_alignment, query_order, key_order, softcap, alibi_slopes, sinks, plan, return_lse, config, **settings
        Likewise.

    Returns
    -------
    str or None
        The message of the TypeError, ValueError or NotImplementedError that the call would raise.

    Raises
    ------
    Exception
        Of another kind, and only by the `mask_mod` of a BlockMask.

    Notes
    -----
    What only shows when the call runs is not foreseen: dropout below `torch.vmap`, a second derivative, boundaries of
    sequences. Nothing is drawn from a random number generator.

    Examples
    --------
    >>> import torch
    >>> from mra_attention import can_run
    >>> query, key, value = torch.randn(3, 1, 4, 100, 64).unbind()
    >>> can_run(query, key, value)
    >>> can_run(query, key, value, mode="dense")
    "mode must be 'full' or 'sparse', got 'dense'"
    """
    arguments = Arguments(
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        window_size,
        query_padding_mask,
        plan,
        softcap,
        alibi_slopes,
        sinks,
        causal_alignment,
        query_order,
        key_order,
        config=config,
        settings=settings,
    )
    try:
        numbers.check_bool("return_lse", return_lse)
        if tensors.any_nested(query, key, value):
            _nested.prepare(query, key, value, arguments)
            return None
        refuse_forward_ad(*calls.prepare((query, key, value), arguments).inputs)
    except (TypeError, ValueError, NotImplementedError) as refusal:
        return str(refusal)
    return None
