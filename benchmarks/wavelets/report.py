"""The tables of `python -m benchmarks.wavelets`, and its record."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from .. import sections
from ..sections import table_row
from ..speed.report import RECORD
from . import choices, paper, prediction
from .columns import TRAINED, UNTRAINED
from .effects import Effect, Trend
from .measure import Found
from .signals import Signal
from .statistics import Estimate

FOLDER = RECORD / "wavelets"

SHOWN = (
    "low_share",
    "mid_share",
    "high_share",
    "frequency_selectivity",
    "spectral_entropy",
    "positional_entropy",
    "entropy_correlation",
    "scale_sensitivity_0.5",
    "scale_sensitivity_0.25",
    "local_share",
    "window_entropy_16",
    "window_entropy_32",
    "window_entropy_64",
    "uncertainty_slack",
    "reconstruction_error",
)
OF_SCALES = ("wavelet_energy", "wavelet_entropy", "normalized_wavelet_entropy")
SCALES = ("a5", "d5", "d4", "d3", "d2", "d1")
DEPTH = ("low_share", "mid_share", "high_share", "frequency_selectivity", "spectral_entropy", "local_share")
NULLS = ("uniform", "random", "shuffled", "alibi", UNTRAINED)
DEPTH_MODELS = (TRAINED, "shuffled", UNTRAINED)

FAMILIES: dict[str, tuple[str, ...]] = {
    "spectrum": ("low_share", "mid_share", "high_share", "frequency_selectivity", "spectral_entropy"),
    "wavelets": (
        *(f"{name}_{scale}" for name in OF_SCALES for scale in SCALES),
        "scale_sensitivity_0.5",
        "scale_sensitivity_0.25",
    ),
    "both entropies": ("entropy_correlation", "uncertainty_frequency_entropy", "uncertainty_slack"),
    "positions": ("positional_entropy", "local_share", "window_entropy_16", "window_entropy_32", "window_entropy_64"),
    "best blocks": prediction.LeftOut._fields,
    "roundoff": ("reconstruction_error",),
    "the head itself": (prediction.AGAIN,),
}
"""What may tell errors, by what it looks at."""


def number(value: float) -> str:
    """Return a number to three decimals, nothing for NaN, and powers of ten for what is smaller."""
    if math.isnan(value):
        return ""
    return f"{value:.0e}" if 0.0 < abs(value) < 5e-4 else f"{value:.3f}"


def interval(estimate: Estimate, sign: str = "") -> str:
    """Return a number with its interval, both with a sign where differences are meant."""
    if math.isnan(estimate.value):
        return ""
    if 0.0 < abs(estimate.value) < 5e-4:
        return number(estimate.value)
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text."""
    lines = [table_row(*heads), "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *(table_row(*row) for row in rows)])


def metrics_table(found: Found) -> str:
    """Return the metrics of the trained heads, with intervals, beside the paper's and those of other models."""
    effects = {(effect.metric, effect.model): effect for effect in found.effects}
    reported = paper.of_group(found.name)

    def row(metric: str) -> list[str]:
        means = (number(effects[metric, model].mean.value) for model in NULLS)
        return [metric, reported.get(metric, ""), interval(effects[metric, TRAINED].mean), *means]

    return markdown(("metric", "paper", TRAINED, *NULLS), (row(m) for m in SHOWN if (m, TRAINED) in effects))


def effects_table(found: Found) -> str:
    """Return how much more the trained heads have than each other model, and in which share of the heads it is more."""
    return _by_model(found, NULLS, _difference)


def _difference(effect: Effect) -> str:
    text = interval(effect.difference, "+")
    return f"{text}, {100 * effect.above:.0f} %" if text else ""


def explained_table(found: Found) -> str:
    """Return the correlations over heads of trained heads and the null models that are made of them."""
    return _by_model(found, ("random", "shuffled"), lambda effect: interval(effect.explained))


def _by_model(found: Found, models: Sequence[str], cell: Callable[[Effect], str]) -> str:
    effects = {(effect.metric, effect.model): effect for effect in found.effects}
    shown = [metric for metric in SHOWN if (metric, TRAINED) in effects]
    return markdown(("metric", *models), ([m, *(cell(effects[m, model]) for model in models)] for m in shown))


def scales_table(found: Found) -> str:
    """Return energies and entropies of each scale, trained and in two other models."""
    effects = {(effect.metric, effect.model): effect.mean for effect in found.effects}
    models = (TRAINED, "shuffled", UNTRAINED)
    reported = paper.of_group(found.name)

    def row(scale: str) -> list[str]:
        cells = [number(effects[f"{name}_{scale}", model].value) for name in OF_SCALES for model in models]
        return [scale, *cells[:3], reported.get(f"wavelet_entropy_{scale}", ""), *cells[3:]]

    heads = [f"{kind}, {model}" for kind in ("energy", "entropy", "normalized") for model in models]
    shown = [scale for scale in SCALES if (f"wavelet_energy_{scale}", TRAINED) in effects]
    return markdown(("scale", *heads[:3], "entropy, paper", *heads[3:]), map(row, shown))


def trends_table(found: Found) -> str:
    """Return correlations with depth, of metrics and of their distance to the layer's mean."""
    trends = {(trend.metric, trend.model): trend for trend in found.trends}

    def row(metric: str) -> list[str]:
        of: list[Trend] = [trends[metric, model] for model in DEPTH_MODELS]
        return [metric, *(interval(t.level) for t in of), interval(of[0].spread), interval(of[1].spread)]

    heads = (*DEPTH_MODELS, f"spread, {DEPTH_MODELS[0]}", f"spread, {DEPTH_MODELS[1]}")
    return markdown(("metric", *heads), map(row, DEPTH))


def spectral_choices_table(found: Found) -> str:
    """Return the metrics of the spectrum with every choice, trained and in null models."""
    metrics = ("low_share", "frequency_selectivity", "spectral_entropy", "entropy_correlation")
    columns = [(metric, model) for metric in metrics for model in (TRAINED, "shuffled")]
    columns.insert(1, ("low_share", "uniform"))
    return _choices(found, choices.SPECTRAL, columns)


def sensitivity_choices_table(found: Found) -> str:
    """Return the scale sensitivities with every choice, and the share of heads where that of 0.25 is larger."""
    metrics = ("scale_sensitivity_0.5", "scale_sensitivity_0.25", choices.MORE)
    return _choices(
        found, choices.SENSITIVITY, [(metric, model) for metric in metrics for model in (TRAINED, "shuffled")]
    )


def _choices(found: Found, names: Iterable[str], columns: Sequence[tuple[str, str]]) -> str:
    means = {(choice.choice, choice.metric, choice.model): choice.mean.value for choice in found.choices}
    heads = ("choice", *(f"{metric}, {model}" for metric, model in columns))
    nothing = float("nan")
    return markdown(heads, ([name, *(number(means.get((name, *at), nothing)) for at in columns)] for name in names))


def budgets(found: Found) -> list[int]:
    """Return the budgets at which errors were measured."""
    return list(dict.fromkeys(error.blocks for error in found.errors))


def errors_table(found: Found) -> str:
    """Return how large errors are, and how much attention the best blocks leave, over heads."""

    def row(blocks: int) -> list[str]:
        here = [error for error in found.errors if error.blocks == blocks]
        error, missed = (sorted(prediction.by_head(here, name).tolist()) for name in ("error", prediction.MISSED))
        middle = len(error) // 2
        return [
            str(blocks),
            *(number(x) for x in (error[0], error[middle], error[-1], missed[0], missed[middle], missed[-1])),
        ]

    heads = [f"{name}, {which}" for name in ("error", "missed share") for which in ("least", "median", "largest")]
    return markdown(("blocks in a row", *heads), map(row, budgets(found)))


def families_table(found: Found) -> str:
    """Return of each family of predictors the one with the largest correlation."""

    def row(blocks: int, family: str) -> list[str]:
        members = [p for p in found.predictions if p.blocks == blocks and p.predictor in FAMILIES[family]]
        best = max(members, key=lambda p: 0.0 if math.isnan(p.overall.value) else abs(p.overall.value))
        ahead = "" if best.predictor == prediction.MISSED else interval(best.behind, "+")
        cells = (interval(best.overall), interval(best.within), ahead)
        return [family, str(blocks), f"{best.predictor} of {len(members)}", *cells]

    known = {p.predictor for p in found.predictions}
    shown = [family for family in FAMILIES if known & set(FAMILIES[family])]
    heads = ("looks at", "blocks", "best", "correlation", "within layers", "`missed_share` ahead by")
    return markdown(heads, (row(blocks, family) for blocks in budgets(found) for family in shown))


def predictions_table(found: Found) -> str:
    """Return every predictor at every budget, the best at the first budget first."""
    by_name = {(p.predictor, p.blocks): p for p in found.predictions}
    wanted = [name for family in FAMILIES.values() for name in family if (name, budgets(found)[0]) in by_name]

    def size(name: str) -> float:
        value = abs(by_name[name, budgets(found)[0]].overall.value)
        return 0.0 if math.isnan(value) else value

    def row(name: str) -> list[str]:
        of = [by_name[name, blocks] for blocks in budgets(found)]
        return [name, *(interval(estimate) for p in of for estimate in (p.overall, p.within))]

    heads = [f"{blocks} blocks{what}" for blocks in budgets(found) for what in ("", ", within layers")]
    return markdown(("predictor", *heads), map(row, sorted(wanted, key=size, reverse=True)))


OF_METRICS: dict[str, Callable[[Found], str]] = {
    "Metrics, mean over heads": metrics_table,
    "Trained less the other model, and share of heads above": effects_table,
    "Correlation over heads of trained heads and null models": explained_table,
    "Scales of the wavelet transform": scales_table,
    "Correlation with depth": trends_table,
    "Choices for the spectrum": spectral_choices_table,
    "Choices for scale sensitivity": sensitivity_choices_table,
}
OF_ERRORS: dict[str, Callable[[Found], str]] = {
    "Errors at a budget": errors_table,
    "Correlation with the error, the best of each family": families_table,
    "Correlation with the error, every predictor": predictions_table,
}


def signals_table(signals: Sequence[Signal]) -> str:
    """Return the metrics of signals that no model made."""
    heads = ("signal", *(field.name for field in fields(Signal)[1:]))
    return markdown(heads, ([name, *map(number, numbers)] for name, *numbers in map(astuple, signals)))


def beside_shuffled_table(found: Sequence[Found]) -> str:
    """Return what places of weights add in each group: the trained heads beside their own rows, shuffled."""
    effects = {(of.name, e.metric): e for of in found for e in of.effects if e.model == "shuffled"}

    def row(metric: str) -> list[str]:
        of = [effects.get((each.name, metric)) for each in found]
        cells = (("", "") if e is None else (_difference(e), number(e.explained.value)) for e in of)
        return [metric, *itertools.chain(*cells)]

    heads = itertools.chain(*((f"{of.name}: trained less shuffled", "correlation") for of in found))
    return markdown(("metric", *heads), map(row, SHOWN))


def bound_table(found: Sequence[Found]) -> str:
    """Return how far the sums of entropies of heads are from the least one, log N, in nats."""

    def row(of: Found) -> list[str]:
        values = of.columns.values
        slack = values["uncertainty_slack", TRAINED]
        bound = values["positional_entropy", TRAINED] + values["uncertainty_frequency_entropy", TRAINED] - slack
        others = (values["uncertainty_slack", model].mean() for model in ("shuffled", "alibi", UNTRAINED))
        numbers = (bound.mean(), slack.min(), slack.mean(), slack.max(), *others)
        return [of.name, str(slack.size), *(number(float(x)) for x in numbers)]

    which = ("least", "mean", "largest", *(f"{model}, mean" for model in ("shuffled", "alibi", UNTRAINED)))
    return markdown(("group", "heads", "log N", *(f"above it, {x}" for x in which)), map(row, found))


def all_tables(found: Sequence[Found], signals: Sequence[Signal]) -> dict[str, str]:
    """Return every table by its heading."""
    of_errors = [of for of in found if of.errors]
    chosen = ((OF_METRICS, found), (OF_ERRORS, of_errors))
    of_groups = {
        f"{title}: {of.name}": table(of)
        for tables, groups in chosen
        for title, table in tables.items()
        for of in groups
    }
    return {
        "Signals that no model made, 512 positions": signals_table(signals),
        "Entropies above the uncertainty bound": bound_table(found),
        "Trained heads beside their own rows, shuffled": beside_shuffled_table(found),
        **of_groups,
    }


def write_record(text: str, found: Sequence[Found], signals: Sequence[Signal], path: Path = FOLDER) -> Path:
    """Write `wavelets-<date>.md` and `.json`, and return the folder."""
    rows: dict[str, Sequence[Any]] = {
        "signals": signals,
        "heads": [row for of in found for row in of.heads()],
        "effects": [row for of in found for row in of.effects if row.metric in SHOWN],
        "trends": [row for of in found for row in of.trends if row.metric in DEPTH],
        "choices": [row for of in found for row in of.choices],
        "predictions": [row for of in found for row in of.predictions],
    }
    return sections.write("wavelets", text, rows, path)
