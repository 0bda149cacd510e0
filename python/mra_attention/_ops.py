"""The torch operators `mra_attention::select_blocks`, `forward` and `backward`: schema, fake kernel, autograd.

Registration. `Library.define` and `impl` rather than `custom_op`: a call passes fewer Python frames, and kernels are
registered per device, so that another device adds an `impl` and shares everything else. What `custom_op` adds is done
here: every operator has an autograd kernel, and every output is a fresh tensor. The schemas have no defaults:
`register_autograd` under torch.compile fails when a value that is passed equals its default (pytorch#162687).

Two ways to differentiate. Outside torch.func the operator's own autograd kernel records the call. That kernel cannot
run below a torch.func transform (pytorch#168393), where the call goes through an `autograd.Function` around the same
operator. No Function has a `jvp`: Dynamo refuses a custom one, and without it torch.func.jvp raises.
"""

# pyright: reportUnknownMemberType=false, reportPrivateUsage=false
# torch.library is partly without annotations; the names of torch._C are those that torch.library uses itself.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _cpu
from ._outputs import empty_grads, empty_outputs, empty_plan

_Tensors3: TypeAlias = tuple[Tensor, Tensor, Tensor]

_SCHEMAS = {
    "select_blocks": "(Tensor query, Tensor key, Tensor? key_mask, Tensor? query_mask, Tensor? attn_bias, "
    "float scale, SymInt block_size, float blocks_per_row, SymInt? num_blocks, SymInt first_blocks, "
    "SymInt diagonal_blocks) -> Tensor",
    "forward": "(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? query_mask, "
    "Tensor? attn_bias, Tensor? plan, Tensor? seed, float scale, SymInt block_size, bool sparse, float dropout_p, "
    "float blocks_per_row, SymInt? num_blocks, SymInt first_blocks, "
    "SymInt diagonal_blocks) -> (Tensor out, Tensor lse, Tensor plan_out)",
    "backward": "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor? key_mask, Tensor? query_mask, Tensor? attn_bias, Tensor plan, Tensor? seed, float scale, "
    "SymInt block_size, bool sparse, float dropout_p) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
}

# The strides of the outputs follow those of the inputs, so a compiler must pass inputs with the strides it has traced.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)

_library = torch.library.Library("mra_attention", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=_TAGS)
    _library.impl(_name, getattr(_cpu, _name), "CPU")

_select_blocks_op = torch.ops.mra_attention.select_blocks.default
_forward_op = torch.ops.mra_attention.forward.default
_backward_op = torch.ops.mra_attention.backward.default

# Private to torch, hence the defaults: without them torch.func fails loudly below, and all the rest works.
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_jit_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: False)


# Fake kernels: the shapes, dtypes and strides of the results, for tracing.


def _check_device(query: Tensor, *others: Tensor | None) -> None:
    """Refuse a tensor on the meta device among others: torch then calls the fake kernel in place of a real one."""
    for other in others:
        if other is not None and other.device != query.device:
            raise ValueError(f"all tensors must be on the same device, got {query.device} and {other.device}")


def _fake_select_blocks(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float,
    block_size: int,
    *_: Any,
) -> Tensor:
    _check_device(query, key, key_mask, query_mask, attn_bias)
    return empty_plan(query, key, block_size)


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attn_bias: Tensor | None,
    plan: Tensor | None,
    seed: Tensor | None,
    scale: float,
    block_size: int,
    *_: Any,
) -> _Tensors3:
    _check_device(query, key, value, key_mask, query_mask, attn_bias, plan, seed)
    return empty_outputs(query, key, value, block_size)


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attn_bias: Tensor | None,
    plan: Tensor,
    seed: Tensor | None,
    *_: Any,
) -> _Tensors3:
    _check_device(query, grad_out, grad_lse, key, value, out, lse, key_mask, query_mask, attn_bias, plan, seed)
    return empty_grads(query, key, value)


# Autograd: the formulas, and what they refuse.


