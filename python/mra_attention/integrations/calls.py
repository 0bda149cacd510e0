"""Calls of torch's attention in one thread, seen by a torch function mode whatever name the function has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .backward import BACKWARD

# From torch._C: the name in torch.nn.functional may have been replaced by another library.
# The operators are called by exported programs.
_torch: Any = torch
_ATTENTION: tuple[Any, ...] = (
    _torch._C._nn.scaled_dot_product_attention,
    _torch.ops.aten.scaled_dot_product_attention,
    _torch.ops.aten.scaled_dot_product_attention.default,
)
_MULTI_HEAD: Any = torch.nn.functional.multi_head_attention_forward
_FLEX: Any = _torch.ops.higher_order.flex_attention
# Compiled and exported programs have these where the model was traced without a mode, and Dynamo does not let a mode
# turn them off as it is turned off otherwise.
_FUSED: tuple[Any, ...] = (
    _torch._transformer_encoder_layer_fwd,
    _torch.ops.aten._transformer_encoder_layer_fwd.default,
    _torch._native_multi_head_attention,
    _torch.ops.aten._native_multi_head_attention.default,
)
WHY_FUSED = (
    "compiled or exported as one operator of torch; convert the model with mra_attention.nn.convert, or call "
    "torch.backends.mha.set_fastpath_enabled(False), before it is"
)


class Call(NamedTuple):
    """A call as the mode got it."""

    function: Callable[..., Any]
    types: Sequence[type]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def query(self) -> Tensor:
        """The first argument."""
        return self.args[0] if self.args else self.kwargs["query"]

    @property
    def key(self) -> Tensor:
        """The second argument."""
        return self.args[1] if len(self.args) > 1 else self.kwargs["key"]

    def run(self) -> Any:
        """Call torch's function."""
        return self.function(*self.args, **self.kwargs)


class AttentionMode(TorchFunctionMode, ABC):
    """Sees every call of torch's functions in its thread, and has a method for each kind that computes attention.

    A mode is off while its methods run. While it is on, torch's modules do not take their fused inference paths.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_covered = False
        """Whether a mode inside this one decides."""

    @abstractmethod
    def attention(self, call: Call) -> Any:
        """Answer a call of scaled_dot_product_attention."""

    @abstractmethod
    def multi_head(self, call: Call) -> Any:
        """Answer a call of multi_head_attention_forward, inside of which attention is not seen."""

    @abstractmethod
    def fused(self, call: Call) -> Any:
        """Answer a call of an operator that computes a whole layer."""

    @abstractmethod
    def backward(self, call: Call) -> Any:
        """Answer a call of a function that runs backward, where checkpointed layers compute attention again."""

    def flex(self, call: Call) -> Any:
        """Answer a call of flex_attention."""
        return call.run()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Hand a call to its method."""
        # Every function of torch comes here, so a value is made of the few calls alone that have a method.
        kwargs = kwargs or {}
        if self.is_covered:
            return func(*args, **kwargs)
        if func in _ATTENTION:
            return self.attention(Call(func, types, args, kwargs))
        if func is _MULTI_HEAD:
            return self.multi_head(Call(func, types, args, kwargs))
        if func in _FUSED:
            return self.fused(Call(func, types, args, kwargs))
        if func is _FLEX:
            return self.flex(Call(func, types, args, kwargs))
        if func in BACKWARD and all(kind is Tensor for kind in types):
            return self.backward(Call(func, types, args, kwargs))
        return func(*args, **kwargs)
