"""
Title: Labels with mistakes in them
Description: Weights of examples, learned from a few clean ones while a network trains:
Meta-Weight-Net, FaMUS and EvoGrad.
Source: "Meta-Weight-Net" (Shu et al., NeurIPS 2019); "Faster Meta Update Strategy for Noise-Robust
Deep Learning" (Xu et al., CVPR 2021).

    python examples/noisy_labels.py [--quick] [--plot FILE.png] [--json FILE] [--data fashion_mnist]
        [--data_dir DIR] [--noise 0.6] [--seeds 3] [--seed 0] [--arms ...]
"""

import json
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags
from keras import ops

from keras_blur import bilevel, files, tasks
from keras_blur.report import style
from keras_blur.tasks.datasets import load_images

_QUICK = flags.DEFINE_boolean("quick", False, "Small numbers everywhere.")
_PLOT = flags.DEFINE_string("plot", None, "File for the picture.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_DATA = flags.DEFINE_string("data", "gaussian", "'gaussian', or an image set such as fashion_mnist.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets.")
_NOISE = flags.DEFINE_list("noise", ["0.6"], "Fractions of labels that are redrawn.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
_ARMS = flags.DEFINE_list("arms", [], "Names of the arms; all by default.")

"""
## The data

The data are ten Gaussian classes in 32 dimensions. Six tenths of the labels of 11,000 examples are
redrawn. 10,000 of these examples are for training. 1,000 are held out for early stopping, with
their noisy labels. A hundred more examples have known correct labels. Images are used in the same
way, with a thousand clean ones. A network can memorise wrong labels, so its accuracy falls when
training continues for too long. Test data are not used for any choice.
"""


def data(seed):
    """Noisy training inputs and true labels, held-back ones, clean meta data, test data."""
    if _DATA.value == "gaussian":
        rng = np.random.default_rng(seed)
        centres = 0.75 * rng.standard_normal((10, 32))

        def draw(count):
            labels = rng.integers(0, 10, count)
            return (centres[labels] + rng.standard_normal((count, 32))).astype("float32"), labels

        return draw(10000), draw(1000), draw(100), draw(5000)
    images = load_images(_DATA.value, _DATA_DIR.value)
    x, x_test = (part.astype("float32") / images.scale for part in (images.x_train, images.x_test))
    order = np.random.default_rng(seed).permutation(len(x))
    train = min(10000, len(x) * 4 // 5)
    few = min(1000, (len(x) - train) // 2)
    parts = np.split(order[: train + 2 * few], [train, train + few])
    return *((x[part], images.y_train[part]) for part in parts), (x_test, images.y_test)


class Batches(keras.utils.PyDataset):
    """The batches of some epochs. Their order follows from seed and epoch and is the same for all
    arms."""

    def __init__(self, x, y, size, epochs, seed):
        super().__init__()
        self._x, self._y, steps = x, y, len(x) // size
        order = [np.random.default_rng([seed, epoch]).permutation(len(x))[: steps * size] for epoch in epochs]
        self._order = np.concatenate(order).reshape(-1, size)

    @property
    def num_batches(self):
        return len(self._order)

    def __getitem__(self, number):
        return self._x[self._order[number]], self._y[self._order[number]]


def network(shape, seed):
    """Four hidden layers of 64 units, or for images two convolutions and one such layer."""
    init = iter(keras.initializers.GlorotUniform(1000 * seed + index) for index in range(9))
    dense, conv, pool = keras.layers.Dense, keras.layers.Conv2D, keras.layers.MaxPooling2D
    if len(shape) == 1:
        inner = [dense(64, "relu", kernel_initializer=next(init)) for _ in range(4)]
    else:
        inner = [conv(16, 3, activation="relu", kernel_initializer=next(init)), pool(2),
                 conv(32, 3, activation="relu", kernel_initializer=next(init)), pool(2) if shape[0] > 8 else pool(1),
                 keras.layers.Flatten(), dense(64, "relu", kernel_initializer=next(init))]  # fmt: skip
    return keras.Sequential([keras.Input(shape), *inner, dense(10, kernel_initializer=next(init))])


"""
## The arms

Meta-Weight-Net takes the exact gradient of the weights through one step; FaMUS only the parts of
some layers, the last two or those that a sampler picks; EvoGrad no second derivative. Cross-entropy
is Keras's own `fit` on the noisy labels. "Clean data alone" is the same on the clean examples,
which the other arms have too, for as many steps. The last arm has no clean data: the network learns
by cross-entropy for two epochs, and then the examples whose loss belongs to the lower of two
mixture components take their place. All arms have the same initial weights and the same optimizer,
and see the noisy batches in the same order.
"""

ARMS = {
    "cross-entropy": None,
    "clean data alone": None,
    "Meta-Weight-Net": bilevel.OneStep(),
    "FaMUS cut": bilevel.LayerwiseMetaGradient("last:2"),
    "FaMUS sampler": bilevel.LayerwiseMetaGradient(None, bilevel.GradientSampler(target=2)),
    "EvoGrad": bilevel.EvoGrad(),
    "FaMUS without clean data": bilevel.LayerwiseMetaGradient("last:2"),
}


class Followed(keras.callbacks.Callback):
    """Accuracy by epoch on test data and on those that are held back, and the seconds of each
    step."""

    def __init__(self, network, test, held):
        super().__init__()
        self.network, self.sets = network, {"test": test, "held": held}
        self.curves, self.steps = {"test": [], "held": []}, []

    def on_train_batch_begin(self, batch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(time.perf_counter() - self._begin)

    def on_epoch_end(self, epoch, logs=None):
        for name, (x, y) in self.sets.items():
            found = self.network.predict(x, batch_size=500, verbose=0).argmax(axis=1)
            self.curves[name].append(float(np.mean(found == y)))


def run(name, noise, seed):
    """Test accuracy by epoch, final weights of examples with correct and wrong labels, and time per
    step."""
    (x, truth), (x_held, truth_held), clean, test = data(seed)
    noisy = tasks.noisy_labels(np.concatenate([truth, truth_held]), 10, noise, seed=seed)
    y, held = noisy[: len(x)], (x_held, noisy[len(x) :])
    epochs, size = (2 if _QUICK.value else 25), 100
    steps = len(x) // size
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model, estimator, plain = network(x.shape[1:], seed), ARMS[name], 0
    followed = Followed(model, test, held)

    def optimizer():
        return keras.optimizers.SGD(0.02, momentum=0.9, global_clipnorm=1.0)

    # On TensorFlow all arms are its graph: XLA cannot compile a sampler's step, and is slow with
    # convolutions on a CPU.
    if estimator is None or name.endswith("without clean data"):
        plain = epochs if estimator is None else min(2, epochs - 1)
        own = Batches(*clean, len(clean[0]), range(epochs * steps), seed) if name == "clean data alone" else None
        model.compile(optimizer(), loss, jit_compile=False)
        model.fit(
            own or Batches(x, y, size, range(plain), seed), epochs=plain, steps_per_epoch=steps, callbacks=[followed],
            shuffle=False, verbose=0,
        )  # fmt: skip
    result = {}
    if estimator:
        if plain:
            chosen = bilevel.PseudoCleanSplit(seed=seed).split(model, x, y, loss)
            clean = (x[chosen], y[chosen])
            result = {"taken": float(np.mean(chosen)), "taken correct": float(np.mean((y == truth)[chosen]))}
            followed.steps = []
        trainer = bilevel.BilevelTrainer(model, bilevel.SampleWeightNet(seed=seed), estimator, seed=seed)
        trainer.compile(optimizer(), keras.optimizers.Adam(3e-4), loss, jit_compile=False)
        history = trainer.fit(
            Batches(x, y, size, range(plain, epochs), seed), meta_data=clean, meta_batch_size=size, steps_per_epoch=steps,
            epochs=epochs - plain, callbacks=[followed], verbose=0,
        ).history  # fmt: skip
        each = loss.call(y, model.predict(x, batch_size=500, verbose=0))
        weights, correct = ops.convert_to_numpy(trainer.learned(each)), y == truth
        result |= {"correct": weights[correct].tolist(), "wrong": weights[~correct].tolist()}
        result["skipped"] = float(np.mean(history["skipped"]))
    curve, choice = followed.curves["test"], int(np.argmax(followed.curves["held"]))
    # The first steps compile, so they do not count.
    seconds = float(np.median(followed.steps[len(followed.steps) // 20 + 1 :]))
    return {**result, "last": float(np.mean(curve[-3:])), "chosen": curve[choice], "epoch": choice + 1, **followed.curves,
            "seconds": seconds}  # fmt: skip


def said(values):
    """Mean and standard deviation."""
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}"


def main(argv):
    """Runs the arms, prints their numbers, and draws them."""
    del argv
    document, count = {}, 2 if _QUICK.value else _SEEDS.value
    seeds = range(_SEED.value, _SEED.value + count)
    unknown = set(_ARMS.value) - set(ARMS)
    if unknown:
        raise app.UsageError(f"--arms must be some of {', '.join(ARMS)}. Received: {', '.join(unknown)}")
    if _PLOT.value and not any(ARMS[name] for name in _ARMS.value or ARMS):
        raise app.UsageError(f"--plot needs an arm in --arms that learns weights. Received: {', '.join(_ARMS.value)}")
    for noise in map(float, _NOISE.value):
        print(f"{_DATA.value}, {noise:.0%} of the labels drawn anew; seeds {seeds[0]} to {seeds[-1]}")
        print("  test accuracy: last (mean of three epochs), and at the epoch that is best on the held-back noisy labels;")
        print("  correct over wrong weight; time of a step over the first arm's")
        found = document[f"{noise:g}"] = {name: [] for name in _ARMS.value or ARMS}
        for seed in seeds:  # arms in turn, so that they meet the same load of the machine
            for name, runs in found.items():
                runs.append(run(name, noise, seed))
        base = next(iter(found.values()))
        for name, runs in found.items():
            ratio = [np.mean(one["correct"]) / np.mean(one["wrong"]) for one in runs if "correct" in one]
            times = np.median([one["seconds"] / other["seconds"] for one, other in zip(runs, base, strict=True)])
            columns = [said([one[key] for one in runs]) for key in ("last", "chosen")]
            print(f"  {name:<24} {'   '.join(columns)}   {said(ratio) if ratio else '':<18} {times:.2f}", flush=True)
            if "taken" in runs[0]:
                fractions = [said([one[key] for one in runs]) for key in ("taken", "taken correct")]
                print(f"    taken as clean: {fractions[0]} of all, of these correct {fractions[1]}")
    if _JSON.value:
        files.write_text(_JSON.value, json.dumps(document, indent=1) + "\n")
    if _PLOT.value:
        draw(next(iter(document.values())))


def draw(arms):
    """Draws test accuracy by epoch, and histograms of Meta-Weight-Net's weights of correct and
    wrong labels."""
    figure, axes = style.figure(columns=2, width=4.5)
    for index, (name, runs) in enumerate(arms.items()):
        curves = np.array([one["test"] for one in runs])
        epochs = np.arange(1, curves.shape[1] + 1)
        style.line(axes[0][0], index, epochs, curves.mean(axis=0), name, curves.std(axis=0, ddof=1))
    axes[0][0].set_xlabel("epoch")
    axes[0][0].set_ylabel("test accuracy")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    shown, runs = next((name, runs) for name, runs in arms.items() if "correct" in runs[0])
    edges = np.linspace(0.0, max(max(runs[0]["correct"]), max(runs[0]["wrong"])), 40)
    for index, key in enumerate(("correct", "wrong")):
        axes[0][1].hist(runs[0][key], edges, color=style.COLOURS[index], alpha=0.6, label=f"label {key}", density=True)
    axes[0][1].set_xlabel(f"weight, {shown}")
    axes[0][1].set_ylabel("density")
    axes[0][1].legend(fontsize=8)
    style.save(figure, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
