"""Inputs, calls and comparisons that the numerical tests share. Tolerances: docs/definitions.md, section 7."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mra_attention
import oracle
import oracle_dropout
import torch
from oracle import Result, Selection, Settings
from plain_float32 import PlainFloat32
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

FLOAT64_TOLERANCE = 1e-10
OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


@contextlib.contextmanager
def named(case: object) -> Iterator[None]:
    """Failures inside say which case of a loop it was."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error


def random_inputs(
    shape: tuple[int, int, int, int, int],
    *,
    value_dim: int | None = None,
    key_heads: int | None = None,
    dtype: torch.dtype = torch.float64,
    magnitude: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query, key, value, grad_out, grad_lse for shape (B, H, Lq, Lk, D); values are rounded to dtype."""
    batch, heads, query_length, key_length, dim = shape
    key_heads = heads if key_heads is None else key_heads
    value_dim = dim if value_dim is None else value_dim
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    query = (magnitude * normal(batch, heads, query_length, dim)).to(dtype)
    key = (magnitude * normal(batch, key_heads, key_length, dim)).to(dtype)
    value = normal(batch, key_heads, key_length, value_dim).to(dtype)
    grad_out = normal(batch, heads, query_length, value_dim).to(dtype)
    grad_lse = normal(batch, heads, query_length).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return query, key, value, grad_out, grad_lse


def gqa(query: Tensor, key: Tensor) -> dict[str, bool]:
    return {"enable_gqa": True} if query.shape[-3] != key.shape[-3] else {}


def call_keywords(query: Tensor, key: Tensor, settings: Settings) -> dict[str, Any]:
    """The keyword arguments with which the package computes what the settings ask for."""
    keywords = settings.keywords() | gqa(query, key)
    if settings.lower_right:
        assert keywords["attn_mask"] is None
        keywords["attn_mask"] = causal_lower_right(query.shape[-2], key.shape[-2])
    return keywords


def plan_keywords(query: Tensor, key: Tensor, settings: Settings) -> dict[str, Any]:
    """Those of them that concern the selection."""
    keywords = call_keywords(query, key, settings)
    keywords.pop("sinks", None)
    return keywords


def block_mask(query: Tensor, key: Tensor, settings: Settings) -> Selection:
    """The blocks that the package makes exact for these inputs, (B, H, rows, nk); see oracle.py for the rows."""
    plan = mra_attention.plan(query, key, **plan_keywords(query, key, settings))
    levels = [oracle.stack(plan.block_masks(level), query.shape[1]) for level in range(len(settings.levels()))]
    return tuple(levels) if settings.coarser else levels[0]


def assert_same_selection(actual: Selection, expected: Selection) -> None:
    """Equal up to rows and columns of False: batch items may have fewer blocks than there is room for."""
    if isinstance(actual, tuple) or isinstance(expected, tuple):
        for of_level, expected_of_level in zip(actual, expected, strict=True):
            assert_same_selection(of_level, expected_of_level)
        return
    places = [*actual.nonzero().tolist(), *expected.nonzero().tolist()]
    sizes = [max((place[dim] + 1 for place in places), default=0) for dim in (2, 3)]
    both = []
    for mask in (actual, expected):
        missing = [max(0, size - mask.shape[dim]) for dim, size in zip((2, 3), sizes, strict=True)]
        padded = torch.nn.functional.pad(mask, (0, missing[1], 0, missing[0]))
        both.append(padded[:, :, : sizes[0], : sizes[1]])
    wrong = (both[0] != both[1]).nonzero().tolist()
    assert not wrong, f"blocks (item, head, row, block) that differ: {wrong[:10]}"


def run_package(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: Settings,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    **more: Any,
) -> Result:
    """Output, log-sum-exp and gradients of the package."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    keywords = call_keywords(query, key, settings) | more
    out, lse = mra_attention.scaled_dot_product_attention(*leaves, return_lse=True, **keywords)
    outputs, cotangents = [out], [grad_out]
    if grad_lse is not None:
        outputs.append(lse)
        cotangents.append(grad_lse)
    dq, dk, dv = torch.autograd.grad(outputs, leaves, cotangents)
    return Result(out.detach(), lse.detach(), dq, dk, dv)


def assert_same_bits(actual: Result, expected: Result) -> None:
    for name, a, e in zip(Result._fields, actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        assert not a.isnan().any(), f"{name} has NaN"
        assert torch.equal(a, e), f"{name} differs by up to {(a - e).abs().nan_to_num(0.0).max():.3e}"


def assert_close(actual: Tensor, expected: Tensor, name: str, *, tolerance: float = FLOAT64_TOLERANCE) -> None:
    """Every element within tolerance * max(1, largest expected magnitude); infinities in the same places."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), f"{name}: infinities differ"
    actual, expected = actual[~infinite], expected[~infinite]
    assert actual.isfinite().all(), f"{name}: {int((~actual.isfinite()).sum())} values are not finite"
    if actual.numel():
        error = (actual - expected).abs().max().item()
        allowed = tolerance * max(1.0, expected.abs().max().item())
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def assert_results_close(actual: Result, expected: Result, *, tolerance: float = FLOAT64_TOLERANCE) -> None:
    for name, a, e in zip(Result._fields, actual, expected, strict=True):
        assert_close(a, e, name, tolerance=tolerance)


def assert_matches_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: Settings,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
) -> None:
    """Float64 inputs: the package agrees with the oracle on the same selection, and the selection is the oracle's."""
    selected = block_mask(query, key, settings)
    assert_same_selection(selected, oracle.select(query, key, settings))
    actual = run_package(query, key, value, settings, grad_out, grad_lse)
    assert_results_close(actual, oracle.run(query, key, value, selected, settings, grad_out, grad_lse))


class Budget(NamedTuple):
    """Whose errors set the allowed one: results of plain torch in the dtype of the inputs, and of plain float32.

    The second is computed only where the first are not enough (plain_float32.py says why they may not be).
    """

    comparisons: Sequence[Sequence[Tensor]]
    floor: Callable[[], Sequence[Tensor]]


def assert_within_budget(
    actual: Tensor,
    expected: Tensor,
    comparisons: Sequence[Tensor],
    name: str,
    *,
    factor: float,
    floor: Callable[[], Tensor],
    block_size: int = 32,
) -> None:
    """The error against float64 is at most factor times that of plain torch, on average and in every block of tokens.

    actual and comparisons are of one dtype, (..., L, D), or (..., L) for lse. The average is a root mean square; the
    first comparison sets its budget. In every block the largest error counts, and the largest error anywhere in any
    comparison sets its budget: a single largest error is a matter of luck, so the comparisons sum in several orders.
    Neither budget is smaller than it would be with floor, the result of plain float32, in place of torch's: how good
    torch's kernels are must not decide. Half a unit in the last place of the largest value, the price of rounding a
    perfect result, is granted on top.
    """
    assert actual.isfinite().all(), f"{name} is not finite"
    if expected.numel() == 0:
        return
    budgets = [_error(comparison, expected, actual.dtype) for comparison in comparisons]
    mean_budget, largest = _mean(budgets[0]), max(budget.max().item() for budget in budgets)
    excess = _excess(actual, expected, name, factor, mean_budget, largest, block_size)
    if excess is not None:
        least = _error(floor(), expected, actual.dtype)
        mean_budget, largest = max(mean_budget, _mean(least)), max(largest, least.max().item())
        excess = _excess(actual, expected, name, factor, mean_budget, largest, block_size)
    assert excess is None, excess


def _error(result: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    assert (result.dtype, result.shape) == (dtype, expected.shape)
    return (result.double() - expected).abs()


def _mean(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def _excess(
    actual: Tensor, expected: Tensor, name: str, factor: float, mean_budget: float, largest: float, block_size: int
) -> str | None:
    """What is outside these budgets, if anything."""
    rounding = 0.5 * torch.finfo(actual.dtype).eps * expected.abs().max().item()
    error = _error(actual, expected, actual.dtype)
    if _mean(error) > factor * mean_budget + rounding:
        return f"{name}: root mean square error {_mean(error):.3e} exceeds {factor} x {mean_budget:.3e}"
    token_error = error if name == "lse" else error.amax(-1)
    for start in range(0, token_error.shape[-1], block_size):
        block_error = token_error[..., start : start + block_size].max().item()
        if block_error > factor * largest + rounding:
            return f"{name}: error {block_error:.3e} in the block at token {start} exceeds {factor} x {largest:.3e}"
    return None


def assert_results_within_budget(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    budget: Budget,
    *,
    names: Sequence[str] = Result._fields,
    block_size: int = 32,
) -> None:
    floor = functools.cache(budget.floor)
    for index, name in enumerate(names):
        a, e, *c = (x[index] for x in (actual, expected, *budget.comparisons))
        hidden = e.isinf()
        assert torch.equal(a.double()[hidden], e[hidden])

        def shown(x: Tensor, hidden: Tensor = hidden) -> Tensor:
            return x.masked_fill(hidden, 0.0)

        assert_within_budget(
            shown(a),
            shown(e),
            [shown(x) for x in c],
            name,
            factor=GRADIENT_FACTOR if name.startswith("d") else OUTPUT_FACTOR,
            floor=lambda index=index, shown=shown: shown(floor()[index]),
            block_size=block_size,
        )


def summation_orders(dim: int) -> list[Tensor]:
    """The order of the features and three others: a logit is the same in each, its rounding error is not."""
    generator = torch.Generator().manual_seed(0)
    return [torch.arange(dim), *(torch.randperm(dim, generator=generator) for _ in range(3))]


def dense_budget(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Selection,
    settings: Settings,
    grad_out: Tensor,
    grad_lse: Tensor,
) -> Budget:
    """Plain torch on the formulas, computed in float32 and stored in the dtype of the inputs.

    The gradients start from the stored output, as those of any attention that does not keep its probabilities.
    """

    def compute(order: Tensor, precision: torch.dtype) -> Result:
        inputs = (query[..., order], key[..., order], value, selected, settings)
        out, lse = oracle.attention(*inputs, precision)
        out, lse = out.to(query.dtype), lse.to(grad_lse.dtype)
        dq, dk, dv = oracle.closed_form_gradients(*inputs, grad_out, grad_lse, out, lse, precision)
        back = order.argsort()
        return Result(out, lse, *(x.to(query.dtype) for x in (dq[..., back], dk[..., back], dv)))

    def floor() -> Result:
        with PlainFloat32():
            return compute(torch.arange(query.shape[-1]), torch.float64)

    return Budget([compute(order, torch.float32) for order in summation_orders(query.shape[-1])], floor)


def random_mask(batch: int, length: int, *, seed: int, keep: float = 0.7) -> Tensor:
    """A mask with holes; every item keeps at least its first token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, length, generator=generator) < keep
    mask[:, :1] = True
    return mask


def everything(block_size: int = 32, **more: Any) -> Settings:
    """Settings with which every live block is selected."""
    return Settings(block_size=block_size, blocks_per_row=1e9, **more)


def keep_factors(
    query: Tensor, key: Tensor, selected: Selection, p: float, torch_seed: int
) -> tuple[Tensor, Selection]:
    """What the weights of keys and of blocks are multiplied by in a call after `torch.manual_seed(torch_seed)`."""
    keys, seed = (*query.shape[:3], key.shape[2]), oracle_dropout.drawn_seed(torch_seed)
    levels = selected if isinstance(selected, tuple) else (selected,)
    kept = [oracle_dropout.keep_factors(seed, p, keys, tuple(x.shape), level) for level, x in enumerate(levels)]
    blocks = tuple(of_level for _, of_level in kept)
    return kept[0][0], blocks if isinstance(selected, tuple) else blocks[0]


def assert_threads_change_nothing(inputs: Sequence[Tensor], settings: Settings) -> None:
    """The same bits for 1, 2 and 5 threads; `inputs` are those of `random_inputs`."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run_package(*inputs[:3], settings, *inputs[3:]))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, a, e in zip(result._fields, result, results[0], strict=True):
            assert torch.equal(a, e), name
