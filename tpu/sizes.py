"""The sizes and the data of the steps that `verify.py` checks, on both backends."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from keras import ops

import keras_blur as kb
from keras_blur import learners, meta, random, tasks
from keras_blur.cli.meta_train import RULE

Array = Any


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a case is.

    Attributes:
        sizes: units of each layer, the input first.
        batch: examples of a support batch, and of the query; of `fit`, the batch of all cores.
        steps: unrolled steps.
        tasks: episodes of a step, of all cores.
        members: genomes side by side.
        states: of a neuron.
        population: candidates of a CMA-ES generation; half as many antithetic pairs in ES and PES.
    """

    sizes: tuple[int, ...] = (12, 16, 4)
    batch: int = 8
    steps: int = 3
    tasks: int = 8
    members: int = 2
    states: int = 2
    population: int = 8

    @property
    def rule(self) -> kb.Rule:
        """That of `keras-blur meta-train`."""
        return kb.Rule(**{**RULE, "states": self.states})


class Gaussians(tasks.Tasks):
    """Classes of Gaussian points around means that each episode draws anew."""

    kind, name = "classes", "gaussians"

    def __init__(self, features: int, outputs: int):
        self.shape, self.outputs = (features,), outputs

    def available(self, split: str) -> int:
        return 2**24

    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        means = random.normal(random.fold_in(seed, 0), (self.outputs, self.features))
        y = random.integers(random.fold_in(seed, 1, len(split)), (count,), self.outputs)
        x = ops.take(means, y, axis=0)
        x = x + 0.5 * random.normal(random.fold_in(seed, 2, len(split)), (count, self.features))
        return x, 2.0 * ops.one_hot(y, self.outputs) - 1.0


ESTIMATORS = {
    "unroll": meta.Unroll, "truncated": meta.TruncatedUnroll, "es": meta.ES, "pes": meta.PES, "cma": meta.Evolution,
}  # fmt: skip


def estimator(kind: Any, size: Size) -> Any:
    """An estimator of this kind and size, or `Evolution`."""
    # A difference of two losses over a small sigma would be rounding magnified.
    noise: dict[str, Any] = {"antithetic_pairs": size.population // 2, "sigma": 0.2}
    if kind is meta.PES:
        return meta.PES(size.steps, episode_steps=2 * size.steps, **noise)
    if kind is meta.TruncatedUnroll:
        return meta.TruncatedUnroll(size.steps, episode_steps=2 * size.steps)
    if kind is meta.ES:
        return meta.ES(size.steps, **noise)
    return meta.Evolution(size.steps, population=size.population) if kind is meta.Evolution else kind(size.steps)


def meta_trainer(
    size: Size, by: Any, trainer: type[meta.MetaTrainer] = meta.MetaTrainer, learner: Any = None
) -> meta.MetaTrainer:
    """A compiled trainer of this size, by an estimator or `Evolution`; a `Blur` learns by
    default."""
    evolution = isinstance(by, meta.Evolution)
    made = trainer(
        Gaussians(size.sizes[0], size.sizes[-1]), learner or learners.Blur(size.sizes[1:-1], size.rule), by,
        members=1 if evolution else size.members, meta_batch_size=size.tasks, batch_size=size.batch, query_size=size.batch,
        seed=3,
    )  # fmt: skip
    # Adam divides by the root of a square: where a derivative is all but zero, rounding alone would
    # decide its step.
    made.compile(None if evolution else keras.optimizers.Adam(1e-2, epsilon=1e-3), jit_compile=False)
    return made
