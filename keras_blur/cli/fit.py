"""`keras-blur fit`: a network learns images by a genome, beside a Keras twin that learns by SGD."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import keras
from absl import flags

from keras_blur import genomes
from keras_blur.cli.common import check_folders, define_data_flags, values_of, whole_numbers
from keras_blur.conversion import copy_kernels
from keras_blur.files import write_text
from keras_blur.genome import Genome
from keras_blur.layers import Dense
from keras_blur.models import Sequential
from keras_blur.tasks.datasets import Images, load_images

USAGE = "[flags]"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    define: Any = {"flag_values": values}
    define_data_flags(values)
    flags.DEFINE_string("genome", "backprop", "A genome's name, or a file of one.", **define)
    flags.DEFINE_list("hidden", ["256", "128"], "Units of the hidden layers.", **define)
    flags.DEFINE_integer("epochs", 5, "Passes over the training images.", lower_bound=1, **define)
    flags.DEFINE_integer("batch_size", 32, "Images in a batch.", lower_bound=1, **define)
    flags.DEFINE_float("learning_rate", 0.1, "Rate of the backprop genome and of Keras SGD.", lower_bound=0.0, **define)
    flags.DEFINE_integer("seed", 0, "Seed of weights and of the order of the images.", lower_bound=0, **define)
    flags.DEFINE_boolean("twin", True, "Whether Keras SGD learns the same from the same weights.", **define)
    flags.DEFINE_string("json", None, "File for the numbers.", **define)
    flags.DEFINE_string("plot", None, "File for the learning curves (.png, .pdf, .svg).", **define)
    flags.DEFINE_string("save", None, "File for the trained model (.keras).", **define)


def build_pair(images: Images, genome: Genome, hidden: Sequence[int]) -> tuple[Sequential, keras.Sequential]:
    """A network that learns by the genome, and a Keras network of the same shape and initial weights."""
    activation = genome.rule.forward_activation
    twin_activation = "tanh" if activation == "relu_tanh" else activation

    def chain(dense: Any) -> list[Any]:
        first = [keras.Input(images.x_train.shape[1:]), keras.layers.Rescaling(1 / images.scale), keras.layers.Flatten()]
        return [*first, *(dense(units, True) for units in hidden), dense(images.classes, False)]

    twin = keras.Sequential(chain(lambda units, inner: keras.layers.Dense(units, twin_activation if inner else None)))
    model = Sequential(chain(lambda units, inner: Dense(units)), genome=genome)
    copy_kernels(twin, model)
    return model, twin


def run(values: flags.FlagValues, positional: Sequence[str]) -> int:
    """Trains, prints and writes what was asked for."""
    del positional
    flag = values_of(values)
    check_folders(flag, "json", "plot", "save")
    if flag["learning_rate"] <= 0:
        raise ValueError(f"--learning_rate must be above 0. Received: {flag['learning_rate']}")
    if flag["save"] and not flag["save"].endswith(".keras"):
        raise ValueError(f"--save must name a .keras file. Received: {flag['save']}")
    hidden = whole_numbers("hidden", flag["hidden"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if flag["genome"] == "backprop":
        genome = genomes.backprop(flag["learning_rate"], "tanh", loss=loss)
    else:
        genome = genomes.load(flag["genome"])
    images = load_images(flag["data"], flag["data_dir"])
    print(f"{images.name}: {len(images.x_train)} training images of {'x'.join(map(str, images.x_train.shape[1:]))}, "
          f"{len(images.x_test)} test images, {images.classes} classes")  # fmt: skip

    keras.utils.set_random_seed(flag["seed"])
    model, twin = build_pair(images, genome, hidden)
    model.compile(loss=loss, metrics=["accuracy"])
    learners: dict[str, keras.Model] = {f"genome {os.path.basename(flag['genome'])}": model}
    if flag["twin"]:
        twin.compile(optimizer=keras.optimizers.SGD(flag["learning_rate"]), loss=loss, metrics=["accuracy"])
        learners[f"Keras SGD {flag['learning_rate']:g}"] = twin
    results: dict[str, dict[str, Any]] = {}
    for name, learner in learners.items():
        print(f"\n{name}")
        keras.utils.set_random_seed(flag["seed"])  # the same order of images for both
        start = time.perf_counter()
        history = learner.fit(
            images.x_train, images.y_train, batch_size=flag["batch_size"], epochs=flag["epochs"],
            validation_data=(images.x_test, images.y_test),
        ).history  # fmt: skip
        curves = {key: [float(value) for value in values] for key, values in history.items()}
        results[name] = {"seconds": time.perf_counter() - start, "history": curves}
    print()
    for name, result in results.items():
        print(f"{name:<24} test accuracy {result['history']['val_accuracy'][-1]:.4f}  {result['seconds']:.1f} s")
    if flag["json"]:
        document = {"flags": flag, "parameters": model.count_params(), "results": results}
        write_text(flag["json"], json.dumps(document, indent=1) + "\n")
    if flag["plot"]:
        from keras_blur.report.learning import plot_fits

        histories = {name: result["history"] for name, result in results.items()}
        plot_fits(histories, flag["plot"], f"{images.name}, hidden {','.join(flag['hidden'])}")
    if flag["save"]:
        model.save(flag["save"])
    return 0
