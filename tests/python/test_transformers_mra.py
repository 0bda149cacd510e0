"""The patched MRA models of transformers: attention is that of the model's own code, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from helpers import FLOAT64_TOLERANCE, assert_close, named
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

transformers = pytest.importorskip("transformers")
from mra_attention.integrations.transformers import patch_mra, unpatch_mra  # noqa: E402
from transformers import MraConfig, MraModel  # noqa: E402
from transformers.models.mra.modeling_mra import MraSelfAttention  # noqa: E402
from transformers_mra_reference import OWN_FORWARD, its_own_code, padded_to_blocks  # noqa: E402

HEADS = {
    transformers.MraForMaskedLM: (2, 70),
    transformers.MraForSequenceClassification: (2, 70),
    transformers.MraForQuestionAnswering: (2, 70),
    transformers.MraForTokenClassification: (2, 70),
    transformers.MraForMultipleChoice: (2, 3, 70),
}


@pytest.fixture(autouse=True)
def _patched() -> Iterator[None]:
    with patch_mra():
        yield
    assert MraSelfAttention.forward is OWN_FORWARD


def small(length: int = 256, **settings: object) -> MraConfig:
    """Return the configuration of a model of two layers and two heads that takes `length` tokens."""
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return MraConfig(**sizes, **no_dropout, num_attention_heads=2, max_position_embeddings=length, **settings)


def attention(config: MraConfig) -> nn.Module:
    """Return a layer of attention in float64 whose logits are not all alike."""
    module = MraSelfAttention(config).double()
    for projection in (module.query, module.key):
        nn.init.normal_(projection.weight, std=0.25)
    return module


def hidden(batch: int, length: int, config: MraConfig) -> Tensor:
    """Return hidden states that differ more from block to block than within a block, as those of text do."""
    blocks = torch.randn(batch, -(-length // 32), config.hidden_size, dtype=torch.float64)
    noise = torch.randn(batch, length, config.hidden_size, dtype=torch.float64)
    return 0.5 * blocks.repeat_interleave(32, 1)[:, :length] + 0.5 * noise


SETTINGS = [
    {"block_per_row": 1},
    {"block_per_row": 3},
    {"block_per_row": 8},
    {"block_per_row": 3, "initial_prior_diagonal_n_blocks": 1},
    {"block_per_row": 5, "initial_prior_diagonal_n_blocks": 2, "initial_prior_first_n_blocks": 1},
    {"block_per_row": 2, "num_attention_heads": 4},  # heads of 16: the model's scale is that of 32
]


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_output_and_gradients_are_those_of_the_model_s_own_code(mode):
    for settings in SETTINGS:
        config = MraConfig(**(small().to_dict() | settings | {"approx_mode": mode}))
        module, states = attention(config), hidden(2, 256, config).requires_grad_()
        leaves = [states, *module.parameters()]
        grad_out = torch.randn(2, 256, 64, dtype=torch.float64)
        mask = torch.ones(2, 256)
        with its_own_code():
            (theirs,) = module(states, mask)
            gradients = torch.autograd.grad(theirs, leaves, grad_out)
        (ours,) = module(states, mask)
        with named(settings):
            assert_close(ours, theirs, "output")
            for actual, expected in zip(torch.autograd.grad(ours, leaves, grad_out), gradients, strict=True):
                assert_close(actual, expected, "gradient")


def test_the_epsilons_of_the_model_s_own_code_are_all_that_is_left_out():
    """1e-6 is added to denominators and counts. A denominator is at least that of one exact block, whose weights are
    at least exp(-spread); a count is 32, so that means, and with them logits c, are off by a part of 1e-6 / 32."""
    config = small(block_per_row=3)
    module, states = attention(config), hidden(1, 256, config)
    query, key, value = (layer(states).unflatten(-1, (2, 32)).transpose(1, 2) for layer in _projections(module))
    logits = query @ key.transpose(-1, -2) / math.sqrt(32)
    spread = (logits.amax((-2, -1)) - logits.amin((-2, -1))).max().item()
    part = 1e-6 / 32
    relative = part * math.exp(spread) + 2 * (2 * part * logits.abs().max().item()) + part
    with its_own_code(epsilon=True):
        (theirs,) = module(states, torch.ones(1, 256))
    difference = (module(states)[0] - theirs).abs().max().item()
    assert FLOAT64_TOLERANCE < difference <= relative * value.abs().max().item()


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_any_length_is_taken(mode):
    config = small(128, block_per_row=1, approx_mode=mode)
    module = attention(config)
    for length in (33, 65, 97, 100, 127):
        states = hidden(1, length, config)
        with named(length):
            assert_close(module(states, torch.ones(1, length))[0], padded_to_blocks(module, states), "output")


def test_short_inputs_are_exact():
    """By default 64 blocks are exact, which are all blocks of 256 tokens."""
    config = small(512)
    module = attention(config)
    for length in (1, 31, 32, 33, 100, 256):
        states = hidden(2, length, config)
        query, key, value = (layer(states).unflatten(-1, (2, 32)).transpose(1, 2) for layer in _projections(module))
        expected = sdpa(query, key, value).transpose(1, 2).flatten(2)
        with named(length):
            assert_close(module(states, torch.ones(2, length))[0], expected, "output")


def test_fewer_positions_than_a_block():
    config = small(20)
    assert config.max_position_embeddings // 32 == 0
    module, states = attention(config), hidden(1, 20, config)
    query, key, value = (layer(states).unflatten(-1, (2, 32)).transpose(1, 2) for layer in _projections(module))
    assert_close(module(states)[0], sdpa(query, key, value).transpose(1, 2).flatten(2), "output")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_get_what_they_get_alone(side):
    config = small(128, block_per_row=2)
    module, states = attention(config), hidden(4, 200, config)
    lengths = (200, 160, 101, 0)
    position = torch.arange(200)
    if side == "left":
        position = position.flip(0)
    mask = (position < torch.tensor(lengths)[:, None]).long()
    states[mask == 0] = torch.nan
    (batch,) = module(states, mask)
    assert not batch[mask == 0].any(), "the output at padded positions is 0"
    for item, length in enumerate(lengths[:-1]):
        alone = states[item][mask[item] == 1][None]
        with named(length):
            assert_close(batch[item][mask[item] == 1][None], padded_to_blocks(module, alone), "output")


def test_the_whole_model_in_a_padded_batch():
    config = small(256, block_per_row=2)
    model = MraModel(config).double().eval()
    tokens = torch.randint(2, 100, (3, 256))
    mask = torch.ones_like(tokens)
    mask[1, 160:] = mask[2, 192:] = 0
    batch = model(tokens, attention_mask=mask).last_hidden_state
    for item in range(3):
        length = int(mask[item].sum())
        with its_own_code():
            expected = model(tokens[item : item + 1, :length]).last_hidden_state
        assert_close(batch[item : item + 1, :length], expected, f"item {item}")


def test_every_spelling_of_a_padding_mask_gives_the_same_bits():
    config = small()
    module, states = attention(config), hidden(2, 100, config)
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1, 70:] = False
    (expected,) = module(states, mask)
    for lowest in (-1e4, torch.finfo(torch.float32).min, -torch.inf):
        additive = torch.zeros(2, 1, 1, 100).masked_fill(~mask[:, None, None], lowest)
        for spelling in (additive, additive.expand(2, 1, 100, 100)):
            assert torch.equal(module(states, spelling)[0], expected), lowest
    for spelling in (mask.int(), mask.float(), mask.double(), mask[:, None, None]):
        assert torch.equal(module(states, spelling)[0], expected), spelling.dtype
    assert torch.equal(module(states, torch.ones(2, 100))[0], module(states)[0])


def test_other_masks_are_refused():
    config = small()
    module, states = attention(config), hidden(2, 100, config)
    causal = torch.zeros(100, 100).masked_fill(~torch.ones(100, 100, dtype=torch.bool).tril(), -torch.inf)
    for mask, words in (
        (torch.ones(2, 99), r"attention_mask must be \(batch, length\) = \(2, 100\).*got the shape \(2, 99\)"),
        (torch.ones(100), r"got the shape \(100,\)"),
        (torch.ones(2, 2, 1, 100), r"got the shape \(2, 2, 1, 100\)"),
        (torch.ones(2, 1, 0, 100), r"got the shape \(2, 1, 0, 100\)"),
        (causal.expand(2, 1, 100, 100), "attention_mask must hide the same keys from every query"),
        (torch.full((2, 100), 0.5), "attention_mask must have the values 0 and 1 .* got 0.5"),
        (torch.full((2, 100), -torch.inf), "attention_mask must have the values 0 and 1 .* got -inf"),
        (torch.full((2, 1, 1, 100), -3.0), "0 and numbers of at most -10000 .* got -3.0"),
    ):
        with pytest.raises(ValueError, match=words):
            module(states, mask)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_every_head_learns_through_attention(head):
    model = head(small(block_per_row=1))
    tokens = torch.randint(2, 100, HEADS[head])
    before = model(tokens)[0]
    assert torch.equal(model(tokens)[0], before)
    before.square().mean().backward()
    expected = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("query.weight", "key.weight", "value.weight")):
            assert parameter.grad.abs().max() > 0, name
            expected[name] = parameter.grad
    assert len(expected) == 6
    model.zero_grad()
    _checkpoint(model.train())
    model(tokens)[0].square().mean().backward()
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name


def test_the_dtype_of_the_model_is_kept():
    """The error of bfloat16 is at most twice that of torch's attention, as section 7 of the definitions asks."""
    config = small(512)
    module = attention(config).bfloat16()
    states = hidden(1, 256, config).bfloat16()
    heads = [layer(states).unflatten(-1, (2, 32)).transpose(1, 2) for layer in _projections(module)]
    expected = sdpa(*(x.double() for x in heads)).transpose(1, 2).flatten(2)
    (ours,), theirs = module(states), sdpa(*heads).transpose(1, 2).flatten(2)
    assert ours.dtype == torch.bfloat16
    ours_error, their_error = ((x - expected).square().mean().sqrt() for x in (ours, theirs))
    assert ours_error <= 2 * their_error
    model = MraModel(config).bfloat16()
    assert model(torch.randint(2, 100, (1, 50))).last_hidden_state.dtype == torch.bfloat16


