"""Callbacks of meta-training: a growing unroll, the best genome in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import keras


class UnrollCurriculum(keras.callbacks.Callback):
    """Lengthens the unroll in stages, and at each switch copies the best member to all.

    Args:
        stages: pairs of (first epoch, number of unrolled steps), in rising order, the first at epoch 0.

    Raises:
        ValueError: if the stages are not in order.

    Source: "Meta-Learning Bidirectional Update Rules" (2021), section 4.2 and appendix C.4: 10 steps, then 5 more in each
    stage.

    Example:

    >>> UnrollCurriculum([(0, 10), (5, 15)]).steps_at(7)
    15
    """

    def __init__(self, stages: Sequence[tuple[int, int]]):
        super().__init__()
        self.stages = [(int(epoch), int(steps)) for epoch, steps in stages]
        starts = [epoch for epoch, _ in self.stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"`stages` must be (epoch, steps) pairs in rising order from epoch 0. Received: {stages!r}")
        if any(steps < 1 for _, steps in self.stages):
            raise ValueError(f"`stages` must have at least one step each. Received: {stages!r}")

    def steps_at(self, epoch: int) -> int:
        """Unrolled steps in an epoch."""
        return next(steps for start, steps in reversed(self.stages) if start <= epoch)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch and any(start == epoch for start, _ in self.stages):
            self.model.synchronize()
        if self.model.estimator.steps != self.steps_at(epoch):
            self.model.unroll_for(self.steps_at(epoch))


class GenomeCheckpoint(keras.callbacks.Callback):
    """Writes the best member's genome to a JSON file after each epoch.

    Args:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.genome.save(self.path)
