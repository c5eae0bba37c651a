"""`keras-blur fit`: trains a network on images with a genome, and with tuned Keras optimizers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_blur import genomes
from keras_blur import layers as blur_layers
from keras_blur.cli.common import check_optimizers, define_data_flags, name_of, whole_numbers
from keras_blur.cli.flags import PICTURES, Flags, When
from keras_blur.cli.outputs import draft_json, interrupted, write_json, wrote
from keras_blur.core.genome import Genome
from keras_blur.files import save
from keras_blur.layers.base import numbers_of
from keras_blur.models import Sequential
from keras_blur.models.convert import copy_weights
from keras_blur.models.networks import activation_of, lenet_layers, mlp_layers
from keras_blur.report.baselines import GRIDS, optimizer_of
from keras_blur.report.scoring import score
from keras_blur.report.sources import STEPS
from keras_blur.tasks.datasets import Images, load_images

USAGE = "[flags]"
EXAMPLES = (
    "--plot fit.png",
    "--network lenet --data mnist --data_dir DIR --epochs 2 --json fit.json --save mnist.keras",
    "--genome backprop --learning_rate 0.1 --optimizers SGD",
)

NETWORKS = ("mlp", "lenet")

_HIDDEN = When("to --network mlp", lambda flag: flag["network"] == "mlp", ("network",))
_RATE = When(
    "to the backprop genome and to optimizers",
    lambda flag: flag["genome"] == "backprop" or bool(flag["optimizers"]),
    ("genome", "optimizers"),
)


def define_flags(flags: Flags) -> None:
    """Defines the command's flags."""
    flags.group("Data")
    define_data_flags(flags)
    flags.group("Learning")
    flags.string("genome", "fast", "'backprop', a name that keras-blur zoo lists, or a file.")
    flags.words("optimizers", ["SGD", "Adam"], "Keras optimizers to train as well; empty for none.")
    flags.choice("network", "mlp", NETWORKS, "Dense layers, or LeNet: two convolutions and three dense layers.")
    flags.words("hidden", ["256", "128"], "Units of the hidden layers.", when=[_HIDDEN])
    flags.integer("epochs", 5, "Passes over the training images.", least=1)
    flags.integer("batch_size", 32, "Images per batch.", least=1)
    flags.number(
        "learning_rate",
        None,
        "Learning rate of the backprop genome (default 0.1) and of the optimizers (default: a grid; "
        "the rate with the best final test accuracy is shown).",
        least=0.0,
        when=[_RATE],
    )
    flags.integer("seed", 0, "Random seed of weights and image order.", least=0)
    flags.group("Outputs")
    flags.output("json", None, "File for the numbers.", (".json",))
    flags.output("plot", None, "File for the learning curves.", PICTURES)
    flags.output("save", None, "File for the trained model.", (".keras",))


def build_pair(
    images: Images, genome: Genome, hidden: Sequence[int], network: str = "mlp"
) -> tuple[Sequential, keras.Sequential]:
    """A network that learns with the genome, and a Keras twin with the same initial weights."""

    def chain(kind: Any, inner: Any) -> list[Any]:
        shape = images.x_train.shape[1:]
        lenet = network == "lenet"
        own = lenet_layers(shape, images.classes, inner, kind) if lenet else mlp_layers(images.classes, hidden, inner, kind)
        return [keras.Input(shape), keras.layers.Rescaling(1 / images.scale), *own]

    twin = keras.Sequential(chain(keras.layers, activation_of(genome.rule.forward_activation)))
    model = Sequential(chain(blur_layers, None), genome=genome)
    copy_weights(twin, model)
    return model, twin


class _Curve(keras.callbacks.Callback):
    """Records test accuracy and seconds of learning after 0, 1, 2, 5, ... steps and each epoch.

    The first step includes compilation, so its time is replaced by the mean of the others.
    """

    def __init__(self, images: Images):
        super().__init__()
        self._images = images
        self._step, self._seconds = 0, 0.0
        self.steps: list[int] = []
        self.accuracy: list[float] = []
        self._after_first: list[float] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self._score()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._step:
            self._seconds += time.perf_counter() - self._begin
        self._step += 1
        if self._step in STEPS:
            self._score()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.steps[-1:] != [self._step]:
            self._score()

    def _score(self) -> None:
        self.steps.append(self._step)
        self.accuracy.append(score(self.model, self._images.x_test, self._images.y_test)[0])
        self._after_first.append(self._seconds)

    def result(self) -> dict[str, list[Any]]:
        """The steps, seconds and test accuracies."""
        first = self._seconds / max(self._step - 1, 1)
        seconds = [later + first if step else 0.0 for step, later in zip(self.steps, self._after_first, strict=True)]
        return {"steps": self.steps, "seconds": seconds, "accuracy": self.accuracy}


class _Tuned:
    """A Keras optimizer and its network, reset to the same state for each learning rate."""

    def __init__(self, twin: keras.Model, start: Sequence[np.ndarray], name: str, loss: keras.losses.Loss):
        self._optimizer, self._twin = optimizer_of(name), twin
        twin.compile(optimizer=self._optimizer, loss=loss, metrics=["accuracy"])
        weights = list(zip(twin.variables, start, strict=True))
        for variable, value in weights:  # an optimizer may start with a copy of the weights
            variable.assign(value)
        self._optimizer.build(twin.trainable_variables)
        self._start = [*weights, *((variable, numbers_of(variable)) for variable in self._optimizer.variables)]

    def begin(self, rate: float) -> keras.Model:
        """Resets the network and the optimizer, sets the learning rate, and returns the network."""
        for variable, value in self._start:
            variable.assign(value)
        self._optimizer.learning_rate = rate
        return self._twin


