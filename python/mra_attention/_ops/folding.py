"""torch.vmap: what it maps becomes part of the batch, in one call of an operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import refusals
from .arguments import SELECT_FIELDS, Inputs, of_backward

_OF_INPUTS = {name: at for at, name in enumerate(Inputs._fields)}
_OF_SELECT = {name: at for at, name in enumerate(SELECT_FIELDS)}


def _fold(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """Move the mapped dimension into the batch dimension."""
    mapped = tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _fold_bias(bias: Tensor, dim: int | None, count: int, batch: int, whole: bool) -> Tensor:
    """Fold a mask or bias; unless it is to be `whole`, it keeps the batch size 1 where it may, since it is large."""
    bias = bias.unsqueeze(0) if dim is None else bias.movedim(dim, 0)
    if not whole and bias.shape[0] == bias.shape[1] == 1:
        return bias[0]
    return bias.expand(count, batch, *bias.shape[2:]).flatten(0, 1)


def _fold_all(
    count: int, dims: tuple[Any, ...], args: tuple[Any, ...], at: dict[str, int], start: int, whole_bias: bool = False
) -> list[Any]:
    """Fold every tensor of a call whose inputs begin at `start`."""
    places = {name: start + place for name, place in at.items()}
    if args[places["cu_seqlens_q"]] is not None:
        refusals.refuse_packed_below_vmap()
    _refuse_mapped_tiles(dims[places["mask_tiles"]])
    folded: list[Any] = []
    batch = _fold(args[places["query"]], dims[places["query"]], count).shape[0] // count
    for place, (arg, dim) in enumerate(zip(args, dims, strict=True)):
        if not isinstance(arg, Tensor) or place in (places["mask_tiles"], places.get("seed")):
            folded.append(arg)
        elif place == places["attn_bias"]:
            folded.append(_fold_bias(arg, dim, count, batch, whole_bias))
        else:
            folded.append(_fold(arg, dim, count))
    return folded


def _refuse_mapped_tiles(dim: int | None) -> None:
    """Raise if torch.vmap maps a BlockMask, whose number of partial blocks differs from map to map."""
    if dim is not None:
        raise NotImplementedError("a BlockMask that torch.vmap maps; pass a mask (..., Lq, Lk), or call without vmap")


def fold_forward(count: int, dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """Fold the arguments of `forward`."""
    refusals.refuse_dropout_below_vmap(args[-1])
    return _fold_all(count, dims, args, _OF_INPUTS, 0)


def fold_backward(count: int, dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """Fold the arguments of `backward`."""
    refusals.refuse_dropout_below_vmap(args[-1])
    # Every map has a gradient of its own, even of a bias that is not mapped. Autograd sums what batch items share.
    return _fold_all(count, dims, args, _OF_INPUTS, 2, of_backward(args).wants_grad_bias)


def fold_select(count: int, dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """Fold the arguments of `select`."""
    return _fold_all(count, dims, args, _OF_SELECT, 0)


def unfold(count: int, tensor: Tensor) -> Tensor:
    """Split the mapped dimension off the batch dimension again."""
    return tensor.view(count, tensor.shape[0] // count, *tensor.shape[1:])
