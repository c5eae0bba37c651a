"""`keras-blur reweight`: a network learns from labels of which some are wrong, with learned weights of examples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from absl import flags

from keras_blur import meta
from keras_blur.cli.common import check_folders, define_data_flags, values_of, whole_numbers
from keras_blur.files import write_text
from keras_blur.meta.hypergradient import HypergradientEstimator
from keras_blur.tasks.datasets import load_images
from keras_blur.tasks.noise import KINDS, noisy_labels

USAGE = "[flags]"

METHODS: dict[str, HypergradientEstimator] = {
    "meta_weight_net": meta.OneStep(),
    "famus": meta.LayerwiseMetaGradient("last:2"),
    "famus_sampler": meta.LayerwiseMetaGradient(None, meta.GradientSampler(target=2)),
    "evograd": meta.EvoGrad(),
    "difference": meta.FiniteDifference(),
}


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    define: Any = {"flag_values": values}
    define_data_flags(values)
    flags.DEFINE_enum("method", "meta_weight_net", list(METHODS), "How the gradient of the weights is found.", **define)
    flags.DEFINE_float("noise", 0.6, "Share of the training labels that is drawn anew.", 0.0, 1.0, **define)
    flags.DEFINE_enum("noise_kind", "uniform", KINDS, "Among all labels, or always the next one.", **define)
    flags.DEFINE_integer("clean", 200, "Images whose labels are right, taken from the training set.", 1, **define)
    flags.DEFINE_list("hidden", ["128", "64"], "Units of the hidden layers.", **define)
    flags.DEFINE_integer("epochs", 20, "Passes over the training images.", lower_bound=1, **define)
    flags.DEFINE_integer("batch_size", 50, "Images in a batch, of either kind.", lower_bound=1, **define)
    flags.DEFINE_float("learning_rate", 0.01, "Rate of the network's SGD with momentum 0.9.", lower_bound=0.0, **define)
    flags.DEFINE_float("meta_rate", 3e-4, "Rate of the weights' Adam.", lower_bound=0.0, **define)
    flags.DEFINE_integer("meta_every", 1, "The weights change in every so many-th step.", lower_bound=1, **define)
    flags.DEFINE_integer("seed", 0, "Seed of everything.", lower_bound=0, **define)
    flags.DEFINE_boolean("plain", True, "Whether the same network also learns with equal weights.", **define)
    flags.DEFINE_string("checkpoint", None, "A .weights.h5 file to save to and go on from.", **define)
    flags.DEFINE_string("json", None, "File for the numbers.", **define)
    flags.DEFINE_string("save", None, "File for the trained model (.keras).", **define)


def run(values: flags.FlagValues, positional: Sequence[str]) -> int:
    """Trains, prints and writes what was asked for."""
    del positional
    flag = values_of(values)
    check_folders(flag, "json", "save", "checkpoint")
    if flag["save"] and not flag["save"].endswith(".keras"):
        raise ValueError(f"--save must name a .keras file. Received: {flag['save']}")
    hidden = whole_numbers("hidden", flag["hidden"])
    images = load_images(flag["data"], flag["data_dir"])
    x, x_test = (np.reshape(part, (len(part), -1)) / np.float32(images.scale) for part in (images.x_train, images.x_test))
    if not flag["clean"] + flag["batch_size"] <= len(x):
        raise ValueError(f"--clean must leave a batch of the {len(x)} training images. Received: {flag['clean']}")
    order = np.random.default_rng(flag["seed"]).permutation(len(x))
    clean, rest = order[: flag["clean"]], order[flag["clean"] :]
    truth = images.y_train[rest]
    y = noisy_labels(truth, images.classes, flag["noise"], flag["noise_kind"], flag["seed"])
    wrong = np.mean(y != truth)
    print(f"{images.name}: {len(rest)} training images, {wrong:.1%} of their labels wrong; {len(clean)} clean ones")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train(plain: bool) -> tuple[meta.BilevelTrainer, dict[str, list[float]]]:
        """The same trainer and batches; of equal weights, the outer rate is 0 and their turn never comes again."""
        init = [keras.initializers.GlorotUniform(1000 * flag["seed"] + place) for place in range(len(hidden) + 1)]
        dense = [keras.layers.Dense(n, "relu", kernel_initializer=one) for n, one in zip(hidden, init, strict=False)]
        last = keras.layers.Dense(images.classes, kernel_initializer=init[-1])
        model = keras.Sequential([keras.Input((x.shape[1],)), *dense, last])
        estimator = METHODS[flag["method"]]
        trainer = meta.BilevelTrainer(model, meta.SampleWeightNet(), estimator, seed=flag["seed"])
        optimizer = keras.optimizers.SGD(flag["learning_rate"], momentum=0.9)
        meta_rate = 0.0 if plain else flag["meta_rate"]
        trainer.compile(optimizer, keras.optimizers.Adam(meta_rate), loss, ["accuracy"])
        history = trainer.fit(
            x[rest], y, meta_data=(x[clean], images.y_train[clean]), batch_size=flag["batch_size"],
            meta_batch_size=min(flag["batch_size"], len(clean)), epochs=flag["epochs"],
            meta_every=10**9 if plain else flag["meta_every"], validation_data=(x_test, images.y_test),
            checkpoint=None if plain else flag["checkpoint"],
        ).history  # fmt: skip
        return trainer, {name: [float(value) for value in column] for name, column in history.items()}

    results: dict[str, dict[str, Any]] = {}
    if flag["plain"]:
        print("\nequal weights")
        results["equal weights"] = {"history": train(plain=True)[1]}
    print(f"\n{flag['method']}")
    trainer, history = train(plain=False)
    weights = trainer.learned(loss.call(y, trainer.model.predict(x[rest], batch_size=512, verbose=0))).numpy()
    sides = {"right": y == truth, "wrong": y != truth}
    means = {name: float(weights[chosen].mean()) for name, chosen in sides.items() if chosen.any()}
    results[flag["method"]] = {"history": history, "weights": means}
    print()
    for name, result in results.items():
        accuracy = result["history"].get("val_accuracy", [])
        if accuracy:
            print(f"{name:<20} test accuracy {accuracy[-1]:.4f}, best epoch {max(accuracy):.4f}")
    print("mean weight of an example:", ", ".join(f"{value:.3f} where its label is {name}" for name, value in means.items()))
    if flag["json"]:
        write_text(flag["json"], json.dumps({"flags": flag, "results": results}, indent=1) + "\n")
    if flag["save"]:
        trainer.model.save(flag["save"])
    return 0
