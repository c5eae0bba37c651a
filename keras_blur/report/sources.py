"""Batches and test examples for learning curves: the same for every learner."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.checks import Expected, checked_arrays
from keras_blur.checks.tasks import check_tasks
from keras_blur.tasks.augment import AugmentedTasks
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.datasets import Images
from keras_blur.tasks.episodes import EpisodeTasks
from keras_blur.training.settings import projected

Array = Any

STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_QUERY = 2000  # maximum number of test examples of an episode


class Source(abc.ABC):
    """Batches and test examples, one order or episode for each seed.

    Attributes:
        shape: shape of an example.
        classes: number of outputs; the sign of a single output tells two classes apart.
    """

    shape: tuple[int, ...]
    classes: int

    def __init__(self, batch_size: int, seeds: int, seed: int):
        self.batch_size, self.seeds, self.seed = batch_size, seeds, seed

    @abc.abstractmethod
    def batches(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the batches of a seed: x `[batch, *shape]` float32, labels `[batch]` int32."""

    @abc.abstractmethod
    def test(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The test examples of a seed: x `[examples, *shape]` float32, labels `[examples]`
        int32."""

    @abc.abstractmethod
    def described(self) -> list[dict[str, Any]]:
        """Summaries of all examples: of each seed, or one if all seeds have the same examples."""

    @property
    def features(self) -> int:
        """Number of elements of an example."""
        return int(np.prod(self.shape))


class Passes(Source):
    """An image set, in a different order for each seed."""

    def __init__(self, images: Images, batch_size: int, seeds: int, seed: int):
        super().__init__(batch_size, seeds, seed)
        x = images.x_train.astype(np.float32) / images.scale
        mean, deviation = x.mean(), x.std() + 1e-6
        self.shape, self.classes = tuple(x.shape[1:]), images.classes
        self._x = (x - mean) / deviation
        self._y = images.y_train.astype(np.int32)
        test = images.x_test.astype(np.float32) / images.scale
        self._test = (test - mean) / deviation, images.y_test.astype(np.int32)

    def batches(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields batches of endless passes, without repeats within a pass."""
        rng = np.random.default_rng([self.seed, number])
        while True:
            order = rng.permutation(len(self._x))
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                chosen = order[start : start + self.batch_size]
                yield self._x[chosen], self._y[chosen]

    def test(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        del number
        return self._test

    def described(self) -> list[dict[str, Any]]:
        return [_described((self._x, self._test[0]), (self._y, self._test[1]))]


class Episodes(Source):
    """Tasks, with one episode per seed."""

    def __init__(self, tasks: Tasks, batch_size: int, seeds: int, seed: int, steps: int, split: str):
        super().__init__(batch_size, seeds, seed)
        own = tasks
        while isinstance(own, AugmentedTasks):
            own = own.tasks
        taken = max(batch_size, own.outputs * own.shots) if isinstance(own, EpisodeTasks) else batch_size
        query = min(_QUERY, tasks.available(split) - taken)
        stream = tasks.dataset(seed, steps=steps, batch=batch_size, query=query, split=split)
        drawn = {name: ops.convert_to_numpy(value) for name, value in next(iter(stream.batch(seeds))).items()}
        self.shape, self.classes = tasks.shape, tasks.outputs
        self._x, self._test_x = (drawn[name].reshape(*drawn[name].shape[:-1], *tasks.shape) for name in ("x", "query_x"))
        self._y, self._test_y = _labels(drawn["y"]), _labels(drawn["query_y"])

    def batches(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from zip(self._x[number], self._y[number], strict=True)

    def test(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self._test_x[number], self._test_y[number]

    def described(self) -> list[dict[str, Any]]:
        columns = zip(self._x, self._test_x, self._y, self._test_y, strict=True)
        return [_described((x, test_x), (y, test_y)) for x, test_x, y, test_y in columns]


def _described(inputs: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> dict[str, Any]:
    return {"inputs": projected(list(inputs)), "labels": projected(list(labels))}


def _labels(signs: np.ndarray) -> np.ndarray:
    """The classes of +1/-1 outputs `[..., outputs]`; the sign of a single output gives the
    class."""
    found = signs[..., 0] > 0 if signs.shape[-1] == 1 else np.argmax(signs, axis=-1)
    return np.asarray(found, np.int32)


def source_of(
    data: Images | Tasks,
    *,
    steps: int,
    seeds: int,
    batch_size: int,
    seed: int,
    split: str,
    score_at: Sequence[int] | None = None,
) -> tuple[Source, list[int]]:
    """Checks the arguments of a comparison or an evaluation.

    Returns:
        The batches, and the steps to score: 0, those of `score_at` (`None`: of `STEPS`), and
        `steps`.

    Raises:
        ValueError: if an argument is out of range or does not fit the data.
    """
    if not isinstance(data, (Images, Tasks)):
        raise ValueError(f"`data` must be a task distribution or an image set. Received: data={data!r}")
    if isinstance(data, Tasks) and data.kind != "classes":
        raise ValueError(f"`data` must be tasks of classes. Received: {data.name}, tasks of {data.kind}")
    if split not in ("validation", "test") or (split != "test" and not isinstance(data, Tasks)):
        raise ValueError(f"`split` must be 'test' or, of tasks, 'validation'. Received: split={split!r} of {data.name}")
    arguments.seed(seed)
    limit = data.available(split) - 1 if isinstance(data, Tasks) else len(data.x_train)
    if steps < 1 or seeds < 2 or not 1 <= batch_size <= limit:
        raise ValueError(
            f"`steps` must be at least 1, `seeds` at least 2, `batch_size` from 1 to {limit}. "
            f"Received: steps={steps}, seeds={seeds}, batch_size={batch_size}"
        )
    wanted = STEPS if score_at is None else arguments.counts("score_at", score_at)
    if score_at is not None and max(wanted, default=0) > steps:
        raise ValueError(f"`score_at` must be at most {steps}, the number of steps. Received: score_at={score_at!r}")
    at = sorted({0, *(step for step in wanted if step <= steps), steps})
    if isinstance(data, Tasks):
        check_tasks(data, batch_size, 1, split)
        return Episodes(data, batch_size, seeds, seed, steps, split), at
    expected = Expected(outputs=(data.classes,), labels="classes", classes=data.classes)
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        checked_arrays(x, y, None, expected, within="data")
    return Passes(data, batch_size, seeds, seed), at
