"""Memory tasks: patterns are shown once and recalled from a part of their bits.

Source: "Finding online neural update rules by learning to remember" (Gregor, 2020), in which a
learner recalls past snippets of its experience. The sizes of the paper were not available. Random
bit patterns with partial cues follow "Differentiable plasticity: training plastic neural networks
with backpropagation" (Miconi, Clune and Stanley, ICML 2018).

Only hidden bits are scored, since repeating the shown bits would otherwise score well. Patterns are
new in each episode.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_blur import arguments
from keras_blur.core import random
from keras_blur.tasks.base import Episode, Tasks, check_split

Array = Any

_GRID = 2**24


class RememberTasks(Tasks):
    """Patterns to recall; `remember` makes them."""

    kind = "bits"

    def __init__(self, units: int, cue: float):
        self.units, self.cue = units, cue
        self.name = f"{units} bits from {cue:g} of them"
        self.shape, self.outputs = (2 * units,), units

    def available(self, split: str) -> int:
        check_split(split)
        return _GRID

    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        """Fully shown patterns: x has their bits and ones, y has their bits."""
        check_split(split)
        y = 2.0 * ops.cast(random.integers(random.fold_in(seed, 0), (count, self.units), 2), "float32") - 1.0
        return ops.concatenate([y, ops.ones_like(y)], axis=1), y

    def episode(self, seed: Array, *, steps: int, batch: int, query: int, split: str = "train") -> Episode:
        """Patterns to store, and cues to recall them.

        Returns:
            As `Tasks.episode`. The query asks for the stored patterns in turn, each with a
            different cue. x has the shown bits (0 elsewhere) and their mask. y has the hidden bits,
            and 0 elsewhere, which is not scored.
        """
        stored = steps * batch
        x, y = self.examples(seed, stored, split)
        asked = ops.take(y, ops.arange(query) % stored, axis=0)
        # A fixed number of bits is shown: the first of a random order.
        order = random.permutation(random.fold_in(seed, 1), self.units, (query,))
        shown = ops.cast(order < round(self.cue * self.units), "float32")
        return {
            "x": ops.reshape(x, (steps, batch, self.features)),
            "y": ops.reshape(y, (steps, batch, self.outputs)),
            "query_x": ops.reshape(ops.concatenate([asked * shown, shown], axis=1), (query, self.features)),
            "query_y": ops.reshape(asked * (1.0 - shown), (query, self.outputs)),
        }


def remember(units: int = 16, *, cue: float = 0.5) -> RememberTasks:
    """Random bit patterns, stored one by one and recalled from a part of their bits.

    Each example of a support batch is a pattern to store. An episode stores `steps * batch`
    patterns.

    The query asks for the patterns of the whole episode. Estimators with truncation windows
    (`meta.TruncatedUnroll`, `meta.PES`) score it after each window, so that early windows are also
    asked for patterns that are not stored yet.

    Args:
        units: number of bits of a pattern.
        cue: fraction of the bits shown in a cue.

    Returns:
        `RememberTasks`, of the kind `"bits"`: each output is an independent bit, +1 or -1, or 0 if
        it is not scored.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> remember(16).features, remember(16).outputs
    (32, 16)
    """
    arguments.integer("units", units, 2)
    if not (arguments.is_number(cue) and 1 <= round(cue * units) < units):
        raise ValueError(
            f"`cue` must be a fraction that shows at least one bit and hides at least one. Received: cue={cue!r}"
        )
    return RememberTasks(units, cue)
