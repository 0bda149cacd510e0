"""MRA attention in Hugging Face transformers: as attention implementation "mra", and inside `MraModel`."""

from .mra_models import patch_mra, unpatch_mra
from .registration import configure, register

__all__ = ["configure", "patch_mra", "register", "unpatch_mra"]
