"""What several commands do with their flags."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags


def values_of(values: flags.FlagValues) -> dict[str, Any]:
    """The flags' values by name."""
    return {name: values[name].value for name in values if name != "help"}


def check_folders(flag: Mapping[str, Any], *names: str) -> None:
    """Raises a `ValueError` if a file that is to be written would have no folder."""
    for name in names:
        if flag[name]:
            folder = os.path.dirname(os.path.abspath(flag[name]))
            if not os.path.isdir(folder):
                raise ValueError(f"--{name}: there is no folder {folder!r}")


def whole_numbers(name: str, texts: Sequence[str]) -> list[int]:
    """The positive numbers of a list flag."""
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ValueError(f"--{name} must be positive whole numbers with commas, as in 256,128. Received: {','.join(texts)}")
    return numbers
