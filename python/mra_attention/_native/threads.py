"""Whose threads compute: torch's own, where torch lends them, or else a pool of the native module."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from .. import _core  # pyright: ignore[reportPrivateUsage]

_LIBRARIES = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}


def _choose() -> str:
    """Make the native module use torch's threads if it can; return whose threads it uses, "torch" or "rayon".

    torch lends its threads through `torch_parallel_for`, which is in its stable C interface since 2.10. The environment
    variable `MRA_ATTENTION_THREADS` may ask for "torch" or "rayon"; without it torch's are used if it has the function.

    Raises
    ------
    ValueError
        If the variable has another value.
    RuntimeError
        If it asks for "torch", and this torch lends no threads.
    """
    wanted = os.environ.get("MRA_ATTENTION_THREADS", "")
    if wanted not in ("", "torch", "rayon"):
        raise ValueError(f"MRA_ATTENTION_THREADS={wanted!r}, expected 'torch', 'rayon' or nothing")
    address = None if wanted == "rayon" else _parallel_for()
    if address is not None:
        _core.use_torch_threads(address)
        return "torch"
    if wanted == "torch":
        raise RuntimeError(
            f"MRA_ATTENTION_THREADS='torch', but torch {torch.__version__} has no torch_parallel_for: it is there from "
            "2.10 on; 'rayon' works with every torch"
        )
    return "rayon"


def _parallel_for() -> int | None:
    library = Path(torch.__file__).parent / "lib" / _LIBRARIES.get(sys.platform, "libtorch_cpu.so")
    try:
        function = ctypes.CDLL(str(library)).torch_parallel_for
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


THREADS_OF = _choose()
"""Whose threads compute: "torch" or "rayon"."""
