"""What figures are compared with."""

from __future__ import annotations

from ..document import Grid, Section

_MODELS = (
    (
        "uniform",
        "All keys that a query sees get the same weight.",
        "What depends on the number of keys alone, as in an untrained model.",
    ),
    (
        "random",
        "Queries and keys are drawn at random, as large as those of the head on average.",
        "What queries and keys of this size give by chance.",
    ),
    (
        "shuffled",
        "The weights of each row are permuted among the keys that it sees.",
        "What follows from the sizes of the weights, wherever they are.",
    ),
    (
        "distance alone",
        "Weights decay exponentially with the distance from the query, as ALiBi's slopes say.",
        "What follows from looking nearby, whatever the text says.",
    ),
)


def null_models() -> Section:
    """Return the section that explains them."""
    return Section(
        "nulls",
        "How to read the figures",
        (
            "A number says something of a head only beside what attention would have that knows less. So every number "
            "is drawn beside such null models, always in the same colours. Where a head is on the line of a null "
            "model, that model explains the number, and the head need not have learned anything for it.",
            "Heads and layers are numbered from 0. Dots are heads, lines join the means of layers.",
        ),
        (Grid("Null models", ("Name", "What it does", "What it explains"), _MODELS),),
    )
