"""The oracle itself agrees with torch's exact attention, the released code and the closed-form backward."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from data import UPSTREAM, load_upstream
from forms import BLOCK_FORMS, FORMS, TOKEN_FORMS, by_form, distance, settings_of, visible_pairs
from oracle import Settings
from torch.nn.functional import scaled_dot_product_attention

Sizes = tuple[int, int, int, int, int, int, int]
SHAPES: dict[str, Sizes] = {
    "self": (2, 2, 2, 23, 23, 8, 8),
    "cross-gqa-dv": (2, 4, 2, 17, 40, 5, 3),
    "one": (1, 1, 1, 1, 1, 1, 1),
}
by_shape = pytest.mark.parametrize("shape", SHAPES)
by_mode = pytest.mark.parametrize("mode", ["full", "sparse"])


def inputs(shape: Sizes, seed: int = 0) -> tuple[torch.Tensor, ...]:
    batch, heads, key_heads, query_length, key_length, dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return (
        normal(batch, heads, query_length, dim),
        normal(batch, key_heads, key_length, dim),
        normal(batch, key_heads, key_length, value_dim),
        normal(batch, heads, query_length, value_dim),
        normal(batch, heads, query_length),
    )


def outer_shape(shape: Sizes) -> tuple[int, int, int, int]:
    return shape[0], shape[1], shape[3], shape[4]


@by_shape
@by_mode
@by_form
def test_everything_exact_is_exact_attention(shape, mode, form):
    """The form's mask is written out for torch; a query that sees nothing has output and gradient 0 here, lse -inf."""
    query, key, value, grad_out, grad_lse = inputs(SHAPES[shape])
    sizes = outer_shape(SHAPES[shape])
    settings = settings_of(form, sizes, mode=mode, blocks_per_row=math.inf)
    selected = oracle.select(query, key, settings)
    assert torch.equal(selected, oracle.exact_blocks(query, key, torch.ones_like(selected), settings))
    result = oracle.run(query, key, value, selected, settings, grad_out, grad_lse)

    visible = visible_pairs(form, sizes)
    some = visible.any(-1)
    bias = torch.zeros(sizes, dtype=torch.float64)
    if settings.bias is not None and settings.bias.is_floating_point():
        bias = settings.bias.expand(sizes)
    bias = torch.where(visible | ~some[..., None], bias.clamp(min=-1e8), -math.inf)
    if settings.alibi_slopes is not None:
        behind = distance(sizes) + (sizes[3] - sizes[2] if settings.lower_right else 0)
        bias = bias - settings.alibi_slopes[:, None, None] * behind.abs()
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    keys, values = (x.repeat_interleave(sizes[1] // key.shape[1], 1) for x in leaves[1:])
    logits = leaves[0] @ keys.transpose(-1, -2) / math.sqrt(query.shape[3])
    if settings.softcap is not None:
        logits = settings.softcap * torch.tanh(logits / settings.softcap)
    logits = logits + bias
    if settings.sinks is not None:
        logits = torch.cat([logits, settings.sinks[:, None, None].expand(*logits.shape[:3], 1)], -1)
    lse = logits.logsumexp(-1)
    if settings.softcap is None and settings.sinks is None:
        out = scaled_dot_product_attention(*leaves, bias, enable_gqa=True)
    else:
        out = logits.softmax(-1)[..., : sizes[3]] @ values
    torch.testing.assert_close(result.out, out.detach() * some[..., None], rtol=0, atol=1e-12)
    torch.testing.assert_close(result.lse, lse.detach().masked_fill(~some, -math.inf), rtol=0, atol=1e-12)
    target = (out * grad_out)[some].sum() + (lse * grad_lse)[some].sum()
    for actual, wanted in zip(result[2:], torch.autograd.grad(target, leaves), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-11)


@by_shape
@by_mode
@pytest.mark.parametrize("blocks_per_row", [0.1, 1.7])
@by_form
def test_closed_form_backward_equals_autograd(shape, mode, form, blocks_per_row):
    query, key, value, grad_out, grad_lse = inputs(SHAPES[shape])
    settings = settings_of(form, outer_shape(SHAPES[shape]), mode=mode, blocks_per_row=blocks_per_row)
    selected = oracle.select(query, key, settings)
    result = oracle.run(query, key, value, selected, settings, grad_out, grad_lse)
    closed = oracle.closed_form_gradients(
        query, key, value, selected, settings, grad_out, grad_lse, result.out, result.lse
    )
    for actual, wanted in zip(closed, result[2:], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_the_form_follows_from_what_is_hidden():
    shape = (2, 2, 43, 51)
    query, key = torch.randn(2, 2, 43, 4), torch.randn(2, 2, 51, 4)
    for form in FORMS:
        expected = "block" if form in BLOCK_FORMS else "token"
        found = oracle.forms(query, key, settings_of(form, shape))
        assert found == [expected] * 2, form
    assert set(TOKEN_FORMS).isdisjoint(BLOCK_FORMS)


@pytest.mark.parametrize("name", UPSTREAM)
def test_released_code(name):
    case = load_upstream(name)
    selected = oracle.select(case.query, case.key, case.settings)
    result = oracle.run(case.query, case.key, case.value, selected, case.settings, case.grad_out)
    for actual, wanted in ((result.out, case.out), (result.dq, case.dq), (result.dk, case.dk), (result.dv, case.dv)):
        torch.testing.assert_close(actual, wanted.double(), rtol=0, atol=5e-6)


def test_coarse_block_by_hand():
    """Two key blocks, the second one short: exp(c) counts once per key and meets the mean of the values."""
    query = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 1, 2, 1)
    key = torch.tensor([0.5] * 8 + [-1.0, 0.0], dtype=torch.float64).view(1, 1, 10, 1)
    value = torch.arange(10, dtype=torch.float64).view(1, 1, 10, 1)
    settings = Settings(block_size=8, num_blocks=1, scale=1.0)
    selected = oracle.select(query, key, settings)
    assert selected.tolist() == [[[[True, False]]]]

    out, lse = oracle.attention(query, key, value, selected, settings)
    coarse = math.exp(2.0 * -0.5)
    for t, q in enumerate((1.0, 3.0)):
        total = 8 * math.exp(q * 0.5) + 2 * coarse
        assert lse[0, 0, t].item() == pytest.approx(math.log(total), abs=1e-14)
        expected = (8 * math.exp(q * 0.5) * 3.5 + 2 * coarse * 8.5) / total
        assert out[0, 0, t, 0].item() == pytest.approx(expected, abs=1e-13)
    sparse_out, _ = oracle.attention(query, key, value, selected, Settings(block_size=8, mode="sparse", scale=1.0))
    torch.testing.assert_close(sparse_out, torch.full_like(sparse_out, 3.5), rtol=0, atol=1e-13)


def test_a_window_by_hand():
    """Blocks of 2 tokens, a window of 3 before and 1 behind: what is cut, what is first, what is coarse."""
    query = torch.tensor([1.0], dtype=torch.float64).expand(1, 1, 8, 1)
    key = torch.arange(8, dtype=torch.float64).view(1, 1, 8, 1)
    settings = Settings(block_size=2, window=(3, 1), blocks_per_row=1, scale=1.0, first_blocks=0)
    selected = oracle.select(query, key, settings)
    # Token 4 sees 1 to 5: block 0 is cut, 1 is open, 2 its own. Token 5 sees 2 to 6: 1 and 2 are open, 3 is cut.
    assert selected[0, 0, 4].tolist() == [True, False, True, False]
    assert selected[0, 0, 5].tolist() == [False, False, True, True]
    out, lse = oracle.attention(query, key, key, selected, settings)
    weights = {1.0: 1, 2.5: 2, 4.0: 1, 5.0: 1}
    total = sum(n * math.exp(x) for x, n in weights.items())
    assert lse[0, 0, 4].item() == pytest.approx(math.log(total), abs=1e-14)
    expected = sum(n * math.exp(x) * x for x, n in weights.items()) / total
    assert out[0, 0, 4, 0].item() == pytest.approx(expected, abs=1e-13)
    first = oracle.select(query, key, Settings(block_size=2, window=(3, 1), blocks_per_row=1, scale=1.0))
    assert first[0, 0, 5].tolist() == [False, True, True, True]
    two = oracle.select(query, key, Settings(block_size=2, window=(3, -1), num_blocks=12, scale=1.0, first_blocks=0))
    # 12 blocks for 4 rows: token 1 has its own and the two of the largest logits.
    assert two[0, 0, 1].tolist() == [True, False, True, True]


def test_masks_by_hand():
    """Means run over valid tokens only; padded queries and queries without a key give 0 and -inf."""
    nan = math.nan
    query = torch.tensor([2.0, nan, 1.0], dtype=torch.float64).view(1, 1, 3, 1).repeat(2, 1, 1, 1)
    key = torch.tensor([nan] * 8 + [3.0, nan, 5.0], dtype=torch.float64).view(1, 1, 11, 1).repeat(2, 1, 1, 1)
    key_mask = torch.tensor([[False] * 8 + [True, False, True], [False] * 11])
    query_mask = torch.tensor([[True, False, True]]).expand(2, 3)
    settings = Settings(block_size=8, scale=1.0, key_mask=key_mask, query_mask=query_mask)
    selected = oracle.select(query, key, settings)
    # The first block begins at the first valid key: there is only one.
    assert selected.tolist() == [[[[True]]], [[[False]]]]

    none = torch.zeros_like(selected)
    out, lse = oracle.attention(query, key, key, none, settings)
    assert out[0, 0, :, 0].tolist() == pytest.approx([4.0, 0.0, 4.0])
    assert lse[0, 0].tolist() == pytest.approx([math.log(2) + 1.5 * 4.0, -math.inf, math.log(2) + 1.5 * 4.0])
    assert out[1].abs().max() == 0.0
    assert (lse[1] == -math.inf).all()
    result = oracle.run(query, key, key, none, settings, torch.full_like(query, 1.0), torch.ones_like(lse))
    assert all(x.isfinite().all() for x in result[2:])


def test_padding_in_front_by_hand():
    """Blocks of 2; three padded tokens, then five valid ones. Padded queries lie in rows -2 and -1."""
    x = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64).view(1, 1, 8, 1)
    mask = torch.arange(8)[None] >= 3
    settings = Settings(block_size=2, scale=1.0, key_mask=mask, num_blocks=4)
    selected = oracle.select(x, x, settings)
    # Every row's best is the last block; the fourth goes to the row with the smallest queries.
    assert selected[0, 0].tolist() == [[False, False, True]] * 2 + [[False, True, True]] + [[False, False, True]] * 2
    out, _ = oracle.attention(x, x, x, selected, settings)
    alone, _ = oracle.attention(
        x[:, :, 3:], x[:, :, 3:], x[:, :, 3:], selected[:, :, 2:], Settings(block_size=2, scale=1.0)
    )
    torch.testing.assert_close(out[:, :, 3:], alone, rtol=0, atol=1e-14)
    # Query 0 is alone in its row, queries 1 and 2 share the mean 7.5.
    for t, pooled in ((0, 9.0), (1, 7.5)):
        own = float(x[0, 0, t, 0])
        terms = [(2, 1.5, pooled * 1.5), (2, 3.5, pooled * 3.5), (1, 5.0, own * 5.0)]
        largest = max(logit for *_, logit in terms)
        total = sum(n * math.exp(logit - largest) for n, _, logit in terms)
        expected = sum(n * math.exp(logit - largest) * v for n, v, logit in terms) / total
        assert out[0, 0, t, 0].item() == pytest.approx(expected, abs=1e-12)
    everything = oracle.select(x, x, Settings(block_size=2, key_mask=mask, blocks_per_row=3))
    assert everything.all()
    assert everything.shape == (1, 1, 5, 3)
