"""Contexts of `replace_sdpa`: one inside of another, in threads, as decorators, and that nothing is left behind."""

from __future__ import annotations

import threading

import mra_attention
import pytest
import torch
import torch.nn.functional as F
from models import EXACT, FEW, few, qkv
from mra_attention import replace_sdpa
from mra_attention.integrations.sdpa import _thread
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack


def assert_nothing_is_left() -> None:
    assert _get_current_function_mode_stack() == []
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    inputs = qkv()
    assert not torch.equal(F.scaled_dot_product_attention(*inputs), few(*inputs))


def test_nothing_is_left_behind():
    inputs = qkv()
    with replace_sdpa(**FEW), replace_sdpa(**EXACT):
        pass
    assert_nothing_is_left()

    def fail():
        with replace_sdpa(**FEW) as replaced:
            try:
                with replaced:
                    raise ZeroDivisionError
            except ZeroDivisionError:
                assert torch.equal(F.scaled_dot_product_attention(*inputs), few(*inputs))
                raise

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_nothing_is_left()


def test_the_innermost_context_decides():
    inputs = qkv()
    exact = F.scaled_dot_product_attention(*inputs)
    with replace_sdpa(**FEW) as outer:
        with replace_sdpa(min_length=10**6) as inner, outer, inner:
            assert torch.equal(F.scaled_dot_product_attention(*inputs), exact)
        assert (inner.report().not_taken, len(outer.report())) == (1, 0)
        assert torch.equal(F.scaled_dot_product_attention(*inputs), few(*inputs))
    assert outer.report().taken == 1


def test_other_modes_see_the_calls_that_go_to_torch():
    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += func is torch._C._nn.scaled_dot_product_attention
            return func(*args, **(kwargs or {}))

    with Count() as outside, replace_sdpa(), Count() as inside:
        F.scaled_dot_product_attention(*qkv(10))
    assert (outside.calls, inside.calls) == (1, 1)


def test_threads():
    inputs = qkv()
    exact = F.scaled_dot_product_attention(*inputs)
    shared = replace_sdpa(**FEW)
    settings = [{"blocks_per_row": n, "resolutions": (8, 1)} for n in (1, 2, 3)]
    expected = [mra_attention.scaled_dot_product_attention(*inputs, **each) for each in settings]
    barrier = threading.Barrier(6)
    results: dict[int, bool] = {}

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(20):
            if number < 3:
                with replace_sdpa(min_length=0, **settings[number]):
                    good = torch.equal(F.scaled_dot_product_attention(*inputs), expected[number])
            elif number < 5:
                with shared:
                    good = torch.equal(F.scaled_dot_product_attention(*inputs), expected[0])
            else:
                good = torch.equal(F.scaled_dot_product_attention(*inputs), exact)
            results[number] = results.get(number, True) and good

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    with replace_sdpa(**FEW) as here:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(F.scaled_dot_product_attention(*inputs), expected[0])
    assert results == dict.fromkeys(range(6), True)
    assert here.report().taken == 1
    assert shared.report().taken == 40


def test_decorator():
    replaced = replace_sdpa(**FEW)

    @replaced
    def attend(*inputs: Tensor) -> Tensor:
        """Attend."""
        return F.scaled_dot_product_attention(*inputs)

    assert (attend.__name__, attend.__doc__) == ("attend", "Attend.")
    inputs = qkv()
    assert torch.equal(attend(*inputs), few(*inputs))
    assert torch.equal(attend(*inputs), few(*inputs))
    assert replaced.report().taken == 2
    assert_nothing_is_left()


def test_decorator_refuses_what_runs_later():
    def generator():
        yield

    async def coroutine():
        pass

    async def asynchronous_generator():
        yield

    for late in (generator, coroutine, asynchronous_generator, torch.nn.Linear):
        with pytest.raises(TypeError, match="use `with` inside"):
            replace_sdpa()(late)


def test_suspended_contexts_are_left_in_order_or_not_at_all():
    def suspended():
        with replace_sdpa(blocks_per_row=1):
            yield

    first, second = suspended(), suspended()
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="left in another order than its contexts were entered"):
        first.close()
    second.close()
    _thread.modes.pop().__exit__(None, None, None)  # what the first one left
