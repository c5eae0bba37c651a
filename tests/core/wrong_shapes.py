"""Calls of the core with arrays of wrong shapes, which `tests/core/test_shapes.py` runs while
functions check their hints."""

import jaxtyping
import keras
import numpy as np
import pytest

from keras_blur import Genome, Rule
from keras_blur.core import equations, feedback, losses, patches, settling, states, terms, weightless
from keras_blur.core.connections.dense import DenseConnection

RULE = Rule()
GENOME = Genome.random(RULE, seed=0)
SQUARED = keras.losses.MeanSquaredError()


def ones(*shape):
    return keras.ops.ones(shape)


# A function, arguments that fit, and one that does not.
CALLS = {
    "activation": (equations.activate, {"activation": "relu", "z": ones(2)}, {"z": keras.ops.ones(2, dtype="int32")}),
    "transform": (equations.mix, {"states": ones(2, 4, 3), "transform": np.ones((2, 2))}, {"transform": np.ones(2)}),
    "population": (
        equations.mix,
        {"states": ones(5, 2, 4, 3), "transform": np.ones((5, 2, 2))},
        {"transform": np.ones((6, 2, 2))},
    ),
    "normalisation": (
        equations.normalize,
        {"rule": RULE, "z": ones(2, 4, 3), "scale": ones(2), "shift": ones(2), "statistics": (ones(2, 1, 3),) * 2},
        {"statistics": (ones(2, 1, 3), ones(2, 1, 5))},
    ),
    "neurons": (
        equations.backward_neurons,
        {"rule": RULE, "genome": GENOME, "z": ones(2, 4, 3), "old": ones(2, 4, 3)},
        {"old": states.Parts(1, [ones(1, 4, 5), lambda: ones(1, 4, 5)])},
    ),
    "synapse": (
        equations.new_synapse,
        {
            "rule": RULE, "old": ones(2, 5, 3), "change": ones(2, 5, 3), "shrink": ones(2, 1, 3),
            "keep": np.ones(()), "gate": np.ones(()), "saturation": None,
        },
        {"change": ones(2, 3, 5)},
    ),
    "gram": (
        terms.whitened,
        {"gram": ones(1, 5, 5), "term": ones(1, 5, 3), "damping": ones(1, 1, 1), "examples": 4},
        {"term": ones(1, 4, 3)},
    ),
    "groups": (terms.Groups(6, 2).apart, {"x": ones(6, 3)}, {"x": ones(6)}),
    "orthogonal": (
        terms.orthogonal_senders,
        {"senders": ones(1, 4, 3), "responses": ones(1, 4, 3), "iterations": 2},
        {"responses": ones(1, 4, 4)},
    ),
    "error": (
        feedback.error,
        {"loss": SQUARED, "y": ones(4, 3), "prediction": ones(4, 3), "sample_weight": ones(4)},
        {"sample_weight": ones(3)},
    ),
    "losses": (
        losses.ExampleLosses(SQUARED).smoothed,
        {"y": ones(4, 3), "prediction": ones(4, 3), "spread": ones()},
        {"spread": ones(4)},
    ),
    "rows": (patches.thinned, {"rows": ones(12, 2), "positions": 6, "most": 2}, {"rows": ones(12)}),
    "mask": (
        weightless.drop_mask,
        {
            "seed": keras.ops.zeros(2, dtype="int32"), "rate": 0.5, "rows": 4, "shape": (3,), "noise_shape": (None, 1),
            "dtype": "float32",
        },
        {"seed": keras.ops.zeros(3, dtype="int32")},
    ),
    "matrix": (DenseConnection(3).over_readers, {"matrix": ones(2, 5, 3)}, {"matrix": ones(5, 3)}),
    "weights": (DenseConnection(3).of_rows, {"weight": ones(4), "source": (5,)}, {"weight": ones()}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_named(name):
    function, right, wrong = CALLS[name]
    function(**right)
    (argument,) = wrong
    with pytest.raises(jaxtyping.TypeCheckError, match=f"parameter '{argument}'"):
        function(**{**right, **wrong})


def test_a_wrong_result_is_named(monkeypatch):
    monkeypatch.setattr(terms, "solve_positive", lambda system, term: keras.ops.swapaxes(term, -1, -2))
    function, right, _ = CALLS["gram"]
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        function(**right)


def test_a_wrong_context_is_named():
    context = settling.TermContext(GENOME, (5,), ones(), "float32", None, False)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'weight'"):
        context.root(DenseConnection(3))
