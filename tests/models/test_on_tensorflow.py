"""What only TensorFlow has of a `Sequential`: its checkpoints, and that no other Keras model trains
it. JAX does not tell a model whether its gradient will be taken."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as kl

import keras_blur as kb
from keras_blur.layers import Dense

RNG = np.random.default_rng(0)
X = RNG.standard_normal((48, 5)).astype("float32")
Y = RNG.integers(0, 3, 48)
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
NORMALISED = kb.Rule(normalize_activations="both", normalize_synapses="stored", batch_reduction="mean")


def make(genome=None, seed=0):
    keras.utils.set_random_seed(seed)
    genome = kb.genomes.backprop(0.1) if genome is None else genome
    model = kb.Sequential([keras.Input((5,)), Dense(6), Dense(3)], genome=genome)
    model.compile(loss=LOGITS, run_eagerly=True)
    return model


def kernel(model):
    return np.array(model.layers[0].synapses["kernel"].value)


def test_checkpoints_of_tensorflow(tmp_path):
    genome = kb.Genome.random(NORMALISED, seed=1, std=0.5, synapse_update=-0.05)
    model = make(genome)
    model.fit(X, Y, batch_size=8, verbose=0)
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "ckpt"))
    other = make(genome, seed=9)
    tf.train.Checkpoint(model=other).restore(path).assert_consumed()
    assert len(model.weights) == len(other.weights) > 4
    for one, restored in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(one.value, restored.value)


def functional(inner):
    entry = keras.Input((5,))
    return keras.Model(entry, kl.Dense(3)(inner(entry)))


class Subclassed(keras.Model):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, kl.Dense(3)

    def call(self, x):
        return self.head(self.inner(x))


OUTER = {
    "sequential": lambda inner: keras.Sequential([keras.Input((5,)), inner, kl.Dense(3)]),
    "functional": functional,
    "subclassed": Subclassed,
    "a layer of it": lambda inner: keras.Sequential([keras.Input((5,)), inner.layers[0], kl.Dense(3)]),
}


@pytest.mark.parametrize("name", OUTER)
def test_another_model_does_not_train_it(name):
    inner = make()
    outer = OUTER[name](inner)
    outer.compile("sgd", LOGITS, jit_compile=False)
    before = kernel(inner)
    message = r"^`\w+` must not be trained inside another Keras model.*`trainable = False`.*Received: '\w+' inside '\w+'$"
    with pytest.raises(ValueError, match=message):
        outer.fit(X, Y, verbose=0)
    np.testing.assert_array_equal(kernel(inner), before)
    assert outer.predict(X, verbose=0).shape == (48, 3)
    inner.trainable = False
    outer.compile("sgd", LOGITS, jit_compile=False)
    outer.fit(X, Y, verbose=0)
    np.testing.assert_array_equal(kernel(inner), before)
