"""What the operators have no derivative or no map for."""

# pyright: reportUnknownMemberType=false
# torch.autograd.forward_ad is partly without annotations.

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .plain import forward_ad_active


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


def refuse_packed_below_vmap() -> NoReturn:
    """Raise, for packed sequences."""
    raise NotImplementedError(
        "attention over packed sequences below torch.vmap: the mapped tensors are no packed tensor. Pack the sequences "
        "of all maps in one, or call without vmap"
    )


def refuse_forward_ad(*args: Any) -> None:
    """Raise if a tensor carries a forward-mode tangent: an operator without a `jvp` would drop it in silence."""
    if not forward_ad_active():
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


def refuse_double_backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    """Raise: the backward pass of `backward`."""
    raise NotImplementedError(
        "mra_attention has no second derivative: its backward pass was differentiated (create_graph=True, "
        "torch.func.grad of grad, hessian); torch.nn.functional.scaled_dot_product_attention under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) has one"
    )
