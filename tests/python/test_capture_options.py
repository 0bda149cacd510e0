"""Options of `analysis.capture`: batches, layers, sampled queries; calls in files; that nothing is left behind."""

from __future__ import annotations

import json
import sys
import threading
from collections import UserDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from helpers import named
from models import LENGTH, encoder, qkv, tokens, vision_model
from mra_attention._observers import _thread
from mra_attention.analysis import AttentionCall, Capture, capture
from test_models_doc import run
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, TensorDataset

FIELDS = AttentionCall.__dataclass_fields__


def assert_same_calls(calls: Capture, expected: Capture) -> None:
    assert len(calls) == len(expected)
    for call, other in zip(calls, expected, strict=True):
        for name in FIELDS:
            a, b = getattr(call, name), getattr(other, name)
            assert type(a) is type(b), name
            if isinstance(a, Tensor):
                assert a.dtype is b.dtype, name
                assert torch.equal(a, b), name
            else:
                assert a == b, name


def test_batches():
    """Alone or several; the calls are in their order."""
    model, x = encoder(), tokens()
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    each = capture(model, x)
    arguments = {"src": x, "src_key_padding_mask": mask}
    for batch in (x, (x, None, mask), arguments, UserDict(arguments), lambda model: model(x)):
        assert_same_calls(capture(model, batch), each)
        assert_same_calls(capture(model, [batch, batch]), Capture([*each, *each]))
    loaded = DataLoader(TensorDataset(x), batch_size=1)
    assert [len(call.query) for call in capture(model, loaded)] == [1] * 4
    assert [len(call.query) for call in capture(model, (y for y in x.split(1)))] == [1] * 4
    for wrong in (None, 3, "text", [x, 3]):
        with pytest.raises(TypeError, match="batch"):
            capture(model, wrong)
    with pytest.raises(ValueError, match="made no call of attention"):
        capture(model, [])


def test_progress(capsys):
    capture(encoder(), [tokens(), tokens()])
    assert "2/2" in capsys.readouterr().err
    capture(encoder(), [tokens(), tokens()], progress=False)
    capture(encoder(), tokens())
    assert capsys.readouterr().err == ""


def test_layers():
    x = tokens()
    for layers, expected in {
        "0": ["0"],
        "?": ["0", "2"],
        ("2", "0"): ["0", "2"],
        ("[1-9]",): ["2"],
        None: ["0", "2"],
    }.items():
        assert capture(vision_model(), x, layers=layers).layers() == expected
    with pytest.raises(ValueError, match=r"layers has '1', which matches none of '0', '2'"):
        capture(vision_model(), x, layers=["0", "1"])
    for wrong in (3, [3], [b"0"]):
        with pytest.raises(TypeError, match="layers"):
            capture(vision_model(), x, layers=wrong)


