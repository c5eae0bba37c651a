"""
Title: Feedback paths
Description: LeNet on MNIST and Fashion-MNIST by six genomes that differ in how the error comes
back.
Source: "Random synaptic feedback weights support error backpropagation" (Lillicrap et al., 2016),
"How Important Is Weight Symmetry in Backpropagation?" (Liao et al., 2016), "Direct Feedback
Alignment Provides Learning in Deep Neural Networks" (Nokland, 2016), "Deep Learning without Weight
Transport" (Akrout et al., 2019, after Kolen and Pollack, 1994), "Learning Without Feedback"
(Frenkel et al., 2021).

    python examples/feedback_paths.py [--quick] [--data digits] [--data_dir DIR] [--arms NAME,NAME]
        [--seeds 3] [--seed 0] [--epochs 4] [--rates 0.02,0.05,0.1] [--momentum 0.9] [--decay 0.001]
        [--jit_compile] [--plot FILE.png] [--json FILE]
"""

import json
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags

import keras_blur as kb
from keras_blur import files
from keras_blur.backend import numbers_of
from keras_blur.report import style
from keras_blur.tasks.datasets import load_images

_QUICK = flags.DEFINE_boolean("quick", False, "Digits, one rate, ten epochs, two seeds.")
_DATA = flags.DEFINE_list("data", ["digits"], "Image sets, such as mnist,fashion_mnist.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets.")
_ARMS = flags.DEFINE_list("arms", None, "Arms to run, by name; all by default.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
_EPOCHS = flags.DEFINE_integer("epochs", 4, "Passes over the training images.", lower_bound=1)
_RATES = flags.DEFINE_list("rates", ["0.02", "0.05", "0.1"], "Learning rates that each arm chooses from.")
_MOMENTUM = flags.DEFINE_float("momentum", 0.9, "Momentum of all arms.", lower_bound=0.0, upper_bound=0.99)
_DECAY = flags.DEFINE_float("decay", 1e-3, "Weight decay of all arms, as that of the loss would be.", lower_bound=0.0)
_JIT = flags.DEFINE_boolean("jit_compile", False, "Compile steps by XLA, which makes convolutions slow on a CPU.")
_PLOT = flags.DEFINE_string("plot", None, "File for the picture.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers; what it has already is not run again.")

"""
## Six paths

Backpropagation sends the error back through the synapses by which the activity came: each one is
read both ways. A synapse of the brain is not. So the feedback path is given synapses of its own, or
leads elsewhere. Every arm is a genome; all have the numbers of the genome that is backpropagation,
and differ in one option of its rule or in the graph:

- `backpropagation`: one kernel for both directions (`directions="tied"`);
- `tied updates`: a backward kernel that starts at random and gets the changes of the forward one
  (`"tied_updates"`). Weight decay takes from both what they had at the start, so that they come to
  agree: this is Kolen and Pollack's rule;
- `signs`: a backward synapse has a fixed random size and the sign that the forward one has by now
  (`"signs"`);
- `fixed random`: backward synapses that never change (`"fixed"`): feedback alignment;
- `direct errors`: each hidden layer receives the error of the output itself, through fixed random
  synapses of its own;
- `direct labels`: the same, but with labels in the place of the error.

The last two need no option. A frozen layer reads a hidden layer, and its sum joins the output as a
value that is always zero, but passes back what comes: so the frozen kernel is that layer's feedback
path, and forward it does nothing. Another layer cuts the path from layer to layer. For `direct
labels` these zeros are outputs of their own, beside the real one. The cross-entropy at ten logits
of zero has the derivative 1/10 - y, whatever the network predicts: what arrives are the labels less
their mean. The paper's projection has y itself.
"""

BATCH, HIDDEN = 64, ("convolution_1", "convolution_2", "hidden_1", "hidden_2")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
ARMS = {
    "backpropagation": ("tied", "layers"),
    "tied updates": ("tied_updates", "layers"),
    "signs": ("signs", "layers"),
    "fixed random": ("fixed", "layers"),
    "direct errors": ("tied", "errors"),
    "direct labels": ("tied", "labels"),
}


class Silent(keras.layers.Layer):
    """Gives zeros, and passes back what comes."""

    def call(self, inputs):
        return inputs - keras.ops.stop_gradient(inputs)


class Cut(keras.layers.Layer):
    """Gives what it reads, and passes nothing back."""

    def call(self, inputs):
        return keras.ops.stop_gradient(inputs)


def genome(arm, rate):
    """Backpropagation with momentum, weight decay, and the directions of an arm."""
    known, beta = kb.genomes.backprop(rate, "tanh", loss=LOSS), _MOMENTUM.value
    changed = known.with_rule(known.rule.replace(directions=ARMS[arm][0], momentum="before"))
    return changed.replace(momentum=beta, synapse_keep=1.0 - _DECAY.value * rate / (1.0 - beta))


def network(arm, rate, seed, images):
    """LeNet, with smaller windows for small images. The forward synapses start equal in all
    arms."""
    shape, classes, way = images.x_train.shape[1:], images.classes, ARMS[arm][1]
    start = [keras.initializers.GlorotUniform(1000 * seed + index) for index in range(9)]
    conv, dense, pool = kb.layers.Conv2D, kb.layers.Dense, keras.layers.AveragePooling2D
    size = 5 if shape[0] >= 20 else 3
    layers = [
        (conv(6, size, padding="same", name=HIDDEN[0], kernel_initializer=start[0]), [pool(2)]),
        (conv(16, size, name=HIDDEN[1], kernel_initializer=start[1]), [pool(2), keras.layers.Flatten()]),
        (dense(120, name=HIDDEN[2], kernel_initializer=start[2]), []),
        (dense(84, name=HIDDEN[3], kernel_initializer=start[3]), []),
    ]
    image, direct = keras.Input(shape), []
    h = keras.layers.Rescaling(1.0 / images.scale)(image)
    for (layer, after), own in zip(layers, start[5:], strict=True):
        h = layer(h)
        if way != "layers":
            how = {"activation": "linear", "use_bias": False, "kernel_initializer": own, "trainable": False}
            back = dense(classes, name=f"{layer.name}_back", **how)
            direct.append(Silent()(back(keras.layers.Flatten()(h))))
            h = Cut()(h)
        for one in after:
            h = one(h)
    logits = dense(classes, name="output", kernel_initializer=start[4])(h)
    outputs = {"layers": logits, "labels": [logits, *direct]}
    if way == "errors":
        outputs["errors"] = keras.layers.Add()([logits, *direct])
    model = kb.Model(image, outputs[way], genome=genome(arm, rate))
    model.compile(loss=[LOSS] * (1 + len(direct)) if way == "labels" else LOSS, jit_compile=_JIT.value)
    return model


def restart(model, arm, seed, images):
    """Sets a compiled model to the start of a seed."""
    for variable, value in zip(model.weights, network(arm, 0.1, seed, images).weights, strict=True):
        variable.assign(value)
    return model


def labels_for(model, y):
    """Labels for each output."""
    return [y] * len(model.outputs) if len(model.outputs) > 1 else y


def error(model, x, y):
    """Percentage of images that get another class than theirs."""
    found = model.predict(x, batch_size=500, verbose=0)
    logits = found[0] if isinstance(found, list) else found
    return float(100.0 * np.mean(np.argmax(logits, axis=-1) != y))


def learn(model, x, y, seed, epoch):
    """One pass, over the same batches in the same order in every arm."""
    order = np.random.default_rng([seed, epoch]).permutation(len(x))[: len(x) // BATCH * BATCH]
    model.fit(x[order], labels_for(model, y[order]), batch_size=BATCH, shuffle=False, verbose=0)


"""
## How far the changes are those of backpropagation

After training, the change of each hidden kernel on a batch is compared with the one that
backpropagation would make of the same synapses on the same batch: the cosine between the two,
momentum and weight decay left out.
"""


def changes(model, x, y):
    """Changes of the hidden kernels on a batch, without momentum and weight decay. The model stays
    as it was."""
    own = [model.get_layer(name).synapses for name in HIDDEN]
    kernels, weights = [one["kernel"] for one in own], [numbers_of(variable) for variable in model.weights]
    before = [numbers_of(kernel) for kernel in kernels]
    for one in own:
        one["kernel_trace"].assign(np.zeros(one["kernel_trace"].shape, "float32"))
    model.train_on_batch(x, labels_for(model, y))
    keep = model.genome.synapse_keep
    found = [numbers_of(kernel) - keep * old for kernel, old in zip(kernels, before, strict=True)]
    for variable, value in zip(model.weights, weights, strict=True):
        variable.assign(value)
    return found


def cosines(model, exact, x, y):
    """Mean cosine of each hidden layer over batches; `exact` learns by backpropagation."""
    for name in (*HIDDEN, "output"):
        for own in ("kernel", "bias"):
            exact.get_layer(name).synapses[own].assign(numbers_of(model.get_layer(name).synapses[own]))
    found = []
    for first in range(0, min(len(x), 8 * BATCH) - BATCH + 1, BATCH):
        batch = x[first : first + BATCH], y[first : first + BATCH]
        pairs = zip(changes(model, *batch), changes(exact, *batch), strict=True)
        found.append([np.vdot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)) for one, other in pairs])
    return np.mean(found, axis=0).tolist()


