"""Outer gradients of every estimator, their random numbers and a run of CMA-ES, on one backend.

python tests/meta/estimates.py FILE
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import keras
import numpy as np
import pytest
from keras import ops
from on_backend import digits

from keras_blur import Genome, Rule, backend, learners, meta, random
from keras_blur.meta.cma import CMAES
from keras_blur.meta.es import perturbations

TASKS, STEPS, BATCH, QUERY, GENERATIONS = 2, 6, 8, 16, 25
RULE = Rule(states=2, normalize_activations="both", normalize_synapses="stored", batch_reduction="mean")

ESTIMATORS = {
    "unroll": meta.Unroll(STEPS, trajectory_loss_weight=0.5),
    "recomputed": meta.Unroll(STEPS, trajectory_loss_weight=0.5, recompute=True),
    "truncated": meta.TruncatedUnroll(STEPS // 2, episode_steps=STEPS),
    "es": meta.ES(STEPS, antithetic_pairs=4, sigma=0.1),
    "pes": meta.PES(STEPS // 2, antithetic_pairs=4, sigma=0.1, episode_steps=STEPS),
    "warpgrad": meta.WarpGrad(STEPS - 1),
    "offline": meta.OfflineWarpGrad(STEPS - 2, thetas=2),
}


class Double(learners.Blur):
    """The learner in float64, in which backends differ by less than the estimates by a mistake."""

    def init(self, *arguments, **options):
        state = super().init(*arguments, **options)
        return backend.tree_map(
            lambda leaf: ops.cast(leaf, "float64") if keras.backend.is_float_dtype(leaf.dtype) else leaf, state
        )


def episodes():
    """Batches of the digits, in order."""
    x, y, *_ = digits()
    x, y = x.reshape(len(x), -1) / 16, 2 * np.eye(10)[y] - 1
    support, made = TASKS * STEPS * BATCH, {}
    for name, value in (("x", x), ("y", y)):
        made[name] = value[:support].reshape(TASKS, STEPS, BATCH, -1)
        made[f"query_{name}"] = value[support : support + TASKS * QUERY].reshape(TASKS, QUERY, -1)
    return {name: ops.convert_to_tensor(value, "float64") for name, value in made.items()}


def outer_parameters():
    arrays = Genome.random(RULE, 1, std=0.5, synapse_update=-0.05, population=(2,)).by_member()
    return {name: ops.convert_to_tensor(value, "float64") for name, value in arrays.items()}


def windows_of(estimator):
    """Gradients, losses and accuracies of an estimator's first two windows."""
    learner, outer, data = Double((12,), RULE), outer_parameters(), episodes()

    def nothing(outer, data):
        return estimator.nothing_carried(learner, outer, estimator.part(data, 0))

    def run(outer, data, carried, seed, window, first):
        return estimator(learner, outer, estimator.part(data, window), seed, carried, first)

    nothing, run = (backend.compiled(function, jit_compile=False) for function in (nothing, run))
    carried, found = nothing(outer, data), {}
    for window in range(min(2, estimator.windows)):
        number, first = ops.convert_to_tensor(window, "int32"), ops.convert_to_tensor(window == 0)
        estimate, carried = run(outer, data, carried, random.seed_of(window), number, first)
        numbers = {**estimate.gradients, "loss": estimate.loss, "accuracy": estimate.accuracy}
        found |= {f"{window} {part}": value for part, value in numbers.items()}
    return found


def estimates():
    """The numbers of each estimator."""
    found = {name: windows_of(estimator) for name, estimator in ESTIMATORS.items()}
    return {f"{name} {part}": value for name, numbers in found.items() for part, value in numbers.items()}


def noise():
    """Perturbations of evolution strategies."""
    found = perturbations(outer_parameters(), 3, random.seed_of(5))
    return {f"noise {name}": value for name, value in found.items()}


def search():
    """Some generations of CMA-ES on an ellipsoid."""
    cma = CMAES(5, 12, sigma=0.5)

    def generation(state):
        candidates = cma.ask(state, random.seed_of(2))
        scales = ops.convert_to_tensor(10.0 ** np.arange(5), cma.dtype)
        return cma.tell(state, candidates, ops.sum(scales * candidates**2, axis=1))

    generation, state = backend.compiled(generation), cma.init(np.full(5, 2.0))
    for _ in range(GENERATIONS):
        state = generation(state)
    root = np.asarray(state.B) * np.asarray(state.D)
    return {"cma mean": state.mean, "cma sigma": state.sigma, "cma C": state.C, "cma root": root @ np.asarray(state.B).T}


def measured():
    """All of it, by name."""
    return {name: ops.convert_to_numpy(value) for name, value in {**estimates(), **noise(), **search()}.items()}


def narrow():
    """CMA-ES where JAX has no 64 bits: float32 by default, and float64 is refused."""
    assert CMAES(3).dtype == "float32"
    assert CMAES(3).condition == 1e5
    with pytest.raises(ValueError, match=r"`dtype` must be 'float32' or None .* JAX_ENABLE_X64=1"):
        CMAES(3, dtype="float64")
    found = search()
    assert found["cma mean"].dtype == "float32"
    assert found["cma sigma"] < 0.5


if __name__ == "__main__":
    if os.environ.get("JAX_ENABLE_X64") == "1":
        np.savez(sys.argv[1], **measured())
    else:
        narrow()