def _refuse_forward_ad(*tensors: Tensor | None) -> None:
    """Raise if a tensor carries a forward-mode tangent: an operator without a `jvp` would drop it in silence."""
    if getattr(forward_ad, "_current_level", -1) < 0:
        return
    # A compiler that traces below a forward-mode level cannot tell which tensors carry a tangent.
    if torch.compiler.is_compiling() or any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise NotImplementedError(
            "mra_attention has no forward-mode automatic differentiation (torch.autograd.forward_ad, torch.func.jvp, "
            "jacfwd, hessian): an input carries a tangent, or the call is compiled where inputs may carry one. "
            "Use reverse mode, or detach the inputs"
        )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: _Tensors3) -> None:
    query, key, value, key_mask, query_mask, attn_bias, _, seed = inputs[:8]
    out, lse, plan = output
    ctx.save_for_backward(query, key, value, out, lse, key_mask, query_mask, attn_bias, plan, seed)
    ctx.settings = inputs[8:12]
    ctx.mark_non_differentiable(plan)
    ctx.set_materialize_grads(False)  # an lse that nobody uses then costs nothing


def _backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
    grad_out, grad_lse, _ = grad_outputs
    saved = ctx.saved_tensors  # once: a checkpoint recomputes it for a single use
    query, key, value, out = saved[:4]
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if grad_out is None and grad_lse is not None:
        grad_out = torch.zeros_like(out)
    if grad_out is not None:
        _refuse_forward_ad(grad_out, grad_lse, query, key, value)
        args = (grad_out, grad_lse, *saved, *ctx.settings)
        if _transforms_active():
            grads = _BackwardFunction.apply(*args)
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():
            grads = _backward_op(*args)
        else:  # nothing to record, so the autograd kernel can be left out
            with torch._C._AutoDispatchBelowAutograd():
                grads = _backward_op(*args)
    return *grads, *(None,) * 13


class _RecordedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> _Tensors3:
        output = _forward_below_autograd(keyset, args)
        _save_for_backward(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return None, *_backward(ctx, *grad_outputs)


def _forward_below_autograd(keyset: Any, args: tuple[Any, ...]) -> _Tensors3:
    with torch._C._AutoDispatchBelowAutograd():
        if keyset is None:
            return _forward_op(*args)
        return _forward_op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _record_forward(keyset: Any, *args: Any) -> _Tensors3:
    """Run the forward operator and record it: its autograd kernel, or with `keyset=None` in place of the operator.

    It does what torch.library.register_autograd would, which before `setup_context` looks up the defaults of the schema
    in a time that grows with the square of the number of arguments: tens of microseconds for thirteen.
    """
    if torch.is_grad_enabled() and (args[0].requires_grad or args[1].requires_grad or args[2].requires_grad):
        return _RecordedForward.apply(keyset, *args)
    return _forward_below_autograd(keyset, args)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse_double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    raise NotImplementedError(
        "mra_attention has no second derivative: its backward pass was differentiated (create_graph=True, "
        "torch.func.grad of grad, hessian); torch.nn.functional.scaled_dot_product_attention under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) has one"
    )


def _fold(info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...], bias_at: int) -> list[Any]:
    """Move the dimension that torch.vmap maps into the batch dimension of every tensor.

    The mask or bias, argument `bias_at`, may have the batch size 1, and keeps it where that serves: it is large.
    """

    def fold(tensor: Tensor, dim: int | None) -> Tensor:
        mapped = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return mapped.flatten(0, 1)

    folded = [fold(arg, dim) if isinstance(arg, Tensor) else arg for arg, dim in zip(args, in_dims, strict=True)]
    bias, dim = args[bias_at], in_dims[bias_at]
    if isinstance(bias, Tensor):
        bias = bias.unsqueeze(0) if dim is None else bias.movedim(dim, 0)
        if bias.shape[0] == bias.shape[1] == 1:
            folded[bias_at] = bias[0]
        else:
            batch = folded[0].shape[0] // info.batch_size
            folded[bias_at] = bias.expand(info.batch_size, batch, *bias.shape[2:]).flatten(0, 1)
    return folded