"""
## The experiment

Each arm chooses its rate by the error on a sixth of the images, which are held out of training,
after one pass over the others. Then it learns anew with every seed.
"""


def experiment(name, document, seeds, save):
    """Runs what a set's document lacks."""
    quick, images = _QUICK.value, load_images(name, _DATA_DIR.value)
    held = len(images.x_train) // 6
    train, valid = ((images.x_train[own], images.y_train[own]) for own in (slice(held, None), slice(held)))
    rates, epochs = (_RATES.value[-1:], 10) if quick else (_RATES.value, _EPOCHS.value)
    exact = network("backpropagation", 0.1, seeds[0], images)
    for arm in _ARMS.value or ARMS:
        own = document.setdefault(arm, {"valid": {}, "runs": []})
        models = {rate: network(arm, float(rate), seeds[0], images) for rate in rates}
        for rate in rates[len(rates) == 1 :]:
            if rate not in own["valid"]:
                learn(models[rate], *train, seeds[0], 0)
                own["valid"][rate] = error(models[rate], *valid)
                save()
        own["rate"] = min(rates, key=lambda rate, found=own["valid"]: found.get(rate, 0.0))
        if own["valid"]:
            found = ", ".join(f"{rate}: {value:.2f}" for rate, value in own["valid"].items())
            print(f"  {name}, {arm}: held-out error by rate, {found}", flush=True)
        model = models[own["rate"]]
        for seed in seeds[len(own["runs"]) :]:
            restart(model, arm, seed, images)
            curve = []
            for epoch in range(epochs):
                learn(model, *train, seed, epoch)
                curve.append(error(model, images.x_test, images.y_test))
            own["runs"].append({"error": curve, "cosine": cosines(model, exact, *valid)})
            save()
            print(f"  {name}, {arm}, seed {seed}: test error by epoch {np.round(curve, 2)}", flush=True)
        if "time" not in own:
            own["time"] = time_over(model, exact, images)
            save()


