"""Dense evaluation of docs/definitions.md, written from its formulas: nothing is shared with the kernels.

Everything of size Lq x Lk is stored and gradients come from torch autograd through the dense formula, with the
selection held fixed. The default precision is float64; float32 gives the error of plain torch on the same formulas.

A selection is (B, H, rows, nk) bool, True where a block is exact; a row is a query block in the block form and a token
in the token form. Batch items may have unlike numbers of rows and blocks: what an item has not is False. With several
levels it is a tuple with one of them for each level, the coarsest first, True where a block is refined.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from oracle_backward import gradients_of_item
from oracle_geometry import Geometry, Settings, geometry
from oracle_score import max_scores
from oracle_select import select_block_form, select_token_form
from oracle_terms import Item, Terms, block_values, clean, exact_of, item_of, of_queries, repeat, terms_of
from torch import Tensor

__all__ = [
    "Result",
    "Selection",
    "Settings",
    "attention",
    "bias_gradient",
    "clean_grad_out",
    "closed_form_gradients",
    "exact_blocks",
    "forms",
    "live_blocks",
    "run",
    "run_packed",
    "select",
    "stack",
]


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


Selection = Tensor | tuple[Tensor, ...]

_latest: list[tuple[Settings, tuple[int, ...], list[list[Geometry]]]] = []


def _levels(query: Tensor, key: Tensor, settings: Settings) -> list[list[Geometry]]:
    """Of every batch item those of all levels. The latest are kept: a comparison asks for the same several times."""
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    for known, sizes, found in _latest:
        if known is settings and sizes == shape:
            return found
    found = [_levels_of_item(shape, settings, item) for item in range(shape[0])]
    _latest[:] = [(settings, shape, found), *_latest[:3]]
    return found


def _levels_of_item(shape: tuple[int, int, int, int], settings: Settings, item: int) -> list[Geometry]:
    found = [geometry(shape, level, item) for level in settings.levels()]
    # The form is one for all levels.
    if any(level.form == "token" for level in found) and any(level.form == "block" for level in found):
        found = [geometry(shape, replace(level, pool_queries=False), item) for level in settings.levels()]
    return found


def _geometries(query: Tensor, key: Tensor, settings: Settings) -> list[Geometry]:
    """Of every batch item that of the finest blocks."""
    return [levels[-1] for levels in _levels(query, key, settings)]


def _each(selected: Selection) -> list[Tensor]:
    return [selected] if isinstance(selected, Tensor) else list(selected)


def _of_item(selected: Selection, item: int) -> list[Tensor]:
    return [level[item] for level in _each(selected)]


def _children(refined: Tensor, above: Geometry, g: Geometry, times: int) -> Tensor:
    """(H, rows, nk) bool: the blocks of a level that lie in blocks that the level above refines."""
    if g.form == "block":
        rows = torch.arange(g.pooled.shape[0]) + g.first_row
        row_above = rows.div(times, rounding_mode="floor") - above.first_row
        refined = refined[:, row_above] if rows.numel() else refined[:, :0]
    columns = torch.arange(g.member.shape[0]).div(times, rounding_mode="floor")
    return refined[..., columns] if columns.numel() else refined[..., :0]


def forms(query: Tensor, key: Tensor, settings: Settings) -> list[str]:
    """The form of every batch item: "block" or "token" (section 2)."""
    return [g.form for g in _geometries(query, key, settings)]


def stack(selections: list[Tensor], heads: int) -> Tensor:
    """The selections (H, rows, nk) of several batch items as one, False where an item has no row or no block."""
    rows = max((x.shape[1] for x in selections), default=0)
    columns = max((x.shape[2] for x in selections), default=0)
    stacked = torch.zeros(len(selections), heads, rows, columns, dtype=torch.bool)
    for item, x in enumerate(selections):
        stacked[item, :, : x.shape[1], : x.shape[2]] = x
    return stacked


def live_blocks(query: Tensor, key: Tensor, settings: Settings) -> Tensor:
    """(B, H, rows, nk) bool: the blocks that can be selected: live in the block form, not dead in the token form."""
    found = []
    for g in _geometries(query, key, settings):
        live = g.is_open | g.is_cut
        found.append(live & g.live_rows[:, None] if g.form == "block" else live)
    return stack(found, query.shape[1])


def select(query: Tensor, key: Tensor, settings: Settings) -> Selection:
    """The selection of sections 3 to 5, the exact blocks of all rows, or the refined ones of every level."""
    heads, each = query.shape[1], settings.levels()
    selections: list[list[Tensor]] = [[] for _ in each]
    for item, levels in enumerate(_levels(query, key, settings)):
        above: Tensor | None = None
        xs = [item_of(query[item].detach(), key[item].detach(), settings, g, torch.float64) for g in levels]
        sizes = [level.block_size for level in each]
        for level, g in enumerate(levels):
            candidates = torch.ones_like(g.is_open)
            if above is not None:
                candidates = _children(above, levels[level - 1], g, sizes[level - 1] // sizes[level])
            ratio = sizes[level] // settings.block_size
            chosen_by = (xs[level].coarse_logits, g, each[level], candidates, ratio)
            if g.form == "block":
                above = select_block_form(*chosen_by)
            else:
                below = (xs[level + 1], sizes[level] // sizes[level + 1]) if level + 1 < len(xs) else ()
                scores = max_scores(xs[level], *below) if settings.score == "max" else None
                above = select_token_form(*chosen_by, levels[-1], scores)
            selections[level].append(above)
    found = tuple(stack(level, heads) for level in selections)
    return found if settings.coarser else found[0]


def exact_blocks(query: Tensor, key: Tensor, selected: Tensor, settings: Settings) -> Tensor:
    """What a given selection makes exact: no dead block, and every cut one."""
    found = [exact_of(g, selected[item]) for item, g in enumerate(_geometries(query, key, settings))]
    return stack(found, query.shape[1])


def _terms_of_levels(xs: list[Item], selected: list[Tensor], settings: Settings) -> list[Terms]:
    """Of every level; keys are those of the last one."""
    sizes = [level.block_size for level in settings.levels()]
    found: list[Terms] = []
    for level, (x, chosen) in enumerate(zip(xs, selected, strict=True)):
        candidates = None
        if level > 0:
            refined = exact_of(xs[level - 1].g, selected[level - 1])
            candidates = _children(refined, xs[level - 1].g, x.g, sizes[level - 1] // sizes[level])
        found.append(terms_of(x, chosen, settings.mode, candidates))
    return found


def _attention_of_item(
    xs: list[Item], value: Tensor, selected: list[Tensor], settings: Settings, keep: tuple[Tensor, list[Tensor]] | None
) -> tuple[Tensor, Tensor]:
    x = xs[-1]
    g, dtype = x.g, x.query.dtype
    terms = _terms_of_levels(xs, selected, settings)
    visible = torch.cat([terms[-1].keys, *(level.blocks for level in terms)], -1)
    logits = torch.cat([x.logits, *(level.block_logits for level in terms)], -1).masked_fill(~visible, -math.inf)
    ones = torch.ones_like(g.key_valid).to(dtype)
    multiplicity = torch.cat([ones, *(level.count.to(dtype) for level in terms)], -1)
    seen = visible.any(-1, keepdim=True)
    # The extra hidden column keeps amax defined where there is no key.
    padded = torch.cat([logits.detach(), logits.new_full((*logits.shape[:-1], 1), -math.inf)], -1)
    largest = padded.amax(-1, keepdim=True).masked_fill(~seen, 0.0)
    if x.sinks is not None:
        largest = torch.maximum(largest, x.sinks.detach()[:, None, None])
    weights = multiplicity * (logits - largest).exp()
    total = weights.sum(-1, keepdim=True)
    if x.sinks is not None:
        total = total + (x.sinks[:, None, None] - largest).exp()
    total = total.masked_fill(~seen, 1.0)
    weights = weights / total
    if keep is not None:
        blocks = [
            of_queries(of_level[..., : x.g.member.shape[0]], x.g) for of_level, x in zip(keep[1], xs, strict=True)
        ]
        weights = weights * torch.cat([keep[0], *blocks], -1).to(dtype)
    of_keys, *of_levels = weights.split([value.shape[-2], *(level.g.member.shape[0] for level in xs)], -1)
    out = of_keys @ value
    for level, of_blocks in zip(xs, of_levels, strict=True):
        out = out + block_values(level, of_blocks, value)
    return out, (total.log() + largest).masked_fill(~seen, -math.inf).squeeze(-1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Selection,
    settings: Settings,
    dtype: torch.dtype = torch.float64,
    keep: tuple[Tensor, Selection] | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp for a given selection, one softmax over all terms of both levels.

    The terms of a query are every key of an exact block, and every coarse block with its logit cnt_j times. Dropout
    multiplies the weights by `keep`: (B, H, Lq, Lk) for keys and (B, H, rows, nk) for blocks, as a tuple with several
    levels. What queries that are not
    `active`, (B, H, Lq), attend to is not computed.
    """
    outs, lses = [], []
    for item, levels in enumerate(_levels(query, key, settings)):
        of_item = None if active is None else active[item]
        xs = [item_of(query[item], key[item], settings, g, dtype, of_item) for g in levels]
        v = repeat(clean(value[item].to(dtype), levels[-1].key_valid), query.shape[1])
        kept = None if keep is None else (keep[0][item], _of_item(keep[1], item))
        out, lse = _attention_of_item(xs, v, _of_item(selected, item), settings, kept)
        outs.append(out)
        lses.append(lse)
    if not outs:
        sizes = (*query.shape[:3], value.shape[3])
        return query.new_zeros(sizes, dtype=dtype), query.new_zeros(sizes[:3], dtype=dtype)
    return torch.stack(outs), torch.stack(lses)


