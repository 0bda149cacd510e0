"""From a model to budgets and back: `capture`, `calibrate`, and the result in the model, in each way there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FLOAT64_TOLERANCE
from mra_attention import replace_sdpa
from mra_attention.analysis import Calibration, calibrate, capture
from mra_attention.nn import convert
from torch import Tensor

LENGTH, DIM, HEADS = 300, 32, 4


def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(DIM, HEADS, 64, batch_first=True, dtype=torch.float64)
    model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).mul_(2.0)  # so that heads look at some keys rather than at all
    return model


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": DIM, "num_attention_heads": HEADS, "intermediate_size": 64, "vocab_size": 50}
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=2, **sizes)).double().eval()
    return model.requires_grad_(False)


def calibrated(model: Any, batch: Any) -> Calibration:
    calibration = calibrate(capture(model, batch), speedup=2.0)
    budgets = {config.blocks_per_row for config in calibration.configs.values()}
    assert any(isinstance(each, tuple) and len(set(each)) > 1 for each in budgets), "budgets that differ are the point"
    return Calibration.from_json(calibration.to_json())


def test_modules_of_torch():
    model, x = encoder(), torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    calibration = calibrated(model, x)
    with replace_sdpa(layers=calibration.configs) as replaced:
        inside: Tensor = model(x)
    assert replaced.report().unmatched == ()
    assert not torch.allclose(inside, model(x), rtol=1e-4)
    convert(model, layers=calibration.configs)
    assert (model(x) - inside).norm() <= FLOAT64_TOLERANCE * inside.norm()


def test_models_of_transformers():
    model = bert()
    from mra_attention.integrations.transformers import configure, register

    ids = torch.randint(50, (1, LENGTH))
    calibration = calibrated(model, {"input_ids": ids})
    with replace_sdpa(layers=calibration.configs):
        expected: Tensor = model(ids).last_hidden_state
    register()
    configure(model, None, layers=calibration.configs)
    model.set_attn_implementation("mra")
    out: Tensor = model(ids).last_hidden_state
    assert (out - expected).norm() <= FLOAT64_TOLERANCE * expected.norm()
    configure(model, None)
    assert not torch.allclose(model(ids).last_hidden_state, expected, rtol=1e-7)
