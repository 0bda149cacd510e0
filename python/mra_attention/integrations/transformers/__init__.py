"""MRA attention as an attention implementation of Hugging Face transformers, under the name "mra"."""

from .registration import configure, register

__all__ = ["configure", "register"]
