"""Packed sequences: the bits of every sequence alone, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import random_inputs
from mra_attention import MRAConfig, scaled_dot_product_attention, varlen_attention
from mra_attention._checks import calls
from mra_attention._ops import Inputs, arguments
from mra_attention.config import SETTINGS
from ops_cases import OPS
from torch import Tensor
from torch.autograd.gradcheck import gradcheck
from torch.nn.attention.bias import causal_lower_right
from varlen_cases import FORMS, KEY_LENGTHS, LENGTHS, by_form

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    # opcheck itself reads .grad of tensors that are no leaves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning"),
    # torch scripts functions of its own when forward mode is first used.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
]


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def packed(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key, value, grad_out, grad_lse of sequences of unequal lengths, with grouped heads."""
    query, key, value, grad_out, grad_lse = random_inputs(
        (1, 4, sum(LENGTHS), sum(KEY_LENGTHS), 12), key_heads=2, value_dim=9, dtype=dtype
    )
    return [x[0].transpose(0, 1) for x in (query, key, value, grad_out)] + [grad_lse[0]]


def alone(form: dict[str, Any], lower_right: bool, inputs: list[Tensor]) -> list[list[Tensor]]:
    """Output, log-sum-exp and gradients of every sequence by itself, packed as the results."""
    results: list[list[Tensor]] = []
    keywords = {"resolutions": (8, 1), "enable_gqa": True, "return_lse": True} | form
    query_starts, key_starts = boundaries(LENGTHS).tolist(), boundaries(KEY_LENGTHS).tolist()
    for item in range(len(LENGTHS)):
        of_query = slice(query_starts[item], query_starts[item + 1])
        of_key = slice(key_starts[item], key_starts[item + 1])
        places = (of_query, of_key, of_key, of_query)
        *leaves, grad_out = (x[at].transpose(0, 1)[None].contiguous() for x, at in zip(inputs, places, strict=False))
        leaves = [x.detach().requires_grad_() for x in leaves]
        if lower_right:
            size = (leaves[0].shape[2], leaves[1].shape[2])
            out, lse = scaled_dot_product_attention(
                *leaves, **(keywords | {"is_causal": False, "attn_mask": causal_lower_right(*size)})
            )
        else:
            out, lse = scaled_dot_product_attention(*leaves, **keywords)
        grads = torch.autograd.grad((out, lse), leaves, (grad_out, inputs[4][None, :, of_query]))
        results.append([out[0].transpose(0, 1), lse[0], *(x[0].transpose(0, 1) for x in grads)])
    packed = enumerate(zip(*results, strict=True))
    return [torch.cat([x.detach() for x in parts], 1 if i == 1 else 0) for i, parts in packed]


def together(form: dict[str, Any], inputs: list[Tensor], **more: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    keywords = {"resolutions": (8, 1), "enable_gqa": True, "return_lse": True} | form | more
    out, lse = varlen_attention(*leaves, boundaries(LENGTHS), boundaries(KEY_LENGTHS), **keywords)
    grads = torch.autograd.grad((out, lse), leaves, (inputs[3], inputs[4]))
    return [out.detach(), lse.detach(), *grads]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), name
        assert not a.isnan().any(), name
        assert torch.equal(a, e), name


@pytest.mark.parametrize(
    ("form", "lower_right"),
    [(form, False) for form in FORMS] + [(form, True) for form in FORMS if form.startswith("causal")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_sequence_gets_the_bits_that_it_gets_alone(form, lower_right, dtype):
    inputs = packed(dtype)
    more = {"causal_alignment": "lower_right"} if lower_right else {}
    assert_same(together(FORMS[form], inputs, **more), alone(FORMS[form], lower_right, inputs))


@by_form
@pytest.mark.parametrize("layout", ["heads first", "of one projection", "strided", "expanded cotangent"])
def test_layouts(form, layout):
    inputs = packed()
    plain = together(FORMS[form], inputs)
    if layout == "heads first":
        inputs[:3] = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:3]]
    elif layout == "of one projection":
        inputs[1:3] = torch.cat([inputs[1], inputs[2]], -1).split((12, 9), -1)
    elif layout == "strided":
        inputs[:4] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4]]
    else:
        inputs[3] = torch.ones((), dtype=torch.float32).expand_as(inputs[3])
        inputs[4] = torch.ones(()).expand_as(inputs[4])
        plain = together(FORMS[form], [*inputs[:3], inputs[3].contiguous(), inputs[4].contiguous()])
    assert_same(together(FORMS[form], inputs), plain)