def test_sampled_queries():
    model, x = encoder(), tokens()
    whole = capture(model, x)
    sampled = capture(model, x, max_queries=4)
    for call, full in zip(sampled, whole, strict=True):
        # The middle of four parts of 22.5 tokens.
        assert call.query_rows.tolist() == [11, 33, 56, 78]
        assert torch.equal(call.query, full.query[:, :, [11, 33, 56, 78]])
        assert torch.equal(call.key, full.key)
        assert call.query_length == LENGTH
        with pytest.raises(ValueError, match=f"has 4 of {LENGTH} queries"):
            call.arguments()
    assert_same_calls(capture(model, x, max_queries=LENGTH), whole)
    for most in (1, 2, 7, 89):
        rows = capture(model, x, max_queries=most)[0].query_rows
        with named(most):
            assert len(rows) == most
            assert (rows.diff() >= LENGTH // most).all()
            assert (rows.diff() <= -(-LENGTH // most)).all()
    for wrong, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="max_queries"):
            capture(model, x, max_queries=wrong)
    for name in ("progress", "enable_grad"):
        with pytest.raises(TypeError, match=name):
            capture(model, x, **{name: 1})
    with pytest.raises(TypeError, match="model must be"):
        capture(x, x)


def calls_of_all_kinds() -> Capture:
    """Every field is given somewhere, in every dtype; key and value are one tensor."""
    calls = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        query, key, value = qkv(20, dtype=dtype)
        calls.append(AttentionCall(query, key.mT.contiguous().mT, value, layer="encoder.0", scale=0.1, is_causal=True))
        mask = torch.rand(2, 20) < 0.5
        head_terms = {"sinks": torch.randn(2), "alibi_slopes": torch.rand(2), "softcap": 1 / 3}
        shown = {"attn_mask": mask, "window_size": (3, -1), "causal_alignment": "lower_right"}
        rows = {"query_rows": torch.tensor([3, 7]), "query_length": 20, "query_padding_mask": mask}
        calls.append(AttentionCall(query[:, :, [3, 7]], key, key, "encoder.1", **head_terms, **shown, **rows))
    return Capture(calls)


def test_files_hold_every_bit(tmp_path: Path):
    calls = calls_of_all_kinds()
    calls.save(tmp_path / "a" / "b")
    loaded = Capture.load(tmp_path / "a" / "b")
    assert_same_calls(loaded, calls)
    assert repr(loaded) == repr(calls) == "Capture(8 calls of 2 layers)"
    loaded.save(str(tmp_path / "c"))
    assert_same_calls(Capture.load(tmp_path / "c"), calls)
    assert len(list((tmp_path / "c").iterdir())) == 8


def test_spill(tmp_path: Path):
    """Calls are in files as they come, and read when they are asked for."""
    model, folder = vision_model(), tmp_path / "calls"
    counts = []

    def batch(model: torch.nn.Module) -> None:
        model(tokens())
        counts.append(len(list(folder.iterdir())))

    calls = capture(model, [batch, batch], spill=folder, max_queries=10)
    assert counts == [2, 4]
    assert_same_calls(calls, capture(model, [tokens(), tokens()], max_queries=10))
    path = sorted(folder.iterdir())[1]
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["mra_attention.AttentionCall"])["layer"] == "2"
        assert set(file.keys()) == {"query", "key", "value", "query_rows"}
    # Nothing of a call is read before it is asked for.
    lazy = Capture.load(folder)
    path.unlink()
    assert lazy.layers() == ["0", "2"]
    assert lazy[0].layer == "0"
    with pytest.raises(FileNotFoundError):
        lazy[1]


def test_folders_that_do_not_fit(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for call in (calls_of_all_kinds().save, lambda path: capture(encoder(), tokens(), spill=path)):
        with pytest.raises(FileExistsError, match="must be a new folder or an empty one"):
            call(tmp_path)
        with pytest.raises(FileExistsError):
            call(tmp_path / "file")
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match="captured calls"):
            Capture.load(missing)
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no captured call"):
        Capture.load(tmp_path)


def test_a_capture_is_a_sequence():
    calls = calls_of_all_kinds()
    assert calls.layers() == ["encoder.0", "encoder.1"]
    assert isinstance(calls[1:3], Capture)
    assert calls[1:3].layers() == ["encoder.1", "encoder.0"]
    assert calls[-1] is list(calls)[7]
    assert_same_calls(calls.of_layer("encoder.1"), calls[1::2])
    with pytest.raises(ValueError, match=r"layer must be one of 'encoder.0', 'encoder.1', got '1'"):
        calls.of_layer("1")
    assert repr(calls[:1]) == "Capture(1 call of 1 layer)"


def test_exceptions_leave_nothing_behind(tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()

    def fail(model: torch.nn.Module) -> None:
        model(tokens())
        raise ZeroDivisionError

    for options in ({}, {"spill": tmp_path / "new"}, {"spill": empty}):
        with pytest.raises(ZeroDivisionError):
            capture(encoder(), fail, **options)
        with pytest.raises(ValueError, match="matches none"):
            capture(encoder(), tokens(), layers=["none", ".*"], **options)
        assert _get_current_function_mode_stack() == []
        assert _thread.observers == []
        assert torch.is_grad_enabled()
    assert list(tmp_path.iterdir()) == [empty]
    assert list(empty.iterdir()) == []
    graphs = []
    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)(tokens())
    assert len(graphs) == 1, "code is compiled again"


def test_other_threads_are_not_recorded():
    def both(model: torch.nn.Module) -> None:
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*qkv()))
        thread.start()
        thread.join()
        model(tokens())

    assert len(capture(encoder(), both)) == 2


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("tqdm.auto", "safetensors"):
        monkeypatch.setitem(sys.modules, name, None)
    for options, message in (({"progress": True}, "tqdm"), ({"spill": tmp_path / "a"}, "safetensors")):
        with pytest.raises(ImportError, match=rf"{message}: pip install mra-attention\[analysis\]"):
            capture(encoder(), [tokens(), tokens()], **{"progress": False} | options)
    assert list(tmp_path.iterdir()) == []


def test_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
    (section,) = (section for section in text.split("\n## ") if section.startswith("Capture"))
    monkeypatch.chdir(tmp_path)
    run(section, {})
