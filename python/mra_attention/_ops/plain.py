"""Whether a call is plain: torch would do nothing with it but call the CPU kernel.

A passage through the dispatcher takes about 20 us, and a look at what is given for each thing that it might be takes a
few more; a plain call needs neither.
"""

# pyright: reportUnknownMemberType=false, reportPrivateUsage=false
# torch.autograd.forward_ad is partly without annotations; the names of torch._C are those that torch.library uses.

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Private to torch, hence the defaults: without them torch.func fails loudly, and all the rest works.
transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_jit_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: False)
_modes_active: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_profiling: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)
_dispatch_keys = torch._C._dispatch_keys


def _plain_keys() -> frozenset[int]:
    tensors = [torch.empty(0, device="cpu")]
    with torch.inference_mode():
        tensors.append(torch.empty(0, device="cpu"))
    return frozenset(_dispatch_keys(tensor).raw_repr() for tensor in tensors)


_PLAIN_KEYS = _plain_keys()


def forward_ad_active() -> bool:
    """Return whether tensors may carry a forward-mode tangent."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def is_direct(args: tuple[Any, ...]) -> bool:
    """Return whether a call comes to the autograd kernel without a transform, a compiler or a subclass before it."""
    return not (
        torch.compiler.is_compiling()
        or transforms_active()
        or _jit_tracing()
        or not (type(args[0]) is type(args[1]) is type(args[2]) is Tensor)
    )


def needs_dispatcher(tensors: Iterable[Any]) -> bool:
    """Return whether the dispatcher would do more than call the CPU kernel: for modes, profilers, special tensors."""
    return bool(_modes_active()) or _profiling() or not have_plain_keys(tensors)


def have_plain_keys(tensors: Iterable[Any]) -> bool:
    """Return whether all tensors are ordinary ones on the CPU, as far as the dispatcher sees; None is none.

    The dispatch keys tell them from nested, sparse and quantized ones, other devices, subclasses, negated views,
    functional and other wrapped tensors.
    """
    for tensor in tensors:  # noqa: SIM110 : a generator would take a microsecond more
        if tensor is not None and _dispatch_keys(tensor).raw_repr() not in _PLAIN_KEYS:
            return False
    return True


def is_plain(*tensors: Any) -> bool:
    """Return whether all arguments are ordinary tensors on the CPU, and nothing traces, maps or watches the call."""
    if torch.compiler.is_compiling() or transforms_active() or _jit_tracing() or forward_ad_active():
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor:
            return False
    return not needs_dispatcher(tensors)
