"""Checks of plain arguments: choices, whole and real numbers, flags, sequences, instances.

Each raises a `ValueError` of one sentence that names the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Checks that an argument is one of the known strings.

    Example:

    >>> choice("order", "exact", ("exact", "first"))
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}. {received(name, value)}")


def integer(name: str, value: Any, least: int) -> None:
    """Checks that an argument is an integer of at least `least`."""
    if not _is_integer(value) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}. {received(name, value)}")


def seed(value: Any) -> None:
    """Checks that the argument `seed` is an integer from 0 to 2**31 - 1."""
    integer("seed", value, 0)
    if value >= 2**31:
        raise ValueError(f"`seed` must be at most 2**31 - 1. {received('seed', value)}")


def count(name: str, value: Any) -> None:
    """Checks that an argument is a positive integer."""
    if not _is_integer(value) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. {received(name, value)}")


def counts(name: str, values: Any) -> tuple[int, ...]:
    """The positive integers of a sequence.

    Example:

    >>> counts("hidden", [32, 16])
    (32, 16)
    """
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = list(values)
    if not isinstance(values, (tuple, list, range)) or not all(_is_integer(one) and one > 0 for one in values):
        raise ValueError(f"`{name}` must be a sequence of positive integers. {received(name, values)}")
    return tuple(int(one) for one in values)


def real(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> None:
    """Checks that an argument is a finite number in a range; `open_low` excludes the lower end."""
    if not is_number(value) or not low <= value <= high or (open_low and value == low):
        bounds = f"{'above' if open_low else 'of at least'} {low:g}" if low > -math.inf else ""
        bounds += f"{' and' if bounds else 'of'} at most {high:g}" if high < math.inf else ""
        raise ValueError(f"`{name}` must be a finite number{bounds and ' ' + bounds}. {received(name, value)}")


def positive(name: str, value: Any) -> None:
    """Checks that an argument is a finite positive number."""
    if not is_number(value) or not value > 0:
        raise ValueError(f"`{name}` must be a positive number. {received(name, value)}")


def between(name: str, value: Any, low: float, high: float) -> None:
    """Checks that an argument is a number strictly between two others."""
    if not is_number(value) or not low < value < high:
        raise ValueError(f"`{name}` must be a number strictly between {low:g} and {high:g}. {received(name, value)}")


def flag(name: str, value: Any) -> None:
    """Checks that an argument is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be True or False. {received(name, value)}")


def instance(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """Checks that an argument is an instance of a class; `wanted` says so in words."""
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` must be {wanted}. {received(name, value)}")


def received(name: str, value: Any) -> str:
    """The sentence that says what came, on one line and not too long.

    Example:

    >>> received("order", "third")
    "Received: order='third'"
    """
    text = " ".join(repr(value).split())
    return f"Received: {name}={text if len(text) <= 200 else text[:197] + '...'}"


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number; True and False are none."""
    known = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return known and bool(np.isfinite(value))


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
