"""Chosen blocks over exact attention."""

from __future__ import annotations

import numpy as np

from ..._arrays import steps
from ..chosen_heads import ChosenHead
from ..document import Figure, Picture, Section
from ..drawing import drawing
from ..findings import Findings
from ..head_maps import HeadMap
from ..palette import COLOR_MAP, NULLS, OBSERVED, VERMILION
from ..plots import decades, legend_below, number, percent, share


def blocks(found: Findings) -> list[Section]:
    """Return the section; none where only some queries were captured."""
    if not found.maps:
        return []
    budget = number(float(found.config.budgets()[0][0]))
    sentences = [_sentence(found, head, some) for head, some in found.maps.items()]
    pictures = [picture for head, some in found.maps.items() for picture in _maps(found, head, some)]
    return [
        Section(
            "blocks",
            "Chosen blocks",
            (
                f"These are the maps of the heads shown before, with the blocks that are computed exactly at {budget} "
                "blocks per row. The rest is not lost: it enters through averages.",
                " ".join(sentences),
            ),
            (
                Figure(
                    "Exact attention, and the blocks that are chosen",
                    pictures,
                    "First the exact weights of the first sequence, queries down, keys across, on a logarithmic "
                    "scale; then the same where they are computed exactly; what has no colour enters through averages.",
                ),
                Figure(
                    "How much of the attention the chosen blocks hold",
                    (_bars(found),),
                    "Random blocks are as many of each row by chance, the null model; best blocks are as many of each "
                    "row that hold most, which only one who knows exact attention can choose. Where the best hold "
                    "little more than random ones, attention is spread, no choice helps much, and averages say most "
                    "of it. Where they hold much more and the chosen ones do not, what the head looks at does not "
                    "show in the averages from which blocks are chosen.",
                ),
            ),
        )
    ]


def _sentence(found: Findings, head: ChosenHead, some: HeadMap) -> str:
    name = found.subject.name(head.layer, head.head)
    return (
        f"Of {name}, {share(some.density)} of the blocks are exact; they hold {share(some.held)} of the attention (at "
        f"random {share(some.chance)}, at best {share(some.best)})."
    )


def _maps(found: Findings, head: ChosenHead, some: HeadMap) -> tuple[Picture, Picture]:
    name = f"{found.subject.name(head.layer, head.head)}: {head.roles}"
    logarithms = np.log10(np.maximum(some.weights, 1e-300))
    top = float(logarithms.max())
    pictures: list[Picture] = []
    for kind, title, shown in (
        ("exact", name, np.where(some.weights > 0.0, logarithms, np.nan)),
        (
            "chosen",
            f"its chosen blocks, {share(some.density)} of all",
            np.where(some.chosen & (some.weights > 0.0), logarithms, np.nan),
        ),
    ):
        what = "Exact attention" if kind == "exact" else f"Chosen blocks, with {share(some.held)} of the attention,"
        alt = f"{what} of {name}"
        with drawing(f"map-{kind}-{head.key}", alt, (4.2, 3.5)) as drawn:
            axes = drawn.figure.subplots()
            extent = (0, some.shape[1], some.shape[0], 0)
            image = axes.imshow(shown, cmap=COLOR_MAP, vmin=top - 5.0, vmax=top, extent=extent, aspect="auto")
            axes.set(title=title, xlabel="key position, tokens", ylabel="query position, tokens")
            axes.spines[:].set_visible(False)
            bar = drawn.figure.colorbar(image, ax=axes, label="attention weight")
            decades(bar)
            bar.outline.set_visible(False)
        pictures.append(drawn.picture)
    return pictures[0], pictures[1]


def _bars(found: Findings) -> Picture:
    names = [
        f"{found.subject.name(head.layer, head.head)}\n{head.roles.replace(' and ', chr(10))}" for head in found.maps
    ]
    alt = "Share of attention in the chosen blocks, in random and in the best ones: " + "; ".join(
        f"{found.subject.name(head.layer, head.head)} {share(some.held)}, {share(some.chance)}, {share(some.best)}"
        for head, some in found.maps.items()
    )
    with drawing("held", alt, (4.5, 3.2)) as drawn:
        axes = drawn.figure.subplots()
        places = steps(len(names))
        for at, (field, color, label) in enumerate(
            (
                ("chance", NULLS["uniform"].color, "null: random blocks"),
                ("held", OBSERVED, "chosen blocks"),
                ("best", VERMILION, "best blocks"),
            )
        ):
            heights = [getattr(some, field) for some in found.maps.values()]
            axes.bar(places + 0.27 * (at - 1), heights, 0.25, color=color, label=label)
        axes.set_xticks(places, names)
        axes.set(title="attention in exact blocks", ylabel="share of attention", ylim=(0.0, 1.0))
        percent(axes.yaxis)
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        legend_below(axes, 3)
    return drawn.picture
