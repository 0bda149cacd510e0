"""The cache of keys and values: what it returns is what causal attention returns for the whole sequences."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import random
from typing import Any

import pytest
import torch
from mra_attention import KVCache, MRAConfig, scaled_dot_product_attention
from torch import Tensor

SETTINGS: dict[str, Any] = {"blocks_per_row": 3, "local_blocks": 2, "first_blocks": 1}
BLOCK_SIZE = 8
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def sequences(
    length: int, batch: int = 2, heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(batch, heads, length, 20).to(dtype)
    key, value = (
        torch.randn(batch, key_heads, length, 20).to(dtype),
        torch.randn(batch, key_heads, length, 12).to(dtype),
    )
    return query, key, value


def new_cache(batch: int = 2, key_heads: int = 2, dtype: torch.dtype = torch.float32, **more: Any) -> KVCache:
    return KVCache(batch, key_heads, 20, 12, dtype=dtype, **({"resolutions": (BLOCK_SIZE, 1)} | more))


def prefill(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    keywords = SETTINGS | {"resolutions": (BLOCK_SIZE, 1), "is_causal": True, "enable_gqa": True} | more
    return scaled_dot_product_attention(query, key, value, return_lse=True, **keywords)


def attend(cache: KVCache, query: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    return cache.attend(query, enable_gqa=True, return_lse=True, **(SETTINGS | more))


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert not e.isnan().any()
        assert torch.equal(a, e)


def part(tensors: tuple[Tensor, ...], item: int, start: int, end: int) -> tuple[Tensor, ...]:
    return tuple(x[item : item + 1, :, start:end] for x in tensors)


def test_negated_views_are_read_as_their_values():
    query, key, value = sequences(40)
    cache, plain = new_cache(), new_cache()
    cache.append(torch._neg_view(key), torch._neg_view(value))
    plain.append(-key, -value)
    assert_same(attend(cache, torch._neg_view(query)), attend(plain, -query))


@DTYPES
@pytest.mark.parametrize(
    "chosen", [{}, {"mode": "sparse"}, {"score": "max", "blocks_per_row": 6}, {"coarse_shift": 0.8}], ids=str
)
def test_chunks_of_any_size_give_the_bits_of_the_whole(dtype, chosen):
    length = 700
    query, key, value = sequences(length, dtype=dtype)
    expected = prefill(query, key, value, **chosen)
    generator, cache, start = random.Random(0), new_cache(dtype=dtype), 0
    while start < length:
        end = min(length, start + generator.choice([0, 1, 1, 1, 2, 7, 8, 9, 50]))
        cache.append(key[:, :, start:end], value[:, :, start:end])
        assert cache.lengths == (end, end)
        got = attend(cache, query[:, :, start:end], **chosen)
        assert_same(got, tuple(x[:, :, start:end] for x in expected))
        start = end


def test_thousands_of_steps():
    """Token by token, with blocks of 32: the memory grows five times."""
    length = 5000
    query, key, value = sequences(length, batch=1, heads=2, key_heads=1)
    expected = prefill(query, key, value, resolutions=(32, 1))
    cache = new_cache(batch=1, key_heads=1, resolutions=(32, 1))
    for t in range(length):
        cache.append(key[:, :, t : t + 1], value[:, :, t : t + 1])
        got = attend(cache, query[:, :, t : t + 1])
        assert_same(got, tuple(x[:, :, t : t + 1] for x in expected))
    assert cache.length == length
    assert length <= cache.capacity <= 2 * length


@pytest.mark.parametrize("window", [(30, -1), (0, 0), (13, 5)], ids=str)
def test_chunks_with_a_window_give_the_bits_of_the_whole(window):
    """Also where the window has left whole blocks behind; blocks inside of it are chosen by each token."""
    length = 150
    query, key, value = sequences(length)
    expected = prefill(query, key, value, window_size=window, blocks_per_row=2)
    cache, start = new_cache(), 0
    for count in (1, 40, 1, 7, 0, 60, 1, 1, 39):
        at = slice(start, start + count)
        cache.append(key[:, :, at], value[:, :, at])
        got = attend(cache, query[:, :, at], window_size=window, blocks_per_row=2)
        assert_same(got, tuple(x[:, :, at] for x in expected))
        start += count
    assert start == length


LADDERS: dict[tuple[int, ...], Any] = {(32, 8, 1): (2, 3), (128, 16, 4, 1): (1, 2, 5), (16, 8, 1): (math.inf, 2)}


@pytest.mark.parametrize("resolutions", LADDERS, ids=str)
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_several_levels_of_blocks(resolutions, mode):
    """In steps, after a crop to the middle of blocks of every size, and in another order: the bits of the whole."""
    length = 390
    settings = {"resolutions": resolutions, "blocks_per_row": LADDERS[resolutions], "mode": mode}
    query, key, value = sequences(length)
    expected = prefill(query, key, value, **settings)
    cache, start = new_cache(resolutions=resolutions), 0
    assert cache.block_size == resolutions[-2]

    def step(count: int) -> None:
        nonlocal start
        at = slice(start, start + count)
        cache.append(key[:, :, at], value[:, :, at])
        assert_same(attend(cache, query[:, :, at], **settings), tuple(x[:, :, at] for x in expected))
        start += count

    for count in (1, 40, 1, 7, 0, 160, 1, 1, 39):
        step(count)
    other = torch.randn(2, 2, 77, 20), torch.randn(2, 2, 77, 12)
    cache.append(*other)
    start = 203
    cache.crop(start)
    for count in (3, 1, 90):
        step(count)
    cache.reorder([1, 0, 1])
    query, key, value = (x[[1, 0, 1]] for x in (query, key, value))
    expected = tuple(x[[1, 0, 1]] for x in expected)
    for count in (1, 1, length - start - 2):
        step(count)
    assert start == length


def test_levels_other_than_those_of_the_cache_are_refused():
    cache = new_cache(resolutions=(32, 8, 1))
    cache.append(*sequences(40)[1:])
    with pytest.raises(ValueError, match="blocks of 32 and 8 tokens"):
        attend(cache, torch.randn(2, 4, 1, 20), resolutions=(8, 1))


def test_settings_come_from_the_call_or_else_from_the_cache():
    query, key, value = sequences(70)
    config = MRAConfig(resolutions=(BLOCK_SIZE, 1), blocks_per_row=2, mode="sparse", local_blocks=2)
    cache = new_cache(config=config)
    cache.append(key, value)
    assert cache.config == config
    assert cache.block_size == BLOCK_SIZE
    given: list[tuple[dict[str, Any], MRAConfig]] = [
        ({}, config),
        ({"blocks_per_row": 3}, dataclasses.replace(config, blocks_per_row=3)),
        ({"blocks_per_row": (1, 2, 3, 4)}, dataclasses.replace(config, blocks_per_row=(1, 2, 3, 4))),
        ({"config": MRAConfig(resolutions=(BLOCK_SIZE, 1))}, MRAConfig(resolutions=(BLOCK_SIZE, 1))),
    ]
    for arguments, means in given:
        got = cache.attend(query, enable_gqa=True, return_lse=True, **arguments)
        expected = scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True, return_lse=True, config=means
        )
        assert_same(got, expected)


def test_another_default_device_makes_no_difference():
    query, key, value = sequences(70)
    expected = prefill(query, key, value)
    with torch.device("meta"):
        cache = new_cache()
        for at in (slice(0, 40), slice(40, 70)):
            cache.append(key[:, :, at], value[:, :, at])
            assert_same(attend(cache, query[:, :, at]), tuple(x[:, :, at] for x in expected))
        cache.append(*(x.repeat(1, 1, 9, 1) for x in (key, value)))  # the memory grows
        cache.reorder([1, 0])
        cache.crop(70)
        got = attend(cache, query.flip(0))
    assert_same(got, tuple(x.flip(0) for x in expected))


def test_every_length_of_a_prompt():
    query, key, value = sequences(40, batch=1)
    for length in range(41):
        cache = new_cache(batch=1)
        cache.append(key[:, :, :length], value[:, :, :length])
        assert_same(attend(cache, query[:, :, :length]), prefill(*(x[:, :, :length] for x in (query, key, value))))


def test_fewer_queries_than_new_tokens():
    """After a prompt, only the last token need attend."""
    query, key, value = sequences(100)
    cache = new_cache()
    cache.append(key, value)
    expected = prefill(query, key, value)
    assert_same(attend(cache, query[:, :, -3:]), tuple(x[:, :, -3:] for x in expected))


@pytest.mark.parametrize("padded", ["nan", "zero"])
def test_sequences_of_unequal_lengths(padded):
    """Chunks of which every sequence takes another number of tokens; what is behind them is never read."""
    length, counts = 200, [0, 0, 0]
    tensors = sequences(length, batch=3)
    expected = [prefill(*part(tensors, item, 0, length)) for item in range(3)]
    generator, cache = random.Random(1), new_cache(batch=3)
    while max(counts) < length - 30:
        new = [generator.choice([0, 1, 5, 8, 30]) for _ in range(3)]
        chunks = [torch.full_like(x[:, :, : max(new)], math.nan if padded == "nan" else 0.0) for x in tensors]
        for item, (before, number) in enumerate(zip(counts, new, strict=True)):
            for chunk, whole in zip(chunks, tensors, strict=True):
                chunk[item, :, :number] = whole[item, :, before : before + number]
        cache.append(*chunks[1:], lengths=torch.tensor(new) if padded == "nan" else new)
        out, lse = attend(cache, chunks[0], lengths=new)
        for item, (before, number) in enumerate(zip(counts, new, strict=True)):
            rows = tuple(x[:, :, before : before + number] for x in expected[item])
            assert_same((out[item : item + 1, :, :number], lse[item : item + 1, :, :number]), rows)
            assert (out[item, :, number:] == 0).all()
            assert (lse[item, :, number:] == -math.inf).all()
        counts = [a + b for a, b in zip(counts, new, strict=True)]
        assert cache.lengths == tuple(counts)
    assert cache.length == max(counts)


def test_padding_on_the_left():
    """Prompts that end together: queries before the first token of a sequence see nothing."""
    tensors = sequences(30, batch=2)
    query, key, value = tensors
    cache = new_cache()
    cache.append(key, value, [30, 13])
    shifted = query.clone()
    shifted[1, :, 17:] = query[1, :, :13]
    out, lse = attend(cache, shifted)
    assert_same((out[1:, :, 17:], lse[1:, :, 17:]), prefill(*part(tensors, 1, 0, 13)))
    assert_same((out[:1], lse[:1]), prefill(*part(tensors, 0, 0, 30)))
    assert (out[1, :, :17] == 0).all()
    assert (lse[1, :, :17] == -math.inf).all()


def test_beam_search():
    """Sequences that are swapped, repeated and dropped keep their history."""
    generator, beams = random.Random(2), 4
    query, key, value = sequences(1, batch=beams)
    history: list[list[tuple[Tensor, ...]]] = [[] for _ in range(beams)]
    cache = new_cache(batch=beams)
    for step in range(60):
        query, key, value = sequences(1, batch=len(history))
        cache.append(key, value)
        out = attend(cache, query)
        for item, tokens in enumerate(history):
            tokens.append(part((query, key, value), item, 0, 1))
            if step % 7 == 0:
                whole = [torch.cat(list(x), 2) for x in zip(*tokens, strict=True)]
                expected = prefill(*whole)
                assert_same(tuple(x[item : item + 1] for x in out), tuple(x[:, :, -1:] for x in expected))
        size = 3 if step == 30 else beams
        order = [generator.randrange(len(history)) for _ in range(size)]
        cache.reorder(torch.tensor(order) if step % 2 else order)
        history = [list(history[index]) for index in order]
        assert cache.batch_size == size
    assert cache.length == 60


@pytest.mark.parametrize("most", [0, 1, 7, 8, 40, 43, 95, 200])
def test_crop(most):
    """After it, other tokens follow: nothing of the old ones is left."""
    old, new = sequences(100), sequences(60)
    cache = new_cache()
    cache.append(*old[1:])
    cache.crop(most)
    kept = min(most, 100)
    assert cache.lengths == (kept, kept)
    tensors = tuple(torch.cat([a[:, :, :kept], b], 2) for a, b in zip(old, new, strict=True))
    cache.append(*new[1:])
    assert_same(attend(cache, new[0]), tuple(x[:, :, kept:] for x in prefill(*tensors)))


def test_crop_of_each_sequence_and_reset():
    tensors = sequences(100)
    query, key, value = tensors
    cache = new_cache()
    cache.append(key, value)
    cache.crop([50, 71])
    assert cache.lengths == (50, 71)
    out, lse = attend(cache, torch.stack([query[0, :, 45:50], query[1, :, 66:71]]))
    for item, end in enumerate((50, 71)):
        expected = prefill(*part(tensors, item, 0, end))
        assert_same((out[item : item + 1], lse[item : item + 1]), tuple(x[:, :, -5:] for x in expected))
    cache.reset()
    assert cache.lengths == (0, 0)
    capacity = cache.capacity
    cache.append(key, value)
    assert cache.capacity == capacity
    assert_same(attend(cache, query), prefill(query, key, value))


def test_max_length_is_a_limit():
    _, key, value = sequences(20)
    cache = new_cache(max_length=20)
    assert cache.capacity == cache.max_length == 20
    pointer = cache._memory.key.data_ptr()
    cache.append(key[:, :, :12], value[:, :, :12])
    with pytest.raises(ValueError, match="21 tokens, more than max_length=20"):
        cache.append(key[:, :, :9], value[:, :, :9])
    assert cache.lengths == (12, 12), "nothing was appended"
    cache.append(key[:, :, :8], value[:, :, :8])
    assert cache._memory.key.data_ptr() == pointer


def test_nothing_at_all():
    cache = new_cache(batch=0)
    assert (cache.lengths, cache.length, cache.batch_size) == ((), 0, 0)
    query, key, value = sequences(3, batch=0)
    cache.append(key, value)
    assert attend(cache, query)[0].shape == (0, 4, 3, 12)
    cache.reorder([])
    empty = new_cache()
    out, lse = attend(empty, torch.randn(2, 4, 1, 20))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_inputs_of_other_layouts_and_without_names():
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in sequences(50))
    cache = new_cache()
    cache.append(key, value)
    out = cache.attend(query, enable_gqa=True, **SETTINGS)
    assert isinstance(out, Tensor)
    assert torch.equal(out, prefill(query, key, value)[0])
    assert out.transpose(1, 2).is_contiguous(), "stored like the query"
    assert repr(cache).startswith("KVCache(batch_size=2, num_kv_heads=2, head_dim=20, value_dim=12, lengths=(50, 50)")


def copied(cache: KVCache, how: str) -> KVCache:
    if how == "deepcopy":
        return copy.deepcopy(cache)
    if how == "pickle":
        return pickle.loads(pickle.dumps(cache))
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_copy_is_independent(how):
    old, new, other = sequences(100), sequences(30), sequences(30)
    cache = new_cache()
    cache.append(*old[1:])
    copy_of_it = copied(cache, how)
    cache.append(*other[1:])
    copy_of_it.append(*new[1:])
    for one, following in ((cache, other), (copy_of_it, new)):
        tensors = tuple(torch.cat(pair, 2) for pair in zip(old, following, strict=True))
        assert_same(attend(one, following[0]), tuple(x[:, :, 100:] for x in prefill(*tensors)))


def test_in_and_out_of_inference_mode():
    query, key, value = sequences(600)
    with torch.inference_mode():
        cache = new_cache()
        cache.append(key[:, :, :300], value[:, :, :300])
    cache.append(key[:, :, 300:301], value[:, :, 300:301])
    with torch.inference_mode():
        cache.append(key[:, :, 301:], value[:, :, 301:])
        out = attend(cache, query)
    assert_same(attend(cache, query), out)
    assert_same(out, prefill(query, key, value))


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it cannot trace
def test_a_step_in_a_compiled_function():
    """The cache is no part of the graph; what is around it is."""
    query, key, value = sequences(50)
    cache = new_cache()

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.append(2 * key, value + 1)
        return cache.attend(query * 2, enable_gqa=True, **SETTINGS) + 1

    compiled, expected = torch.compile(step, backend="aot_eager"), prefill(query * 2, key * 2, value + 1)[0]
    for t in range(3):
        at = slice(t, t + 1)
        out = compiled(query[:, :, at], key[:, :, at], value[:, :, at])
        assert torch.equal(out, expected[:, :, at] + 1)
    torch.compiler.reset()


def test_autocast():
    query, key, value = sequences(50)
    cache = new_cache(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache.append(key, value)
        out = attend(cache, query)
        assert_same(out, prefill(query, key, value))


def test_gradients_are_refused():
    query, key, value = sequences(5)
    cache = new_cache()
    for given in ((key.requires_grad_(), value), (key.detach(), value.requires_grad_())):
        with pytest.raises(RuntimeError, match=r"requires gradients.*torch.no_grad\(\)"):
            cache.append(*given)
    with torch.no_grad():
        cache.append(key, value)
    with pytest.raises(RuntimeError, match="query requires gradients"):
        attend(cache, query.requires_grad_())
    with torch.no_grad():
        assert not attend(cache, query)[0].requires_grad


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "key shape": (
        lambda c: c.append(torch.randn(2, 3, 5, 20), torch.randn(2, 2, 5, 12)),
        ValueError,
        r"key .*\(2, 2, n, 20\)",
    ),
    "value shape": (lambda c: c.append(torch.randn(2, 2, 5, 20), torch.randn(2, 2, 5, 20)), ValueError, "value .*, 12"),
    "lengths differ": (
        lambda c: c.append(torch.randn(2, 2, 5, 20), torch.randn(2, 2, 4, 12)),
        ValueError,
        "same length",
    ),
    "key dtype": (
        lambda c: c.append(torch.randn(2, 2, 5, 20).double(), torch.randn(2, 2, 5, 12)),
        TypeError,
        "key must be torch.float32.* torch.float64",
    ),
    "key list": (lambda c: c.append([1.0], torch.randn(2, 2, 5, 12)), TypeError, "key must be a torch.Tensor"),
    "meta": (
        lambda c: c.append(torch.empty(2, 2, 5, 20, device="meta"), torch.randn(2, 2, 5, 12)),
        NotImplementedError,
        "key is on device meta",
    ),
    "too many": (
        lambda c: c.append(torch.randn(2, 2, 5, 20), torch.randn(2, 2, 5, 12), [5, 6]),
        ValueError,
        r"lengths must be 2 integers from 0 to 5.*\[5, 6\]",
    ),
    "too few lengths": (
        lambda c: c.append(torch.randn(2, 2, 5, 20), torch.randn(2, 2, 5, 12), [5]),
        ValueError,
        "lengths must be 2 integers",
    ),
    "float lengths": (
        lambda c: c.append(torch.randn(2, 2, 5, 20), torch.randn(2, 2, 5, 12), torch.tensor([1.0, 2.0])),
        TypeError,
        "lengths must be integers",
    ),
    "negative lengths": (
        lambda c: c.append(torch.randn(2, 2, 5, 20), torch.randn(2, 2, 5, 12), torch.tensor([1, -2])),
        ValueError,
        "lengths must be 2 integers",
    ),
    "query batch": (lambda c: c.attend(torch.randn(3, 2, 1, 20)), ValueError, r"query must have the shape \(2, heads"),
    "query heads": (lambda c: c.attend(torch.randn(2, 4, 1, 20)), ValueError, "2 heads.*enable_gqa=True would group"),
    "query group": (lambda c: c.attend(torch.randn(2, 3, 1, 20), enable_gqa=True), ValueError, "a multiple of 2 heads"),
    "mode": (lambda c: c.attend(torch.randn(2, 2, 1, 20), mode="dense"), ValueError, "mode must be 'full' or 'sparse'"),
    "budget": (lambda c: c.attend(torch.randn(2, 2, 1, 20), blocks_per_row=0), ValueError, "blocks_per_row must be"),
    "local": (lambda c: c.attend(torch.randn(2, 2, 1, 20), local_blocks=0), ValueError, "local_blocks must be"),
    "scale": (lambda c: c.attend(torch.randn(2, 2, 1, 20), scale=math.nan), ValueError, "scale must be"),
    "window": (lambda c: c.attend(torch.randn(2, 2, 1, 20), window_size=3), TypeError, "window_size must be two"),
    "config": (lambda c: c.attend(torch.randn(2, 2, 1, 20), config=3), TypeError, "config must be None or a"),
    "setting": (lambda c: c.attend(torch.randn(2, 2, 1, 20), is_causal=True), TypeError, "'is_causal' is no argument"),
    "other resolutions": (
        lambda c: c.attend(torch.randn(2, 2, 1, 20), resolutions=(64, 1)),
        ValueError,
        r"resolutions=\(64, 1\) do not fit the cache",
    ),
    "reorder": (lambda c: c.reorder([0, 2]), ValueError, r"indices must be integers from 0 to 1, got \[0, 2\]"),
    "reorder floats": (lambda c: c.reorder([0.5]), TypeError, r"indices\[0\] must be an integer"),
    "crop": (lambda c: c.crop(-1), ValueError, "lengths must be an integer of at least 0"),
    "crop short": (lambda c: c.crop([1]), ValueError, "lengths must be 2 integers of at least 0"),
    "batch": (lambda _: KVCache(-1, 2, 20), ValueError, "batch_size must be an integer of at least 0"),
    "dtype": (lambda _: KVCache(1, 2, 20, dtype=torch.int8), TypeError, "dtype must be float32"),
    "resolutions": (
        lambda c: c.attend(torch.randn(2, 2, 1, 20), resolutions=(64, 8, 1)),
        ValueError,
        r"resolutions=\(64, 8, 1\) do not fit the cache",
    ),
    "max_length": (
        lambda _: KVCache(1, 2, 20, max_length=0),
        ValueError,
        "max_length must be an integer of at least 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, error, words = REFUSED[name]
    cache = new_cache()
    with pytest.raises(error, match=words):
        call(cache)
    assert cache.lengths == (0, 0)
