"""Captures and pages of models by their names: what they read, and how much of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mra_attention.analysis import Capture
from mra_attention.analysis import __main__ as command
from mra_attention.analysis._report.sources import Reading, calls_of
from transformers import BertConfig, BertModel, BertTokenizer, T5Config, T5Model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 64, "vocab_size": len(WORDS)}
    BertModel(BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=60).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "letters.txt"
    path.write_text("a b c d " * 5)
    return path


def test_by_default_it_reads_as_much_as_it_takes(model: str) -> None:
    calls, about = calls_of(model, None, Reading())
    assert [call.layer for call in calls] == [f"encoder.layer.{i}.attention.self" for i in range(2)]
    assert calls[0].key.shape == (1, 2, 60, 8)
    assert about["Model"].startswith(f"{model} (BertModel of transformers ")
    assert about["Text"].endswith("(pydoc_data.topics); the first 60 tokens")


def test_it_reads_a_text_and_some_layers_are_captured(model: str, text: Path) -> None:
    calls, about = calls_of(model, "encoder.layer.1.*", Reading(text, 10))
    assert [(call.layer, call.query_length) for call in calls] == [("encoder.layer.1.attention.self", 10)]
    assert about["Text"] == "letters.txt; the first 10 tokens"
    # A whole text has two tokens more, which begin and end it.
    calls, about = calls_of(model, None, Reading(text))
    assert calls[0].query_length == 22
    assert about["Text"] == "letters.txt; the first 22 tokens"


def test_what_was_captured_by_name_is_what_is_read(model: str, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    assert command.main(["capture", model, "-o", str(folder), "--text", str(text), "--tokens", "12"]) == 0
    assert len(Capture.load(folder)) == 2
    expected, about = calls_of(model, None, Reading(text, 12))
    calls, found = calls_of(str(folder), None, Reading())
    assert found == about == json.loads((folder / "about.json").read_text())
    for call, other in zip(calls, expected, strict=True):
        assert torch.equal(call.query, other.query)


@pytest.mark.parametrize("tokens", [0, 61])
def test_no_more_tokens_than_the_model_takes(model: str, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"--tokens must be from 1 to 60, as much as the model takes, got {tokens}"):
        calls_of(model, None, Reading(tokens=tokens))


def test_no_more_tokens_than_the_text_has(model: str, text: Path) -> None:
    with pytest.raises(ValueError, match=r"--tokens=40 is more than the text has, which is 22: letters\.txt"):
        calls_of(model, None, Reading(text, 40))


def test_two_texts_are_not_for_it(tmp_path: Path) -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 10}
    T5Model(T5Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has an encoder and a decoder"):
        calls_of(str(tmp_path), None, Reading())
