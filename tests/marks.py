"""The marks of tests that the default run leaves out."""

from collections.abc import Collection
from typing import Any

import pytest


def slow_but(quick: Collection[Any], values: Collection[Any]) -> list[Any]:
    """Values for `pytest.mark.parametrize`, of which those that are not in `quick` are slow.

    Raises:
        ValueError: if a value of `quick` is not in `values`.
    """
    unknown = [value for value in quick if value not in values]
    if unknown:
        raise ValueError(f"`quick` must be some of {list(values)}. Received: {unknown}")
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
