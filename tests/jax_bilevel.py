"""Trains a network and outer parameters in a process of its own, on JAX: `python jax_bilevel.py
JSON`; prints one line of JSON, with results by case.

The JSON gives `cases`, and how they are run: nothing, `devices`, or `worker`, `workers` and `port`,
as in `jax_meta.py`; `epochs`, and `checkpoint`. With JAX_ENABLE_X64 everything is computed in
float64.
"""

import hashlib
import json
import sys

import bilevel_table
import jax
import jax_meta
import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_blur import bilevel

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def trainer(case):
    """A trainer whose network has the same initial weights in every process."""
    first, second = (keras.initializers.GlorotUniform(seed) for seed in (1, 2))
    between = [keras.layers.Dropout(0.3, seed=1), keras.layers.BatchNormalization()] if case == "layers" else []
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(8, "relu", kernel_initializer=first), *between,
         keras.layers.Dense(10, kernel_initializer=second)]
    )  # fmt: skip
    estimator = bilevel_table.ESTIMATORS.get(case, bilevel.OneStep(rate=0.1))
    made = bilevel.BilevelTrainer(model, bilevel.SampleWeightNet(4), estimator)
    optimizers = [keras.optimizers.SGD(0.5, momentum=0.9), keras.optimizers.SGD(0.1, momentum=0.9)]
    if case == "scaled":
        optimizers = [keras.optimizers.LossScaleOptimizer(one) for one in optimizers]
    made.compile(*optimizers, LOSS, ["accuracy"])
    return made


def trained(case, epochs, checkpoint):
    """The results, and the number of examples of a batch on each device."""
    digits = load_digits()
    x, y = (digits.data / 16).astype(keras.config.floatx()), digits.target
    made = trainer(case)
    history = made.fit(
        x[:96], y[:96], meta_data=(x[96:], y[96:]), batch_size=32, epochs=epochs, verbose=0, checkpoint=checkpoint,
        validation_data=(x[:50], y[:50]),
    ).history  # fmt: skip
    batch = next(made._streams[0])[0]
    return {
        "learned": [
            np.ravel(np.array(one.value)).tolist() for one in [*made.model.trainable_variables, *made.outer.values()]
        ],
        "bits": hashlib.sha256(b"".join(np.array(one.value).tobytes() for one in made.weights)).hexdigest(),
        "history": {name: [float(value) for value in column] for name, column in history.items()},
        "examples": [len(part.data) for part in batch.addressable_shards],
    }


if __name__ == "__main__":
    jax_meta.asked.update(json.loads(sys.argv[1]))
    if jax.config.jax_enable_x64:
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
    jax_meta.lay()
    asked = jax_meta.asked
    print(json.dumps({case: trained(case, asked["epochs"], asked.get("checkpoint")) for case in asked["cases"]}))
