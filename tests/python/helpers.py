"""Inputs, calls and comparisons that the numerical tests share. Tolerances: docs/definitions.md, section 6."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mra_attention
import oracle
import torch
from oracle import Result, Settings
from torch import Tensor

FLOAT64_TOLERANCE = 1e-10
OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


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


def block_mask(query: Tensor, key: Tensor, settings: Settings) -> Tensor:
    """The selection that the package makes for these inputs."""
    return mra_attention.plan(query, key, **settings.keywords(), **gqa(query, key)).block_mask()


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
    keywords = settings.keywords() | gqa(query, key) | more
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
    assert torch.equal(selected, oracle.select(query, key, settings))
    actual = run_package(query, key, value, settings, grad_out, grad_lse)
    assert_results_close(actual, oracle.run(query, key, value, selected, settings, grad_out, grad_lse))


def assert_within_budget(
    actual: Tensor,
    expected: Tensor,
    comparisons: Sequence[Tensor],
    name: str,
    *,
    factor: float,
    block_size: int = 32,
) -> None:
    """The error against float64 is at most factor times that of plain torch, on average and in every block of tokens.

    actual and comparisons are of one dtype, (..., L, D), or (..., L) for lse. The average is a root mean square; the
    first comparison sets its budget. In every block the largest error counts, and the largest error anywhere in any
    comparison sets its budget: a single largest error is a matter of luck, so the comparisons sum in several orders.
    Half a unit in the last place of the largest value, the price of rounding a perfect result, is granted on top.
    """
    assert actual.isfinite().all(), f"{name} is not finite"
    if expected.numel() == 0:
        return
    budgets = []
    for comparison in comparisons:
        assert actual.dtype == comparison.dtype
        assert actual.shape == expected.shape == comparison.shape
        budgets.append((comparison.double() - expected).abs())
    rounding = 0.5 * torch.finfo(actual.dtype).eps * expected.abs().max().item()
    error = (actual.double() - expected).abs()
    mean_error, mean_budget = error.square().mean().sqrt().item(), budgets[0].square().mean().sqrt().item()
    assert mean_error <= factor * mean_budget + rounding, (
        f"{name}: root mean square error {mean_error:.3e} exceeds {factor} x {mean_budget:.3e}"
    )
    largest = max(budget.max().item() for budget in budgets)
    token_error = error if name == "lse" else error.amax(-1)
    for start in range(0, token_error.shape[-1], block_size):
        block_error = token_error[..., start : start + block_size].max().item()
        assert block_error <= factor * largest + rounding, (
            f"{name}: error {block_error:.3e} in the block at token {start} exceeds {factor} x {largest:.3e}"
        )


def assert_results_within_budget(
    actual: Result, expected: Result, comparisons: Sequence[Result], *, block_size: int = 32
) -> None:
    for index, name in enumerate(Result._fields):
        a, e, *c = (x[index] for x in (actual, expected, *comparisons))
        hidden = e.isinf()
        assert torch.equal(a.double()[hidden], e[hidden])
        a, e, *c = (x.masked_fill(hidden, 0.0) for x in (a, e, *c))
        factor = GRADIENT_FACTOR if name.startswith("d") else OUTPUT_FACTOR
        assert_within_budget(a, e, c, name, factor=factor, block_size=block_size)


def summation_orders(dim: int) -> list[Tensor]:
    """The order of the features and three others: a logit is the same in each, its rounding error is not."""
    generator = torch.Generator().manual_seed(0)
    return [torch.arange(dim), *(torch.randperm(dim, generator=generator) for _ in range(3))]


def dense_comparisons(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, settings: Settings, grad_out: Tensor, grad_lse: Tensor
) -> list[Result]:
    """Plain torch on the formulas of section 2, computed in float32 and stored in the dtype of the inputs.

    The gradients start from the stored output, as those of any attention that does not keep its probabilities.
    """
    dtype, results = query.dtype, []
    for order in summation_orders(query.shape[-1]):
        inputs = (query[..., order], key[..., order], value, selected, settings)
        out, lse = oracle.attention(*inputs, torch.float32)
        out = out.to(dtype)
        gradients = oracle.closed_form_gradients(*inputs, grad_out, grad_lse, out, lse, torch.float32)
        dq, dk, dv = (x.to(dtype) for x in gradients)
        back = order.argsort()
        results.append(Result(out, lse, dq[..., back], dk[..., back], dv))
    return results


def random_mask(batch: int, length: int, *, seed: int, keep: float = 0.7) -> Tensor:
    """A mask with holes; every item keeps at least its first token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, length, generator=generator) < keep
    mask[:, :1] = True
    return mask


def everything(block_size: int = 32, **more: Any) -> Settings:
    """Settings with which every live block is selected."""
    return Settings(block_size=block_size, blocks_per_row=1e9, **more)


def kept_weights(
    shape: tuple[int, ...],
    selected: Tensor,
    settings: Settings,
    p: float,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Which weights of tokens `(B, H, Lq, Lk)` and of blocks `(B, H, nq, nk)` are kept by the call after this seed.

    Read off the package: with values that are the columns of an identity, every weight is an element of the output, and
    the kept ones are those that are not 0. Weights whose block is computed the other way are True.
    """
    batch, heads, rows, columns, _ = shape
    block = settings.block_size
    words = torch.nn.functional.pad(selected, (0, -selected.shape[3] % 8)).unflatten(
        -1, (-(-selected.shape[3] // 8), 8)
    )
    bits = (words.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
    plan = mra_attention.Plan(bits, rows, columns, block)
    torch.manual_seed(seed)
    out = mra_attention.scaled_dot_product_attention(
        torch.zeros(batch, heads, rows, 1, dtype=dtype),
        torch.zeros(batch, heads, columns, 1, dtype=dtype),
        torch.eye(columns, dtype=dtype).expand(batch, heads, columns, columns),
        dropout_p=p,
        resolutions=(block, 1),
        plan=plan,
    )
    kept = out != 0
    exact = selected.repeat_interleave(block, 2)[:, :, :rows].repeat_interleave(block, 3)[..., :columns]
    return kept | ~exact, kept[:, :, ::block, ::block] | selected
