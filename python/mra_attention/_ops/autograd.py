"""How `forward` is recorded, differentiated and mapped, by the shortest way that the circumstances allow.

Two ways to differentiate. Outside torch.func the operator's own autograd kernel records the call. That kernel cannot
run below a torch.func transform (pytorch#168393), where the call goes through an `autograd.Function` around the same
operator. No Function has a `jvp`: Dynamo refuses a custom one, and without it torch.func.jvp raises.
"""

# pyright: reportUnknownMemberType=false, reportPrivateUsage=false
# torch.library is partly without annotations; the names of torch._C are those that torch.library uses itself.

from __future__ import annotations

from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from . import cpu, folding, refusals
from .arguments import BIAS, COUNT, SINKS, Inputs, Settings, for_backward
from .plain import have_plain_keys, is_direct, needs_dispatcher, transforms_active

Tensors3: TypeAlias = tuple[Tensor, Tensor, Tensor]
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _forward_op() -> Any:
    return torch.ops.mra_attention.forward.default


def _backward_op() -> Any:
    return torch.ops.mra_attention.backward.default


def _save_for_backward(ctx: Any, args: tuple[Any, ...], output: Tensors3) -> None:
    ctx.settings = args[COUNT:]
    ctx.save_for_backward(*for_backward(Inputs(*args[:COUNT]), *output))
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # an lse that nobody uses then costs nothing


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradient of every argument of `forward`."""
    tensors = ctx.saved_tensors
    grads: tuple[Tensor | None, ...] = (None,) * 5
    # Counted from the end: what comes before the arguments differs.
    wants_grad_bias: bool = ctx.needs_input_grad[BIAS - COUNT - len(ctx.settings)]
    if grad_out is None and grad_lse is not None:
        grad_out = torch.zeros_like(tensors[COUNT])
    if grad_out is not None:
        refusals.refuse_forward_ad(grad_out, grad_lse, *tensors[:3])
        args = (grad_out, grad_lse, *tensors, wants_grad_bias, *ctx.settings)
        if transforms_active():
            grads = _BackwardFunction.apply(*args)
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():
            grads = _backward_op()(*args)
        else:  # nothing to record, so the autograd kernel can be left out
            with torch._C._AutoDispatchBelowAutograd():
                grads = _backward_op()(*args)
    of_arguments: list[Tensor | None] = [*grads[:3], *(None,) * (COUNT - 3 + len(ctx.settings))]
    if wants_grad_bias:
        of_arguments[BIAS] = grads[3]
    if tensors[SINKS] is not None:
        of_arguments[SINKS] = grads[4]
    return tuple(of_arguments)


class _RecordedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Tensors3:
        output = _forward_below_autograd(keyset, args)
        _save_for_backward(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return None, *_backward(ctx, *grad_outputs[:2])


def _forward_below_autograd(keyset: Any, args: tuple[Any, ...]) -> Tensors3:
    if keyset is None and not needs_dispatcher(args[:COUNT]):
        return cpu.forward(*args)
    with torch._C._AutoDispatchBelowAutograd():
        if keyset is None:
            return _forward_op()(*args)
        return _forward_op().redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _is_recorded(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and (
        args[0].requires_grad
        or args[1].requires_grad
        or args[2].requires_grad
        or (args[BIAS] is not None and args[BIAS].requires_grad)
        or (args[SINKS] is not None and args[SINKS].requires_grad)
    )


def record(keyset: Any, *args: Any) -> Tensors3:
    """Run `forward` and record it: its autograd kernel, or with `keyset=None` in place of the operator.

    It does what torch.library.register_autograd would, which before `setup_context` looks up the defaults of the schema
    in a time that grows with the square of the number of arguments: tens of microseconds for thirteen.
    """
    if _is_recorded(args):
        return _RecordedForward.apply(keyset, *args)
    return _forward_below_autograd(keyset, args)


class _ForwardFunction(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensors3:
        return _forward_op()(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors3) -> None:
        _save_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grad_outputs[:2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = _ForwardFunction.apply(*folding.fold_forward(info.batch_size, in_dims, args))
        return tuple(folding.unfold(info.batch_size, output) for output in outputs), (0, 0, 0)


class _BackwardFunction(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Gradients:
        return _backward_op()(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        refusals.refuse_double_backward(ctx, *grad_outputs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        grads = _BackwardFunction.apply(*folding.fold_backward(info.batch_size, in_dims, args))
        return tuple(folding.unfold(info.batch_size, grad) for grad in grads), (0, 0, 0, 0, 0)


class _SelectFunction(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.mra_attention.select.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        chosen = _SelectFunction.apply(*folding.fold_select(info.batch_size, in_dims, args))
        return folding.unfold(info.batch_size, cast("Tensor", chosen)), 0


def call_forward(*args: Any) -> Tensors3:
    """Call `forward`."""
    refusals.refuse_forward_ad(*args[:COUNT])
    # For plain tensors the dispatcher would come to the autograd kernel first. To begin there saves one passage through
    # the dispatcher, up to ten microseconds.
    if is_direct(args):
        return record(None, *args)
    return _ForwardFunction.apply(*args) if transforms_active() else _forward_op()(*args)


def call_forward_out(inputs: Inputs, settings: Settings, plain: bool) -> Tensor:
    """Call `forward` for its first result; where nothing is recorded, the others are not even allocated.

    `plain` says of query, key and value whether `is_plain` holds.
    """
    if plain and have_plain_keys(inputs[3:]) and not _is_recorded(inputs):
        return cpu.forward_out(inputs, settings)
    return call_forward(*inputs, *settings)[0]


def call_select(*args: Any) -> Tensor:
    """Call `select`. No gradient flows through it."""
    return _SelectFunction.apply(*args) if transforms_active() else torch.ops.mra_attention.select.default(*args)
