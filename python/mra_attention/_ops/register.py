"""The operators `mra_attention::forward`, `backward` and `select`: their registration and their fake kernels.

`Library.define` and `impl` rather than `custom_op`: a call passes fewer Python frames, and kernels are registered per
device, so that another device adds an `impl` and shares everything else. What `custom_op` adds is done here: every
operator has an autograd kernel, and every output is a fresh tensor. The schemas have no defaults: `register_autograd`
under torch.compile fails when a value that is passed equals its default (pytorch#162687).
"""

# pyright: reportUnknownMemberType=false
# torch.library is partly without annotations.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import autograd, cpu, outputs, refusals
from .arguments import (
    BACKWARD_SCHEMA,
    FORWARD_SCHEMA,
    SELECT_SCHEMA,
    Inputs,
    Settings,
    for_select,
    of_backward,
    of_forward,
    of_select,
)
from .autograd import Gradients, Tensors3

# The strides of the outputs follow those of the inputs, so a compiler must pass inputs with the strides it has traced.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)
_library = torch.library.Library("mra_attention", "DEF")
OPS = torch.ops.mra_attention


def _define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(name + schema, tags=_TAGS)
    _library.impl(name, kernel, "CPU")
    torch.library.register_fake(f"mra_attention::{name}", fake, lib=_library)


def _fake_forward(*args: Any) -> Tensors3:
    inputs, settings = of_forward(args)
    refusals.check_device(*inputs)
    return outputs.empty_results(inputs, settings)


def _fake_backward(*args: Any) -> Gradients:
    call = of_backward(args)
    refusals.check_device(*call.inputs, call.grad_out, call.grad_lse, call.out, call.lse)
    return outputs.empty_grads(call.inputs, call.wants_grad_bias)


def _fake_select(*args: Any) -> Tensor:
    inputs, settings = of_select(args)
    refusals.check_device(*inputs)
    return outputs.empty_plan(inputs, settings)


_define("forward", FORWARD_SCHEMA, cpu.forward, _fake_forward)
_define("backward", BACKWARD_SCHEMA, cpu.backward, _fake_backward)
_define("select", SELECT_SCHEMA, cpu.select, _fake_select)
_library.impl("forward", autograd.record, "Autograd", with_keyset=True)
torch.library.register_autograd("mra_attention::backward", refusals.refuse_double_backward, lib=_library)


def forward(inputs: Inputs, settings: Settings) -> Tensors3:
    """Return the output, the log-sum-exp and the plan."""
    return autograd.call_forward(*inputs, *settings)


def forward_out(inputs: Inputs, settings: Settings, plain: bool) -> Tensor:
    """Return the output alone; `plain` says of query, key and value whether `is_plain` holds."""
    return autograd.call_forward_out(inputs, settings, plain)


def select(inputs: Inputs, settings: Settings) -> Tensor:
    """Return the plan."""
    return autograd.call_select(*for_select(inputs), *settings)