def time_over(model, exact, images):
    """Time of a step over that of backpropagation: the median over blocks of steps, which take
    turns."""
    blocks, size = (2, 2 * BATCH) if _QUICK.value else (25, 10 * BATCH)
    x, y, ratios = images.x_train[:size], images.y_train[:size], []
    for _ in range(1 + blocks):
        seconds = []
        for one in (model, exact):
            begin = time.perf_counter()
            one.fit(x, labels_for(one, y), batch_size=BATCH, verbose=0)
            seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[0] / seconds[1])
    return float(np.median(ratios[1:]))  # the first has the compilation


def saved():
    """What the file of numbers has, with the settings that they are from."""
    settings = {flag.name: flag.value for flag in (_QUICK, _SEED, _EPOCHS, _RATES, _MOMENTUM, _DECAY, _JIT)}
    try:
        return files.read_numbers(_JSON.value, settings)
    except ValueError as error:
        raise app.UsageError(f"--json: {error}") from error


def said(values, digits=2):
    """Mean and standard deviation."""
    return f"{np.mean(values):.{digits}f} +- {np.std(values, ddof=1):.{digits}f}"


def main(argv):
    """Runs each arm on each set, prints the numbers, and draws them."""
    del argv
    unknown = sorted(set(_ARMS.value or ()) - set(ARMS))
    if unknown:
        raise app.UsageError(f"--arms must be among {', '.join(ARMS)}. Received: {', '.join(unknown)}")
    seeds = range(_SEED.value, _SEED.value + (2 if _QUICK.value else _SEEDS.value))
    document = saved()

    def save():
        if _JSON.value:
            files.write_text(_JSON.value, json.dumps(document, indent=1) + "\n")

    for name in _DATA.value:
        experiment(name, document.setdefault(name, {}), seeds, save)
    print(f"seeds {seeds[0]} to {seeds[-1]}: rate, test error in percent, cosine with the change by backpropagation in "
          f"{', '.join(HIDDEN)}, time of a step over backpropagation's")  # fmt: skip
    for name in _DATA.value:
        for arm in _ARMS.value or ARMS:
            own = document[name][arm]
            runs = own["runs"][: len(seeds)]
            aligned = ", ".join(f"{value:.2f}" for value in np.mean([run["cosine"] for run in runs], axis=0))
            last = said([run["error"][-1] for run in runs])
            print(f"{name:<14} {arm:<16} {own['rate']:<5} {last:<15} {aligned:<23} {own['time']:.2f}")
    if _PLOT.value:
        draw({name: document[name] for name in _DATA.value})


def draw(document):
    """Test error by epoch on each set, and the cosines."""
    figure, axes = style.figure(columns=len(document) + 1, width=3.8)
    *errors, last = axes[0]
    for axis, (name, arms) in zip(errors, document.items(), strict=True):
        for index, (arm, own) in enumerate(arms.items()):
            values = np.array([run["error"] for run in own["runs"]])
            epochs = np.arange(1, values.shape[1] + 1)
            style.line(axis, index, epochs, values.mean(axis=0), arm, values.std(axis=0, ddof=1))
            axis.set_xticks(epochs)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("epoch")
        axis.set_ylabel("test error, percent")
    name, arms = next(iter(document.items()))
    for index, (arm, own) in enumerate(arms.items()):
        values = np.array([run["cosine"] for run in own["runs"]])
        style.line(last, index, np.arange(len(HIDDEN)), values.mean(axis=0), arm, values.std(axis=0, ddof=1))
    last.set_title(name, fontsize=9)
    last.set_xticks(range(len(HIDDEN)), HIDDEN, fontsize=7)
    last.set_ylabel("cosine with the change\nby backpropagation")
    style.legend(figure, last, columns=2 * len(document) + 2)
    style.save(figure, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
