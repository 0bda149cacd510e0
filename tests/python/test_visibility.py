"""A token learns only from what it sees (docs/definitions.md, section 2): bit for bit, however that is written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from forms import TOKEN_FORMS, by_token_form, distance, hide, settings_of, visible_pairs
from helpers import block_mask, call_keywords, random_inputs, run_package
from mra_attention import KVCache, scaled_dot_product_attention, varlen_attention
from oracle import Result, Settings
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
by_mode = pytest.mark.parametrize("mode", ["full", "sparse"])
# (B, H, Lq, Lk, D): around the block size of 8, and longer ones that do not fill their blocks.
SHAPES = {
    "block - 1": (1, 2, 7, 7, 4),
    "block": (1, 2, 8, 8, 4),
    "block + 1": (1, 2, 9, 9, 4),
    "2 block + 7": (2, 2, 23, 23, 8),
    "self": (2, 2, 75, 75, 20),
    "cross": (1, 2, 43, 70, 17),
}
pytestmark = pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")


def changed(x: Tensor, keep: Tensor, number: float | None) -> Tensor:
    """Other numbers in the tokens (B, L) that are not to be kept."""
    other = 3 * torch.randn_like(x) if number is None else torch.full_like(x, number)
    return torch.where(keep[:, None, :, None], x, other)


def assert_token_is_the_same(
    before: Result, after: Result, t: int, of_token: Tensor, selected: tuple[Tensor, Tensor]
) -> None:
    """Out, lse, gradient and exact blocks of token t, of the batch items where it sees something."""
    for name in ("out", "lse", "dq"):
        a, e = getattr(after, name)[of_token, :, t], getattr(before, name)[of_token, :, t]
        assert torch.equal(a, e), f"{name} of token {t}"
        assert not e.isnan().any()
    assert torch.equal(selected[0][of_token, :, t], selected[1][of_token, :, t]), f"selection of token {t}"


# A finite bias is added to NaN, as in torch's attention: such a number may hide finite numbers only.
HIDDEN = [(form, x) for form in TOKEN_FORMS for x in (None, math.nan, math.inf) if x is None or "huge" not in form]


@pytest.mark.parametrize(("form", "number"), HIDDEN)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_token_does_not_see_changes_no_bit_of_it(form, shape, number):
    """q, k and v of everything that it does not see, once other numbers, once NaN, once infinite."""
    sizes = SHAPES[shape]
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value, grad_out, grad_lse = random_inputs(sizes, dtype=dtype)
        visible = visible_pairs(form, sizes)
        # A mask that hides nothing in so short a sequence asks for nothing.
        pooled = form.startswith("no pooled") or visible.flatten(1).all(-1).any()
        more = {"pool_queries": False} if pooled else {}
        for chosen in ({}, {"mode": "sparse"}, {"score": "max", "blocks_per_row": 3.0, "coarse_shift": 0.8}):
            settings = settings_of(form, sizes, dtype, **chosen, **more)
            before = run_package(query, key, value, settings, grad_out, grad_lse)
            selected = block_mask(query, key, settings)
            for t in {0, 6, sizes[2] // 2, sizes[2] - 1}:
                if t >= sizes[2]:
                    continue
                seen = visible[:, :, t].any(1)
                own = (torch.arange(sizes[2]) == t).expand(sizes[0], -1)
                other = (
                    changed(query, own, number),
                    changed(key, seen, number),
                    changed(value, seen, number),
                )
                after = run_package(*other, settings, grad_out, grad_lse)
                selections = (selected, block_mask(*other[:2], settings))
                assert_token_is_the_same(before, after, t, seen.any(-1), selections)


@by_token_form
def test_a_query_gives_no_gradient_to_what_it_does_not_see(form):
    sizes = (2, 2, 43, 51, 6)
    query, key, value, grad_out, _ = random_inputs(sizes, dtype=torch.float32)
    visible = visible_pairs(form, sizes)
    for mode in ("full", "sparse"):
        for t in (3, 21, 42):
            only = torch.zeros_like(grad_out)
            only[:, :, t] = grad_out[:, :, t]
            result = run_package(query, key, value, settings_of(form, sizes, torch.float32, mode=mode), only)
            hidden = ~visible[:, :, t].any(1)[:, None, :, None]
            for name in ("dk", "dv"):
                assert (getattr(result, name).masked_select(hidden) == 0).all(), name


def spellings(shape: tuple[int, int, int, int, int]) -> dict[str, Settings]:
    """Causality, said in every way."""
    mask = distance(shape[:4]) >= 0
    common: dict[str, Any] = {"block_size": 8, "blocks_per_row": 2.0}
    return {
        "is_causal": Settings(is_causal=True, **common),
        "window": Settings(window=(-1, 0), **common),
        "mask": Settings(bias=mask, **common),
        "mask of each head": Settings(bias=mask.expand(shape[:4]).clone(), **common),
        "bias": Settings(bias=hide(mask).float(), **common),
        "both": Settings(is_causal=True, bias=mask, **common),
        "wide window": Settings(is_causal=True, window=(10**6, -1), **common),
    }


@DTYPES
@by_mode
@pytest.mark.parametrize("shape", [(2, 2, 75, 75, 20), (1, 2, 43, 70, 8), (1, 2, 70, 43, 8), (1, 1, 9, 9, 3)], ids=str)
def test_every_spelling_of_causality_gives_the_same_bits(shape, mode, dtype):
    inputs = random_inputs(shape, dtype=dtype)
    results: dict[str, Result] = {}
    for name, settings in spellings(shape).items():
        results[name] = run_package(*inputs[:3], Settings(**(vars(settings) | {"mode": mode})), *inputs[3:])
    for name, result in results.items():
        for part, a, e in zip(Result._fields, result, results["is_causal"], strict=True):
            assert torch.equal(a, e), f"{part} by {name}"


@DTYPES
@by_mode
@pytest.mark.parametrize("window", [(9, 4), (0, 0), (-1, 6), (20, 0)], ids=str)
def test_a_mask_that_is_a_window_gives_the_bits_of_the_window(window, mode, dtype):
    shape = (2, 2, 75, 75, 20)
    inputs = random_inputs(shape, dtype=dtype)
    left, right = window
    behind = distance(shape[:4])
    mask = (behind <= left if left >= 0 else behind > -100) & (behind >= -right)
    common: dict[str, Any] = {"block_size": 8, "mode": mode, "blocks_per_row": 2.0}
    by_window = run_package(*inputs[:3], Settings(window=window, **common), *inputs[3:])
    by_mask = run_package(*inputs[:3], Settings(bias=mask, **common), *inputs[3:])
    for part, a, e in zip(Result._fields, by_mask, by_window, strict=True):
        assert torch.equal(a, e), part


@DTYPES
@by_mode
@pytest.mark.parametrize("causal", [True, False])
def test_documents_by_a_mask_give_the_bits_of_packed_sequences(causal, mode, dtype):
    """Where every document begins with a block; the sums of dk and dv over the queries may round in another order."""
    ends = [16, 24, 64, 75]
    document = torch.tensor([sum(t >= end for end in ends) for t in range(75)])
    query, key, value, grad_out, grad_lse = random_inputs((1, 4, 75, 75, 20), key_heads=2, dtype=dtype)
    common: dict[str, Any] = {"block_size": 8, "mode": mode, "blocks_per_row": 2.0, "pool_queries": False}
    settings = Settings(bias=document[:, None] == document, is_causal=causal, **common)
    by_mask = run_package(query, key, value, settings, grad_out, grad_lse)
    packed = [x[0].transpose(0, 1).detach().requires_grad_() for x in (query, key, value)]
    keywords = settings.keywords()
    for name in ("attn_mask", "query_padding_mask"):
        del keywords[name]
    boundaries = torch.tensor([0, *ends])
    out, lse = varlen_attention(*packed, boundaries, boundaries, return_lse=True, enable_gqa=True, **keywords)
    grads = torch.autograd.grad((out, lse), packed, (grad_out[0].transpose(0, 1), grad_lse[0]))
    assert torch.equal(by_mask.out[0], out.transpose(0, 1))
    assert torch.equal(by_mask.lse[0], lse)
    assert torch.equal(by_mask.dq[0], grads[0].transpose(0, 1))
    if dtype == torch.float64:
        for a, e in ((by_mask.dk, grads[1]), (by_mask.dv, grads[2])):
            torch.testing.assert_close(a[0], e.transpose(0, 1), rtol=0, atol=1e-10)


@DTYPES
@by_mode
@pytest.mark.parametrize("window", [(-1, -1), (13, -1)], ids=str)
def test_a_query_alone_against_a_cache_gives_its_row_of_the_whole(window, mode, dtype):
    query, key, value, _, _ = random_inputs((1, 4, 75, 75, 20), key_heads=2, dtype=dtype)
    settings = Settings(block_size=8, mode=mode, blocks_per_row=3.0, is_causal=True, window=window)
    keywords = call_keywords(query, key, settings) | {"return_lse": True}
    out, lse = scaled_dot_product_attention(query, key, value, **keywords)
    cache = KVCache(1, 2, 20, 20, dtype=dtype, resolutions=(8, 1))
    asked = {name: keywords[name] for name in ("mode", "score", "blocks_per_row", "enable_gqa", "return_lse")}
    asked |= {} if window == (-1, -1) else {"window_size": window}
    for t in range(75):
        cache.append(key[:, :, t : t + 1], value[:, :, t : t + 1])
        step = cache.attend(query[:, :, t : t + 1], **asked)
        end = t + 1
        rows = {name: x for name, x in keywords.items() if name != "is_causal"}
        rows["attn_mask"] = causal_lower_right(1, end)
        alone = scaled_dot_product_attention(query[:, :, t:end], key[:, :, :end], value[:, :, :end], **rows)
        for actual in (step, alone):
            assert torch.equal(actual[0], out[:, :, t:end]), f"out of token {t}"
            assert torch.equal(actual[1], lse[:, :, t:end]), f"lse of token {t}"


def test_the_table_hides_something_in_each_of_its_forms():
    """Else the tests above would test nothing; pooling apart, which is what `pool_queries=False` is about."""
    for form in TOKEN_FORMS:
        visible = visible_pairs(form, (2, 2, 43, 51, 6))
        assert form.startswith("no pooled queries") or not visible.all(), form


class Model(torch.nn.Module):
    """One layer of attention that predicts a token from those before it: tokens and positions, learned."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(vocabulary, width)
        self.positions = torch.nn.Parameter(torch.randn(length, width) * 0.3)
        self.project = torch.nn.Linear(width, 3 * width)
        self.predict = torch.nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, **how: Any) -> Tensor:
        x = self.tokens(tokens) + self.positions
        query, key, value = self.project(x)[:, None].chunk(3, -1)
        return self.predict(scaled_dot_product_attention(query, key, value, **how)[:, 0])


@pytest.mark.parametrize("spelling", ["is_causal", "mask", "bias", "window", "huge bias"])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_random_tokens_cannot_be_predicted(spelling, mode):
    """A model that saw what it is to predict would get below log 4, whatever way the information takes."""
    vocabulary, length, batch, steps = 4, 64, 32, 60
    shape = (1, 1, length, length)
    settings = (spellings((*shape, 1)) | {"huge bias": Settings(bias=hide(distance(shape) >= 0, -1e9).float())})[
        spelling
    ]
    keywords = settings.keywords() | {"resolutions": (8, 1), "blocks_per_row": 1.0, "mode": mode}
    model = Model(vocabulary, length, 32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(vocabulary, (batch, length + 1))
        logits = model(tokens[:, :-1], **keywords)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # A guess of the right distribution loses log 4; over the last steps chance is below 0.004.
    assert sum(losses[-20:]) / 20 > math.log(vocabulary) - 0.01
    assert losses[0] > losses[-1]