def test_weights_and_configuration_are_saved_and_loaded_as_ever(tmp_path):
    model = MraModel(small(approx_mode="sparse", block_per_row=1)).eval()
    tokens = torch.randint(2, 100, (2, 100))
    model.save_pretrained(tmp_path)
    loaded = MraModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).last_hidden_state, model(tokens).last_hidden_state)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_compiled():
    model = MraModel(small(block_per_row=1)).eval()
    tokens, mask = torch.randint(2, 100, (2, 100)), torch.ones(2, 100)
    mask[1, 50:] = 0
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(
            compiled(tokens, attention_mask=mask).last_hidden_state,
            model(tokens, attention_mask=mask).last_hidden_state,
        )


def test_undoing():
    module, states = attention(small()), hidden(1, 50, small())
    (patched,) = module(states)
    mask = torch.ones(1, 50)
    unpatch_mra()
    assert MraSelfAttention.forward is OWN_FORWARD
    (own,) = module(states, mask)
    assert own.dtype == torch.float32  # what the own code returns, whatever the dtype of the model
    unpatch_mra()
    with patch_mra():
        with patch_mra():
            assert torch.equal(module(states)[0], patched)
        assert torch.equal(module(states)[0], patched), "only the first of two patches undoes anything"
    assert torch.equal(module(states, mask)[0], own)
    patch_mra()
    patch_mra()
    assert torch.equal(module(states)[0], patched)
    unpatch_mra()
    assert MraSelfAttention.forward is OWN_FORWARD


def test_other_devices_keep_the_own_code():
    module = MraSelfAttention(small()).to("meta")
    states = torch.empty(2, 100, 64, device="meta")
    with pytest.raises(AttributeError):
        module(states, None)  # the own code wants a mask
    assert module(states, torch.ones(2, 100, device="meta"))[0].shape == (2, 100, 64)


def _projections(module: nn.Module) -> list[nn.Module]:
    return [module.query, module.key, module.value]


def _checkpoint(model: nn.Module) -> None:
    new = getattr(model, "activation_checkpointing_enable", None)  # the old name is deprecated since transformers 5
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
