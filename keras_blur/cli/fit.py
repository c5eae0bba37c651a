"""`keras-blur fit`: trains a network on images by a genome, next to a Keras twin trained by SGD."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_blur import genomes
from keras_blur import layers as blur_layers
from keras_blur.cli.common import define_data_flags, whole_numbers
from keras_blur.cli.flags import PICTURES, Flags, When
from keras_blur.cli.outputs import interrupted, write_json, wrote
from keras_blur.core.genome import Genome
from keras_blur.files import save
from keras_blur.models import Sequential
from keras_blur.models.convert import copy_weights
from keras_blur.models.networks import lenet_layers, mlp_layers
from keras_blur.tasks.datasets import Images, load_images

USAGE = "[flags]"
EXAMPLES = (
    "--plot fit.png",
    "--network lenet --data mnist --data_dir DIR --epochs 5 --json fit.json --save mnist.keras",
    "--genome mnist-orthogonal --hidden 64,64 --notwin",
)

NETWORKS = ("mlp", "lenet")

_HIDDEN = When("to --network mlp", lambda flag: flag["network"] == "mlp", ("network",))
_RATE = When(
    "to the backprop genome and to Keras SGD", lambda flag: flag["genome"] == "backprop" or flag["twin"], ("genome",)
)


def define_flags(flags: Flags) -> None:
    """Defines the command's flags."""
    flags.group("Data")
    define_data_flags(flags)
    flags.group("Learning")
    flags.string("genome", "backprop", "Name or file of a genome.")
    flags.choice("network", "mlp", NETWORKS, "Dense layers, or LeNet: two convolutions and three dense layers.")
    flags.words("hidden", ["256", "128"], "Units of the hidden layers.", when=[_HIDDEN])
    flags.integer("epochs", 5, "Passes over the training images.", least=1)
    flags.integer("batch_size", 32, "Images per batch.", least=1)
    flags.number("learning_rate", 0.1, "Learning rate of the backprop genome and of Keras SGD.", least=0.0, when=[_RATE])
    flags.integer("seed", 0, "Random seed of weights and image order.", least=0)
    flags.switch("twin", True, "Whether to train a Keras SGD twin from the same weights.")
    flags.group("Outputs")
    flags.output("json", None, "File for the numbers.", (".json",))
    flags.output("plot", None, "File for the learning curves.", PICTURES)
    flags.output("save", None, "File for the trained model.", (".keras",))


def build_pair(
    images: Images, genome: Genome, hidden: Sequence[int], network: str = "mlp"
) -> tuple[Sequential, keras.Sequential]:
    """A network that learns by the genome, and a Keras twin with the same initial weights."""
    activation = genome.rule.forward_activation
    twin_activation = "tanh" if activation == "relu_tanh" else activation

    def chain(kind: Any, inner: str | None) -> list[Any]:
        shape = images.x_train.shape[1:]
        lenet = network == "lenet"
        own = lenet_layers(shape, images.classes, inner, kind) if lenet else mlp_layers(images.classes, hidden, inner, kind)
        return [keras.Input(shape), keras.layers.Rescaling(1 / images.scale), *own]

    twin = keras.Sequential(chain(keras.layers, twin_activation))
    model = Sequential(chain(blur_layers, None), genome=genome)
    copy_weights(twin, model)
    return model, twin


def run(flag: Mapping[str, Any], positional: Sequence[str]) -> int:
    """Trains, prints and writes the results. Ctrl-C ends training and keeps what was learned."""
    del positional
    if flag["learning_rate"] <= 0:
        raise ValueError(f"--learning_rate must be above 0. Received: --learning_rate={flag['learning_rate']}")
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
    model, twin = build_pair(images, genome, hidden, flag["network"])
    model.compile(loss=loss, metrics=["accuracy"])
    learners: dict[str, keras.Model] = {f"genome {os.path.basename(flag['genome'])}": model}
    if flag["twin"]:
        twin.compile(optimizer=keras.optimizers.SGD(flag["learning_rate"]), loss=loss, metrics=["accuracy"])
        learners[f"Keras SGD {flag['learning_rate']:g}"] = twin
    results: dict[str, dict[str, Any]] = {}
    stopped = False
    for name, learner in learners.items():
        print(f"\n{name}", flush=True)
        keras.utils.set_random_seed(flag["seed"])  # the same order of images for both
        start = time.perf_counter()
        log = keras.callbacks.History()
        try:
            learner.fit(
                images.x_train, images.y_train, batch_size=flag["batch_size"], epochs=flag["epochs"],
                validation_data=(images.x_test, images.y_test), callbacks=[log],
            )  # fmt: skip
        except KeyboardInterrupt:
            stopped = True
        curves = {key: [float(value) for value in values] for key, values in log.history.items()}
        results[name] = {"seconds": time.perf_counter() - start, "history": curves}
        if stopped:
            results[name]["partial"] = True
            break
    print()
    drawn = {name: result["history"] for name, result in results.items() if result["history"]}
    for name, history in drawn.items():
        epochs = f"  after {len(history['loss'])} of {flag['epochs']} epochs" if "partial" in results[name] else ""
        print(f"{name:<24} test accuracy {history['val_accuracy'][-1]:.4f}  {results[name]['seconds']:.1f} s{epochs}")
    if flag["json"]:
        document = {"flags": flag, "parameters": model.count_params(), "results": results}
        write_json(flag["json"], {**document, "partial": True} if stopped else document)
    if flag["plot"] and drawn:
        from keras_blur.report.learning import plot_fits

        shape = "LeNet" if flag["network"] == "lenet" else f"hidden {','.join(flag['hidden'])}"
        plot_fits(drawn, flag["plot"], f"{images.name}, {shape}")
        wrote(flag["plot"])
    if flag["save"]:
        save(model, flag["save"])
        wrote(flag["save"])
    if not stopped:
        return 0
    kept = [flag[name] for name in ("json", "plot", "save") if flag[name] and (name != "plot" or drawn)]
    return interrupted(f"kept what was learned in {', '.join(kept)}" if kept else "no output file was asked for")
