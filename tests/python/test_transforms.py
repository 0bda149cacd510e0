"""torch.func, checkpoints, compilers and autocast, with everything that a call may have beside query, key and value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mra_attention import scaled_dot_product_attention
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

# torch scripts functions of its own when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")

BLOCK, QUERIES, KEYS = 8, 19, 27
NEAR = (torch.arange(QUERIES)[:, None] - torch.arange(KEYS)).abs() <= 11
BIAS = torch.randn(QUERIES, KEYS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SEED = 5


def _lengths(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(query.shape[-2])[:, None], torch.arange(key.shape[-2])


# name: the arguments of a call, made inside the function that is transformed
FORMS: dict[str, Callable[[Tensor, Tensor], dict[str, Any]]] = {
    "key padding": lambda q, k: {"attn_mask": torch.arange(k.shape[-2]) % 5 > 0},
    "mask": lambda q, k: {"attn_mask": (_lengths(q, k)[0] - _lengths(q, k)[1]).abs() <= 11},
    "bias": lambda q, k: {"attn_mask": (_lengths(q, k)[0] - _lengths(q, k)[1]).abs().to(q.dtype) * -0.1},
    "query padding": lambda q, k: {"query_padding_mask": torch.arange(q.shape[-2]) < 15},
    "causal": lambda q, k: {"is_causal": True},
    "causal, lower right": lambda q, k: {"attn_mask": causal_lower_right(q.shape[-2], k.shape[-2])},
    "window": lambda q, k: {"window_size": (9, 4)},
    "causal, window and mask": lambda q, k: {
        "is_causal": True,
        "window_size": (9, 4),
        "attn_mask": torch.arange(k.shape[-2]) % 5 > 0,
    },
    "per head": lambda q, k: {"blocks_per_row": (1, 2)},
    "token form": lambda q, k: {"pool_queries": False},
    "dropout": lambda q, k: {"dropout_p": 0.3},
    "mask and dropout": lambda q, k: {"attn_mask": _lengths(q, k)[0] >= _lengths(q, k)[1], "dropout_p": 0.3},
    "causal and dropout": lambda q, k: {"is_causal": True, "dropout_p": 0.3},
}
by_form = pytest.mark.parametrize("form", FORMS)
by_form_without_dropout = pytest.mark.parametrize("form", [form for form in FORMS if "dropout" not in form])
# torch can make no causal bias below its compilers; test_causal_ops.py gives them one.
by_compiled_form = pytest.mark.parametrize("form", [form for form in FORMS if form != "causal, lower right"])
by_dropout = pytest.mark.parametrize("form", [form for form in FORMS if "dropout" in form])


def inputs(dtype: torch.dtype = torch.float64, queries: int = QUERIES, keys: int = KEYS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, queries, 4), (1, 2, keys, 4), (1, 2, keys, 5)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def attention_of(form: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        arguments = FORMS[form](query, key)
        return scaled_dot_product_attention(
            query, key, value, **({"resolutions": (BLOCK, 1), "blocks_per_row": 1.5, "mode": "full"} | arguments)
        )

    return attention


def loss_of(form: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    attention = attention_of(form)
    return lambda query, key, value: attention(query, key, value).square().sum()


def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    torch.manual_seed(SEED)
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


@by_form
def test_func_grad(form: str) -> None:
    torch.manual_seed(SEED)
    grads = torch.func.grad(loss_of(form), (0, 1, 2))(*inputs())
    assert_equal(list(grads), gradients(attention_of(form), inputs())[1:])


@by_form_without_dropout
def test_vmap_and_its_gradient(form: str) -> None:
    batches = [torch.stack([x, -x, 2 * x]) for x in inputs()]
    attention, loss = attention_of(form), loss_of(form)
    assert torch.equal(
        torch.vmap(attention)(*batches), torch.stack([attention(*x) for x in zip(*batches, strict=True)])
    )
    mapped = torch.vmap(torch.func.grad(loss, (0, 1, 2)))(*batches)
    for index, tensors in enumerate(zip(*batches, strict=True)):
        assert_equal([x[index] for x in mapped], list(torch.func.grad(loss, (0, 1, 2))(*tensors)))
    shared = torch.vmap(torch.func.grad(loss), (0, None, None))(batches[0], *inputs()[1:])
    assert_equal(list(shared), [torch.func.grad(loss)(query, *inputs()[1:]) for query in batches[0]])


@pytest.mark.parametrize("mask", [NEAR, BIAS], ids=["mask", "bias"])
@pytest.mark.parametrize("in_dims", [(None, None, 0), (0, None, 0), (None, 0, None), (0, 0, 2)], ids=str)
def test_vmap_of_masks(mask: Tensor, in_dims: tuple[int | None, ...]) -> None:
    """Query, key and value, and the mask: mapped together, or some of them only; the gradient, too."""
    query, key, value = inputs()

    def batched(x: Tensor, other: Tensor, dim: int | None) -> Tensor:
        return x if dim is None else torch.stack([x, other], dim)

    arguments = [
        batched(x, other, dim)
        for x, other, dim in zip((query, key, mask), (2 * query, -key, mask.flip(0)), in_dims, strict=True)
    ]

    def loss(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        out = scaled_dot_product_attention(query, key, value, mask, resolutions=(BLOCK, 1), blocks_per_row=1)
        return out.square().sum()

    for function in (loss, torch.func.grad(loss)):
        mapped = torch.vmap(function, in_dims)(*arguments)
        for index in range(2):
            single = [x if dim is None else x.select(dim, index) for x, dim in zip(arguments, in_dims, strict=True)]
            assert torch.equal(mapped[index], function(*single))


@by_form_without_dropout
def test_jacrev(form: str) -> None:
    query, key, value = inputs(queries=2)
    if form == "query padding":
        pytest.skip("its mask is for longer queries")

    def of_query(query: Tensor) -> Tensor:
        return attention_of(form)(query, key, value)

    expected = torch.autograd.functional.jacobian(of_query, query)
    torch.testing.assert_close(torch.func.jacrev(of_query)(query), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(of_query, query, vectorize=True), expected)


@by_dropout
def test_dropout_below_vmap_is_refused(form: str) -> None:
    """Also where the transform is hidden, as the map over the backward in `jacrev`."""
    query, key, value = inputs()
    loss = loss_of(form)
    calls: list[Callable[[], Any]] = [
        lambda: torch.vmap(loss, (0, None, None), randomness="different")(torch.stack([query, query]), key, value),
        lambda: torch.vmap(torch.func.grad(loss), (0, None, None), randomness="same")(query[None], key, value),
        lambda: torch.func.jacrev(lambda q: attention_of(form)(q, key, value))(query),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"dropout_p=0.3 below torch.vmap.*without vmap"):
            call()


@by_form
def test_second_derivatives_are_refused(form: str) -> None:
    leaves = [x.requires_grad_() for x in inputs()]
    grads = torch.autograd.grad(loss_of(form)(*leaves), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grads[0].sum().backward()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda q: torch.func.grad(loss_of(form))(q, *inputs()[1:]).sum())(inputs()[0])


@by_form
def test_forward_mode_is_refused(form: str) -> None:
    query, key, value = inputs()
    with pytest.raises(NotImplementedError, match="no forward-mode automatic differentiation"):
        torch.func.jvp(lambda q: attention_of(form)(q, key, value), (query,), (query,))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode automatic differentiation"),
    ):
        attention_of(form)(query, forward_ad.make_dual(key, key), value)


def test_a_bias_with_a_tangent_is_refused() -> None:
    query, key, value = inputs()
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode automatic differentiation"),
    ):
        scaled_dot_product_attention(query, key, value, forward_ad.make_dual(BIAS, BIAS))


@by_form
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(form: str, use_reentrant: bool) -> None:
    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in inputs()]
        torch.manual_seed(SEED)
        out = function(*leaves)
        out.square().sum().backward()
        return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]

    attention = attention_of(form)
    again = run(lambda *tensors: checkpoint(attention, *tensors, use_reentrant=use_reentrant))
    assert_equal(again, run(attention))


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
@by_compiled_form
def test_compile(form: str, dynamic: bool) -> None:
    attention = attention_of(form)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for sizes in [(QUERIES, KEYS), (33, 41)] if dynamic else [(QUERIES, KEYS)]:
        tensors = inputs(queries=sizes[0], keys=sizes[1])
        assert_equal(gradients(compiled, tensors), gradients(attention, tensors))


@pytest.mark.usefixtures("_fresh_compiler")
@by_compiled_form
def test_autocast_and_compile_below_it(form: str) -> None:
    attention, tensors = attention_of(form), inputs(torch.float32)

    def run(function: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        torch.manual_seed(SEED)
        return function(*tensors)

    with torch.autocast("cpu", torch.bfloat16):
        out = run(attention, tensors)
        compiled = run(torch.compile(attention, fullgraph=True, backend="aot_eager"), tensors)
    assert out.dtype == torch.bfloat16
    assert torch.equal(compiled, out)
    if form != "bias":  # the bias of float32 is cast under autocast, and made in bfloat16 without it
        assert torch.equal(run(attention, [x.bfloat16() for x in tensors]), out)


class Attention(torch.nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_of(self.form)(query, key, value)


@pytest.mark.parametrize("strict", [False, True])
@by_compiled_form
def test_export(form: str, strict: bool) -> None:
    tensors = tuple(inputs())
    program = torch.export.export(Attention(form), tensors, strict=strict).module()
    for factor in (1, 2):
        scaled = [factor * x for x in tensors]
        results = []
        for function in (program, attention_of(form)):
            torch.manual_seed(SEED)
            results.append(function(*scaled))
        assert torch.equal(*results)
    if "dropout" in form:
        assert not torch.equal(program(*tensors), program(*tensors))
