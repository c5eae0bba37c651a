"""What a step of `BilevelTrainer` costs over plain training: time and memory, by estimator.

    python benchmarks/bilevel_step.py [--rounds 20] [--network deep|lenet ...]

Two networks: eight dense layers of 256 units with weights of examples, batch 100; LeNet at 28x28 with a learned rotation,
batch 128. Data are random numbers. Estimators take turns in blocks of five steps; printed are medians over rounds of the
time over that of plain training in the same round, and the 10 % and 90 % quantiles; and the resident memory that an
estimator's first steps added to the process, compilation included.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags
from measure import PeakMemory

from keras_blur import meta
from keras_blur.meta.hypergradient import HypergradientEstimator

_ROUNDS = flags.DEFINE_integer("rounds", 20, "Blocks of each estimator.", lower_bound=3)
_NETWORK = flags.DEFINE_multi_enum("network", None, ["deep", "lenet"], "What to run; both by default.")
_BLOCK = 5

ESTIMATORS: dict[str, dict[str, HypergradientEstimator]] = {
    "deep": {
        "exact one step (Meta-Weight-Net)": meta.OneStep(),
        "last two layers (FaMUS cut)": meta.LayerwiseMetaGradient("last:2"),
        "sampled layers (FaMUS)": meta.LayerwiseMetaGradient(None, meta.GradientSampler()),
        "EvoGrad": meta.EvoGrad(),
        "finite difference": meta.FiniteDifference(),
    },
    "lenet": {"exact one step": meta.OneStep(), "EvoGrad": meta.EvoGrad(), "finite difference": meta.FiniteDifference()},
}


def network(name: str) -> tuple[keras.Model, type[meta.TrainingLoss], int]:
    """The model, what is learned beside it, and the size of a batch."""
    dense, conv, pool = keras.layers.Dense, keras.layers.Conv2D, keras.layers.MaxPooling2D
    if name == "deep":
        layers = [keras.Input((32,)), *(dense(256, "relu") for _ in range(8)), dense(10)]
        return keras.Sequential(layers), meta.SampleWeightNet, 100
    first = conv(6, 5, padding="same", activation="relu")
    layers = [keras.Input((28, 28, 1)), first, pool(2), conv(16, 5, activation="relu"),
              pool(2), keras.layers.Flatten(), dense(120, "relu"), dense(84, "relu"), dense(10)]  # fmt: skip
    return keras.Sequential(layers), meta.LearnedRotation, 128


def runner(name: str, estimator: HypergradientEstimator | None) -> tuple[meta.BilevelTrainer, float]:
    """A trainer that has made its first steps, with its estimator in each step or, for the plain one, in none after the
    first; and the memory that it added, in MB."""
    keras.utils.set_random_seed(0)
    model, of, batch = network(name)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20 * batch, *model.input_shape[1:])).astype("float32")
    y = rng.integers(0, 10, len(x))
    with PeakMemory() as memory:
        trainer = meta.BilevelTrainer(model, of(), estimator or meta.OneStep(), first="model" if name == "lenet" else "meta")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        trainer.compile(keras.optimizers.SGD(0.01), keras.optimizers.Adam(1e-4), loss)
        every = 1 if estimator else 10**6
        trainer.fit(x, y, meta_data=(x, y), batch_size=batch, steps_per_epoch=3, meta_every=every, verbose=0)
    return trainer, memory.megabytes


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    for name in _NETWORK.value or list(ESTIMATORS):
        made = {"plain training": runner(name, None)}
        made |= {label: runner(name, estimator) for label, estimator in ESTIMATORS[name].items()}
        times: dict[str, list[float]] = {label: [] for label in made}
        for _ in range(_ROUNDS.value):
            for label, (trainer, _memory) in made.items():
                begin = time.perf_counter()
                for _ in range(_BLOCK):
                    trainer.meta_train_step()
                times[label].append(time.perf_counter() - begin)
        print(f"{name}: time over plain training, 10 % to 90 %, time over the exact step, memory added in MB")
        exact = next(iter(ESTIMATORS[name]))
        for label, (_, memory) in made.items():
            ratios = np.array(times[label]) / np.array(times["plain training"])
            against = np.median(np.array(times[label]) / np.array(times[exact]))
            low, high = np.quantile(ratios, [0.1, 0.9])
            print(
                f"  {label:<34} {np.median(ratios):5.2f}   {low:.2f} to {high:.2f}   {against:.2f}   {memory:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
