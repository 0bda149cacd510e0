"""torch.utils.flop_counter: what the operators count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mra_attention import plan, scaled_dot_product_attention, varlen_attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

BATCH, HEADS, LENGTH, KEYS, DIM, VALUE_DIM, BLOCK = 2, 3, 43, 51, 6, 5, 8


def inputs() -> list[Tensor]:
    sizes = ((LENGTH, DIM), (KEYS, DIM), (KEYS, VALUE_DIM))
    return [torch.randn(BATCH, HEADS, *size, requires_grad=True) for size in sizes]


def count(function: Any) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(name).split(".")[-1]: number for name, number in counter.get_flop_counts()["Global"].items()}


def call(tensors: list[Tensor], **arguments: Any) -> Any:
    return lambda: scaled_dot_product_attention(*tensors, resolutions=(BLOCK, 1), **arguments).sum().backward()


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("form", [{}, {"pool_queries": False}], ids=["block", "token"])
def test_with_every_block_exact_as_many_as_for_torch(form, fake):
    with FakeTensorMode() if fake else torch.enable_grad():
        tensors = inputs()
        ours = count(call(tensors, blocks_per_row=math.inf, **form))
        theirs = count(
            lambda: torch.nn.functional.scaled_dot_product_attention(*tensors[:2], tensors[1]).sum().backward()
        )
    pairs = BATCH * HEADS * LENGTH * KEYS
    assert ours == {"forward": 2 * pairs * (DIM + VALUE_DIM), "backward": 2 * pairs * (3 * DIM + 2 * VALUE_DIM)}
    assert sum(theirs.values()) == 2 * pairs * 2 * DIM + 2 * pairs * 5 * DIM


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_exact_blocks_are_those_of_the_plan(mode, is_causal):
    tensors = inputs()
    settings: dict[str, Any] = {"blocks_per_row": 2, "is_causal": is_causal}
    chosen = plan(*tensors[:2], resolutions=(BLOCK, 1), **settings).block_mask()
    rows = LENGTH if is_causal else -(-LENGTH // BLOCK)
    of_rows = torch.tensor([1] * LENGTH if is_causal else [8, 8, 8, 8, 8, 3])
    of_columns = torch.tensor([8, 8, 8, 8, 8, 8, 3])
    exact = int((chosen * of_rows[:, None] * of_columns).sum())
    blocks = BATCH * HEADS * rows * 7
    pooled = 0 if mode == "sparse" else blocks - int(chosen.sum())
    assert count(call(tensors, mode=mode, **settings)) == {
        "forward": 2 * ((exact + blocks) * DIM + (exact + pooled) * VALUE_DIM),
        "backward": 2 * (exact + pooled) * (3 * DIM + 2 * VALUE_DIM),
    }


@pytest.mark.parametrize("is_causal", [False, True])
def test_under_fake_tensors_they_are_those_of_the_budget(is_causal):
    with FakeTensorMode():
        counted = count(call(inputs(), blocks_per_row=2, is_causal=is_causal))
    rows = LENGTH if is_causal else 6
    blocks = BATCH * HEADS * rows * 7
    chosen = BATCH * HEADS * rows * 2
    exact = chosen * BLOCK * (1 if is_causal else BLOCK)
    pooled = blocks - chosen
    assert counted == {
        "forward": 2 * ((exact + blocks) * DIM + (exact + pooled) * VALUE_DIM),
        "backward": 2 * (exact + pooled) * (3 * DIM + 2 * VALUE_DIM),
    }


def test_products_of_codes_are_not_counted():
    tensors = [x.detach() for x in inputs()]
    arguments: dict[str, Any] = {"blocks_per_row": 2, "first_blocks": 0, "pool_queries": False}
    plans: list[Any] = []

    def select(score: Any) -> None:
        plans.append(plan(*tensors[:2], resolutions=(BLOCK, 1), score=score, **arguments))

    assert count(lambda: select("mean")) == count(lambda: select("max"))
    assert not torch.equal(plans[0].data, plans[1].data)
    with FakeTensorMode():
        by_means, by_codes = (count(call(inputs(), score=score, **arguments)) for score in ("mean", "max"))
    assert by_means == by_codes


def test_packed_sequences_count_as_each_alone():
    lengths = [20, 0, 23]
    tensors = [torch.randn(43, HEADS, DIM) for _ in range(3)]
    starts = [0, 20, 20, 43]
    packed = count(lambda: varlen_attention(*tensors, starts, starts, resolutions=(BLOCK, 1), blocks_per_row=2))
    alone = 0
    for start, length in zip(starts, lengths, strict=False):
        item = [x[start : start + length].transpose(0, 1)[None] for x in tensors]
        counts = count(lambda x=item: scaled_dot_product_attention(*x, resolutions=(BLOCK, 1), blocks_per_row=2))
        alone += sum(counts.values())
    assert packed == {"forward": alone}


def test_a_selection_counts_its_logits():
    tensors = inputs()
    assert count(lambda: plan(*tensors[:2], resolutions=(BLOCK, 1), blocks_per_row=2)) == {
        "select": 2 * BATCH * HEADS * 6 * 7 * DIM
    }
