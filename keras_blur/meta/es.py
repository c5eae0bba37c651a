"""Evolution strategies: estimates of the outer gradient from losses alone.

Sources: "Evolution Strategies as a Scalable Alternative to Reinforcement Learning" (Salimans et
al., 2017, arXiv 1703.03864; mirrored sampling) for `ES`; "Unbiased Gradient Estimation in Unrolled
Computation Graphs with Persistent Evolution Strategies" (Vicol, Metz and Sohl-Dickstein, ICML 2021,
algorithm 2) for `PES`.

Both estimate the gradient of the smoothed loss E[L(theta + sigma e)] with normal e. They store
nothing of the unroll, and they remain useful where a long unroll makes the true gradient explode.
Antithetic pairs, one perturbation with both signs, cancel the even part of the loss.

`ES` evaluates whole episodes. `PES` evaluates one truncation window at a time and carries every
perturbed learner to the next one. The loss of a window depends on all perturbations so far. `PES`
therefore multiplies it by their sum, which removes the truncation bias.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from keras import ops

from keras_blur import arguments, backend
from keras_blur.core import random
from keras_blur.distribution import Shard
from keras_blur.learners.base import Learner
from keras_blur.meta.estimator import (
    Array,
    Carried,
    Episodes,
    Estimate,
    Estimator,
    Outer,
    Truncated,
    choose,
    start,
)

_NOISE = 1  # folded into the seed of an estimate for its perturbations


@dataclasses.dataclass(frozen=True)
class ES(Estimator):
    """Antithetic evolution strategies over whole episodes.

    Args:
        steps: learning steps of an episode.
        trajectory_loss_weight: weight of the mean loss of the predictions made during learning,
            added to the query loss.
        loss: `"auto"`, `"cross_entropy"`, `"binary"` or `"squared"`, as in `Estimator`.
        kind: output kind of the tasks; `MetaTrainer` sets it.
        recompute: must be `False`, since nothing of the unroll is stored.
        antithetic_pairs: perturbations of each member. Each is used with both signs.
        sigma: standard deviation of the perturbations.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> ES(steps=20, antithetic_pairs=8, sigma=0.05).horizon
    20

    Source: "Evolution Strategies as a Scalable Alternative to Reinforcement Learning" (Salimans et
    al., 2017, arXiv 1703.03864), with mirrored sampling.
    """

    antithetic_pairs: int = 16
    sigma: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.count("antithetic_pairs", self.antithetic_pairs)
        arguments.positive("sigma", self.sigma)
        if self.recompute:
            raise ValueError("`recompute` must be False: evolution strategies store nothing of the unroll.")

    def local_estimate(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried, first: Any, shard: Shard
    ) -> tuple[Any, Any]:
        def scores(particles: Outer, shard: Shard) -> tuple[tuple[Array, Array], Any]:
            state = self.begin(learner, particles, episodes, seed, carried, first, shard)
            losses, accuracies, state = self.objective(learner, particles, episodes, state)
            return (backend.mean(losses, axis=1), backend.mean(accuracies, axis=1)), state

        def like(members: int, dtype: str) -> Any:
            return (keras.KerasTensor((members,), dtype),) * 2

        noise = perturbations(outer, self.antithetic_pairs, seed, shard.members)
        particles = perturbed(outer, noise, self.sigma)
        shard = dataclasses.replace(shard, networks=None)  # equal for all, as copies differ by their noise
        return self.by_member(scores, like, learner, particles, episodes, seed, shard)

    def combine(self, outer: Outer, measured: Any, seed: Array, carried: Carried, first: Any) -> tuple[Estimate, Any]:
        return self.estimate(outer, perturbations(outer, self.antithetic_pairs, seed), *measured), ()

    def estimate(self, outer: Outer, directions: Outer, losses: Array, accuracies: Array) -> Estimate:
        """Computes the gradient from the losses of the particles.

        Args:
            outer: outer parameters `[members, ...]`.
            directions: standard normal directions `[members, antithetic_pairs, ...]`, or their
                sums.
            losses: means over tasks, `[members * 2 * antithetic_pairs]`: of each member all
                positive signs first, then all negative ones.
            accuracies: same shape as `losses`.

        Returns:
            The estimate, with the smoothed loss. A pair with a non-finite loss is ignored.

        Example:

        >>> member, direction = {"a": ops.zeros((1, 2))}, {"a": ops.array([[[1.0, -1.0]]])}
        >>> losses = ops.array([3.0, 2.0])  # at a + sigma * direction, and at a - sigma * direction
        >>> found = ES(antithetic_pairs=1, sigma=0.5).estimate(member, direction, losses, losses)
        >>> ops.convert_to_numpy(found.gradients["a"]).tolist(), float(found.loss[0])
        ([[1.0, -1.0]], 2.5)
        """
        members = next(iter(outer.values())).shape[0]
        shape = (members, 2, self.antithetic_pairs)
        loss, correct = ops.reshape(losses, shape), ops.reshape(accuracies, shape)
        sound = ops.all(ops.isfinite(loss), axis=1)
        count = ops.sum(ops.cast(sound, loss.dtype), axis=1)

        def over_pairs(value: Array) -> Array:  # not a number if no pair is sound, so that the member is skipped
            return ops.sum(ops.where(sound, value, 0.0), axis=1) / count

        difference = ops.where(sound, loss[:, 0] - loss[:, 1], 0.0) / (2.0 * self.sigma)
        gradients = {}
        for name, direction in directions.items():
            factor = ops.reshape(difference, (members, self.antithetic_pairs) + (1,) * (len(direction.shape) - 2))
            total = ops.sum(ops.cast(direction, loss.dtype) * factor, axis=1)
            gradients[name] = total / ops.reshape(count, (members,) + (1,) * (len(total.shape) - 1))
        return Estimate(gradients, over_pairs(backend.mean(loss, axis=1)), over_pairs(backend.mean(correct, axis=1)))


@dataclasses.dataclass(frozen=True)
class PES(Truncated, ES):
    """Persistent evolution strategies: unbiased estimates on truncation windows of long episodes.

    Args:
        steps: learning steps of a truncation window. Each window ends with the query.
        trajectory_loss_weight: weight of the mean loss of the predictions made during learning,
            added to the query loss.
        loss: `"auto"`, `"cross_entropy"`, `"binary"` or `"squared"`, as in `Estimator`.
        kind: output kind of the tasks; `MetaTrainer` sets it.
        recompute: must be `False`, since nothing of the unroll is stored.
        antithetic_pairs: perturbations of each member. Each is used with both signs.
        sigma: standard deviation of the perturbations.
        episode_steps: learning steps of an episode, a multiple of `steps`.

    Raises:
        ValueError: if an argument is out of range, or `episode_steps` is not a multiple of `steps`.

    Example:

    >>> PES(steps=10, episode_steps=200, antithetic_pairs=8).horizon
    200

    Source: "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution
    Strategies" (Vicol, Metz and Sohl-Dickstein, ICML 2021), algorithm 2.
    """

    def nothing_carried(self, learner: Learner, outer: Outer, episodes: Episodes) -> Carried:
        zero = ops.zeros(2, "int32")
        noise = perturbations(outer, self.antithetic_pairs, zero)
        state = start(learner, perturbed(outer, noise, self.sigma), episodes, zero)
        return backend.tree_map(ops.zeros_like, Carried(state, noise))

    def combine(self, outer: Outer, measured: Any, seed: Array, carried: Carried, first: Any) -> tuple[Estimate, Any]:
        noise = perturbations(outer, self.antithetic_pairs, seed)
        before = choose(first, backend.tree_map(ops.zeros_like, noise), carried.directions)
        directions = {name: before[name] + noise[name] for name in noise}
        return self.estimate(outer, directions, *measured), directions


def perturbations(outer: Outer, antithetic_pairs: int, seed: Array, part: Shard | None = None) -> Outer:
    """Standard normal directions `[members, antithetic_pairs, ...]` for each outer parameter.

    Args:
        outer: outer parameters `[members, ...]`.
        antithetic_pairs: directions of each member.
        seed: a seed.
        part: which of all members these are; `None` is all.
    """
    noise = {}
    for index, (name, value) in enumerate(sorted(outer.items())):
        shape = (value.shape[0], antithetic_pairs, *value.shape[1:])
        rows = None if part is None else part.places(shape[0])
        noise[name] = ops.cast(random.normal(random.fold_in(seed, _NOISE, index), shape, rows), value.dtype)
    return noise


def perturbed(outer: Outer, noise: Outer, sigma: float) -> Outer:
    """The particles `[members * 2 * antithetic_pairs, ...]`.

    Each member has all positive signs first, then all negative ones.
    """
    moved = {}
    for name, value in outer.items():
        both = ops.stack([value[:, None] + sigma * noise[name], value[:, None] - sigma * noise[name]], axis=1)
        moved[name] = ops.reshape(both, (-1, *value.shape[1:]))
    return moved
