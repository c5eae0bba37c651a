"""The progress of a comparison or an evaluation."""

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
        done: number of completed runs or steps of the arm.
        count: total number of runs or steps of the arm.
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
