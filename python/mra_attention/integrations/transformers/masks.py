"""The mask function: what transformers asks for once per forward pass and hands to the layers."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportPrivateUsage=false
# transformers is partly without annotations; the names of torch._C are those that torch itself uses for subclasses.

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import masking_utils

from .patterns import Pattern, recognise


class PatternMask(Tensor):
    """A bool mask `(B, 1, Lq, Lk)` that is a description until somebody reads its elements.

    Models pass masks on as they get them, and then attention reads the description. Every operation on the mask, as
    some models have, makes the elements first, so what it returns is an ordinary mask.
    """

    pattern: Pattern
    padding: Tensor | None
    """bool `(B, keys)`: which keys are valid; None if all are."""
    keys: int
    """How many keys have been written: those of a static cache behind them hold nothing yet."""
    arguments: dict[str, Any]
    """The arguments of `sdpa_mask` that make the elements."""
    _packed: tuple[Tensor, Tensor | None] | None
    """The last positions that `documents` was asked about, and its answer."""

    def __new__(cls, arguments: dict[str, Any], pattern: Pattern) -> PatternMask:
        """Describe the mask that `sdpa_mask` makes of these arguments."""
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=arguments["device"])
        # A tensor where the cache is static, which counts on before anybody reads the mask.
        mask.arguments = {**arguments, "q_offset": int(arguments["q_offset"])}
        mask.pattern = pattern
        mask._packed = None
        written = mask.arguments["q_offset"] + arguments["q_length"] - arguments["kv_offset"]
        mask.keys = min(arguments["kv_length"], written) if pattern.is_causal else arguments["kv_length"]
        mask.padding = mask._valid_keys()
        return mask

    def _valid_keys(self) -> Tensor | None:
        offset = self.arguments["kv_offset"]
        padding = masking_utils.prepare_padding_mask(self.arguments["attention_mask"], self.shape[3], offset)
        if padding is None:
            return None
        padding = padding[:, offset : offset + self.keys]
        return None if bool(padding.all()) else padding

    def documents(self, positions: Any) -> Tensor | None:
        """Return the document of each token, `(B, L)`; None if the sequences are not packed.

        Some models, GPT-OSS among them, do not tell the mask function of positions that begin anew. As for
        flash-attention, the positions of the tokens then say it themselves.
        """
        batch, _, length, keys = self.shape
        is_first_call = keys == length and self.arguments["q_offset"] == 0 and self.arguments["attention_mask"] is None
        if self.pattern.documents is not None or not self.pattern.is_causal or not is_first_call:
            return self.pattern.documents
        if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != length:
            return None
        if self._packed is None or self._packed[0] is not positions:
            self._packed = positions, masking_utils.find_packed_sequence_indices(positions)
        found = self._packed[1]
        return None if found is None else found.expand(batch, -1)

    def elements(self) -> Tensor:
        """Return the mask as an ordinary tensor."""
        return cast("Tensor", masking_utils.sdpa_mask(**self.arguments))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PatternMask(shape={tuple(self.shape)}, pattern={self.pattern}, padding={self.padding is not None})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the elements."""
        if func is torch.ops.aten.detach.default:  # what reentrant checkpointing does to the inputs of a layer
            return cls(args[0].arguments, args[0].pattern)
        args, kwargs = pytree.tree_map_only(PatternMask, PatternMask.elements, (args, kwargs or {}))
        return func(*args, **kwargs)


def mra_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask of the layers, with the signature of the mask functions of transformers.

    Causality, windows, padding and packed sequences are described, in memory for one element per token. Any other mask
    function gets the mask of pairs that "sdpa" gets, and so does all that is traced by a compiler, which cannot follow
    a description.
    """
    arguments: dict[str, Any] = {
        **kwargs,
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
    }
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return masking_utils.sdpa_mask(**arguments)
    arguments |= {"device": kwargs.get("device", "cpu"), "allow_is_causal_skip": False}
    arguments["allow_is_bidirectional_skip"] = False
    pattern = recognise(mask_function)
    return masking_utils.sdpa_mask(**arguments) if pattern is None else PatternMask(arguments, pattern)
