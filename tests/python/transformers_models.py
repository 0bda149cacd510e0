"""Small models of transformers with random weights, with MRA attention and with the attention they are compared to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from mra_attention.integrations.transformers import configure, register
from torch import Tensor

LENGTH, PADDED, VOCABULARY = 75, 21, 100
BLOCK = 8
EXACT = {"resolutions": [BLOCK, 1], "blocks_per_row": "inf"}
SMALL = {"resolutions": [BLOCK, 1], "blocks_per_row": 2}
SMALL_EVERYWHERE = {**SMALL, "sliding": SMALL}

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = _SIZES | _SPECIAL
_DECODER = _ENCODER | {"num_key_value_heads": 2, "max_position_embeddings": 256}
_WINDOW: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
    **_SPECIAL,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_SOUND = {"num_mel_bins": 8, "max_source_positions": 60, "max_target_positions": 128, "begin_suppress_tokens": None}


class Architecture(NamedTuple):
    model: str
    config: str
    sizes: dict[str, Any]
    reference: str = "sdpa"
    dtype: torch.dtype = torch.float64


ENCODERS = {
    "bert": Architecture("BertForMaskedLM", "BertConfig", _ENCODER),
    "roberta": Architecture("RobertaForMaskedLM", "RobertaConfig", _ENCODER),
    "electra": Architecture("ElectraForMaskedLM", "ElectraConfig", _ENCODER | {"embedding_size": 32}),
    "modernbert": Architecture(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _ENCODER | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 16, "layer_types": _WINDOW["layer_types"]},
    ),
}
DECODERS = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", _DECODER | _WINDOW | {"use_sliding_window": True}),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", _DECODER | {"head_dim": 16}),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", _DECODER | {"sliding_window": 16}),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "olmo2": Architecture("Olmo2ForCausalLM", "Olmo2Config", _DECODER),
    # "eager" takes the softmax in float32, in which the mask of float64 makes padded rows NaN.
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _DECODER | {"head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": None},
        "eager",
        torch.float32,
    ),
    "gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER | _WINDOW | {"head_dim": 8}),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _DECODER | _EXPERTS | {"head_dim": 8, "attention_chunk_size": 32, "intermediate_size_mlp": 64},
    ),
    # torch multiplies the weights of these experts in float32 at most.
    "deepseek_v3": Architecture("DeepseekV3ForCausalLM", "DeepseekV3Config", _ENCODER | _LATENT, dtype=torch.float32),
}
BOTH = {
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", _BART | {"forced_eos_token_id": None}),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", _T5),
    "whisper": Architecture("WhisperForConditionalGeneration", "WhisperConfig", _BART | _SOUND),
}
# Decoders with cross-attention that are told of it in ways of their own.
CROSS = {
    "gpt2_cross": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "add_cross_attention": True, **_SPECIAL},
    ),
}
COMPOSITE = {
    "gemma3_images": Architecture(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": _DECODER | _WINDOW | {"head_dim": 8},
            "vision_config": _SIZES | {"image_size": 16, "patch_size": 4},
            "mm_tokens_per_image": 4,
            "image_token_id": 97,
            "boi_token_index": 98,
            "eoi_token_index": 99,
        },
    ),
}
IMAGES = {
    "vit": Architecture(
        "ViTModel",
        "ViTConfig",
        {name: x for name, x in _SIZES.items() if name != "vocab_size"} | {"image_size": 32, "patch_size": 4},
    ),
}
CAPPED = {
    "gemma2_capped": Architecture(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _DECODER | {"head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": 1.0},
        "eager",
        torch.float32,
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        _DECODER | _WINDOW | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        "eager",
        torch.float32,
    ),
}
ALL = {**ENCODERS, **DECODERS, **BOTH, **CROSS, **COMPOSITE, **IMAGES, **CAPPED}


def build(name: str, mra: dict[str, Any] | None = None, dtype: torch.dtype | None = None) -> Any:
    """Return a model with MRA attention, in evaluation; weights so large that attention is far from even."""
    register()
    torch.manual_seed(0)
    architecture = ALL[name]
    dtype = architecture.dtype if dtype is None else dtype
    config = getattr(transformers, architecture.config)(**architecture.sizes)
    config._attn_implementation = "mra"
    model = getattr(transformers, architecture.model)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    configure(model, mra)
    return model.to(dtype)


@contextlib.contextmanager
def reference(name: str, model: Any) -> Iterator[Any]:
    """Let a model compute with the attention of torch, or with transformers' own where that cannot."""
    model.set_attn_implementation(ALL[name].reference)
    yield model
    model.set_attn_implementation("mra")


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    """Return random tokens, without special ones."""
    return torch.randint(3, VOCABULARY, (batch, length))


def padding(side: str) -> Tensor:
    """Return an attention mask of two sequences, the first of which is padded on this side ("none" for neither)."""
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    if side == "left":
        mask[0, :PADDED] = 0
    elif side == "right":
        mask[0, -PADDED:] = 0
    return mask


def positions(mask: Tensor) -> Tensor:
    """Return the positions of tokens, counted from the first valid one."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def error(result: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    assert expected.isfinite().all()
    return float(((result - expected).abs().max() / expected.abs().max()).detach())
