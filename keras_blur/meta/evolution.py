"""Outer parameters by evolution: scores of whole learners, and CMA-ES on the vector of all numbers.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), section 4.4: fitness
is the accuracy after an unroll, with a population of 80 and no curriculum. Nothing is
differentiated, so a rule can be scored directly by accuracy and over any number of steps. The price
is that each generation runs the inner loop with every genome of the population.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import arguments, backend
from keras_blur.distribution import Shard
from keras_blur.learners.base import Learner
from keras_blur.meta.estimator import Array, Episodes, InnerLoop, Outer, in_groups, section, start

FITNESSES = ("accuracy", "loss", "speed")
"""How `Evolution` scores candidates: the values of `fitness`."""


@dataclasses.dataclass(frozen=True)
class Evolution(InnerLoop):
    """CMA-ES on the vector of all outer parameters, such as the numbers of a genome.

    Args:
        steps: learning steps of an episode.
        trajectory_loss_weight: weight of the mean loss of the predictions made during learning,
            added to the query loss.
        loss: `"auto"`, `"cross_entropy"`, `"binary"` or `"squared"`, as in `Estimator`.
        kind: output kind of the tasks; `MetaTrainer` sets it.
        recompute: must be `False`, since nothing of the unroll is stored.
        population: candidates of a generation.
        sigma: standard deviation of the first generation.
        fitness: `"accuracy"` or `"loss"` of the query after the last step, or `"speed"`: the query
            accuracy averaged over steps 1, 2, 4, ... and the last, so early steps count as much as
            late ones. Only `"loss"` includes the trajectory loss.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> Evolution(steps=15, population=80).fitness
    'accuracy'

    Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), section 4.4; for
    the search, see `CMAES`.
    """

    population: int = 80
    sigma: float = 0.3
    fitness: str = "accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.integer("population", self.population, 4)
        arguments.positive("sigma", self.sigma)
        arguments.choice("fitness", self.fitness, FITNESSES)
        if self.recompute:
            raise ValueError("`recompute` must be False: evolution stores nothing of the unroll.")

    def score(self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array) -> tuple[Array, Array, Array]:
        """Scores candidates.

        Args:
            learner: the learner.
            outer: outer parameters of all candidates by name, `[population, ...]`.
            episodes: as in `Estimator`.
            seed: seed of the initial networks, `[2]` int32.

        Returns:
            Fitness (lower is better), loss and accuracy, averaged over tasks, each `[population]`.
            The accuracy is that after the last step; with `fitness="speed"`, the loss is the mean
            over the scored steps.
        """

        def score(outer: Outer, shard: Shard) -> tuple[Array, Array, Array]:
            return self._score(learner, outer, episodes, start(learner, outer, episodes, seed, shard))

        def like(members: int, dtype: str) -> Any:
            return (keras.KerasTensor((members,), dtype),) * 3

        return in_groups(score, like, learner, outer, episodes, seed)

    def _score(self, learner: Learner, outer: Outer, episodes: Episodes, state: Any) -> tuple[Array, Array, Array]:
        begin, found = 0, []
        for end in self._scored_at():
            part = dataclasses.replace(self, steps=end - begin)
            support = {name: section(episodes[name], begin, end - begin, axis=1) for name in ("x", "y")}
            losses, accuracies, state = part.objective(learner, outer, {**episodes, **support}, state)
            found.append((backend.mean(losses, axis=1), backend.mean(accuracies, axis=1)))
            begin = end
        loss = sum(one for one, _ in found) / len(found)
        speed = sum(one for _, one in found) / len(found)
        accuracy = found[-1][1]
        fitness = {"loss": loss, "accuracy": -accuracy, "speed": -speed}[self.fitness]
        # A genome with a non-finite loss is the worst, whatever its argmax.
        return ops.where(ops.isfinite(loss), fitness, math.nan), loss, accuracy

    def _scored_at(self) -> list[int]:
        """The steps after which the query is scored."""
        if self.fitness != "speed":
            return [self.steps]
        return [*(1 << power for power in range((self.steps - 1).bit_length())), self.steps]


def to_vector(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Flattens one set of outer parameters to a float64 vector, in the order of their names."""
    return np.concatenate([np.asarray(arrays[name], np.float64).ravel() for name in sorted(arrays)])


def from_vectors(shapes: Mapping[str, tuple[int, ...]], vectors: Array) -> Outer:
    """Splits vectors `[population, size]` into outer parameters `[population, ...]`.

    `shapes` are the shapes of a single set.
    """
    vectors, parts, end = ops.cast(vectors, "float32"), {}, 0
    for name, shape in sorted(shapes.items()):
        begin, end = end, end + math.prod(shape)
        parts[name] = ops.reshape(vectors[:, begin:end], (-1, *shape))
    return parts
