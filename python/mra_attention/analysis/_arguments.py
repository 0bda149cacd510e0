"""Checks of arguments that are not arrays."""

from __future__ import annotations


def choice(name: str, given: object, accepted: tuple[object, ...]) -> None:
    """Check an argument that is one of a few values.

    Raises
    ------
    ValueError
        If it is none of them.
    """
    if given not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {given!r}")
