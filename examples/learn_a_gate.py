"""
Title: A gate of the genome, learned while a network learns
Description: Derivatives of a BLUR gate during `Sequential.fit`: EvoGrad's, the same with the gate
attached, the exact one.
Source: "EvoGrad: Efficient Gradient-Based Meta-Learning and Hyperparameter Optimization" (Bohdal et
al., NeurIPS 2021), over the synapse states of "Meta-Learning Bidirectional Update Rules" (Sandler
et al., ICML 2021).

    python examples/learn_a_gate.py [--quick] [--genome backprop] [--data digits] [--data_dir DIR]
        [--seeds 5] [--seed 0] [--starts=-4,-2,0,2,3.5] [--plot FILE.png] [--json FILE]
"""

import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags
from keras import ops

import keras_blur
from keras_blur import bilevel, files, genomes, learners, random
from keras_blur.backend import compiled
from keras_blur.bilevel.hypergradient import Bilevel, gradient
from keras_blur.core import network
from keras_blur.report import style
from keras_blur.tasks.datasets import load_images

_QUICK = flags.DEFINE_boolean("quick", False, "Small numbers everywhere.")
_GENOME = flags.DEFINE_string("genome", "backprop", "The genome whose gate is learned.")
_DATA = flags.DEFINE_string("data", "digits", "Image set, such as mnist.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds of each arm.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
_STARTS = flags.DEFINE_list("starts", ["-4", "-2", "0", "2", "3.5"], "Logarithms of the gate's factor at the start.")
_PLOT = flags.DEFINE_string("plot", None, "File for the picture.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")

"""
## The question

The synapse update gate says how far one step goes; in the genome that is backpropagation it is
minus the learning rate. Can it be learned in one ordinary training run, from a start that is much
too small or much too large? EvoGrad perturbs the states of the synapses, lets each candidate take a
step with the genome, and weighs candidates by their training losses after it: only there does the
gate come in. The merged states are judged on held-out images.

A step with a genome has no derivative in it. So the derivative of the loss after the step, by the
gate, is an ordinary first derivative: there is no second derivative to avoid. Three arms:

- `EvoGrad`: the gate acts through the weights of the candidates alone;
- `EvoGrad, attached`: the candidates are merged after their step, of which the gate is a part;
- `one step`: the derivative of the held-out loss after one step from the states as they are.
"""

HIDDEN, BATCH, META_RATE = 32, 32, 0.03
EVOGRAD = bilevel.EvoGrad(population=2)
CrossEntropy = keras.losses.CategoricalCrossentropy(from_logits=True)


class Losses:
    """Losses after a step, as functions of s, the logarithm of the gate's factor, and of a model's
    synapse states."""

    def __init__(self, genome):
        self.genome, self.learner = genome, learners.Blur((HIDDEN,), genome.rule)

    def stepped(self, s, weights, batch, count):
        """The states after one step on a batch."""
        outer = {**self.genome.arrays, "synapse_update": self.genome.synapse_update * ops.exp(s)}
        after, _ = self.learner.step(outer, as_state(weights, count), *batch)
        return by_name(after.synapses)

    def loss(self, weights, batch, count):
        """Cross-entropy of what the states predict."""
        output = self.learner.predict(self.genome.arrays, as_state(weights, count), batch[0])
        return CrossEntropy(0.5 * (batch[1] + 1.0), output)

    def evograd(self, s, weights, train, valid, count, seed):
        """EvoGrad as the library has it."""
        problem = Bilevel(
            lambda outer, values: self.loss(self.stepped(outer["s"], values, train, count), train, count),
            lambda values: self.loss(values, valid, count), {},
        )  # fmt: skip
        return EVOGRAD.estimate(problem, {"s": s}, weights, ops.ones(()), seed, {})[0].gradients["s"]

    def attached(self, s, weights, train, valid, count, seed):
        """The same candidates, merged after their steps."""

        def candidate(k):
            noise = {
                name: 2.0 * ops.cast(random.integers(random.fold_in(seed, k, place), value.shape, 2), "float32") - 1.0
                for place, (name, value) in enumerate(weights.items())
            }
            return {name: value + EVOGRAD.sigma * noise[name] for name, value in weights.items()}

        def judged(outer):
            after = [self.stepped(outer["s"], candidate(k), train, count) for k in range(EVOGRAD.population)]
            losses = ops.stack([self.loss(one, train, count) for one in after])
            weighing = ops.unstack(ops.softmax(-losses / EVOGRAD.temperature))
            merged = {name: sum(w * one[name] for w, one in zip(weighing, after, strict=True)) for name in weights}
            return self.loss(merged, valid, count)

        return gradient(judged, {"s": s})[1]["s"]

    def one_step(self, s, weights, train, valid, count, seed):
        """The exact derivative through one step."""
        del seed

        def judged(outer):
            return self.loss(self.stepped(outer["s"], weights, train, count), valid, count)

        return gradient(judged, {"s": s})[1]["s"]


ARMS = {"EvoGrad": Losses.evograd, "EvoGrad, attached": Losses.attached, "one step": Losses.one_step}


def by_name(synapses):
    """States of synapses as one dictionary."""
    return {f"{place}_{name}": ops.convert_to_tensor(own[name]) for place, own in enumerate(synapses) for name in own}


def as_state(weights, count):
    """The opposite."""
    synapses = ({}, {})
    for name, value in weights.items():
        place, own = name.split("_", 1)
        synapses[int(place)][own] = value
    return network.NetworkState(synapses, count)


"""
## A callback

On TensorFlow the genome of a `Sequential` may hold a variable: then one compiled `fit` follows it.
After each step the callback draws a batch of either kind, finds the derivative at the states that
the model has by then, and Adam moves s against it.
"""


class LearnGate(keras.callbacks.Callback):
    """Changes the update gate of a model with two layers after each step of its `fit`."""

    def __init__(self, losses, arm, gate, s, train, valid, seed):
        super().__init__()
        self.gate, self.start, self.seed = gate, losses.genome.synapse_update, random.seed_of(seed)
        self.s, self.adam = keras.Variable(np.float32(s)), keras.optimizers.Adam(META_RATE)
        self.values, self.agree = [], []

        def estimate(s, weights, count, seed):
            batches = []
            for part, (images, labels) in enumerate((train, valid)):
                chosen = random.integers(random.fold_in(seed, part), (BATCH,), len(images))
                batches.append((ops.take(images, chosen, axis=0), ops.take(labels, chosen, axis=0)))
            arguments = (s, weights, *batches, count, random.fold_in(seed, 2))
            return ARMS[arm](losses, *arguments), losses.one_step(*arguments)

        self.estimate = compiled(estimate)

    def on_train_batch_end(self, batch, logs=None):
        count = ops.convert_to_tensor(self.model.learning_step)
        weights = by_name([layer.synapses for layer in self.model.layers])
        slope, exact = self.estimate(ops.convert_to_tensor(self.s), weights, count, random.fold_in(self.seed, count))
        if np.isfinite(slope):
            self.adam.apply([slope], [self.s])
            self.gate.assign(self.start * ops.exp(self.s))
        self.values.append(float(self.s.value))
        self.agree.append(float(slope * exact > 0))


def run(arm, s, seed, data, epochs):
    """Test loss and accuracy, the logarithm of the gate's factor after each step, and the fraction
    of correct signs."""
    (x, labels), valid, test, classes = data
    genome = genomes.load(_GENOME.value)
    gate = keras.Variable(genome.synapse_update * np.exp(np.float32(s)), trainable=False)
    keras.utils.set_random_seed(seed)
    layers = [keras_blur.layers.Dense(units) for units in (HIDDEN, classes)]
    model = keras_blur.Sequential([keras.Input((x.shape[1],)), *layers], genome=genome.replace(synapse_update=gate))
    loss, callbacks = keras.losses.SparseCategoricalCrossentropy(from_logits=True), []
    model.compile(loss=loss, metrics=["accuracy"], jit_compile=True)
    if arm in ARMS:
        signs = np.float32(2.0 * np.eye(classes) - 1.0)
        train, held = ((images, signs[own]) for images, own in ((x, labels), valid))
        callbacks = [LearnGate(Losses(genome), arm, gate, s, train, held, seed)]
    model.fit(x, labels, batch_size=BATCH, epochs=epochs, callbacks=callbacks, verbose=0)
    found = model.evaluate(*test, batch_size=500, verbose=0, return_dict=True)
    if callbacks:
        found |= {"s": [float(s), *callbacks[0].values], "agree": [float(np.mean(callbacks[0].agree))]}
    return found


def said(values):
    """Mean and standard deviation."""
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}"


