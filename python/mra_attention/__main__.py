"""`python -m mra_attention`: what this installation is, and whether it computes attention."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import __version__, scaled_dot_product_attention
from ._core import available_isas, build_info, isa
from ._native.threads import THREADS_OF

LENGTH, HEAD_DIM, BLOCK_SIZE = 200, 64, 32  # the length is not a multiple of the block size
# At most this multiple of the error that torch's own float32 attention makes (docs/definitions.md, section 7).
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


def _describe() -> None:
    build = build_info()
    print(f"mra_attention    {__version__}")
    print(f"native module    {build['profile']} build for {build['target']} by {build['rustc']}")
    print(f"instruction set  {isa()} (available: {', '.join(available_isas())})")
    print(f"torch            {torch.__version__}, threads: {torch.get_num_threads()}, of {THREADS_OF}")


def _run(attention: Callable[..., Tensor], tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of query, key and value, for query, key, value and grad_out stacked."""
    query, key, value, grad_out = (tensor.to(dtype).requires_grad_() for tensor in tensors.unbind())
    out = attention(query, key, value)
    grads = torch.autograd.grad(out, (query, key, value), grad_out.detach())
    return [out.detach(), *grads]


def _unfused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value)


def _check_full_budget(tensors: Tensor) -> bool:
    """Compare with softmax attention when every block is exact."""

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, resolutions=(BLOCK_SIZE, 1), num_blocks=2**31)

    expected = _run(F.scaled_dot_product_attention, tensors, torch.float64)
    fused, unfused = (
        _run(attention, tensors, torch.float32) for attention in (F.scaled_dot_product_attention, _unfused)
    )
    ours = _run(exact, tensors, torch.float32)
    passed = True
    names = ("out", "grad_query", "grad_key", "grad_value")
    for name, want, got, *others in zip(names, expected, ours, fused, unfused, strict=True):
        error, *theirs = (float((result - want).square().mean().sqrt()) for result in (got, *others))
        # A kernel of torch may happen to be better than float32 can be relied on to be.
        allowed = max(theirs) * (OUTPUT_FACTOR if name == "out" else GRADIENT_FACTOR)
        good = error <= allowed  # False for NaN
        print(f"  {name:<11} error {error:.2e}, allowed {allowed:.2e}: {'ok' if good else 'FAILED'}")
        passed = passed and good
    return passed


def _check_small_budget(tensors: Tensor) -> bool:
    """Look for NaN and infinity when most blocks are not exact."""

    def approximate(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, resolutions=(BLOCK_SIZE, 1), blocks_per_row=1.0)

    good = all(result.isfinite().all().item() for result in _run(approximate, tensors, torch.float32))
    print(f"  one block per row: {'finite, ok' if good else 'not finite, FAILED'}")
    return good


def main() -> int:
    """Print the report, run the self-check and return the exit status."""
    _describe()
    tensors = torch.randn(4, 1, 2, LENGTH, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    print("self-check, float32 against torch in float64, every block exact")
    passed = _check_full_budget(tensors)
    passed = _check_small_budget(tensors) and passed
    print("self-check passed" if passed else "self-check FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
