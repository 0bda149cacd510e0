"""`analysis.capture`: what is recorded of torch's models and of calls, and that no result changes."""

from __future__ import annotations

import math
from typing import Any

import mra_attention
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, named
from models import (
    ENCODER_MASKS,
    HEADS,
    LENGTH,
    WIDTH,
    causal,
    encoder,
    padding,
    qkv,
    tokens,
    transformer,
    vision_model,
)
from mra_attention import FallbackWarning, KVCache, replace_sdpa, varlen_attention
from mra_attention._observers import _thread
from mra_attention.analysis import AttentionCall, capture
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.trace"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def captured(function, **options: Any) -> list[AttentionCall]:
    """The calls that a function without arguments makes."""
    return list(capture(function, (), **options))


def assert_same_call(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, **others: Any) -> None:
    for name, expected in (("query", query), ("key", key), ("value", value)):
        tensor = getattr(call, name)
        assert torch.equal(tensor, expected), name
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
    for name, expected in others.items():
        assert getattr(call, name) == expected, name


def exact(call: AttentionCall) -> Tensor:
    """Attention of a record, with every block in the budget."""
    arguments = call.arguments() | {"blocks_per_row": math.inf}
    return mra_attention.scaled_dot_product_attention(call.query, call.key, call.value, **arguments)