def main(argv):
    """Runs each arm from each start, prints the numbers, and draws them."""
    del argv
    if keras.backend.backend() != "tensorflow":  # elsewhere a compiled `fit` takes the genome's numbers as constants
        raise app.UsageError("this example needs KERAS_BACKEND=tensorflow: `fit` follows a variable of a genome only there")
    quick, images = _QUICK.value, load_images(_DATA.value, _DATA_DIR.value)
    x, x_test = (np.reshape(part, (len(part), -1)) / np.float32(images.scale) for part in (images.x_train, images.x_test))
    held = len(x) // 5 if len(x) < 10000 else 10000
    data = ((x[:-held], images.y_train[:-held]), (x[-held:], images.y_train[-held:]),
            (x_test, images.y_test), images.classes)  # fmt: skip
    epochs = 1 if quick or len(x) >= 10000 else 10
    starts = (-2.0,) if quick else tuple(map(float, _STARTS.value))
    seeds, document = range(_SEED.value, _SEED.value + (2 if quick else _SEEDS.value)), {}
    print(f"{_GENOME.value} on {_DATA.value}, seeds {seeds[0]} to {seeds[-1]}; factors of the gate are e^s")
    print("  start s, arm: last s, fraction of derivatives with the sign of the exact one, test accuracy, test loss")
    for s in starts:
        for arm in ("constant gate", *ARMS):
            runs = document.setdefault(arm, {})[f"{s:g}"] = [run(arm, s, seed, data, epochs) for seed in seeds]
            columns = [said([one[key][-1] for one in runs]) if arm in ARMS else "" for key in ("s", "agree")]
            columns = [f"{column:<16}" for column in columns]
            columns += [said([one[key] for one in runs]) for key in ("accuracy", "loss")]
            print(f"  {s:<5g} {arm:<18} {'  '.join(columns)}", flush=True)
    if _JSON.value:
        files.write_text(_JSON.value, json.dumps(document, indent=1) + "\n")
    if _PLOT.value:
        draw(document)


def draw(document):
    """The gate over time from each start; accuracy at the end over the start."""
    figure, axes = style.figure(columns=2, width=4.5)
    curves, ends = axes[0]
    for index, (arm, by_start) in enumerate(document.items()):
        starts = np.array([float(s) for s in by_start])
        accuracy = np.array([[one["accuracy"] for one in runs] for runs in by_start.values()])
        style.line(ends, index, starts, accuracy.mean(axis=1), arm, accuracy.std(axis=1, ddof=1))
        if arm not in ARMS:
            continue
        for runs in by_start.values():
            values = np.array([one["s"] for one in runs])
            label = arm if runs is next(iter(by_start.values())) else None
            style.line(curves, index, np.arange(values.shape[1]), values.mean(axis=0), label, values.std(axis=0, ddof=1))
    curves.set_xlabel("step of fit")
    curves.set_ylabel("s: the gate is e^s of the genome's")
    ends.set_xlabel("s at the start")
    ends.set_ylabel("test accuracy")
    ends.legend(fontsize=7)
    style.save(figure, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
