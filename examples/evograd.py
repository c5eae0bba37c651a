"""
Title: Hyperparameters by a step of evolution
Description: EvoGrad learns how training images should be rotated, with first derivatives only.
Source: "EvoGrad: Efficient Gradient-Based Meta-Learning and Hyperparameter Optimization" (Bohdal et
al., NeurIPS 2021).

    python examples/evograd.py [--quick] [--part line|rotation ...] [--plot FILE.png] [--json FILE]
        [--data mnist] [--data_dir DIR] [--seeds 5] [--seed 0] [--epochs 5]
"""

import json
import math
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags
from keras import ops

from keras_blur import bilevel, files, random
from keras_blur.backend import compiled, one_by_one
from keras_blur.bilevel.hypergradient import Bilevel
from keras_blur.bilevel.training_losses import rotated
from keras_blur.report import style
from keras_blur.tasks.datasets import load_images

_QUICK = flags.DEFINE_boolean("quick", False, "Small numbers everywhere.")
_PART = flags.DEFINE_multi_enum("part", None, ["line", "rotation"], "What to run; all by default.")
_PLOT = flags.DEFINE_string("plot", None, "File for the picture.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_DATA = flags.DEFINE_string("data", "digits", "Image set of the rotation, such as mnist.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds of the line, and of each arm of the rotation.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
_EPOCHS = flags.DEFINE_integer("epochs", 5, "Passes over the training images; of the digits ten times as many.")

"""
## A line

A number x is trained by (x - 1)^2 + lambda x^2 and judged by (x - 1/2)^2. Trained to the end, x is
1 / (1 + lambda), so the derivative of the judgement by lambda is known. EvoGrad sees candidates
around an x that was drawn at random, their losses, and nothing else. Its estimates are noisy, and
biased since x is not where training ends; their mean should still point the right way.
"""


POPULATIONS = (2, 10, 100)


def line(trials, populations, seeds):
    """By seed, the quality of the mean over trials for each size of the population."""
    rates = np.linspace(0.1, 2.0, 100).astype("float32")
    truth = (rates - 1.0) / (rates + 1.0) ** 3
    found = [{"truth": truth.tolist(), "lambda": rates.tolist()} for _ in seeds]
    for population in populations:
        estimator = bilevel.EvoGrad(population, sigma=1.0, temperature=0.5, noise="normal")

        def estimate(number, seed, estimator=estimator):
            own = random.fold_in(seed, number)
            problem = Bilevel(
                lambda outer, weights: (weights["x"] - 1.0) ** 2 + outer["rate"] * weights["x"] ** 2,
                lambda weights: (weights["x"] - 0.5) ** 2, {"line": ("x",)},
            )  # fmt: skip
            outer = {"rate": ops.take(ops.convert_to_tensor(rates), number % len(rates))}
            start = random.normal(random.fold_in(own, 1_000_000), ())
            return estimator.estimate(problem, outer, {"x": start}, ops.ones(()), own, {})[0].gradients["rate"]

        count = trials * len(rates)

        @compiled
        def run(numbers, seed, one=estimate):
            return one_by_one(lambda number: one(number, seed), numbers, ops.zeros(()))

        for own, seed in zip(found, seeds, strict=True):
            drawn = ops.convert_to_numpy(run(ops.arange(count, dtype="int32"), random.seed_of(seed)))
            drawn = drawn.reshape(trials, len(rates))
            mean = drawn.mean(axis=0)
            own[str(population)] = {
                "error": float(np.sqrt(np.mean((mean - truth) ** 2))), "deviation": float(drawn.std(axis=0, ddof=1).mean()),
                "correlation": float(np.corrcoef(mean, truth)[0, 1]), "signs": float(np.mean((mean > 0) == (truth > 0))),
                "mean": mean.tolist(),
            }  # fmt: skip
    return found


"""
## A rotation

Training images are upright; those for validation and for testing are rotated by 30 degrees. The
network sees training images through a rotation by a learned angle, 0 at first, which changes so
that the loss on validation images would fall. A second arm learns the angle by the exact gradient
through one step of SGD. The third has no rotation: it is Keras's own `fit`. All see the same
batches in the same order.
"""

ANGLE = 30.0


def network(shape, classes, seed):
    """LeNet, or for small images a network with smaller filters."""
    init = [keras.initializers.GlorotUniform(1000 * seed + index) for index in range(5)]
    conv, dense = keras.layers.Conv2D, keras.layers.Dense
    if shape[0] < 20:
        front = [conv(16, 3, activation="relu", kernel_initializer=init[0]), keras.layers.MaxPooling2D(2)]
    else:
        front = [conv(6, 5, padding="same", activation="relu", kernel_initializer=init[0]), keras.layers.MaxPooling2D(2),
                 conv(16, 5, activation="relu", kernel_initializer=init[1]), keras.layers.MaxPooling2D(2)]  # fmt: skip
    return keras.Sequential(
        [keras.Input(shape), *front, keras.layers.Flatten(), dense(120, "relu", kernel_initializer=init[2]),
         dense(84, "relu", kernel_initializer=init[3]), dense(classes, kernel_initializer=init[4])]
    )  # fmt: skip


class Batches(keras.utils.PyDataset):
    """Endless batches. The order of each pass follows from the seed, the same for all arms."""

    num_batches = None

    def __init__(self, x, y, size, passes, seed):
        super().__init__()
        self._x, self._y, steps = x, y, len(x) // size
        order = [np.random.default_rng([seed, number]).permutation(len(x))[: steps * size] for number in range(passes)]
        self._order = np.concatenate(order).reshape(-1, size)

    def __getitem__(self, number):
        chosen = self._order[number % len(self._order)]
        return self._x[chosen], self._y[chosen]


def turned(images):
    """Images rotated by 30 degrees."""
    parts = [rotated(ops.convert_to_tensor(part), math.radians(ANGLE)) for part in np.array_split(images, 8)]
    return np.concatenate([ops.convert_to_numpy(part) for part in parts])


class Angles(keras.callbacks.Callback):
    """The learned angle after each epoch."""

    def __init__(self):
        super().__init__()
        self.values = [0.0]

    def on_epoch_end(self, epoch, logs=None):
        self.values.append(float(self.model.learned.read()["degrees"]))


def rotation(seeds):
    """Accuracy on rotated test images by arm and seed."""
    quick, images = _QUICK.value, load_images(_DATA.value, _DATA_DIR.value)
    x, x_test = (part.astype("float32") / images.scale for part in (images.x_train, images.x_test))
    y, held = images.y_train, len(x) // 5 if len(x) < 10000 else 10000
    x_valid, x_turned = turned(x[-held:]), turned(x_test)
    epochs = 2 if quick else _EPOCHS.value * (10 if _DATA.value == "digits" else 1)
    loss, batch = keras.losses.SparseCategoricalCrossentropy(from_logits=True), 128
    steps = (len(x) - held) // batch
    arms = {"no rotation": None, "EvoGrad": bilevel.EvoGrad(), "exact one-step": bilevel.OneStep()}
    found = {name: [] for name in arms}
    for seed in seeds:
        for name, estimator in arms.items():
            model, angles = network(x.shape[1:], images.classes, seed), Angles()
            train = Batches(x[:-held], y[:-held], batch, epochs, seed)
            how = {"steps_per_epoch": steps, "epochs": epochs, "verbose": 0}
            trainer = bilevel.BilevelTrainer(model, bilevel.LearnedRotation(), estimator, first="model", seed=seed)
            if estimator:
                trainer.compile(keras.optimizers.Adam(1e-3), keras.optimizers.Adam(1e-2), loss)
                how |= {"meta_data": (x_valid, y[-held:]), "meta_batch_size": batch, "callbacks": [angles]}
            model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"], jit_compile=True)
            begin = time.perf_counter()
            if estimator:
                trainer.fit(train, **how)
            else:
                model.fit(train, shuffle=False, **how)
            seconds = time.perf_counter() - begin
            accuracy = {
                key: model.evaluate(test, images.y_test, batch_size=500, verbose=0, return_dict=True)["accuracy"]
                for key, test in (("rotated", x_turned), ("upright", x_test))
            }
            found[name].append({**accuracy, "angles": angles.values, "seconds": seconds})
            print(f"  seed {seed} {name:<16} {accuracy} {angles.values[-1]:.1f} degrees {seconds:.0f} s", flush=True)
    return found


def said(values):
    """Mean and standard deviation."""
    return f"{np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}"


def main(argv):
    """Runs the parts, prints their numbers, and draws them."""
    del argv
    parts, document = _PART.value or ["line", "rotation"], {}
    seeds = range(_SEED.value, _SEED.value + (2 if _QUICK.value else _SEEDS.value))
    if "line" in parts:
        quick = _QUICK.value
        how = (3, POPULATIONS[:2]) if quick else (100, POPULATIONS)
        document["line"] = line(*how, seeds)
        print(f"line, seeds {seeds[0]} to {seeds[-1]}: error of the mean of {how[0]} trials, deviation of one estimate, "
              "correlation, fraction of correct signs")  # fmt: skip
        for name in map(str, how[1]):
            columns = [said([one[name][key] for one in document["line"]])
                       for key in ("error", "deviation", "correlation", "signs")]  # fmt: skip
            print(f"  K = {name:<4} {'   '.join(columns)}", flush=True)
    if "rotation" in parts:
        runs = document["rotation"] = rotation(seeds)
        print(
            f"{_DATA.value}: accuracy on rotated test images, on upright ones, learned angle, time over that of no rotation"
        )
        for name, own in runs.items():
            columns = [said([run[key] for run in own]) for key in ("rotated", "upright")]
            ratio = np.median(
                [run["seconds"] / other["seconds"] for run, other in zip(own, runs["no rotation"], strict=True)]
            )
            print(f"  {name:<16} {'   '.join(columns)}   {said([run['angles'][-1] for run in own])}   {ratio:.2f}")
    if _JSON.value:
        files.write_text(_JSON.value, json.dumps(document, indent=1) + "\n")
    if _PLOT.value:
        draw(document)


def draw(document):
    """Estimates on the line beside the truth; the learned angle over time."""
    figure, axes = style.figure(columns=len(document), width=4.5)
    for axis, (part, found) in zip(axes[0], document.items(), strict=True):
        if part == "line":
            rates, truth = (np.array(found[0][key]) for key in ("lambda", "truth"))
            style.line(axis, 6, rates, truth, "true derivative")
            for index, name in enumerate(one for one in found[0] if one not in ("truth", "lambda")):
                means = np.array([one[name]["mean"] for one in found])
                style.line(axis, index, rates, means.mean(axis=0), f"EvoGrad, K = {name}", means.std(axis=0, ddof=1))
            axis.set_xlabel("lambda")
            axis.set_ylabel("derivative, mean of the trials")
        else:
            for index, name in enumerate(("EvoGrad", "exact one-step")):
                angles = np.array([run["angles"] for run in found[name]])
                epochs = np.arange(angles.shape[1])
                style.line(axis, index, epochs, angles.mean(axis=0), name, angles.std(axis=0, ddof=1))
            axis.axhline(ANGLE, color="black", linewidth=0.8, linestyle=":")
            axis.set_xlabel("epoch")
            axis.set_ylabel("learned angle, degrees")
        axis.legend(fontsize=8)
    style.save(figure, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
