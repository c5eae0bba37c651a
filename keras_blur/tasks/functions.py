"""Small endless tasks: points of the plane, and sine waves.

Source: "Meta-Learning Bidirectional Update Rules" (2021), section 4.1 and its toy functions. A
learning step on two features is almost free, and each function tests another ability of a rule (a
line, a corner, a hole, an island). A set of them quickly shows what a genome cannot learn. Sines
follow "Model-Agnostic Meta-Learning" (2017), section 5.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_blur import arguments
from keras_blur.core import random
from keras_blur.tasks.base import SPLITS, Tasks

Array = Any

_GRID = 2**24  # different values of a random float32 of `keras_blur.random`
_MOONS_SCALE = 1.0 / 1.55  # scikit-learn's moons, centred, shrunk into the unit disc: they fit at any angle
_MOST_BLOBS = 9
_BLOB_CELL, _BLOB_JITTER, _BLOB_DEVIATION = 2.0 / 3.0, 0.15, 0.08


class FunctionTasks(Tasks):
    """Toy functions; `functions` makes them."""

    def __init__(self, names: Sequence[str], *, noise: float, relabel: bool):
        self.names = tuple(names)
        self.name = ", ".join(names)
        self.outputs = _outputs(names[0])
        self.kind = "values" if names[0] == "sine" else "classes"
        self.shape = (1 if names[0] == "sine" else 2,)
        self.noise, self.relabel = float(noise), relabel

    def available(self, split: str) -> int:
        return _GRID

    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        task, points = random.fold_in(seed, 0), random.fold_in(seed, 1, SPLITS.index(split))

        def branch(name: str) -> Callable[[], tuple[Array, Array]]:
            return lambda: _DRAWS[name](task, points, count)

        if len(self.names) == 1:
            x, y = branch(self.names[0])()
        else:
            chosen = random.integers(random.fold_in(seed, 2), (), len(self.names))
            x, y = ops.switch(chosen, [branch(name) for name in self.names])
        if self.kind == "values":
            if self.noise:
                y += self.noise * random.normal(random.fold_in(points, 2), (count, 1))
            return ops.reshape(x, (count, 1)), ops.reshape(y, (count, 1))
        if self.noise:
            x += self.noise * random.normal(random.fold_in(points, 2), (count, 2))
        if self.relabel:
            y = ops.take(random.permutation(random.fold_in(seed, 3), self.outputs), y, axis=0)
        y = 2.0 * ops.one_hot(ops.reshape(y, (count,)), self.outputs) - 1.0
        return ops.reshape(x, (count, 2)), y


def functions(names: str | Sequence[str], *, noise: float = 0.0, relabel: bool = False) -> FunctionTasks:
    """Small classification tasks in the plane, or sine regression.

    Points are in [-1, 1] x [-1, 1]. Class 1 is the named region:

    - `"and"`, `"or"`, `"xor"`, `"nxor"`, `"nand"` of the signs of the coordinates. One in four
      points is on the smaller side of `and`, `or` and `nand`.
    - `"circle"`, `"square"`, `"cross"`, `"triangle"`, and `"concentric_circles"`, the ring between
      two circles.
    - `"angular_slice"`: a sector of three eighths of a turn at a random angle.
    - `"random_xor"`: a checkerboard at a random angle, with 1 to 3 squares per unit of length.
    - `"two_moons"`, and `"rotated_moons"` at a random angle.
    - `"blobs2"` to `"blobs9"`: that many clouds, one per class, around random centres in different
      cells of a 3x3 grid.
    - `"sine"`: one input from -5 to 5 and the value `amplitude * sin(x - phase)`, with amplitude
      from 0.1 to 5 and phase from 0 to pi.

    Random parameters are redrawn in each episode. Splits draw their points from different seeds.

    Args:
        names: a name, or several with the same number of outputs. Each episode uses one of them.
        noise: standard deviation of noise added to the points after classification, or to the
            values of `"sine"`.
        relabel: whether to permute the classes in each episode.

    Returns:
        `FunctionTasks`.

    Raises:
        ValueError: if a name is unknown or repeated, functions differ in their number of outputs,
            `noise` is negative or not finite, or `relabel` is used with `"sine"`, which has no
            classes.

    Example:

    >>> tasks = functions(["xor", "circle", "two_moons"], relabel=True)
    >>> tasks.features, tasks.outputs, tasks.kind
    (2, 2, 'classes')
    """
    several = [names] if isinstance(names, str) else list(names) if isinstance(names, (tuple, list)) else []
    known = function_names()
    if any(name not in known for name in several) or not several or len(set(several)) != len(several):
        raise ValueError(
            f"`names` must be one or more different names, each one of {', '.join(known)}. Received: names={names!r}"
        )
    if len({_outputs(name) for name in several}) > 1:
        found = ", ".join(f"{name} has {_outputs(name)}" for name in several)
        raise ValueError(
            "`names` must be functions with the same number of outputs; make one list for each number of outputs. "
            f"Received: {found}"
        )
    arguments.real("noise", noise, low=0.0)
    arguments.flag("relabel", relabel)
    if relabel and several[0] == "sine":
        raise ValueError("`relabel` must be False for 'sine', which has values, not classes. Received: relabel=True")
    return FunctionTasks(several, noise=noise, relabel=relabel)


def function_names() -> tuple[str, ...]:
    """Names of all functions.

    Example:

    >>> "random_xor" in function_names()
    True
    """
    return tuple(_DRAWS)


def _outputs(name: str) -> int:
    if name == "sine":
        return 1
    return int(name.removeprefix("blobs")) if name.startswith("blobs") else 2


def _rotate(x: Array, angle: Array) -> Array:
    """Rotates points counterclockwise."""
    cosine, sine = ops.cos(angle), ops.sin(angle)
    return ops.stack([cosine * x[:, 0] - sine * x[:, 1], sine * x[:, 0] + cosine * x[:, 1]], axis=1)


def _angle(task: Array) -> Array:
    return random.uniform(random.fold_in(task, 0), (), 0.0, 2.0 * math.pi)


# Whether points `[n, 2]` are of class 1; the second argument is the episode's seed. Sizes divide
# the square into nearly equal halves.


def _and(x: Array, task: Array) -> Array:
    return ops.all(x > 0.0, axis=1)


def _or(x: Array, task: Array) -> Array:
    return ops.any(x > 0.0, axis=1)


def _xor(x: Array, task: Array) -> Array:
    return ops.not_equal(x[:, 0] > 0.0, x[:, 1] > 0.0)


def _nxor(x: Array, task: Array) -> Array:
    return ops.equal(x[:, 0] > 0.0, x[:, 1] > 0.0)


def _nand(x: Array, task: Array) -> Array:
    return ops.logical_not(_and(x, task))


def _circle(x: Array, task: Array) -> Array:
    return ops.sum(x * x, axis=1) < 0.8**2


def _concentric_circles(x: Array, task: Array) -> Array:
    square = ops.sum(x * x, axis=1)
    return ops.logical_and(square > 0.4**2, square < 0.9**2)


def _square(x: Array, task: Array) -> Array:
    return ops.max(ops.abs(x), axis=1) < 0.7


def _cross(x: Array, task: Array) -> Array:
    return ops.min(ops.abs(x), axis=1) < 0.3


def _triangle(x: Array, task: Array) -> Array:
    return x[:, 1] < 1.0 - 2.0 * ops.abs(x[:, 0])


def _angular_slice(x: Array, task: Array) -> Array:
    along = _rotate(x, -_angle(task))[:, 0]
    return along > math.cos(3.0 * math.pi / 8.0) * ops.sqrt(ops.sum(x * x, axis=1))


def _random_xor(x: Array, task: Array) -> Array:
    frequency = random.uniform(random.fold_in(task, 1), (), 1.0, 3.0)
    cells = ops.floor(frequency * _rotate(x, _angle(task)))
    return ops.mod(ops.sum(cells, axis=1), 2.0) > 0.5


_SIDES: dict[str, Callable[[Array, Array], Array]] = {
    "and": _and,
    "or": _or,
    "xor": _xor,
    "nxor": _nxor,
    "nand": _nand,
    "circle": _circle,
    "concentric_circles": _concentric_circles,
    "square": _square,
    "cross": _cross,
    "triangle": _triangle,
    "angular_slice": _angular_slice,
    "random_xor": _random_xor,
}

# Examples of the episode `task` at the points that the seed `points` draws: x, and labels `[n]` or
# values `[n, 1]`.
_Draw = Callable[[Array, Array, int], tuple[Array, Array]]


def _by_side(side: Callable[[Array, Array], Array]) -> _Draw:
    def draw(task: Array, points: Array, count: int) -> tuple[Array, Array]:
        x = random.uniform(random.fold_in(points, 0), (count, 2), -1.0, 1.0)
        return x, ops.cast(side(x, task), "int32")

    return draw


def _moons(task: Array, points: Array, count: int) -> tuple[Array, Array]:
    label = random.integers(random.fold_in(points, 0), (count,), 2)
    turn = random.uniform(random.fold_in(points, 1), (count,), 0.0, math.pi)
    sign = 1.0 - 2.0 * ops.cast(label, "float32")  # the lower moon is the upper one, turned by half a turn
    x = ops.stack([ops.cos(turn) - 0.5, ops.sin(turn) - 0.25], axis=1)
    return _MOONS_SCALE * sign[:, None] * x, label


def _rotated_moons(task: Array, points: Array, count: int) -> tuple[Array, Array]:
    x, label = _moons(task, points, count)
    return _rotate(x, _angle(task)), label


def _blobs(classes: int) -> _Draw:
    def draw(task: Array, points: Array, count: int) -> tuple[Array, Array]:
        cell = random.permutation(random.fold_in(task, 0), _MOST_BLOBS)[:classes]
        place = ops.cast(ops.stack([cell % 3 - 1, cell // 3 - 1], axis=1), "float32") * _BLOB_CELL
        centres = place + random.uniform(random.fold_in(task, 1), (classes, 2), -_BLOB_JITTER, _BLOB_JITTER)
        label = random.integers(random.fold_in(points, 0), (count,), classes)
        apart = _BLOB_DEVIATION * random.normal(random.fold_in(points, 1), (count, 2))
        return ops.take(centres, label, axis=0) + apart, label

    return draw


def _sine(task: Array, points: Array, count: int) -> tuple[Array, Array]:
    amplitude = random.uniform(random.fold_in(task, 0), (), 0.1, 5.0)
    phase = random.uniform(random.fold_in(task, 1), (), 0.0, math.pi)
    x = random.uniform(random.fold_in(points, 0), (count, 1), -5.0, 5.0)
    return x, amplitude * ops.sin(x - phase)


_DRAWS: dict[str, _Draw] = {
    **{name: _by_side(side) for name, side in _SIDES.items()},
    "two_moons": _moons,
    "rotated_moons": _rotated_moons,
    **{f"blobs{classes}": _blobs(classes) for classes in range(2, _MOST_BLOBS + 1)},
    "sine": _sine,
}
