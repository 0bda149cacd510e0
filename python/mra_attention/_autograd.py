"""What all operators share: their library, and how a forward operator is recorded, differentiated and mapped.

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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

Tensors3: TypeAlias = tuple[Tensor, Tensor, Tensor]
# From the inputs and the output of a forward operator, what its backward operator takes after the two cotangents:
# tensors, the first five of them query, key, value, out and lse; then all else.
Saved: TypeAlias = Callable[[tuple[Any, ...], Tensors3], tuple[tuple[Tensor | None, ...], tuple[Any, ...]]]

# The strides of the outputs follow those of the inputs, so a compiler must pass inputs with the strides it has traced.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)
_library = torch.library.Library("mra_attention", "DEF")

# Private to torch, hence the defaults: without them torch.func fails loudly below, and all the rest works.
transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_jit_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: False)
_modes_active: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_profiling: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)
_PLAIN_KEYS = torch._C._dispatch_keys(torch.empty(0)).raw_repr()
_kernels: dict[str, Callable[..., Any]] = {}


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator with its CPU kernel and its fake kernel, and return it."""
    _library.define(name + schema, tags=_TAGS)
    _kernels[name] = kernel
    _library.impl(name, kernel, "CPU")
    torch.library.register_fake(f"mra_attention::{name}", fake, lib=_library)
    return getattr(torch.ops.mra_attention, name).default


def check_device(query: Tensor, *others: Tensor | None) -> None:
    """Refuse a tensor on the meta device among others: torch then calls the fake kernel in place of a real one."""
    for other in others:
        if other is not None and other.device != query.device:
            raise ValueError(f"all tensors must be on the same device, got {query.device} and {other.device}")


def refuse_dropout_below_vmap(dropout_p: float) -> None:
    """Raise if weights are dropped below torch.vmap: in one batch, all maps would differ in what is dropped."""
    if dropout_p > 0:
        raise NotImplementedError(
            f"dropout_p={dropout_p!r} below torch.vmap: mra_attention draws one seed for a call, which is neither "
            "randomness='same' nor 'different'; pass dropout_p=0.0, or call without vmap on a batch"
        )


def refuse_forward_ad(*args: Any) -> None:
    """Raise if a tensor carries a forward-mode tangent: an operator without a `jvp` would drop it in silence."""
    if getattr(forward_ad, "_current_level", -1) < 0:
        return
    # A compiler that traces below a forward-mode level cannot tell which tensors carry a tangent.
    if torch.compiler.is_compiling() or any(
        isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args
    ):
        raise NotImplementedError(
            "mra_attention has no forward-mode automatic differentiation (torch.autograd.forward_ad, torch.func.jvp, "
            "jacfwd, hessian): an input carries a tangent, or the call is compiled where inputs may carry one. "
            "Use reverse mode, or detach the inputs"
        )


