"""Calls of attention by the name of a model, or from the folder of a saved capture."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..attention_call import AttentionCall
from ..captured import Capture
from ..capturing import capture
from ..layer_patterns import LayerPatterns

TOKENS = 512
"""How much of a text is read by default."""

_ABOUT = "about.json"
"""In the folder of a capture: what the page is to say of model and text."""


@dataclass(frozen=True)
class Reading:
    """What a model reads, as the command line has it; None where nothing was given."""

    text: Path | None = None
    tokens: int | None = None
    gguf_file: str | None = None


def calls_of(source: str, layers: str | None, reading: Reading) -> tuple[Sequence[AttentionCall], dict[str, str]]:
    """Return the calls of a source, and what is known of its model and text.

    Parameters
    ----------
    source : str
        The folder of a saved capture, or what `transformers.AutoModel.from_pretrained` takes.
    layers : str, optional
        A pattern that whole names of layers match, as `"encoder.*"`.
    reading : Reading
        What the model reads; nothing for a saved capture.

    Raises
    ------
    ImportError
        If transformers is missing and needed.
    OSError
        If there is no such model or capture.
    ValueError
        If an argument is not accepted, or does not go with the source.
    """
    folder = Path(source)
    if reading.gguf_file is not None or not folder.is_dir() or (folder / "config.json").exists():
        return capture_model(source, layers, reading, None)
    for name, given in vars(reading).items():
        if given is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}={given} is for a model; {source} has no config.json, so it is taken for "
                "a saved capture, whose text was read already"
            )
    patterns = LayerPatterns(layers)
    calls = [call for call in Capture.load(folder) if patterns.want(call.layer)]
    patterns.check(f"the model captured in {source}")
    return calls, _read_about(folder)


def capture_model(
    source: str, layers: str | None, reading: Reading, folder: Path | None
) -> tuple[Capture, dict[str, str]]:
    """Let a model read a text, and return its calls; with `folder` they are in its files, for `calls_of` to read."""
    model, tokenizer = _load(source, reading.gguf_file)
    batch, about = _tokens(model, tokenizer, reading)
    calls = capture(model, batch, layers=layers, spill=folder)
    version = importlib.import_module("transformers").__version__
    about = {"Model": f"{source} ({type(model).__name__} of transformers {version})"} | about
    if folder is not None:
        (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
    return calls, about


def _read_about(folder: Path) -> dict[str, str]:
    path = folder / _ABOUT
    if not path.exists():
        return {"Capture": str(folder)}
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {str(name): str(value) for name, value in about.items()}


def _load(source: str, gguf_file: str | None) -> tuple[Any, Any]:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"{source} is taken for a model of transformers, which is not installed: pip install transformers. A "
            "saved capture, as mra_attention.analysis.capture makes of any model of torch, does not need it"
        ) from error
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    model = transformers.AutoModel.from_pretrained(source, **options).eval()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{source} has an encoder and a decoder, which read two texts; capture it by "
            "mra_attention.analysis.capture, save the calls, and pass their folder"
        )
    model.set_attn_implementation("sdpa")
    return model, transformers.AutoTokenizer.from_pretrained(source, **options)


def _tokens(model: Any, tokenizer: Any, reading: Reading) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Return what the model is given, and what is said of the text."""
    limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    most = min(int(limit) for limit in limits if limit is not None)
    wanted = min(TOKENS, most) if reading.tokens is None else reading.tokens
    if not 1 <= wanted <= most:
        raise ValueError(f"--tokens must be from 1 to {most}, as much as the model takes, got {wanted}")
    text, name = _text(reading.text)
    batch = cast(
        "Mapping[str, Any]", tokenizer(text, truncation=True, max_length=wanted, return_tensors="pt", verbose=False)
    )
    count = int(batch["input_ids"].shape[-1])
    if reading.tokens is not None and count < wanted:
        raise ValueError(f"--tokens={wanted} is more than the text has, which is {count}: {name}")
    return {**batch}, {"Text": f"{name}; the first {count} tokens"}


def _text(path: Path | None) -> tuple[str, str]:
    if path is not None:
        return path.read_text(encoding="utf-8"), path.name
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics.values()), "Python's own reference, as help() shows it (pydoc_data.topics)"