def test_records_are_what_the_projections_return():
    model, x, projected = vision_model(), tokens(), []
    with torch.no_grad():
        expected = model(x)
    hooks = [
        model[layer].qkv.register_forward_hook(lambda module, inputs, out: projected.append(out)) for layer in (0, 2)
    ]
    results = []
    calls = capture(model, lambda model: results.append(model(x)))
    assert torch.equal(results[0], expected)
    assert not results[0].requires_grad
    assert calls.layers() == ["0", "2"]
    for call, out in zip(calls, projected, strict=True):
        query, key, value = out.view(2, LENGTH, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        assert_same_call(call, query, key, value, attn_mask=None, is_causal=False, scale=None, query_rows=None)
        assert call.query_length == LENGTH
    for hook in hooks:
        hook.remove()
    assert len(model[0].qkv._forward_hooks) == 0


def test_multi_head_attention_with_and_without_weights():
    """Both record what the projections of the weights are; results and random numbers are torch's."""
    attention = torch.nn.MultiheadAttention(WIDTH, HEADS, dropout=0.4, batch_first=True, dtype=torch.float64)
    query, key = tokens(LENGTH - 20), tokens()
    hidden = {"key_padding_mask": padding(), "attn_mask": causal().roll(3, 0)[: LENGTH - 20]}
    for case in ({}, hidden):
        inputs = [x.transpose(0, 1) for x in (query, key, key)]
        sides = zip(inputs, attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        heads = [F.linear(*side).view(-1, 2, HEADS, WIDTH // HEADS).permute(1, 2, 0, 3) for side in sides]
        for need_weights in (True, False):
            arguments = case | {"need_weights": need_weights}
            torch.manual_seed(0)
            expected = attention(query, key, key, **arguments)
            next_number = torch.rand(())
            results: list[Any] = []
            torch.manual_seed(0)
            (call,) = capture(
                attention,
                lambda module, a=arguments, r=results: r.append(module(query, key, key, **a)),
                enable_grad=True,
            )
            with named(arguments):
                assert torch.equal(torch.rand(()), next_number)
                for result, e in zip(results[0], expected, strict=True):
                    assert torch.equal(result, e) if isinstance(e, Tensor) else result is e
                assert results[0][0].requires_grad
                for name, tensor in zip(("query", "key", "value"), heads, strict=True):
                    assert_close(getattr(call, name), tensor, name)
                assert call.layer == "MultiheadAttention"
                shown = ~hidden["attn_mask"] & ~padding()[:, None, None]
                assert (call.attn_mask is None) == (not case)
                assert not case or torch.equal(call.attn_mask == 0, shown)
    # With weights, torch takes the mask and not the hint.
    (call,) = captured(
        lambda: attention(query, key, key, need_weights=True, attn_mask=hidden["attn_mask"], is_causal=True)
    )
    assert torch.equal(call.attn_mask[0, 0] == 0, ~hidden["attn_mask"])


KINDS = {
    "nothing": (None, False),
    "padding": (~padding()[:, None, None], False),
    "padding as a bias": (~padding()[:, None, None], False),
    "causal": (None, True),
    "causal, detected": (None, True),
    "causal and padding": (~padding()[:, None, None], True),
}


@pytest.mark.parametrize("masks", ENCODER_MASKS)
def test_an_encoder(masks):
    """Torch's own path without gradients is another one, whose results differ by rounding."""
    model, x, keywords = encoder(), tokens(), ENCODER_MASKS[masks]
    results = []
    calls = capture(model, lambda model: results.append(model(x, **keywords)), enable_grad=True)
    assert torch.equal(results[0], model(x, **keywords))
    assert calls.layers() == ["layers.0.self_attn", "layers.1.self_attn"]
    for call in calls:
        if masks in KINDS:
            mask, is_causal = KINDS[masks]
            assert call.is_causal == is_causal
            assert (call.attn_mask is None) if mask is None else torch.equal(call.attn_mask, mask)
        else:
            shown = (
                ~keywords["mask"] & ~keywords.get("src_key_padding_mask", torch.zeros(1, LENGTH).bool())[:, None, None]
            )
            assert torch.equal(call.attn_mask == 0, shown)
    assert_close(capture_output(model, x, keywords), model(x, **keywords).detach(), "out")


def capture_output(model: torch.nn.Module, x: Tensor, keywords: dict[str, Any]) -> Tensor:
    results = []
    capture(model, lambda model: results.append(model(x, **keywords)))
    return results[0]


def test_a_decoder_with_cross_attention():
    calls = capture(transformer(), {"src": tokens(), "tgt": tokens(LENGTH - 30), "tgt_mask": causal(LENGTH - 30)})
    shapes = {call.layer: (call.query.shape[2], call.key.shape[2], call.is_causal) for call in calls}
    assert shapes == {
        "encoder.layers.0.self_attn": (LENGTH, LENGTH, False),
        "decoder.layers.0.self_attn": (LENGTH - 30, LENGTH - 30, True),
        "decoder.layers.0.multihead_attn": (LENGTH - 30, LENGTH, False),
    }


def test_calls_of_torch():
    """Any shape that torch takes; attention of the record is torch's result."""
    query, key, value = qkv(70, batch=2, heads=4)
    bias = torch.randn(2, 1, 1, 70, 70, dtype=torch.float64)
    five = [x.unflatten(0, (1, 2)) for x in (query, key, value)]
    cases = {
        "scale": ((query, key, value), {"scale": 0.2}),
        "causal": ((query, key, value), {"is_causal": True}),
        "grouped": ((query, key[:, :2], value[:, :2]), {"enable_gqa": True}),
        "three dimensions": ((query[0], key[0], value[0]), {"attn_mask": torch.rand(4, 70, 70) < 0.8}),
        "two dimensions": ((query[0, 0], key[0, 0], value[0, 0]), {}),
        "five dimensions": ((*[x.transpose(0, 1) for x in five],), {"attn_mask": bias}),
        "broadcast": ((query, key[:1], value[:1]), {}),
        "upper left": ((query[:, :, :50], key, value), {"attn_mask": causal_upper_left(50, 70)}),
        "lower right": ((query[:, :, :50], key, value), {"attn_mask": causal_lower_right(50, 70)}),
        "a step": ((query[:, :, -1:], key, value), {}),
        "other channels": ((query, key, value[..., :3]), {"attn_mask": bias[:, 0].float().double()}),
    }
    for name, (inputs, arguments) in cases.items():
        expected = F.scaled_dot_product_attention(*inputs, **arguments)
        (call,) = captured(lambda i=inputs, a=arguments: F.scaled_dot_product_attention(*i, **a))
        with named(name):
            assert call.layer == "(no module)"
            assert_close(exact(call), expected.reshape(exact(call).shape), "out")
            if name == "grouped":
                assert_same_call(call, query, key[:, :2], value[:, :2])
            if name == "a step":
                assert (call.is_causal, call.causal_alignment) == (True, "lower_right")


def test_calls_of_this_package():
    """All that says what attention is; what says how to approximate it is left out."""
    query, key, value = qkv(70, batch=2, heads=4)
    attend = mra_attention.scaled_dot_product_attention
    valid = padding(70).logical_not()
    sinks, slopes = torch.randn(4), torch.rand(4)
    given = {"scale": 0.3, "softcap": 2.0, "sinks": sinks, "alibi_slopes": slopes, "query_padding_mask": valid}
    given |= {"attn_mask": valid[:, None, None], "window_size": (9, 4), "causal_alignment": "lower_right"}
    (call,) = captured(lambda: attend(query, key, value, **given, blocks_per_row=1))
    assert_same_call(
        call, query, key, value, scale=0.3, softcap=2.0, window_size=(9, 4), causal_alignment="lower_right"
    )
    for name in ("sinks", "alibi_slopes", "query_padding_mask", "attn_mask"):
        assert torch.equal(getattr(call, name), given[name]), name

    pairs = create_block_mask(lambda b, h, q, k: (q - k).abs() < 20, None, None, 70, 70, device="cpu", BLOCK_SIZE=16)
    (call,) = captured(lambda: attend(query, key, value, pairs))
    assert_same_call(call, query, key, value, attn_mask=None, window_size=(19, 19))
    band = torch.ones(70, 70, dtype=torch.bool).tril(3).triu(-3)
    (call,) = captured(lambda: attend(query, key, value, band, is_causal=True))
    assert call.is_causal
    assert torch.equal(call.attn_mask[0, 0], band)
    assert captured(lambda: attend(query, key, value, softcap=0.0))[0].softcap is None
    with pytest.raises(TypeError):
        captured(lambda: attend(query, key.float(), value))


def test_a_mask_beside_causality_is_kept_without_repeats():
    query, key, value = qkv(20)
    window = torch.ones(20, 20, dtype=torch.bool).triu(-4)
    (call,) = captured(
        lambda: mra_attention.scaled_dot_product_attention(
            query, key, value, attn_mask=window.expand(1, HEADS, 20, 20), is_causal=True
        )
    )
    assert call.is_causal
    assert torch.equal(call.attn_mask, window[None, None])


def test_nested_and_packed_sequences_are_calls_each():
    sequences = [torch.randn(length, HEADS, 8, dtype=torch.float64) for length in (5, 40)]
    jagged = torch.nested.nested_tensor(sequences, layout=torch.jagged).transpose(1, 2)
    packed = torch.cat(sequences)
    for name, call in {
        "torch": lambda: F.scaled_dot_product_attention(jagged, jagged, jagged),
        "ours": lambda: mra_attention.scaled_dot_product_attention(jagged, jagged, jagged),
        "packed": lambda: varlen_attention(packed, packed, packed, [0, 5, 45], torch.tensor([0, 5, 45])),
    }.items():
        with named(name):
            for record, sequence in zip(captured(call), sequences, strict=True):
                assert_same_call(record, *[sequence.transpose(0, 1)[None]] * 3)


def test_converted_modules_and_replaced_calls():
    """Each call is recorded once, by whichever function it is computed."""
    x = tokens()
    plain = capture(vision_model(), x)

    def replaced(model: torch.nn.Module) -> None:
        with replace_sdpa(blocks_per_row=math.inf, min_length=0):
            model(x)

    for ours, torchs in zip(capture(vision_model(), replaced), plain, strict=True):
        assert_close(ours.query, torchs.query, "query")
        assert ours.layer == torchs.layer

    def fallen_back(model: torch.nn.Module) -> None:
        with replace_sdpa(blocks_per_row=[1, 2, 3], min_length=0), pytest.warns(FallbackWarning):
            model(x)

    assert len(capture(vision_model(), fallen_back)) == 2
    model = encoder()
    expected = capture(model, x)
    mra_attention.nn.convert(model, blocks_per_row=math.inf)
    for ours, torchs in zip(capture(model, x), expected, strict=True):
        assert_close(ours.value, torchs.value, "value")
        assert ours.layer == torchs.layer
    with replace_sdpa(), pytest.raises(RuntimeError, match="inside replace_sdpa"):
        capture(model, x)


def test_captures_inside_of_each_other():
    inner = []

    def both(model: torch.nn.Module) -> None:
        inner.append(capture(model, tokens()))
        model(tokens())

    assert (len(capture(encoder(), both)), len(inner[0])) == (4, 2)


def test_copies_outlive_what_the_model_does_to_its_tensors():
    query, key, value = qkv(20)
    kept = key.clone()
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    shared = mask.clone()

    def attend() -> None:
        for _ in range(2):
            F.scaled_dot_product_attention(query, key, value, shared)
            key.zero_()
            shared.fill_(True)

    first, second = captured(attend)
    assert torch.equal(first.key, kept)
    assert torch.equal(second.key, torch.zeros_like(kept))
    assert (first.is_causal, second.is_causal) == (True, False)

    with torch.inference_mode():
        (call,) = captured(lambda: F.scaled_dot_product_attention(query + 1, key, value, mask.roll(1) & mask))
    assert not call.query.is_inference()
    assert not call.attn_mask.is_inference()


def test_autocast_and_checkpoints():
    model = vision_model().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calls = capture(model, tokens().float())
    assert {call.value.dtype for call in calls} == {torch.bfloat16}
    (call,) = captured(lambda: attend_autocast(qkv(20, dtype=torch.float32)))
    assert call.query.dtype is torch.bfloat16

    def train(model: torch.nn.Module) -> None:
        checkpoint(model, tokens(), use_reentrant=False).sum().backward()

    for model in (vision_model(), encoder()):
        if isinstance(model, torch.nn.TransformerEncoder):
            mra_attention.nn.convert(model)
        assert len(capture(model, train, enable_grad=True)) == 2, "not once more in backward"


def attend_autocast(inputs: list[Tensor]) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.scaled_dot_product_attention(*inputs)


def test_compiled_models_run_uncompiled():
    model, x, graphs = vision_model(), tokens(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain = capture(model, x)
    compiled = torch.compile(model, backend=backend)
    calls = capture(compiled, x)
    assert calls.layers() == ["_orig_mod.0", "_orig_mod.2"]
    assert torch.equal(calls[1].query, plain[1].query)
    assert not graphs
    compiled(x)
    assert len(graphs) > 0, "and compiled again afterwards"


def assert_nothing_is_left() -> None:
    assert _get_current_function_mode_stack() == []
    assert _thread.observers == []


def test_what_cannot_be_seen_is_refused():
    query, key, value = qkv(20)
    scripted = torch.nn.Sequential(torch.jit.trace(vision_model(), tokens()))
    cache = KVCache(1, HEADS, 8, dtype=torch.float64)
    cache.append(key, value)
    flex = [x.float() for x in (query, key, value)]
    cases = {
        "0 is scripted or traced": lambda: capture(scripted, tokens()),
        r"set_attn_implementation\(.sdpa.\)": lambda: capture(torch.nn.Linear(WIDTH, 3).double(), tokens()),
        "flex_attention": lambda: captured(lambda: flex_attention(*flex)),
        "KVCache.attend is not captured": lambda: captured(lambda: cache.attend(query)),
        "below torch.vmap": lambda: captured(
            lambda: torch.vmap(mra_attention.scaled_dot_product_attention)(query, key, value)
        ),
        "_transformer_encoder_layer_fwd": lambda: capture(
            torch.export.export(encoder().layers[0], (tokens(),), strict=True).module(), tokens()
        ),
    }
    for message, call in cases.items():
        with torch.no_grad(), pytest.raises((NotImplementedError, ValueError), match=message):
            call()
        assert_nothing_is_left()
    assert cache.attend(query).shape == query.shape
