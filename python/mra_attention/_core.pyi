"""The native module: pointers, shapes and strides in, results written in place.

It validates everything that it is given again and raises ValueError (TypeError for a wrong Python type); the
interpreter lock is released while it computes. Only `mra_attention._cpu`, `_causal_cpu` and `_varlen_cpu` call the
functions that take descriptors.
"""

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

__all__ = [
    "__version__",
    "append",
    "available_isas",
    "backward",
    "block_mask",
    "build_info",
    "causal_backward",
    "causal_forward",
    "forward",
    "isa",
    "kernel_rates",
    "select_blocks",
    "use_torch_threads",
]

# (data pointer, sizes, strides in elements, dtype code, the tensor, which is kept alive during the call)
# dtype codes: 0 float32, 1 float64, 2 bfloat16, 3 float16, 4 bool or uint8, 5 int32
_Descriptor: TypeAlias = tuple[int, Sequence[int], Sequence[int], int, object]

class _BuildInfo(TypedDict):
    version: str
    profile: Literal["release", "debug"]
    rustc: str
    target: str

__version__: Final[str]

def select_blocks(
    query: _Descriptor,
    key: _Descriptor,
    key_mask: _Descriptor | None,
    query_mask: _Descriptor | None,
    attn_bias: _Descriptor | None,
    plan: _Descriptor,
    *,
    scale: float,
    block_size: int,
    blocks_per_row: float,
    num_blocks: int | None,
    first_blocks: int,
    diagonal_blocks: int,
    threads: int,
) -> None: ...
def forward(
    query: _Descriptor,
    key: _Descriptor,
    value: _Descriptor,
    key_mask: _Descriptor | None,
    query_mask: _Descriptor | None,
    attn_bias: _Descriptor | None,
    plan_in: _Descriptor | None,
    plan_out: _Descriptor | None,
    out: _Descriptor,
    lse: _Descriptor | None,
    *,
    scale: float,
    block_size: int,
    sparse: bool,
    dropout_p: float,
    seed: int,
    blocks_per_row: float,
    num_blocks: int | None,
    first_blocks: int,
    diagonal_blocks: int,
    threads: int,
) -> None: ...
def backward(
    grad_out: _Descriptor,
    grad_lse: _Descriptor | None,
    query: _Descriptor,
    key: _Descriptor,
    value: _Descriptor,
    out: _Descriptor,
    lse: _Descriptor,
    key_mask: _Descriptor | None,
    query_mask: _Descriptor | None,
    attn_bias: _Descriptor | None,
    plan: _Descriptor,
    grad_query: _Descriptor,
    grad_key: _Descriptor,
    grad_value: _Descriptor,
    *,
    scale: float,
    block_size: int,
    sparse: bool,
    dropout_p: float,
    seed: int,
    threads: int,
) -> None: ...
def causal_forward(
    query: _Descriptor,
    key: _Descriptor,
    value: _Descriptor,
    pooled_key: _Descriptor | None,
    pooled_value: _Descriptor | None,
    plan_in: _Descriptor | None,
    plan_out: _Descriptor | None,
    out: _Descriptor,
    lse: _Descriptor | None,
    *,
    offsets: Sequence[int],
    key_lengths: Sequence[int] | None,
    scale: float,
    block_size: int,
    sparse: bool,
    blocks: int,
    local_blocks: int,
    first_blocks: int,
    dropout_p: float,
    seed: int,
    threads: int,
) -> None: ...
def causal_backward(
    grad_out: _Descriptor,
    grad_lse: _Descriptor | None,
    query: _Descriptor,
    key: _Descriptor,
    value: _Descriptor,
    out: _Descriptor,
    lse: _Descriptor,
    plan: _Descriptor,
    grad_query: _Descriptor,
    grad_key: _Descriptor,
    grad_value: _Descriptor,
    *,
    offsets: Sequence[int],
    key_lengths: Sequence[int] | None,
    scale: float,
    block_size: int,
    sparse: bool,
    dropout_p: float,
    seed: int,
    threads: int,
) -> None: ...
def append(
    key: _Descriptor,
    value: _Descriptor,
    stored_key: _Descriptor,
    stored_value: _Descriptor,
    key_means: _Descriptor,
    value_means: _Descriptor,
    *,
    before: Sequence[int],
    after: Sequence[int],
    block_size: int,
    threads: int,
) -> None: ...
def block_mask(plan: npt.NDArray[np.uint8], num_key_blocks: int) -> npt.NDArray[np.bool_]: ...
def build_info() -> _BuildInfo: ...
def use_torch_threads(address: int) -> None: ...
def kernel_rates() -> tuple[float, float, float]: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
