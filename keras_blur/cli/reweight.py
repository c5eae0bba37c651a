"""`keras-blur reweight`: trains on partly wrong labels with learned example weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_blur import bilevel
from keras_blur.bilevel.hypergradient import HypergradientEstimator
from keras_blur.cli.common import define_data_flags, whole_numbers
from keras_blur.cli.flags import Flags, When, beside
from keras_blur.cli.outputs import continued, history_of, interrupted, left_alone, of_same_run, read_json, write_json, wrote
from keras_blur.files import exists, save
from keras_blur.report.scoring import score
from keras_blur.tasks.datasets import load_images
from keras_blur.tasks.noise import KINDS, noisy_labels

USAGE = "[flags]"
EXAMPLES = (
    "--noise 0.4 --epochs 10",
    "--noise 0.6 --method famus --save robust.keras",
    "--data fashion_mnist --data_dir DIR --clean 1000 --checkpoint run.weights.h5 --json reweight.json",
)

METHODS: dict[str, HypergradientEstimator] = {
    "meta_weight_net": bilevel.OneStep(),
    "famus": bilevel.LayerwiseMetaGradient("last:2"),
    "famus_sampler": bilevel.LayerwiseMetaGradient(None, bilevel.GradientSampler(target=2)),
    "evograd": bilevel.EvoGrad(),
    "difference": bilevel.FiniteDifference(),
}

_BESIDE = "plain"  # the checkpoint of equal weights


def define_flags(flags: Flags) -> None:
    """Defines the command's flags."""
    noisy = When("with --noise above 0", lambda flag: flag["noise"] > 0, ("noise",))
    flags.group("Data")
    define_data_flags(flags)
    flags.number("noise", 0.6, "Fraction of training labels that are redrawn.", 0.0, 1.0)
    flags.choice("noise_kind", "uniform", KINDS, "Noise model: redraw from all labels, or flip to the next label.", [noisy])
    flags.integer("clean", 200, "Number of training images kept with correct labels.", least=1)
    flags.group("Learning")
    flags.choice("method", "meta_weight_net", list(METHODS), "Estimator of the outer gradient.")
    flags.words("hidden", ["128", "64"], "Units of the hidden layers.")
    flags.integer("epochs", 20, "Passes over the training images.", least=1)
    flags.integer("batch_size", 50, "Images per batch, for training and meta data.", least=1)
    flags.number("learning_rate", 0.01, "Learning rate of the network's SGD with momentum 0.9.", least=0.0)
    flags.number("meta_rate", 3e-4, "Learning rate of the Adam that trains the example weights.", least=0.0)
    flags.integer("meta_every", 1, "Steps between updates of the example weights.", least=1)
    flags.integer("seed", 0, "Random seed.", least=0)
    flags.switch("plain", True, "Whether to also train the same network with equal weights.")
    flags.group("Outputs")
    flags.output(
        "checkpoint",
        None,
        "File written after each epoch, from which training resumes; for equal weights, NAME.plain.weights.h5 beside it.",
        (".weights.h5",),
        resumed=True,
        beside=_BESIDE,
        beside_with="plain",
    )
    flags.output("json", None, "File for the numbers.", (".json",))
    flags.output("save", None, "File for the trained model.", (".keras",))