class _Fits:
    """Trains learners one after another until Ctrl-C, and keeps their results.

    The results so far are written to `--json` after each learner.

    Attributes:
        images: the image set.
        results: by learner: seconds, Keras's history, the curve, and `partial` if interrupted.
        shown: the learners that are reported: the genome and the best run of each optimizer.
        stopped: whether Ctrl-C was pressed.
    """

    def __init__(self, images: Images, flag: Mapping[str, Any], parameters: int):
        self.images, self._flag, self._parameters = images, flag, parameters
        self.results: dict[str, dict[str, Any]] = {}
        self.shown: list[str] = []
        self.stopped = False

    def document(self, partial: bool) -> dict[str, Any]:
        """What `--json` holds."""
        found = {"flags": self._flag, "parameters": self._parameters, "shown": self.shown, "results": self.results}
        return {**found, "partial": True} if partial else found

    def learn(self, learner: keras.Model, name: str, verbose: str | int) -> None:
        """Trains one learner."""
        keras.utils.set_random_seed(self._flag["seed"])  # the same order of images for all
        images, log, curve = self.images, keras.callbacks.History(), _Curve(self.images)
        began = time.perf_counter()
        try:
            learner.fit(
                images.x_train, images.y_train, batch_size=self._flag["batch_size"], epochs=self._flag["epochs"],
                validation_data=(images.x_test, images.y_test), callbacks=[log, curve], verbose=verbose,
            )  # fmt: skip
        except KeyboardInterrupt:
            self.stopped = True
        self.results[name] = {
            "seconds": time.perf_counter() - began,
            "history": {key: [float(value) for value in values] for key, values in log.history.items()},
            "curve": curve.result(),
        }
        if self.stopped:
            self.results[name]["partial"] = True
        if self._flag["json"]:
            draft_json(self._flag["json"], self.document(partial=True))

    def tune(self, tuned: _Tuned, optimizer: str, rates: Sequence[float]) -> None:
        """Trains with an optimizer at each rate, and shows the run with the best end."""
        names: list[str] = []
        for rate in rates:
            names.append(f"Keras {optimizer} {rate:g}")
            self.learn(tuned.begin(rate), names[-1], 0)
            if self.stopped:
                break
            print(f"  learning rate {rate:<8g} test accuracy {_last(self.results[names[-1]]):.4f}", flush=True)
        ended = [name for name in names if "partial" not in self.results[name]]
        self.shown.append(max(ended or names, key=lambda name: _last(self.results[name])))


def run(flag: Mapping[str, Any], positional: Sequence[str]) -> int:
    """Trains, prints and writes the results. Ctrl-C ends training and keeps what was learned."""
    del positional
    rate = flag["learning_rate"]
    if rate is not None and rate <= 0:
        raise ValueError(f"--learning_rate must be above 0. Received: --learning_rate={rate}")
    check_optimizers(flag["optimizers"])
    hidden = whole_numbers("hidden", flag["hidden"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if flag["genome"] == "backprop":
        genome = genomes.backprop(0.1 if rate is None else rate, "tanh", loss=loss)
    else:
        genome = genomes.load(flag["genome"])
    images = load_images(flag["data"], flag["data_dir"])
    print(f"{images.name}: {len(images.x_train)} training images of {'x'.join(map(str, images.x_train.shape[1:]))}, "
          f"{len(images.x_test)} test images, {images.classes} classes")  # fmt: skip

    keras.utils.set_random_seed(flag["seed"])
    model, twin = build_pair(images, genome, hidden, flag["network"])
    start = [numbers_of(variable) for variable in twin.variables]
    model.compile(loss=loss, metrics=["accuracy"])
    fits, ours = _Fits(images, flag, model.count_params()), f"genome {name_of(flag['genome'])}"
    print(f"\n{ours}", flush=True)
    fits.shown.append(ours)
    fits.learn(model, ours, "auto")
    if flag["save"]:
        save(model, flag["save"])
        wrote(flag["save"])
    for optimizer in flag["optimizers"]:
        if fits.stopped:
            break
        print(f"\nKeras {optimizer}", flush=True)
        rates = GRIDS[optimizer] if rate is None else (rate,)
        fits.tune(_Tuned(twin, start, optimizer, loss), optimizer, rates)
    return _write(fits, flag)


def _write(fits: _Fits, flag: Mapping[str, Any]) -> int:
    """Prints the final accuracies, writes the numbers and draws. Returns the exit status."""
    results = fits.results
    print()
    for name in fits.shown:
        done = len(results[name]["history"].get("loss", ()))
        epochs = f"  after {done} of {flag['epochs']} epochs" if "partial" in results[name] else ""
        if done:
            print(f"{name:<24} test accuracy {_last(results[name]):.4f}  {results[name]['seconds']:.1f} s{epochs}")
    drawn = {name: results[name]["curve"] for name in fits.shown if results[name]["curve"]["steps"]}
    if flag["json"]:
        write_json(flag["json"], fits.document(partial=fits.stopped))
    if flag["plot"] and drawn:
        from keras_blur.report.learning import plot_fits

        shape = "LeNet" if flag["network"] == "lenet" else f"hidden {','.join(flag['hidden'])}"
        plot_fits(drawn, flag["plot"], f"{fits.images.name}, {shape}, batches of {flag['batch_size']}")
        wrote(flag["plot"])
    return interrupted("no output file was asked for") if fits.stopped else 0


def _last(result: Mapping[str, Any]) -> float:
    """The final test accuracy, or minus infinity."""
    return float(result["history"].get("val_accuracy", [-math.inf])[-1])
