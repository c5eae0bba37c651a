"""Trains under a strategy in a process of its own: `python replicas.py JSON`; prints one line of
JSON.

Logical devices and workers must be set up before TensorFlow starts, so that tests cannot do this in
their own process.

The JSON gives `what` ("meta", "fit", "bilevel"), `case`, and how it is run: `replicas` (0 for no
strategy, 1 for a OneDeviceStrategy, more for a MirroredStrategy of so many logical CPUs), or
`worker`, `workers` and `port` of a MultiWorkerMirroredStrategy. For "meta" also `epochs`,
`checkpoint`, and `stay`, an epoch at whose end it waits to be killed.
"""

import json
import os
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from keras_blur import Genome, Rule, Sequential, bilevel, genomes, layers, learners, meta, tasks

asked: dict = {}  # the JSON
RULE = Rule(batch_reduction="mean", last_activation="linear", normalize_activations="both", normalize_synapses="stored")
ESTIMATORS = {
    "unroll": lambda: meta.Unroll(3, trajectory_loss_weight=0.5),
    "truncated": lambda: meta.TruncatedUnroll(2, episode_steps=4),
    "es": lambda: meta.ES(3, antithetic_pairs=4),
    "pes": lambda: meta.PES(2, episode_steps=4, antithetic_pairs=4),
    "cma": lambda: meta.Evolution(3, population=6),
    "warpgrad": lambda: meta.WarpGrad(3),
    "offline": lambda: meta.OfflineWarpGrad(2),
}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
GENOMES = {
    "normalised": lambda: Genome.random(Rule(**{**RULE.get_config(), "states": 3, "oja": "activations"}), 0),
    "summed": lambda: Genome.random(Rule(normalize_synapses="stored", saturation="tanh", oja="weights"), 0, std=0.2),
    "errors": lambda: genomes.backprop(learning_rate=0.5, loss=LOSS, activation="tanh"),
    "dropout": lambda: genomes.backprop(learning_rate=0.5, loss=LOSS, activation="tanh"),
    "whitened": lambda: genomes.backprop(learning_rate=0.1, loss=LOSS).with_rule(
        genomes.backprop(loss=LOSS).rule.replace(
            whitening=True,
            normalize_term="orthogonal",
            orthogonal_iterations=2,
            momentum="after",
            slow_synapses=True,
            normalize_activations="forward",
        )
    ),
}