def _answers(query: Tensor, key: Tensor, settings: Settings) -> Tensor:
    """(B, Lq) bool: the queries that have an output."""
    answers = [g.answers for g in _geometries(query, key, settings)]
    return torch.stack(answers) if answers else torch.ones(0, query.shape[2], dtype=torch.bool)


def clean_grad_out(grad_out: Tensor, settings: Settings) -> Tensor:
    """The cotangent of outputs of padded queries counts for nothing, whatever is stored there."""
    if settings.query_mask is None:
        return grad_out
    valid = settings.query_mask.expand(grad_out.shape[0], grad_out.shape[2])
    return torch.where(valid[:, None, :, None], grad_out, torch.zeros((), dtype=grad_out.dtype))


def _incoming(
    query: Tensor, key: Tensor, settings: Settings, grad_out: Tensor, grad_lse: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of queries that have an output, and which of them are not 0, (B, H, Lq)."""
    answers = _answers(query, key, settings)[:, None]
    g = clean(grad_out.to(dtype), answers)
    gl = torch.zeros(g.shape[:3], dtype=dtype) if grad_lse is None else grad_lse.to(dtype)
    gl = torch.where(answers, gl, torch.zeros((), dtype=dtype))
    return g, gl, (g != 0).any(-1) | (gl != 0)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Selection,
    settings: Settings,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    keep: tuple[Tensor, Selection] | None = None,
) -> Result:
    """Output, log-sum-exp and gradients by autograd, for a given selection."""
    with torch.no_grad():
        out, lse = attention(query, key, value, selected, settings, dtype, keep)
    leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    g, gl, active = _incoming(query, key, settings, grad_out, grad_lse, dtype)
    target_out, target_lse = attention(*leaves, selected, settings, dtype, keep, active)
    target = (target_out[active] * g[active]).sum()
    counts = active & (lse > -math.inf)
    target = target + (target_lse[counts] * gl[counts]).sum()
    if not target.requires_grad:  # there is no batch item
        return Result(out, lse, *(torch.zeros_like(x) for x in leaves))
    dq, dk, dv = torch.autograd.grad(target, leaves, allow_unused=True, materialize_grads=True)
    return Result(out, lse, dq, dk, dv)


def bias_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Selection,
    settings: Settings,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    keep: tuple[Tensor, Selection] | None = None,
) -> Tensor:
    """The gradient of the bias by autograd, for a given selection, in the shape of the bias."""
    assert settings.bias is not None
    leaf = settings.bias.detach().double().requires_grad_()
    given = replace(settings, bias=leaf)
    with torch.no_grad():
        _, lse = attention(query, key, value, selected, given, keep=keep)
    g, gl, active = _incoming(query, key, given, grad_out, grad_lse, torch.float64)
    given = replace(given)  # geometries are kept for settings, and those of above record nothing
    out, target_lse = attention(query, key, value, selected, given, keep=keep, active=active)
    counts = active & (lse > -math.inf)
    target = (out[active] * g[active]).sum() + (target_lse[counts] * gl[counts]).sum()
    return torch.autograd.grad(target, leaf, allow_unused=True, materialize_grads=True)[0]


def run_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: tuple[list[int], list[int]],
    settings: Settings,
    grad_out: Tensor,
    grad_lse: Tensor,
) -> Result:
    """Packed sequences (total, H, D), with the selection that each makes for itself; lse is (H, total)."""
    results = []
    starts = list(zip(boundaries[0], boundaries[0][1:], boundaries[1], boundaries[1][1:], strict=False))
    for q0, q1, k0, k1 in starts:
        q, g = (x[q0:q1].transpose(0, 1)[None] for x in (query, grad_out))
        k, v = (x[k0:k1].transpose(0, 1)[None] for x in (key, value))
        selected = select(q, k, settings)
        result = run(q, k, v, selected, settings, g, grad_lse[None, :, q0:q1])
        results.append([x[0] if name == "lse" else x[0].transpose(0, 1) for name, x in result._asdict().items()])
    parts = dict(zip(Result._fields, zip(*results, strict=True), strict=True))
    return Result(**{name: torch.cat(list(x), 1 if name == "lse" else 0) for name, x in parts.items()})


def closed_form_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Selection,
    settings: Settings,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by the closed form of sections 3 and 4, from a stored output and log-sum-exp."""
    g, gl, active = _incoming(query, key, settings, grad_out, grad_lse, dtype)
    active = active & (lse > -math.inf)
    grads = [torch.zeros(x.shape, dtype=dtype) for x in (query, key, value)]
    for item, levels in enumerate(_levels(query, key, settings)):
        xs = [item_of(query[item], key[item], settings, of_level, dtype, active[item]) for of_level in levels]
        v = repeat(clean(value[item].to(dtype), levels[-1].key_valid), query.shape[1])
        terms = _terms_of_levels(xs, _of_item(selected, item), settings)
        stored = (clean(g[item], active[item]), gl[item], out[item].to(dtype), lse[item].to(dtype))
        for grad, found in zip(grads, gradients_of_item(xs, terms, v, *stored, active[item]), strict=True):
            groups = grad.shape[1]
            grad[item] = found.unflatten(0, (groups, -1)).sum(1) if groups else found
    return grads[0], grads[1], grads[2]