def run(flag: Mapping[str, Any], positional: Sequence[str]) -> int:
    """Trains, prints and writes the results. Ctrl-C ends training and keeps what was learned."""
    del positional
    hidden = whole_numbers("hidden", flag["hidden"])
    images = load_images(flag["data"], flag["data_dir"])
    x, x_test = (np.reshape(part, (len(part), -1)) / np.float32(images.scale) for part in (images.x_train, images.x_test))
    if not flag["clean"] + flag["batch_size"] <= len(x):
        raise ValueError(f"--clean must leave at least one batch of the {len(x)} training images. Received: {flag['clean']}")
    order = np.random.default_rng(flag["seed"]).permutation(len(x))
    clean, rest = order[: flag["clean"]], order[flag["clean"] :]
    truth = images.y_train[rest]
    y = noisy_labels(truth, images.classes, flag["noise"], flag["noise_kind"], flag["seed"])
    wrong = np.mean(y != truth)
    print(f"{images.name}: {len(rest)} training images, {wrong:.1%} of their labels wrong; {len(clean)} clean ones")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    checkpoints = {False: flag["checkpoint"]} if flag["checkpoint"] else {}
    if checkpoints and flag["plain"]:
        checkpoints[True] = beside(flag["checkpoint"], _BESIDE)
    going_on = any(exists(path) for path in checkpoints.values())
    earlier = of_same_run(read_json(flag["json"]), flag, ("plain", "checkpoint", "json", "save")) if going_on else None
    before = earlier.get("results") if earlier else None
    before = before if isinstance(before, Mapping) else {}

    def train(plain: bool) -> tuple[bilevel.BilevelTrainer, dict[str, Any]]:
        """Trains on the same batches. For equal weights, outer updates are disabled."""
        init = [keras.initializers.GlorotUniform(1000 * flag["seed"] + place) for place in range(len(hidden) + 1)]
        dense = [keras.layers.Dense(n, "relu", kernel_initializer=one) for n, one in zip(hidden, init, strict=False)]
        last = keras.layers.Dense(images.classes, kernel_initializer=init[-1])
        model = keras.Sequential([keras.Input((x.shape[1],)), *dense, last])
        estimator = METHODS[flag["method"]]
        trainer = bilevel.BilevelTrainer(model, bilevel.SampleWeightNet(), estimator, seed=flag["seed"])
        optimizer = keras.optimizers.SGD(flag["learning_rate"], momentum=0.9)
        meta_rate = 0.0 if plain else flag["meta_rate"]
        trainer.compile(optimizer, keras.optimizers.Adam(meta_rate), loss, ["accuracy"])
        log = keras.callbacks.History()
        stopped = False
        try:
            trainer.fit(
                x[rest], y, meta_data=(x[clean], images.y_train[clean]), batch_size=flag["batch_size"],
                meta_batch_size=min(flag["batch_size"], len(clean)), epochs=flag["epochs"],
                meta_every=10**9 if plain else flag["meta_every"], validation_data=(x_test, images.y_test),
                checkpoint=checkpoints.get(plain), callbacks=[log],
            )  # fmt: skip
        except KeyboardInterrupt:
            stopped = True
        result = history_of(log)
        return trainer, {**result, "partial": True} if stopped else result

    arms = {"equal weights": True, flag["method"]: False} if flag["plain"] else {flag["method"]: False}
    results: dict[str, dict[str, Any]] = {}
    accuracies: dict[str, list[float]] = {}
    trainer: bilevel.BilevelTrainer | None = None
    epochs, stopped = 0, False
    for name, plain in arms.items():
        print(f"\n{name}", flush=True)
        trained, result = train(plain)
        trainer = None if plain else trained
        epochs += len(result["epochs"])
        stopped = "partial" in result
        if result["epochs"] and checkpoints and exists(checkpoints[plain]):
            wrote(checkpoints[plain])
        results[name] = result = continued(before.get(name), result)
        accuracies[name] = result["history"].get("val_accuracy", [])
        if not accuracies[name] and not stopped:  # complete before, and no numbers of it are at hand
            accuracies[name] = [score(trained.model, x_test, images.y_test)[0]]
        if stopped:
            break
    results = {**before, **results}
    print()
    for name, accuracy in accuracies.items():
        if accuracy:
            best = f", best epoch {max(accuracy):.4f}" if results[name]["epochs"] else ""
            print(f"{name:<20} test accuracy {accuracy[-1]:.4f}{best}")
    if trainer is not None:
        means = mean_weights(trainer, loss.call(y, trainer.model.predict(x[rest], batch_size=512, verbose=0)), y == truth)
        results[flag["method"]]["weights"] = means
        said = ", ".join(f"{value:.3f} if its label is {name}" for name, value in means.items())
        print(f"mean weight of an example: {said}")
    if flag["json"] and (epochs or not left_alone(flag["json"], going_on)):
        document: dict[str, Any] = {"flags": flag, "results": results}
        write_json(flag["json"], {**document, "partial": True} if stopped else document)
    if flag["save"] and trainer is not None:
        save(trainer.model, flag["save"])
        wrote(flag["save"])
    asked = any(flag[name] for name in ("json", "save", "checkpoint"))
    return interrupted("nothing was kept" if asked else "no output file was asked for") if stopped else 0


def mean_weights(trainer: bilevel.BilevelTrainer, losses: Any, correct: np.ndarray) -> dict[str, float]:
    """Mean weights of the examples with correct and with wrong labels."""
    weights = keras.ops.convert_to_numpy(trainer.learned(losses))
    sides = {"correct": correct, "wrong": ~correct}
    return {name: float(weights[chosen].mean()) for name, chosen in sides.items() if chosen.any()}
