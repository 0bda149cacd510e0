"""What users may rely on: names, signatures, types, documentation."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import pydoc
from pathlib import Path

import mra_attention
import pytest
import torch
from mra_attention import _core

PACKAGE = Path(mra_attention.__file__).parent
SETTINGS = {
    "resolutions": (32, 1),
    "blocks_per_row": 4.0,
    "num_blocks": None,
    "mode": "full",
    "coarse": "mean",
    "score": "max",
    "coarse_shift": 0.0,
    "first_blocks": None,
    "diagonal_blocks": 0,
    "local_blocks": 1,
    "pool_queries": True,
    "grid": None,
}
ENTRY_POINTS = [
    mra_attention.scaled_dot_product_attention,
    mra_attention.varlen_attention,
    mra_attention.plan,
    mra_attention.can_run,
    mra_attention.KVCache,
    mra_attention.replace_sdpa,
    mra_attention.nn.MultiheadAttention,
    mra_attention.nn.convert,
]


def test_names():
    assert mra_attention.__all__ == [
        "FallbackWarning",
        "KVCache",
        "LayerConfigs",
        "MRAConfig",
        "Plan",
        "__version__",
        "can_run",
        "nn",
        "plan",
        "replace_sdpa",
        "scaled_dot_product_attention",
        "varlen_attention",
    ]
    for name in mra_attention.__all__:
        assert hasattr(mra_attention, name)
    assert callable(mra_attention.plan), "the function, not a submodule of this name"
    assert not (PACKAGE / "plan.py").exists(), "a submodule of this name would hide the function"


def test_version_is_that_of_the_distribution():
    assert mra_attention.__version__ == _core.__version__ == _core.build_info()["version"]
    assert importlib.metadata.version("mra-attention") == mra_attention.__version__


def test_positional_parameters_are_those_of_torch_attention():
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    theirs = [(a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty) for a in schema.arguments]
    parameters = list(inspect.signature(mra_attention.scaled_dot_product_attention).parameters.values())
    ours = [(p.name, p.default) for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert ours == theirs


def test_keyword_parameters():
    parameters = inspect.signature(mra_attention.scaled_dot_product_attention).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords == {
        "window_size": (-1, -1),
        "causal_alignment": "upper_left",
        "query_padding_mask": None,
        "query_order": None,
        "key_order": None,
        "softcap": None,
        "alibi_slopes": None,
        "sinks": None,
        "plan": None,
        "return_lse": False,
        "config": None,
        **SETTINGS,
    }


def test_the_settings_and_their_defaults():
    parameters = inspect.signature(mra_attention.MRAConfig).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == SETTINGS
    assert mra_attention.MRAConfig().to_dict() == SETTINGS | {"resolutions": [32, 1]}


@pytest.mark.parametrize("function", ENTRY_POINTS, ids=lambda function: function.__name__)
def test_every_entry_point_shows_config_and_every_setting(function):
    parameters = inspect.signature(function).parameters
    assert parameters["config"].default is None
    assert {name: parameters[name].default for name in SETTINGS} == SETTINGS
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in SETTINGS)


def test_can_run_takes_the_parameters_of_attention():
    attention = inspect.signature(mra_attention.scaled_dot_product_attention)
    assert inspect.signature(mra_attention.can_run).parameters == attention.parameters


def test_plan_takes_the_parameters_of_attention_that_concern_the_selection():
    attention = inspect.signature(mra_attention.scaled_dot_product_attention).parameters
    left_out = {"value", "dropout_p", "sinks", "plan", "return_lse"}
    expected = [(p.name, p.default, p.kind) for p in attention.values() if p.name not in left_out]
    plan = inspect.signature(mra_attention.plan).parameters.values()
    assert [(p.name, p.default, p.kind) for p in plan] == expected


def test_the_operators_have_no_defaults():
    for name in ("forward", "backward", "select"):
        schema = getattr(torch.ops.mra_attention, name).default._schema
        assert not any(argument.has_default_value() for argument in schema.arguments), str(schema)
        assert not schema.is_mutable


def test_the_methods_of_the_cache_are_documented():
    for name, method in inspect.getmembers(mra_attention.KVCache, inspect.isfunction):
        if not name.startswith("_"):
            documentation = inspect.getdoc(method)
            assert documentation
            for parameter in list(inspect.signature(method).parameters)[1:]:
                assert parameter in documentation, f"KVCache.{name} does not explain {parameter}"


def test_varlen_attention_takes_the_parameters_of_attention():
    attention = inspect.signature(mra_attention.scaled_dot_product_attention).parameters
    varlen = inspect.signature(mra_attention.varlen_attention).parameters
    assert attention.keys() - varlen.keys() == {"attn_mask", "query_padding_mask", "plan", "query_order", "key_order"}
    assert varlen.keys() - attention.keys() == {"cu_seqlens_q", "cu_seqlens_k"}
    for name in attention.keys() & varlen.keys():
        assert attention[name].default == varlen[name].default, name


def test_every_public_name_is_documented():
    others = {"__version__", "FallbackWarning", "nn"}
    functions = [getattr(mra_attention, name) for name in mra_attention.__all__ if name not in others]
    for function in [*functions, *(getattr(mra_attention.nn, name) for name in mra_attention.nn.__all__)]:
        documentation = inspect.getdoc(function)
        assert documentation is not None
        for section in ("Parameters", "Raises", "Notes"):
            assert f"\n{section}\n---" in documentation, f"{function.__name__} has no section {section}"
        for parameter in inspect.signature(function).parameters:
            explained = mra_attention.MRAConfig.__doc__ if parameter in SETTINGS else documentation
            assert f"{parameter}" in (explained or ""), f"{function.__name__} does not explain {parameter}"
    assert "scaled_dot_product_attention" in pydoc.render_doc(mra_attention)


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_core.pyi").is_file()


def test_the_stub_has_the_names_and_parameters_of_the_native_module():
    stub = ast.parse((PACKAGE / "_core.pyi").read_text())
    functions = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    native = {name for name in dir(_core) if not name.startswith("__")}
    assert functions.keys() == native
    for name, node in functions.items():
        parameters = inspect.signature(getattr(_core, name)).parameters.values()
        assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == [a.arg for a in node.args.kwonlyargs]
        assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == [a.arg for a in node.args.args]


@pytest.mark.parametrize("key_length", [1, 8, 64, 65, 200])
@pytest.mark.parametrize("is_causal", [False, True])
def test_what_a_plan_says_of_itself(key_length, is_causal):
    query, key = torch.randn(2, 3, 40, 8), torch.randn(2, 3, key_length, 8)
    selection = mra_attention.plan(query, key, resolutions=(8, 1), blocks_per_row=1.5, is_causal=is_causal)
    mask = selection.block_mask()
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 3, 40 if is_causal else 5, -(-key_length // 8))
    assert all(torch.equal(*pair) for pair in zip(selection.block_masks(), mask, strict=True))
    assert torch.equal(selection.num_blocks, mask.sum((-2, -1)))
    torch.testing.assert_close(selection.density, mask.float().mean((-2, -1)))
    assert selection.config == mra_attention.MRAConfig(resolutions=(8, 1), blocks_per_row=1.5)


def test_a_plan_of_nothing():
    selection = mra_attention.plan(torch.randn(1, 2, 0, 8), torch.randn(1, 2, 0, 8))
    assert selection.block_mask().shape == (1, 2, 0, 0)
    assert selection.num_blocks.tolist() == [[0, 0]]
    assert selection.density.tolist() == [[0.0, 0.0]]


def test_a_plan_is_frozen():
    selection = mra_attention.plan(torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8))
    with pytest.raises(AttributeError):
        selection.data = torch.zeros(0)  # pyright: ignore[reportAttributeAccessIssue]


def test_new_memory_is_poisoned_in_these_tests():
    assert torch.empty(7).isnan().all()
    assert torch.empty_strided((2, 3), (1, 2), dtype=torch.bfloat16).isnan().all()
    assert (torch.empty(7, dtype=torch.uint8) == 255).all()