@by_form
def test_any_number_of_threads_gives_the_same_bits(form):
    inputs, threads, results = packed(), torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(together(FORMS[form], inputs))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])


@by_form
def test_what_other_sequences_hold_does_not_matter(form):
    inputs = packed()
    expected = together(FORMS[form], inputs)
    start, end = boundaries(LENGTHS)[2:4].tolist()
    key_start, key_end = boundaries(KEY_LENGTHS)[2:4].tolist()
    changed = [torch.full_like(x, math.nan) for x in inputs[:3]]
    for x, y, at in zip(changed, inputs, [slice(start, end), *[slice(key_start, key_end)] * 2], strict=False):
        x[at] = y[at]
    actual = together(FORMS[form], [*changed, *inputs[3:]])
    for index, at in (
        (0, slice(start, end)),
        (2, slice(start, end)),
        *((i, slice(key_start, key_end)) for i in (3, 4)),
    ):
        assert torch.equal(actual[index][at], expected[index][at])


def test_heads_of_key_and_value_may_differ_in_number():
    query, key, value = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 1, 5)
    out = varlen_attention(query, key, value, [0, 4, 9], [0, 4, 9], enable_gqa=True, resolutions=(8, 1))
    keys, values = key.repeat_interleave(2, 1), value.repeat_interleave(4, 1)
    assert torch.equal(out, varlen_attention(query, keys, values, [0, 4, 9], [0, 4, 9], resolutions=(8, 1)))


def test_a_config_is_the_same_as_its_settings():
    query, key, value = packed()[:3]
    starts, key_starts = boundaries(LENGTHS), boundaries(KEY_LENGTHS)
    settings: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": (1, 2, 3, 4), "mode": "sparse"}
    given = (query, key, value, starts, key_starts)
    expected = varlen_attention(*given, enable_gqa=True, **settings)
    assert torch.equal(varlen_attention(*given, enable_gqa=True, config=MRAConfig(**settings)), expected)
    other = MRAConfig(**settings | {"mode": "full"})
    assert torch.equal(varlen_attention(*given, enable_gqa=True, config=other, mode="sparse"), expected)


def test_boundaries_of_every_kind():
    query, key, value = packed()[:3]
    keywords: dict[str, Any] = {"resolutions": (8, 1), "enable_gqa": True}
    starts, key_starts = boundaries(LENGTHS), boundaries(KEY_LENGTHS)
    expected = varlen_attention(query, key, value, starts, key_starts, **keywords)
    for given in (starts.int(), starts.tolist(), tuple(starts.tolist()), starts.repeat_interleave(2)[::2]):
        assert torch.equal(varlen_attention(query, key, value, given, key_starts, **keywords), expected)
    assert expected.is_contiguous()


def test_nothing_at_all():
    query, key, value = (torch.randn(0, 2, 4) for _ in range(3))
    for starts in ([0], [0, 0], [0, 0, 0]):
        out, lse = varlen_attention(query, key, value, starts, starts, return_lse=True)
        assert out.shape == (0, 2, 4)
        assert lse.shape == (2, 0)
        assert varlen_attention(query, key, value, starts, starts, is_causal=True).shape == (0, 2, 4)


def test_keys_that_no_query_sees_have_the_gradient_zero():
    key, value = torch.randn(9, 2, 4, requires_grad=True), torch.randn(9, 2, 4, requires_grad=True)
    query = torch.randn(5, 2, 4, requires_grad=True)
    out = varlen_attention(query, key, value, [0, 5, 5], [0, 0, 9])
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), (query, key, value)):
        assert (grad == 0).all()


@by_form
def test_gradcheck_where_every_block_is_selected(form):
    inputs = [x.requires_grad_() for x in packed(torch.float64)[:3]]
    visible = {k: v for k, v in FORMS[form].items() if k in ("is_causal", "window_size")}
    budget = {"blocks_per_row": math.inf, "num_blocks": None} | visible

    def attention(*tensors: Tensor) -> Tensor:
        starts = (boundaries(LENGTHS), boundaries(KEY_LENGTHS))
        return varlen_attention(*tensors, *starts, enable_gqa=True, resolutions=(8, 1), **budget)

    assert gradcheck(attention, inputs, fast_mode=True)


