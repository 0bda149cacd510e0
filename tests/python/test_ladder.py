"""More than two resolutions (docs/definitions.md, section 5): every form against the formulas, and what must hold."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mra_attention
import oracle
import pytest
import torch
from forms import FORMS, TOKEN_FORMS, by_token_form, distance, settings_of, visible_pairs
from helpers import (
    assert_close,
    assert_matches_oracle,
    assert_results_close,
    assert_results_within_budget,
    assert_same_bits,
    assert_threads_change_nothing,
    block_mask,
    call_keywords,
    dense_budget,
    keep_factors,
    random_inputs,
    run_package,
)
from mra_attention import KVCache, MRAConfig, plan, scaled_dot_product_attention, varlen_attention
from oracle import Result, Settings
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")

LADDERS: dict[str, dict[str, Any]] = {
    "32, 8": {"coarser": (32,), "block_size": 8, "blocks_per_row": (1.0, 2.0)},
    "32, 16, 4": {"coarser": (32, 16), "block_size": 4, "blocks_per_row": (1.5, 2.0, 3.5), "score": "max"},
    "30, 6": {"coarser": (30,), "block_size": 6, "blocks_per_row": 1.7},
}
by_ladder = pytest.mark.parametrize("ladder", LADDERS)
# The first-order term is for two resolutions, but for the token form, which has the means whatever is asked for.
by_form = pytest.mark.parametrize("form", [form for form in FORMS if "first order" not in form or form in TOKEN_FORMS])
SHAPE = (2, 4, 83, 97, 6)


def ladder_of(form: str, shape: tuple[int, ...], ladder: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    return settings_of(form, shape, dtype, **(LADDERS[ladder] | more))


def compare(form: str, shape: tuple[int, ...], key_heads: int, ladder: str, **more: Any) -> None:
    inputs = random_inputs(shape, key_heads=key_heads, value_dim=5)
    for mode in ("full", "sparse"):
        assert_matches_oracle(*inputs[:3], ladder_of(form, shape, ladder, mode=mode, **more), *inputs[3:])


@by_ladder
@by_form
def test_values_gradients_and_selection(form: str, ladder: str) -> None:
    compare(form, SHAPE, 2, ladder)


@pytest.mark.parametrize(
    ("shape", "key_heads"),
    [
        ((1, 2, 1, 67, 3), 1),
        ((1, 2, 67, 1, 3), 2),
        ((1, 1, 3, 3, 2), 1),
        ((1, 2, 31, 31, 3), 2),
        ((1, 2, 32, 32, 3), 2),
        ((1, 2, 33, 33, 3), 2),
        ((1, 2, 130, 40, 3), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["plain", "no pooled queries", "causal", "left padding", "causal, left padding"])
def test_lengths(form: str, shape: tuple[int, ...], key_heads: int) -> None:
    for ladder in LADDERS:
        compare(form, shape, key_heads, ladder)


BUDGETS: dict[str, dict[str, Any]] = {
    "one for all": {"blocks_per_row": 1.0},
    "every at first": {"blocks_per_row": (math.inf, 1.0, 2.0)},
    "every at last": {"blocks_per_row": (1.0, 2.0, math.inf)},
    "every": {"blocks_per_row": math.inf},
    "per head": {"blocks_per_row": ([0.5, 1.0, 2.0, 9.0], 2.0, [3.0, 1.0, 6.0, 2.0])},
    "first": {"first_blocks": 3},
    "none first": {"first_blocks": 0},
    "diagonal": {"diagonal_blocks": 5},
    "local": {"local_blocks": 4, "blocks_per_row": 1.0},
    "beyond": {"blocks_per_row": 0.4, "local_blocks": 2, "first_blocks": 9},
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "form", ["plain", "left padding", "holes", "no pooled queries", "causal", "window", "random mask", "window, holes"]
)
def test_budgets(form: str, budget: str) -> None:
    compare(form, SHAPE, 2, "32, 16, 4", **BUDGETS[budget])


@by_form
def test_every_block_is_exact_attention(form: str) -> None:
    shape = (2, 2, 43, 51, 6)
    inputs = random_inputs(shape)
    two = settings_of(form, shape, blocks_per_row=math.inf)
    ladder = settings_of(form, shape, blocks_per_row=math.inf, coarser=(32, 16))
    assert_results_close(
        run_package(*inputs[:3], ladder, *inputs[3:]), run_package(*inputs[:3], two, *inputs[3:]), tolerance=1e-12
    )


@pytest.mark.parametrize("form", ["plain", "right padding", "causal", "window mask"])
def test_a_level_that_refines_everything_might_as_well_be_left_out(form: str) -> None:
    shape = (2, 2, 83, 97, 6)
    inputs = random_inputs(shape)
    for score in ("mean", "max"):
        two = settings_of(form, shape, blocks_per_row=2.0, score=score)
        ladder = settings_of(form, shape, blocks_per_row=(math.inf, 2.0), coarser=(32,), score=score)
        results = [run_package(*inputs[:3], settings, *inputs[3:]) for settings in (ladder, two)]
        assert_results_close(*results, tolerance=1e-10)


@by_ladder
@by_form
def test_any_number_of_threads_gives_the_same_bits(form: str, ladder: str) -> None:
    shape = (2, 3, 300, 310, 16)
    inputs = random_inputs(shape, dtype=torch.float32)
    settings = ladder_of(form, shape, ladder, torch.float32)
    assert_threads_change_nothing(inputs, settings)


def test_many_queries() -> None:
    """More of them than one range has: their gradients are summed in several pieces."""
    shape = (1, 1, 2100, 40, 3)
    inputs = random_inputs(shape)
    for ladder in ("32, 8", "32, 16, 4"):
        assert_matches_oracle(*inputs[:3], ladder_of("causal", shape, ladder), *inputs[3:])
    shape = (1, 2, 8300, 40, 3)
    settings = ladder_of("causal", shape, "32, 8", torch.float32)
    assert_threads_change_nothing(random_inputs(shape, key_heads=1, dtype=torch.float32), settings)


@pytest.mark.parametrize(("before", "behind"), [(3000, 0), (0, 3000)])
def test_padding_changes_no_bit_of_the_gradients_of_many_queries(before: int, behind: int) -> None:
    length = 8300
    inputs = [torch.randn(1, 1, length, 4) for _ in range(4)]
    padded = [torch.nn.functional.pad(x, (0, 0, before, behind)) for x in inputs]
    valid = torch.nn.functional.pad(torch.ones(1, 1, 1, length, dtype=torch.bool), (before, behind))

    def gradients(tensors: list[Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        out = scaled_dot_product_attention(
            *leaves, attn_mask=mask, is_causal=True, resolutions=(256, 32, 1), blocks_per_row=(2, 1)
        )
        return torch.autograd.grad(out, leaves, tensors[3])

    for alone, together in zip(gradients(inputs, None), gradients(padded, valid), strict=True):
        assert torch.equal(alone, together[:, :, before : before + length])


# A finite bias is added to NaN, as in torch's attention: such a number may hide finite numbers only.
HIDDEN = [(form, x) for form in TOKEN_FORMS for x in (3.0, math.nan, math.inf) if x == 3.0 or "huge" not in form]


@pytest.mark.parametrize(("form", "number"), HIDDEN)
def test_a_token_learns_only_from_what_it_sees(form: str, number: float) -> None:
    """Bits of output, log-sum-exp and selection, whatever is changed that the token does not see."""
    sizes = (2, 2, 83, 97, 6)
    query, key, value, grad_out, grad_lse = random_inputs(sizes, dtype=torch.float32)
    visible = visible_pairs(form, sizes)
    settings = ladder_of(form, sizes, "32, 16, 4", torch.float32)
    before = run_package(query, key, value, settings, grad_out, grad_lse)
    selected = block_mask(query, key, settings)
    for t in (0, 5, 41, 82):
        seen = visible[:, :, t].any(1)
        own = (torch.arange(sizes[2]) == t).expand(sizes[0], -1)
        other = [
            torch.where(keep[:, None, :, None], x, x + number) for x, keep in ((query, own), (key, seen), (value, seen))
        ]
        after = scaled_dot_product_attention(*other, return_lse=True, **call_keywords(query, key, settings))
        chosen = block_mask(other[0], other[1], settings)
        # A query that sees nothing has no output to change.
        sees = seen.any(-1)
        for name, a, e in (("out", after[0], before.out), ("lse", after[1], before.lse)):
            assert torch.equal(a[sees][:, :, t], e[sees][:, :, t]), f"{name} of token {t}"
        for level, (a, e) in enumerate(zip(chosen, selected, strict=True)):
            columns = min(a.shape[-1], e.shape[-1])
            assert torch.equal(a[sees][:, :, t, :columns], e[sees][:, :, t, :columns]), f"level {level} of token {t}"


@by_token_form
def test_a_query_gives_no_gradient_to_what_it_does_not_see(form: str) -> None:
    sizes = (2, 2, 83, 97, 6)
    query, key, value, grad_out, _ = random_inputs(sizes, dtype=torch.float32)
    visible = visible_pairs(form, sizes)
    settings = ladder_of(form, sizes, "32, 16, 4", torch.float32)
    for t in (3, 41, 82):
        only = torch.zeros_like(grad_out)
        only[:, :, t] = grad_out[:, :, t]
        result = run_package(query, key, value, settings, only)
        hidden = ~visible[:, :, t].any(1)[:, None, :, None]
        for name in ("dk", "dv"):
            assert (getattr(result, name).masked_select(hidden) == 0).all(), name


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_spelling_of_causality_gives_the_same_bits(dtype: torch.dtype, mode: str) -> None:
    shape = (2, 2, 83, 83, 20)
    inputs = random_inputs(shape, dtype=dtype)
    common: dict[str, Any] = {"mode": mode} | LADDERS["32, 16, 4"]
    expected = run_package(*inputs[:3], Settings(is_causal=True, **common), *inputs[3:])
    for other in ({"window": (-1, 0)}, {"bias": distance(shape[:4]) >= 0}):
        actual = run_package(*inputs[:3], Settings(**common, **other), *inputs[3:])
        for part, a, e in zip(Result._fields, actual, expected, strict=True):
            assert torch.equal(a, e), part


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (40, -1)], ids=str)
def test_a_query_alone_against_a_cache_gives_its_row_of_the_whole(
    window: tuple[int, int], dtype: torch.dtype, mode: str
) -> None:
    query, key, value, _, _ = random_inputs((1, 4, 131, 131, 20), key_heads=2, dtype=dtype)
    settings = Settings(mode=mode, is_causal=True, window=window, **LADDERS["32, 16, 4"])
    keywords = call_keywords(query, key, settings) | {"return_lse": True}
    out, lse = scaled_dot_product_attention(query, key, value, **keywords)
    cache = KVCache(1, 2, 20, 20, dtype=dtype, resolutions=(32, 16, 4, 1))
    asked = {name: keywords[name] for name in ("mode", "score", "blocks_per_row", "enable_gqa", "return_lse")}
    asked |= {} if window == (-1, -1) else {"window_size": window}
    for t in range(131):
        cache.append(key[:, :, t : t + 1], value[:, :, t : t + 1])
        step = cache.attend(query[:, :, t : t + 1], **asked)
        assert torch.equal(step[0], out[:, :, t : t + 1]), f"out of token {t}"
        assert torch.equal(step[1], lse[:, :, t : t + 1]), f"lse of token {t}"


def test_a_cache_that_is_cut_and_reordered_keeps_its_averages() -> None:
    _, key, value, _, _ = random_inputs((2, 2, 100, 100, 8), dtype=torch.float32)
    settings: dict[str, Any] = {"resolutions": (32, 8, 1), "blocks_per_row": (1, 2)}
    cache = KVCache(2, 2, 8, 8, **settings)
    cache.append(key[:, :, :90], value[:, :, :90])
    cache.crop(70)
    cache.append(key[:, :, 70:], value[:, :, 70:])
    cache.reorder(torch.tensor([1, 0]))
    query = torch.randn(2, 2, 7, 8)
    fresh = KVCache(2, 2, 8, 8, **settings)
    fresh.append(key.flip(0), value.flip(0))
    assert torch.equal(cache.attend(query), fresh.attend(query))


PACKED = ["plain", "no pooled queries", "causal", "causal, lower right", "window", "causal window"]


@by_ladder
@pytest.mark.parametrize("form", PACKED)
def test_packed_sequences(form: str, ladder: str) -> None:
    lengths, key_lengths = [7, 0, 63, 8, 1, 100], [7, 5, 40, 41, 0, 100]
    starts = [0, *itertools.accumulate(lengths)], [0, *itertools.accumulate(key_lengths)]
    shape = (1, 4, starts[0][-1], starts[1][-1], 6)
    inputs = random_inputs(shape, key_heads=2, value_dim=5)
    query, key, value, grad_out = (x[0].transpose(0, 1) for x in inputs[:4])
    grad_lse = inputs[4][0]
    for mode in ("full", "sparse"):
        settings = ladder_of(form, shape, ladder, mode=mode)
        keywords = settings.keywords() | {"return_lse": True, "enable_gqa": True}
        for name in ("attn_mask", "query_padding_mask"):
            del keywords[name]
        if settings.lower_right:
            keywords |= {"is_causal": True, "causal_alignment": "lower_right"}
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out, lse = varlen_attention(*leaves, *(torch.tensor(x) for x in starts), **keywords)
        grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
        expected = oracle.run_packed(query, key, value, starts, settings, grad_out, grad_lse)
        assert_results_close(Result(out.detach(), lse.detach(), *grads), expected)


@by_ladder
@pytest.mark.parametrize("form", ["plain", "left padding", "causal", "random mask"])
def test_dropout(form: str, ladder: str) -> None:
    """Each block that is not refined is one weight, whatever its level."""
    inputs = random_inputs(SHAPE, key_heads=2)
    settings = ladder_of(form, SHAPE, ladder)
    selected = block_mask(*inputs[:2], settings)
    torch.manual_seed(5)
    actual = run_package(*inputs[:3], settings, *inputs[3:], dropout_p=0.4)
    keep = keep_factors(*inputs[:2], selected, 0.4, 5)
    assert_results_close(actual, oracle.run(*inputs[:3], selected, settings, *inputs[3:], keep=keep))


@pytest.mark.parametrize("form", ["bias", "no pooled queries, bias", "bias that hides"])
def test_gradient_of_a_bias(form: str) -> None:
    shape = (2, 2, 43, 51, 6)
    query, key, value, grad_out, grad_lse = random_inputs(shape)
    for ladder in LADDERS:
        settings = ladder_of(form, shape, ladder)
        selected = block_mask(query, key, settings)
        assert settings.bias is not None
        bias = settings.bias.detach().clone().requires_grad_()
        keywords = call_keywords(query, key, settings) | {"attn_mask": bias, "return_lse": True}
        out, lse = scaled_dot_product_attention(query, key, value, **keywords)
        (actual,) = torch.autograd.grad((out, lse), bias, (grad_out, grad_lse))
        expected = oracle.bias_gradient(query, key, value, selected, settings, grad_out, grad_lse)
        assert_close(actual, expected, f"bias, {ladder}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["plain", "left padding", "causal", "window mask"])
def test_rounding_is_that_of_plain_torch(form: str, dtype: torch.dtype) -> None:
    shape = (1, 2, 150, 150, 32)
    inputs = random_inputs(shape, dtype=dtype)
    for ladder in ("32, 8", "32, 16, 4"):
        settings = ladder_of(form, shape, ladder, dtype)
        selected = block_mask(*inputs[:2], settings)
        double = [x.double() for x in inputs]
        expected = oracle.run(*double[:3], selected, settings, *double[3:])
        budget = dense_budget(*inputs[:3], selected, settings, *inputs[3:])
        actual = run_package(*inputs[:3], settings, *inputs[3:])
        assert_results_within_budget(actual, expected, budget, block_size=16)


@pytest.mark.parametrize("form", ["plain", "causal"])
def test_gradcheck(form: str) -> None:
    shape = (1, 2, 21, 21, 3)
    query, key, value, _, _ = random_inputs(shape)
    settings = ladder_of(form, shape, "32, 16, 4")
    keywords = call_keywords(query, key, settings)
    chosen = plan(query, key, **keywords)
    keywords = {name: keywords[name] for name in ("is_causal", "mode") if name in keywords}
    leaves = tuple(x.requires_grad_() for x in (query, key, value))

    def attention(*inputs: Tensor) -> Tensor:
        return scaled_dot_product_attention(*inputs, plan=chosen, **keywords)

    assert torch.autograd.gradcheck(attention, leaves)


def test_blocks_of_a_level_lie_in_refined_blocks_of_the_level_above() -> None:
    query, key, *_ = random_inputs((1, 2, 200, 200, 8))
    for more in ({}, {"is_causal": True}):
        chosen = plan(query, key, resolutions=(64, 16, 4, 1), blocks_per_row=(1, 2, 4), **more)
        levels = [chosen.block_masks(level)[0] for level in range(3)]
        assert torch.equal(levels[2], chosen.block_masks()[0])
        for above, level in itertools.pairwise(levels):
            columns = torch.arange(level.shape[2]) // 4
            rows = torch.arange(level.shape[1]) // (1 if more else 4)
            assert not (level & ~above[:, rows][:, :, columns]).any()
            assert level.any()
        with pytest.raises(IndexError):
            chosen.block_masks(3)


def test_compiled_with_lengths_that_are_known_later() -> None:
    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        settings: dict[str, Any] = {"resolutions": (64, 16, 4, 1), "blocks_per_row": (1, 2, 4)}
        whole = scaled_dot_product_attention(query, key, value, **settings)
        return (whole + scaled_dot_product_attention(query, key, value, is_causal=True, **settings)).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (70, 133):
        inputs = [torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3)]
        expected = torch.autograd.grad(loss(*inputs), inputs)
        for a, e in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
            assert torch.equal(a, e)


def test_a_head_has_the_budgets_that_it_has_alone() -> None:
    shape = (1, 2, 83, 97, 6)
    inputs = random_inputs(shape, dtype=torch.float32)
    for form in ("plain", "causal"):
        rates = ((1.0, 2.0), 2.0, (3.0, 1.0))
        together = run_package(
            *inputs[:3], ladder_of(form, shape, "32, 16, 4", torch.float32, blocks_per_row=rates), *inputs[3:]
        )
        for head in range(2):
            rate = (rates[0][head], 2.0, rates[2][head])
            settings = ladder_of(form, shape, "32, 16, 4", torch.float32, blocks_per_row=rate)
            alone = run_package(
                *(x[:, head : head + 1] for x in inputs[:3]), settings, *(x[:, head : head + 1] for x in inputs[3:])
            )
            assert_same_bits(Result(*(x[:, head : head + 1] for x in together)), alone)


def test_auto_adds_a_level_where_the_largest_blocks_become_too_many() -> None:
    config = MRAConfig(resolutions="auto", blocks_per_row=(3, 5))
    expected = {
        1: ((32, 1), (3.0, 5.0)),
        16384: ((32, 1), (3.0, 5.0)),
        16385: ((512, 32, 1), (16.0, (3.0, 5.0))),
        262144: ((512, 32, 1), (16.0, (3.0, 5.0))),
        262145: ((8192, 512, 32, 1), (16.0, 16.0, (3.0, 5.0))),
    }
    for length, (resolutions, budgets) in expected.items():
        chosen = config.for_length(length)
        assert (chosen.resolutions, chosen.blocks_per_row) == (resolutions, budgets)
    assert config.block_size == 32
    assert MRAConfig.from_json(config.to_json()) == config
    assert MRAConfig().for_length(10**6) == MRAConfig()
    with pytest.raises(ValueError, match=r"num_blocks=3 is for two resolutions.*'auto'"):
        MRAConfig(resolutions="auto", num_blocks=3)


@pytest.mark.parametrize("causal", [False, True])
def test_auto_is_smooth_where_a_level_is_added(causal: bool) -> None:
    """Half of the blocks of a new level are refined at first: the others are those that matter least."""
    query, key, value, *_ = random_inputs((1, 1, 16640, 16640, 4), dtype=torch.float32)
    two = scaled_dot_product_attention(query, key, value, is_causal=causal)
    auto = scaled_dot_product_attention(query, key, value, is_causal=causal, resolutions="auto")
    before = scaled_dot_product_attention(
        query[:, :, :16384], key[:, :, :16384], value[:, :, :16384], is_causal=causal, resolutions="auto"
    )
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    assert (auto - exact).norm() <= 1.02 * (two - exact).norm()
    assert torch.equal(
        before,
        scaled_dot_product_attention(query[:, :, :16384], key[:, :, :16384], value[:, :, :16384], is_causal=causal),
    )


def test_a_cache_with_auto_has_the_levels_of_its_longest_sequence() -> None:
    with pytest.raises(ValueError, match=r"resolutions='auto' needs to know the longest.*max_length"):
        KVCache(1, 1, 4, resolutions="auto")
    _, key, value, _, _ = random_inputs((1, 1, 40, 40, 4), dtype=torch.float32)
    query = torch.randn(1, 1, 5, 4)
    caches = [KVCache(1, 1, 4, max_length=17000, resolutions=x) for x in ("auto", (512, 32, 1))]
    for cache in caches:
        cache.append(key, value)
    expected = caches[1].attend(query, blocks_per_row=(16, 4))
    assert torch.equal(caches[0].attend(query), expected)
    with pytest.raises(ValueError, match="512 and 32 tokens"):
        caches[0].attend(query, resolutions=(32, 1))
    with pytest.raises(ValueError, match="'auto' needs to know"):
        KVCache(1, 1, 4).attend(torch.randn(1, 1, 0, 4), resolutions="auto")


@pytest.mark.parametrize("form", ["plain", "left padding", "causal", "random mask"])
def test_a_shift_of_coarse_blocks_is_that_of_every_level(form: str) -> None:
    compare(form, (1, 2, 83, 97, 6), 1, "32, 16, 4", coarse_shift=0.4)


def test_the_block_form_ranks_by_means_and_first_order_is_for_two_resolutions() -> None:
    query, key, value, *_ = random_inputs((1, 2, 90, 90, 8), dtype=torch.float32)
    settings: dict[str, Any] = {"resolutions": (32, 8, 1), "blocks_per_row": (1, 2)}
    usual = scaled_dot_product_attention(query, key, value, **settings)
    assert torch.equal(scaled_dot_product_attention(query, key, value, score="mean", **settings), usual)
    with pytest.raises(NotImplementedError, match=r"coarse='first_order'.*more than two resolutions"):
        scaled_dot_product_attention(query, key, value, resolutions=(32, 8, 1), coarse="first_order")


def test_budgets_as_a_tensor_are_those_of_the_levels() -> None:
    settings: dict[str, Any] = {"resolutions": (32, 8, 1)}
    assert MRAConfig(blocks_per_row=torch.tensor([1.0, 2.0]), **settings) == MRAConfig(
        blocks_per_row=(1, 2), **settings
    )
    per_head = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert MRAConfig(blocks_per_row=per_head, **settings).blocks_per_row == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    with pytest.raises(ValueError, match="one for each of the 2 levels"):
        MRAConfig(blocks_per_row=torch.ones(4), **settings)


def test_budgets_of_other_heads_are_refused_with_auto() -> None:
    with pytest.raises(ValueError, match="blocks_per_row must be one number, or one for each of the 4 heads"):
        mra_attention.nn.MultiheadAttention(16, 4, resolutions="auto", blocks_per_row=(1, 2, 3))


def test_a_plan_brings_its_settings_with_it() -> None:
    """What is given must be that of the plan; what is not given is taken from it, however it was spelled."""
    query, key, value, *_ = random_inputs((1, 2, 90, 90, 8), dtype=torch.float32)
    rates = ((1.0, 2.0), (2.0, 3.0))
    made = plan(query, key, resolutions=(32, 8, 1), blocks_per_row=rates, coarse_shift=0.5)
    expected = scaled_dot_product_attention(
        query, key, value, resolutions=(32, 8, 1), blocks_per_row=rates, coarse_shift=0.5
    )
    for given in ({}, {"blocks_per_row": rates}, {"coarse_shift": 0.5}, {"resolutions": (32, 8, 1)}):
        assert torch.equal(scaled_dot_product_attention(query, key, value, plan=made, **given), expected)
    assert not torch.equal(scaled_dot_product_attention(query, key, value, plan=made, coarse_shift=0.0), expected)
    with pytest.raises(NotImplementedError, match=r"coarse='first_order'.*more than two resolutions"):
        scaled_dot_product_attention(query, key, value, plan=made, coarse="first_order")
    auto = plan(query, key, resolutions="auto", blocks_per_row=2)
    assert torch.equal(
        scaled_dot_product_attention(query, key, value, plan=auto, blocks_per_row=2),
        scaled_dot_product_attention(query, key, value, resolutions="auto", blocks_per_row=2),
    )
    first = plan(query, key, coarse="first_order", blocks_per_row=1)
    assert torch.equal(
        scaled_dot_product_attention(query, key, value, plan=first),
        scaled_dot_product_attention(query, key, value, coarse="first_order", blocks_per_row=1),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_flops_are_those_of_the_blocks_of_the_plan(causal: bool) -> None:
    query, key, value, *_ = random_inputs((1, 2, 40, 40, 8), dtype=torch.float32)
    settings: dict[str, Any] = {"resolutions": (32, 8, 1), "blocks_per_row": (1, 2), "is_causal": causal}
    coarse, fine = (plan(query, key, **settings).block_masks(level)[0] for level in range(2))
    columns, rows = torch.arange(5) // 4, torch.arange(fine.shape[1]) // (1 if causal else 4)
    candidates = coarse[:, rows][:, :, columns]
    tokens = torch.full((5,), 8)
    of_rows = torch.ones(40, dtype=torch.int64) if causal else tokens
    exact = int((fine * of_rows[:, None] * tokens).sum())
    blocks = coarse.numel() + int(candidates.sum())
    pooled = coarse.numel() - int(coarse.sum()) + int(candidates.sum()) - int(fine.sum())
    with FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(query, key, value, **settings)
    assert counter.get_total_flops() == 2 * ((exact + blocks) * 8 + (exact + pooled) * 8)


@pytest.mark.parametrize("bias", ["wide", "wide within small blocks of padding"])
def test_all_levels_have_one_form(bias: str) -> None:
    """Where the bias of the blocks of any level is too wide for a mean, also if it is that of padded queries alone."""
    query, key, value, grad_out, grad_lse = random_inputs((2, 2, 64, 64, 5))
    numbers = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    if bias == "wide":
        numbers[1, :, 3, 5] = -2000.0
    else:
        numbers[1, :, 45, 3] = -2000.0
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[1, 40:] = False
    settings = Settings(
        coarser=(64,),
        block_size=8,
        blocks_per_row=(1.0, 2.0),
        bias=numbers.masked_fill(~valid[:, None, None], -math.inf),
    )
    assert_matches_oracle(query, key, value, settings, grad_out, grad_lse)