def strategy():
    """The strategy that the JSON asks for."""
    if "workers" in asked:
        addresses = [f"127.0.0.1:{asked['port'] + number}" for number in range(asked["workers"])]
        task = {"type": "worker", "index": asked["worker"]}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        return tf.distribute.MultiWorkerMirroredStrategy()
    count = asked["replicas"]
    devices = [tf.config.LogicalDeviceConfiguration()] * max(1, count)
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    if count == 0:
        return tf.distribute.get_strategy()
    if count == 1:
        return tf.distribute.OneDeviceStrategy("CPU:0")
    return tf.distribute.MirroredStrategy(
        [f"CPU:{number}" for number in range(count)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


class Stay(keras.callbacks.Callback):
    """Waits at the end of an epoch, before its checkpoint, for a test to kill this process."""

    def on_epoch_end(self, epoch, logs=None):
        if epoch == asked.get("stay"):
            time.sleep(600.0)


def trainer():
    """A trainer with tasks for four replicas; of evolution, candidates that cannot be split evenly
    over four."""
    evolution = asked["case"] == "cma"
    made = meta.MetaTrainer(
        tasks.images("digits", size=4, relabel=True), learners.Blur((8,), RULE), ESTIMATORS[asked["case"]](),
        members=1 if evolution else 2, meta_batch_size=3 if evolution else 4, batch_size=8, query_size=16, seed=3,
    )  # fmt: skip
    # Not Adam, whose first steps are the signs of gradients, which depend on rounding if a gradient
    # is zero.
    made.compile(None if evolution else keras.optimizers.SGD(0.01, momentum=0.9), jit_compile=asked.get("jit", False))
    return made


def data():
    """Digits whose last batch has two examples, fewer than there are replicas."""
    digits = load_digits()
    count = 288 if asked["case"] == "dropout" else 290  # masks are distributed by position, so parts have equal sizes
    x, y = (digits.images / 16).astype("float32")[:count], digits.target[:count]
    weight = np.linspace(0.1, 1.0, count).astype("float32")
    return {"x": x, "y": y, "sample_weight": weight, "validation_data": (x[:50], y[:50])}


def network():
    """A network with the same initial weights in every process."""
    first, second = (keras.initializers.GlorotUniform(seed) for seed in (1, 2))
    between = [keras.layers.Dropout(0.3, seed=1)] if asked["case"] == "dropout" else []
    model = Sequential(
        [keras.Input((8, 8)), keras.layers.Flatten(), layers.Dense(16, kernel_initializer=first), *between,
         layers.Dense(10, kernel_initializer=second)], genome=GENOMES[asked["case"]](),
    )  # fmt: skip
    model.compile(loss=LOSS, metrics=["accuracy"])
    return model


BILEVEL = {
    "one step": lambda: bilevel.OneStep(rate=0.1),
    "difference": lambda: bilevel.FiniteDifference(rate=0.1),
    "cut": lambda: bilevel.LayerwiseMetaGradient("last:1", rate=0.1),
    "sampler": lambda: bilevel.LayerwiseMetaGradient(None, bilevel.GradientSampler(target=1, hidden=4), rate=0.1),
    "evograd": lambda: bilevel.EvoGrad(3, sigma=0.1),
    "scaled": lambda: bilevel.OneStep(rate=0.1),
}


def reweighted():
    """A network trained with learned example weights."""
    first, second = (keras.initializers.GlorotUniform(seed) for seed in (1, 2))
    chain = [keras.layers.Dense(16, "tanh", kernel_initializer=first), keras.layers.Dense(10, kernel_initializer=second)]
    model = keras.Sequential([keras.Input((64,)), *chain])
    made = bilevel.BilevelTrainer(model, bilevel.SampleWeightNet(8), BILEVEL[asked["case"]]())
    optimizers = [keras.optimizers.SGD(0.5, momentum=0.9), keras.optimizers.SGD(0.1, momentum=0.9)]
    if asked["case"] == "scaled":
        inner = keras.optimizers.SGD(0.5, momentum=0.9, use_ema=True, ema_momentum=0.5)
        optimizers = [keras.optimizers.LossScaleOptimizer(one) for one in (inner, optimizers[1])]
    made.compile(*optimizers, LOSS, ["accuracy"])
    return made


def copies(variable):
    """A variable's value on each replica of this process."""
    value = variable.value
    return [copy.numpy() for copy in value.values] if isinstance(value, tf.distribute.DistributedValues) else [value.numpy()]


def main():
    """Trains and prints the results."""
    asked.update(json.loads(sys.argv[1]))
    with strategy().scope():
        if asked["what"] == "meta":
            model, options = trainer(), {"epochs": asked.get("epochs", 2), "steps_per_epoch": 2}
            curriculum = [meta.UnrollCurriculum([(0, 3), (1, 2)])] if asked.get("copies") else []
            options |= {"checkpoint": asked.get("checkpoint"), "callbacks": [*curriculum, Stay()]}
        elif asked["what"] == "bilevel":
            digits = load_digits()
            x, y = (digits.data / 16).astype("float32"), digits.target
            model, options = reweighted(), {"x": x[:160], "y": y[:160], "meta_data": (x[160:], y[160:]), "batch_size": 32}
            options["epochs"] = 2
        else:
            model, options = network(), {"batch_size": 32, "epochs": 2, "shuffle": False, **data()}
    history = model.fit(**options, verbose=0).history
    found = {
        "values": np.concatenate([np.ravel(copies(v)[0]).astype("float64") for v in model.weights]).tolist(),
        "apart": [v.path for v in model.weights if any((one != copies(v)[0]).any() for one in copies(v)[1:])],
        "history": {name: [float(value) for value in column] for name, column in history.items()},
        "predicted": [] if asked["what"] != "fit" else model.predict(options["x"][:20], verbose=0).tolist(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