def _refuse_vmap_dropout(dropout_p: float) -> None:
    """Raise if weights are dropped below torch.vmap, which has its own rules for what is random."""
    if dropout_p > 0:
        raise NotImplementedError(
            f"dropout_p={dropout_p!r} below torch.vmap: mra_attention draws one seed for a call, which is neither "
            "randomness='same' nor 'different'; pass dropout_p=0.0, or call without vmap on a batch"
        )


def _unfold(info: Any, tensor: Tensor) -> Tensor:
    return tensor.view(info.batch_size, tensor.shape[0] // info.batch_size, *tensor.shape[1:])


class _SelectBlocksFunction(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _select_blocks_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _unfold(info, _SelectBlocksFunction.apply(*_fold(info, in_dims, args, 4))), 0


class _ForwardFunction(torch.autograd.Function):
    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_backward)

    @staticmethod
    def forward(*args: Any) -> _Tensors3:
        return _forward_op(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        _refuse_vmap_dropout(args[11])
        outputs = _ForwardFunction.apply(*_fold(info, in_dims, args, 5))
        return tuple(_unfold(info, output) for output in outputs), (0, 0, 0)


class _BackwardFunction(torch.autograd.Function):
    setup_context = staticmethod(_save_nothing)
    backward = staticmethod(_refuse_double_backward)

    @staticmethod
    def forward(*args: Any) -> _Tensors3:
        return _backward_op(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        _refuse_vmap_dropout(args[14])
        grads = _BackwardFunction.apply(*_fold(info, in_dims, args, 9))
        return tuple(_unfold(info, grad) for grad in grads), (0, 0, 0)


torch.library.register_fake("mra_attention::select_blocks", _fake_select_blocks, lib=_library)
torch.library.register_fake("mra_attention::forward", _fake_forward, lib=_library)
torch.library.register_fake("mra_attention::backward", _fake_backward, lib=_library)
_library.impl("forward", _record_forward, "Autograd", with_keyset=True)
torch.library.register_autograd("mra_attention::backward", _refuse_double_backward, lib=_library)


# What the package calls.


def select_blocks(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float,
    block_size: int,
    blocks_per_row: float,
    num_blocks: int | None,
    first_blocks: int,
    diagonal_blocks: int,
) -> Tensor:
    """Return the plan of 4-D inputs as bits. No gradient flows through it."""
    call = _SelectBlocksFunction.apply if _transforms_active() else _select_blocks_op
    return call(
        query,
        key,
        key_mask,
        query_mask,
        attn_bias,
        scale,
        block_size,
        blocks_per_row,
        num_blocks,
        first_blocks,
        diagonal_blocks,
    )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attn_bias: Tensor | None,
    plan: Tensor | None,
    seed: Tensor | None,
    scale: float,
    block_size: int,
    sparse: bool,
    dropout_p: float,
    blocks_per_row: float,
    num_blocks: int | None,
    first_blocks: int,
    diagonal_blocks: int,
) -> _Tensors3:
    """Return the output, the log-sum-exp and the plan of 4-D inputs."""
    _refuse_forward_ad(query, key, value, attn_bias)
    args = (
        query,
        key,
        value,
        key_mask,
        query_mask,
        attn_bias,
        plan,
        seed,
        scale,
        block_size,
        sparse,
        dropout_p,
        blocks_per_row,
        num_blocks,
        first_blocks,
        diagonal_blocks,
    )
    if _transforms_active():
        return _ForwardFunction.apply(*args)
    if torch.compiler.is_compiling() or _jit_tracing() or not (type(query) is type(key) is type(value) is Tensor):
        return _forward_op(*args)
    # For plain tensors the dispatcher would come to the autograd kernel first. To begin there saves one passage through
    # the dispatcher, up to ten microseconds.
    return _record_forward(None, *args)
