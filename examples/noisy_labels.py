"""
Title: Labels with mistakes in them
Description: Weights of examples, learned from a few clean ones while a network trains: Meta-Weight-Net, FaMUS and EvoGrad.
Source: "Meta-Weight-Net" (Shu et al., NeurIPS 2019); "Faster Meta Update Strategy for Noise-Robust Deep Learning" (Xu et
al., CVPR 2021).

    python examples/noisy_labels.py [--quick] [--plot FILE.png] [--json FILE] [--data fashion_mnist] [--data_dir DIR]
        [--noise 0.6] [--seeds 3] [--arms ...]
"""

import json
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags

from keras_blur import files, meta, tasks
from keras_blur.report import style
from keras_blur.tasks.datasets import load_images

_QUICK = flags.DEFINE_boolean("quick", False, "Small numbers everywhere.")
_PLOT = flags.DEFINE_string("plot", None, "File for the picture.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_DATA = flags.DEFINE_string("data", "gaussian", "'gaussian', or an image set such as fashion_mnist.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets.")
_NOISE = flags.DEFINE_list("noise", ["0.6"], "Shares of labels that are drawn anew.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm.", lower_bound=2)
_ARMS = flags.DEFINE_list("arms", [], "Names of the arms; all by default.")

"""
## The data

Ten Gaussian classes in 32 dimensions, whose labels are drawn anew for six tenths of 10,000 examples; a hundred examples are
known to be right. Or images, of which ten thousand are used and a thousand are clean. A network can learn the mistakes by
heart: its last accuracy falls below its best one. All arms start from the same weights and see the same batches.
"""


def data(seed):
    """Training inputs and true labels, clean meta data, test data."""
    if _DATA.value == "gaussian":
        rng = np.random.default_rng(seed)
        centres = 0.75 * rng.standard_normal((10, 32))

        def draw(count):
            labels = rng.integers(0, 10, count)
            return (centres[labels] + rng.standard_normal((count, 32))).astype("float32"), labels

        return draw(10000), draw(100), draw(5000)
    images = load_images(_DATA.value, _DATA_DIR.value)
    x, x_test = (part.astype("float32") / images.scale for part in (images.x_train, images.x_test))
    order = np.random.default_rng(seed).permutation(len(x))
    train = min(10000, len(x) * 4 // 5)
    chosen, clean = order[:train], order[train : train + min(1000, len(x) - train)]
    return (x[chosen], images.y_train[chosen]), (x[clean], images.y_train[clean]), (x_test, images.y_test)


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

Meta-Weight-Net takes the exact gradient of the weights through one step; FaMUS only the parts of some layers, the last two
or those that a sampler picks; EvoGrad no second derivative. Cross-entropy gives all examples the weight 1: the same trainer,
in which the turn of the weights never comes. The last arm has no clean data: the network learns plainly for two epochs, and
examples whose loss is by then in the lower of two heaps take their place.
"""

ARMS = {
    "cross-entropy": None,
    "Meta-Weight-Net": meta.OneStep(),
    "FaMUS cut": meta.LayerwiseMetaGradient("last:2"),
    "FaMUS sampler": meta.LayerwiseMetaGradient(None, meta.GradientSampler(target=2)),
    "EvoGrad": meta.EvoGrad(),
    "FaMUS without clean data": meta.LayerwiseMetaGradient("last:2"),
}


class Timed(keras.callbacks.Callback):
    """Seconds of the median step; the first ones, of which one compiles, do not count."""

    def on_train_begin(self, logs=None):
        self.steps = []

    def on_train_batch_begin(self, batch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(time.perf_counter() - self._begin)

    @property
    def seconds(self):
        return float(np.median(self.steps[len(self.steps) // 20 + 1 :]))


def run(name, noise, seed):
    """Test accuracy by epoch, the weights of right and wrong examples at the end, and the time of an epoch."""
    (x, truth), clean, test = data(seed)
    y = tasks.noisy_labels(truth, 10, noise, seed=seed)
    epochs, batch = (2 if _QUICK.value else 25), 100
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model, estimator, timed = network(x.shape[1:], seed), ARMS[name], Timed()

    def train(estimator, meta_data, epochs, callbacks=()):
        trainer = meta.BilevelTrainer(model, meta.SampleWeightNet(seed=seed), estimator or meta.OneStep(), seed=seed)
        optimizer = keras.optimizers.SGD(0.02, momentum=0.9, global_clipnorm=1.0)
        # All arms as TensorFlow's graph: a sampler's step is not compiled by XLA, which makes convolutions slow on a CPU.
        meta_optimizer = keras.optimizers.Adam(3e-4 if estimator else 0.0)
        trainer.compile(optimizer, meta_optimizer, loss, ["accuracy"], jit_compile=False)
        history = trainer.fit(
            x, y, meta_data=meta_data, batch_size=batch, epochs=epochs, meta_every=1 if estimator else 10**9,
            validation_data=test, callbacks=callbacks, verbose=0,
        ).history  # fmt: skip
        return trainer, history["val_accuracy"], history["skipped"]

    before = []
    if name.endswith("without clean data"):
        _, before, _ = train(None, (x, y), 1 if _QUICK.value else 2)
        chosen = meta.PseudoCleanSplit(seed=seed).split(model, x, y, loss)
        clean = (x[chosen], y[chosen])
    trainer, curve, skipped = train(estimator, clean, epochs - len(before), [timed])
    curve = before + curve
    result = {}
    if estimator:
        each = loss.call(y, model.predict(x, batch_size=500, verbose=0))
        weights, right = trainer.learned(each).numpy(), y == truth
        result = {"right": weights[right].tolist(), "wrong": weights[~right].tolist()}
        result["skipped"] = float(np.mean(skipped))
    if before:
        result |= {"taken": float(np.mean(chosen)), "taken right": float(np.mean((y == truth)[chosen]))}
    last = float(np.mean(curve[-3:]))
    return {**result, "last": last, "best": max(curve), "curve": curve, "seconds": timed.seconds}


def said(values):
    """Mean and standard deviation."""
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}"


def main(argv):
    """Runs the arms, prints their numbers, and draws them."""
    del argv
    document, seeds = {}, 2 if _QUICK.value else _SEEDS.value
    unknown = set(_ARMS.value) - set(ARMS)
    if unknown:
        raise app.UsageError(f"--arms must be some of {', '.join(ARMS)}. Received: {', '.join(unknown)}")
    for noise in map(float, _NOISE.value):
        print(f"{_DATA.value}, {noise:.0%} of the labels drawn anew; {seeds} seeds")
        print("  last accuracy (mean of three epochs), best, right over wrong weight, time of a step over the first's")
        found = document[f"{noise:g}"] = {name: [] for name in _ARMS.value or ARMS}
        for seed in range(seeds):  # arms in turn, so that they meet the same load of the machine
            for name, runs in found.items():
                runs.append(run(name, noise, seed))
        base = next(iter(found.values()))
        for name, runs in found.items():
            ratio = [np.mean(one["right"]) / np.mean(one["wrong"]) for one in runs if "right" in one]
            times = np.median([one["seconds"] / other["seconds"] for one, other in zip(runs, base, strict=True)])
            columns = [said([one[key] for one in runs]) for key in ("last", "best")]
            print(f"  {name:<24} {'   '.join(columns)}   {said(ratio) if ratio else '':<18} {times:.2f}", flush=True)
            if "taken" in runs[0]:
                shares = [said([one[key] for one in runs]) for key in ("taken", "taken right")]
                print(f"    taken as clean: {shares[0]} of all, of these right {shares[1]}")
    if _JSON.value:
        files.write_text(_JSON.value, json.dumps(document, indent=1) + "\n")
    if _PLOT.value:
        draw(next(iter(document.values())))


def draw(arms):
    """Test accuracy by epoch; histograms of the weights that Meta-Weight-Net gives to right and wrong examples."""
    figure, axes = style.figure(columns=2, width=4.5)
    for index, (name, runs) in enumerate(arms.items()):
        curves = np.array([one["curve"] for one in runs])
        epochs = np.arange(1, curves.shape[1] + 1)
        style.line(axes[0][0], index, epochs, curves.mean(axis=0), name, curves.std(axis=0, ddof=1))
    axes[0][0].set_xlabel("epoch")
    axes[0][0].set_ylabel("test accuracy")
    axes[0][0].legend(fontsize=7)
    shown, runs = next((name, runs) for name, runs in arms.items() if "right" in runs[0])
    edges = np.linspace(0.0, max(max(runs[0]["right"]), max(runs[0]["wrong"])), 40)
    for index, key in enumerate(("right", "wrong")):
        axes[0][1].hist(runs[0][key], edges, color=style.COLOURS[index], alpha=0.6, label=f"label {key}", density=True)
    axes[0][1].set_xlabel(f"weight, {shown}")
    axes[0][1].set_ylabel("density")
    axes[0][1].legend(fontsize=8)
    style.save(figure, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
