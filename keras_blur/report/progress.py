"""How far a comparison or an evaluation is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a comparison or an evaluation.

    Attributes:
        data: name of the data.
        arm: what is run: `"genome"`, `"seconds of a step"`, or an optimizer with all its rates.
        number: number of the arm, from 1.
        arms: number of arms.
        done: number of the arm's runs or steps that are done.
        count: number of the arm's runs or steps.
        unit: `"run"` or `"step"`.
        result: curves so far, in the form of the final result with `partial: True`; `None` before
            the first.
    """

    data: str
    arm: str
    number: int
    arms: int
    done: int
    count: int
    unit: str
    result: dict[str, Any] | None


Watch = Callable[[Progress], None]
