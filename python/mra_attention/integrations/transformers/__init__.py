"""MRA attention in Hugging Face transformers: as attention implementation "mra", and inside `MraModel`."""

try:
    from .mra_models import patch_mra, unpatch_mra
    from .registration import configure, register
except (AttributeError, ImportError) as error:
    raise ImportError(
        f"mra_attention.integrations.transformers needs transformers 5.24 or later, which has what it uses: {error}"
    ) from error

__all__ = ["configure", "patch_mra", "register", "unpatch_mra"]