def _refuse_double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    raise NotImplementedError(
        "mra_attention has no second derivative: its backward pass was differentiated (create_graph=True, "
        "torch.func.grad of grad, hessian); torch.nn.functional.scaled_dot_product_attention under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) has one"
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def fold(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """Move the dimension that torch.vmap maps into the batch dimension of every tensor, and of every list of numbers.

    A list holds a number for each batch item, or a single one for all.
    """

    def fold_one(arg: Any, dim: Any) -> Any:
        if isinstance(arg, Tensor):
            mapped = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            return mapped.flatten(0, 1)
        if isinstance(arg, (list, tuple)):
            numbers = list(cast("Sequence[int]", arg))
            return numbers if len(numbers) == 1 else numbers * info.batch_size
        return arg

    return [fold_one(arg, dim) for arg, dim in zip(args, in_dims, strict=True)]


def unfold(info: Any, tensor: Tensor) -> Tensor:
    """Split the mapped dimension off the batch dimension again."""
    return tensor.view(info.batch_size, tensor.shape[0] // info.batch_size, *tensor.shape[1:])


Fold: TypeAlias = Callable[[Any, tuple[Any, ...], tuple[Any, ...]], list[Any]]


class _Family(NamedTuple):
    """A forward operator and what belongs to it.

    The functions below are told which family they serve by its name, as Dynamo traces neither classes made inside a
    function nor objects that it does not know.
    """

    forward: Any
    backward: Any
    saved: Saved
    fold_forward: Fold
    fold_backward: Fold


_families: dict[str, _Family] = {}


def _save_for_backward(ctx: Any, name: str, inputs: tuple[Any, ...], output: Tensors3) -> None:
    tensors, ctx.rest = _families[name].saved(inputs, output)
    ctx.name, ctx.count = name, len(inputs)
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # an lse that nobody uses then costs nothing


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradient of every input of the forward operator."""
    tensors = ctx.saved_tensors
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if grad_out is None and grad_lse is not None:
        grad_out = torch.zeros_like(tensors[3])
    if grad_out is not None:
        refuse_forward_ad(grad_out, grad_lse, *tensors[:3])
        args = (grad_out, grad_lse, *tensors, *ctx.rest)
        if transforms_active():
            grads = _BackwardFunction.apply(ctx.name, *args)
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():
            grads = _families[ctx.name].backward(*args)
        else:  # nothing to record, so the autograd kernel can be left out
            with torch._C._AutoDispatchBelowAutograd():
                grads = _families[ctx.name].backward(*args)
    return *grads, *(None,) * (ctx.count - 3)


class _RecordedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, keyset: Any, *args: Any) -> Tensors3:
        output = _forward_below_autograd(name, keyset, args)
        _save_for_backward(ctx, name, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return None, None, *_backward(ctx, *grad_outputs[:2])


def _needs_dispatcher(args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would do more than call the CPU kernel: for modes, the profiler, or special tensors.

    A passage through it with thirteen arguments takes about 20 us. The dispatch keys tell an ordinary CPU tensor from
    subclasses, negated views, functional and other wrapped tensors.
    """
    if _modes_active() or _profiling():
        return True
    for arg in args:
        if arg is None:
            continue
        if not isinstance(arg, Tensor):
            return False  # the tensors of an operator come first
        if torch._C._dispatch_keys(arg).raw_repr() != _PLAIN_KEYS:
            return True
    return False


def _forward_below_autograd(name: str, keyset: Any, args: tuple[Any, ...]) -> Tensors3:
    if keyset is None and not _needs_dispatcher(args):
        return _kernels[name](*args)
    operator = _families[name].forward
    with torch._C._AutoDispatchBelowAutograd():
        if keyset is None:
            return operator(*args)
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _is_recorded(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and (args[0].requires_grad or args[1].requires_grad or args[2].requires_grad)


def _record(name: str, keyset: Any, args: tuple[Any, ...]) -> Tensors3:
    """Run a forward operator and record it: its autograd kernel, or with `keyset=None` in place of the operator.

    It does what torch.library.register_autograd would, which before `setup_context` looks up the defaults of the schema
    in a time that grows with the square of the number of arguments: tens of microseconds for thirteen.
    """
    if _is_recorded(args):
        return _RecordedForward.apply(name, keyset, *args)
    return _forward_below_autograd(name, keyset, args)


class _ForwardFunction(torch.autograd.Function):
    @staticmethod
    def forward(name: str, *args: Any) -> Tensors3:
        return _families[name].forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors3) -> None:
        _save_for_backward(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return None, *_backward(ctx, *grad_outputs[:2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        name = args[0]
        outputs = _ForwardFunction.apply(name, *_families[name].fold_forward(info, in_dims[1:], args[1:]))
        return tuple(unfold(info, output) for output in outputs), (0, 0, 0)


class _BackwardFunction(torch.autograd.Function):
    setup_context = staticmethod(_save_nothing)
    backward = staticmethod(_refuse_double_backward)

    @staticmethod
    def forward(name: str, *args: Any) -> Tensors3:
        return _families[name].backward(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        name = args[0]
        grads = _BackwardFunction.apply(name, *_families[name].fold_backward(info, in_dims[1:], args[1:]))
        return tuple(unfold(info, grad) for grad in grads), (0, 0, 0)


def register_derivative(
    name: str, forward: Any, backward: Any, saved: Saved, fold_forward: Fold = fold, fold_backward: Fold = fold
) -> None:
    """Make a forward operator differentiable.

    Its first three arguments are query, key and value, its results are out, lse and plan. Its backward operator takes
    the cotangents of out and lse, then what `saved` returns, and returns the gradients of query, key and value. The two
    folds bring the arguments of the two operators below torch.vmap to those of one call on a larger batch.
    """
    _families[name] = _Family(forward, backward, saved, fold_forward, fold_backward)

    def record(keyset: Any, *args: Any) -> Tensors3:
        return _record(name, keyset, args)

    _library.impl(name, record, "Autograd", with_keyset=True)
    torch.library.register_autograd(str(backward.name()), _refuse_double_backward, lib=_library)


def _is_direct(args: tuple[Any, ...]) -> bool:
    """Whether a call comes to the autograd kernel without a transform, a compiler or a subclass before it."""
    return not (
        transforms_active()
        or torch.compiler.is_compiling()
        or _jit_tracing()
        or not (type(args[0]) is type(args[1]) is type(args[2]) is Tensor)
    )


def call_forward(name: str, *args: Any) -> Tensors3:
    """Call a forward operator by the shortest way that the circumstances allow."""
    refuse_forward_ad(*args)
    # For plain tensors the dispatcher would come to the autograd kernel first. To begin there saves one passage through
    # the dispatcher, up to ten microseconds.
    if _is_direct(args):
        return _record(name, None, args)
    return _ForwardFunction.apply(name, *args) if transforms_active() else _families[name].forward(*args)


def call_for_out(name: str, kernel: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return the first result of a forward operator; where nothing is recorded, `kernel` computes it alone."""
    if _is_direct(args) and not _is_recorded(args) and not _needs_dispatcher(args):
        refuse_forward_ad(*args)
        return kernel(*args)
    return call_forward(name, *args)[0]