def test_autocast():
    inputs = packed()[:3]
    starts = (boundaries(LENGTHS), boundaries(KEY_LENGTHS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = varlen_attention(*inputs, *starts, enable_gqa=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, varlen_attention(*(x.bfloat16() for x in inputs), *starts, enable_gqa=True))


by_causal = pytest.mark.parametrize("is_causal", [False, True], ids=["two-level", "causal"])


@by_causal
def test_dropout_of_a_single_sequence_is_that_of_the_sequence_alone(is_causal):
    query, key, value = torch.randn(3, 70, 2, 8).unbind()
    torch.manual_seed(5)
    out = varlen_attention(query, key, value, [0, 70], [0, 70], dropout_p=0.4, is_causal=is_causal)
    torch.manual_seed(5)
    alone = (x.transpose(0, 1)[None] for x in (query, key, value))
    expected = scaled_dot_product_attention(*alone, dropout_p=0.4, is_causal=is_causal)
    assert torch.equal(out, expected[0].transpose(0, 1))


@by_causal
def test_sequences_drop_different_weights(is_causal):
    query, key, value = (x.repeat(2, 1, 1) for x in torch.randn(3, 70, 2, 8).unbind())
    starts = [0, 70, 140]
    out = varlen_attention(query, key, value, starts, starts, dropout_p=0.4, is_causal=is_causal)
    assert not torch.equal(out[:70], out[70:])
    leaves = [x.double().requires_grad_() for x in (query[:40], key[:40], value[:40])]

    def attention(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return varlen_attention(*tensors, [0, 25, 40], [0, 25, 40], dropout_p=0.4, is_causal=is_causal)

    assert gradcheck(attention, leaves, fast_mode=True)


# Operators


@by_form
def test_opcheck(form):
    """Schema and fake kernels for every form; one of each kind of plan below AOT as well."""
    query, key, value = (x.transpose(0, 1)[None].detach() for x in packed(torch.float64)[:3])
    config = MRAConfig(resolutions=(8, 1), **{k: v for k, v in FORMS[form].items() if k in SETTINGS})
    right = 0 if FORMS[form].get("is_causal") else FORMS[form].get("window_size", (-1, -1))[1]
    left = FORMS[form].get("window_size", (-1, -1))[0]
    settings = calls.settings(config, 4, 0.3, None, (left, right), lower_right=False, dropout_p=0.0)
    starts = (boundaries(LENGTHS), boundaries(KEY_LENGTHS))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    inputs = Inputs(*leaves, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
    all_tests = form in ("two-level", "causal")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    more: dict[str, Any] = {} if all_tests else {"test_utils": tests}
    assert set(torch.library.opcheck(OPS.forward.default, (*inputs, *settings), **more).values()) == {"SUCCESS"}
    selecting = arguments.for_select(inputs)
    assert set(torch.library.opcheck(OPS.select.default, (*selecting, *settings), **more).values()) == {"SUCCESS"}
    with torch.no_grad():
        out, lse, chosen = OPS.forward(*inputs, *settings)
    rest = arguments.for_backward(
        inputs._replace(query=query.detach(), key=key.detach(), value=value.detach()), out, lse, chosen
    )
    given = (torch.randn_like(out), torch.randn_like(lse), *rest, False, *settings)
    assert set(torch.library.opcheck(OPS.backward.default, given, **more).values()) == {"SUCCESS"}


@pytest.mark.parametrize("form", ["two-level", "causal"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(form, dynamic):
    torch.compiler.reset()

    def attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor) -> Tensor:
        return varlen_attention(
            query, key, value, starts, key_starts, enable_gqa=True, resolutions=(8, 1), **FORMS[form]
        )

    inputs = [x.requires_grad_() for x in packed()[:3]]
    starts = (boundaries(LENGTHS), boundaries(KEY_LENGTHS))
    traced = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    out, expected = traced(*inputs, *starts), attention(*inputs, *starts)
    assert torch.equal(out, expected)
    cotangent = torch.randn_like(out)
    grads, wanted = (torch.autograd.grad(x, inputs, cotangent) for x in (out, expected))
    for grad, want in zip(grads, wanted, strict=True):
        assert torch.equal(grad, want)


def test_torch_func():
    query, key, value = packed()[:3]
    starts = (boundaries(LENGTHS), boundaries(KEY_LENGTHS))

    def loss(query: Tensor) -> Tensor:
        return varlen_attention(query, key, value, *starts, enable_gqa=True).square().sum()

    leaf = query.detach().requires_grad_()
    assert torch.equal(torch.func.grad(loss)(query), torch.autograd.grad(loss(leaf), leaf)[0])
    with pytest.raises(NotImplementedError, match=r"packed sequences below torch.vmap"):
        torch.vmap(loss)(query[None])
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.jvp(loss, (query,), (query,))
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


QUERY = torch.randn(20, 4, 8)
STARTS = [0, 12, 20]
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "total": ({"cu_seqlens_q": [0, 12, 19]}, ValueError, "cu_seqlens_q must rise from 0 to .* 20; got"),
    "not from 0": ({"cu_seqlens_k": [1, 12, 20]}, ValueError, "cu_seqlens_k must rise from 0"),
    "falling": ({"cu_seqlens_k": [0, 13, 12, 20]}, ValueError, "cu_seqlens_k must rise from 0"),
    "another number": ({"cu_seqlens_k": [0, 20]}, ValueError, "must be of equal length, got 3 and 2"),
    "empty": (
        {"cu_seqlens_k": torch.zeros(0, dtype=torch.int32)},
        ValueError,
        "cu_seqlens_k must be an int32 or int64",
    ),
    "float": ({"cu_seqlens_k": torch.tensor([0.0, 20.0])}, ValueError, "cu_seqlens_k must be an int32 or int64"),
    "two dimensions": ({"cu_seqlens_k": torch.zeros(1, 2).int()}, ValueError, "cu_seqlens_k must be .* one dimension"),
    "list of floats": ({"cu_seqlens_k": [0, 20.0]}, TypeError, r"cu_seqlens_k\[1\] must be an integer"),
    "none": ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q must be a tensor or a sequence"),
    "meta": (
        {"cu_seqlens_q": torch.zeros(3, device="meta").int()},
        NotImplementedError,
        "cu_seqlens_q is on device meta",
    ),
    "four dimensions": ({"query": QUERY[None]}, ValueError, "three dimensions .* query \\(1, 20, 4, 8\\)"),
    "heads": (
        {"query": QUERY.repeat(1, 2, 1)},
        ValueError,
        "numbers of heads must be equal; enable_gqa=True would group",
    ),
    "group": ({"query": torch.randn(20, 6, 8), "enable_gqa": True}, ValueError, "must divide query's"),
    "value": ({"value": torch.randn(19, 4, 8)}, ValueError, "key and value must have the same number of tokens"),
    "value heads": ({"value": torch.randn(20, 2, 8)}, ValueError, "the numbers of heads must be equal; got"),
    "head_dim": ({"query": torch.randn(20, 4, 9)}, ValueError, "same head_dim"),
    "dtype": ({"query": QUERY.double()}, TypeError, "same dtype"),
    "alignment": ({"causal_alignment": "right"}, ValueError, "causal_alignment must be 'upper_left' or 'lower_right'"),
    "alignment alone": (
        {"causal_alignment": "lower_right"},
        ValueError,
        "'lower_right' is for is_causal=True, a window",
    ),
    "window": ({"window_size": (1,)}, TypeError, "window_size must be two integers"),
    "local": ({"local_blocks": 0}, ValueError, "local_blocks must be an integer of at least 1"),
    "rates": ({"blocks_per_row": [1, 2]}, ValueError, "one for each of the 4 heads of query, got 2"),
    "config": ({"config": "full"}, TypeError, "config must be None or a mra_attention.MRAConfig, got str"),
    "setting": ({"plan": None}, TypeError, "'plan' is no argument and no setting"),
    "is_causal": ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
    "dropout": ({"dropout_p": 2.0}, ValueError, "dropout_p must be a number in"),
    "mode": ({"mode": "dense"}, ValueError, "mode must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    given, error, words = REFUSED[name]
    valid = {"query": QUERY, "key": QUERY, "value": QUERY, "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
    with pytest.raises(error, match=words):
        varlen_attention(**(valid | given))
