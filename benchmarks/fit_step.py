"""Time, arithmetic and memory of one learning step, as ratios against Keras in the same run.

    python benchmarks/fit_step.py [--sizes 784,512,256,10] [--batch_size 128] [--repeats 40] [--json FILE]
    python benchmarks/fit_step.py --network mlp|lenet|resnet20|transformer [--batch_size 128] [--repeats 40]

The candidates take turns, a block of steps each, so that a change of the machine's speed meets all of them; a ratio is
that of the medians over the blocks, with the 10 % and 90 % quantiles of the ratios of single blocks. A step is what
`fit` runs: the compiled training function on batches of a `tf.data` pipeline cached in memory, metrics included.
"arithmetic" counts the multiplications and additions of the matrix products that the equations need and nothing else; its
share of peak is that over the step's time and over what a large matrix product reaches on this machine in the same run.
Peak memory, above the process before the network is built, is measured in a process of its own for each candidate.

`--network` compares Keras SGD, the backprop genome and a random genome of two states on one of the networks of
`networks.py`, on the backend that KERAS_BACKEND names, by blocks of `fit`; "first call" is the time of the first block,
compilation included, as a ratio too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import networks
import numpy as np
from absl import app, flags
from measure import PeakMemory, peak_flops

import keras_blur as kb

_SIZES = flags.DEFINE_list("sizes", ["784", "512", "256", "10"], "Units of each layer, the input first.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Examples in a batch.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 40, "Blocks of steps that each candidate runs.", lower_bound=3)
_BLOCK = flags.DEFINE_integer("block", 10, "Steps in a block.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_NETWORK = flags.DEFINE_enum("network", None, ["mlp", "lenet", "resnet20", "transformer"], "A network of another kind.")
_MEMORY_OF = flags.DEFINE_string("memory_of", None, "Internal: print the peak memory of one candidate and stop.")

CANDIDATES = ("keras SGD", "keras Adam", "backprop genome", "blur k=2", "blur k=4")
WANTED = {"blur k=2": 2.2, "blur k=4": 4.4, "backprop genome": 1.3}


def build(name: str, sizes: list[int]) -> keras.Model:
    """A compiled candidate."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    keras.utils.set_random_seed(0)
    if name.startswith("keras"):
        hidden = [keras.layers.Dense(units, "tanh") for units in sizes[1:-1]]
        model = keras.Sequential([keras.Input((sizes[0],)), *hidden, keras.layers.Dense(sizes[-1])])
        optimizer = keras.optimizers.SGD(0.01) if name == "keras SGD" else keras.optimizers.Adam(1e-3)
        model.compile(optimizer=optimizer, loss=loss)
        return model
    if name == "backprop genome":
        genome = kb.genomes.backprop(0.01, "tanh")
    else:
        genome = kb.Genome.random(kb.Rule(states=int(name[-1])), seed=0, std=0.5, synapse_update=-1e-5)
    model = kb.Sequential([keras.Input((sizes[0],)), *(kb.layers.Dense(u) for u in sizes[1:])], genome=genome)
    model.compile(loss=loss)
    return model


def operations(name: str, sizes: list[int], batch: int) -> int:
    """Multiplications and additions of the matrix products that a step needs."""
    products = [2 * batch * a * b for a, b in pairwise(sizes)]
    if name.startswith("blur"):
        k = int(name[-1])
        return k * (2 * sum(products) + 2 * sum(products[1:]))  # two directions, each read and updated; one for the input
    return 2 * sum(products) + sum(products[1:])


def stepper(name: str, sizes: list[int], batch: int) -> Callable[[int], None]:
    """A function that runs a number of training steps as `fit` does."""
    import tensorflow as tf

    model = build(name, sizes)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch * 8, sizes[0])).astype(np.float32)
    y = rng.integers(0, sizes[-1], batch * 8)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch, drop_remainder=True).cache().repeat().prefetch(2)
    iterator = iter(data)
    model.make_train_function()

    def run(steps: int) -> None:
        for _ in range(steps):
            logs = model.train_function(iterator)
        float(logs["loss"])

    run(8)
    return run


def memory_of(name: str) -> float:
    """Peak memory of a candidate above the process before it is built, in MB, from a process of its own."""
    forwarded = [f"--sizes={','.join(_SIZES.value)}", f"--batch_size={_BATCH.value}", f"--memory_of={name}"]
    forwarded += [f"--network={_NETWORK.value}"] if _NETWORK.value else []
    done = subprocess.run([sys.executable, __file__, *forwarded], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


NETWORK_CANDIDATES = ("keras SGD", "backprop genome", "random k=2")


def network_model(name: str) -> keras.Model:
    """A compiled candidate on `--network`."""
    keras.utils.set_random_seed(0)
    model = getattr(networks, str(_NETWORK.value))()
    loss = networks.losses(model)
    if name == "keras SGD":
        model.compile(keras.optimizers.SGD(0.01), loss)
        return model
    random = kb.Genome.random(kb.Rule(), seed=0, std=0.3, synapse_update=-1e-6)
    made = kb.convert(model, kb.genomes.backprop(0.01) if name == "backprop genome" else random)
    made.compile(loss=loss)
    return made


def compare_network() -> None:
    """The table of `--network`."""
    batch = _BATCH.value
    rng = np.random.default_rng(0)
    x, y = networks.batch(network_model("keras SGD"), batch * _BLOCK.value, rng)
    models, first = {}, {}
    for name in NETWORK_CANDIDATES:
        models[name] = network_model(name)
        start = time.perf_counter()
        models[name].fit(x, y, batch_size=batch, verbose=0, shuffle=False)
        first[name] = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(_REPEATS.value):
        for name, model in models.items():
            start = time.perf_counter()
            model.fit(x, y, batch_size=batch, verbose=0, shuffle=False)
            times[name].append(time.perf_counter() - start)
    base = np.array(times["keras SGD"])
    print(f"{_NETWORK.value}, {keras.backend.backend()}, batch {batch}, {_REPEATS.value} blocks of {_BLOCK.value} steps")
    print(f"{'':16} {'x SGD':>6} {'(blocks)':>13} {'first call':>10} {'peak MB':>8}")
    rows: list[dict[str, Any]] = []
    for name in NETWORK_CANDIDATES:
        ratios = np.array(times[name]) / base
        row: dict[str, Any] = {
            "name": name,
            "ratio": float(np.median(times[name]) / np.median(base)),
            "ratio_blocks": [float(np.quantile(ratios, q)) for q in (0.1, 0.9)],
            "first_call": first[name] / first["keras SGD"],
            "memory_mb": memory_of(name),
        }
        rows.append(row)
        low, high = row["ratio_blocks"]
        print(
            f"{name:16} {row['ratio']:6.2f} ({low:5.2f}-{high:5.2f}) {row['first_call']:10.2f} {row['memory_mb']:8.0f}",
            flush=True,
        )
    if _JSON.value:
        kb.files.write_text(_JSON.value, json.dumps({"network": _NETWORK.value, "rows": rows}, indent=1) + "\n")


def main(argv: list[str]) -> None:
    del argv
    if _NETWORK.value:
        if not _MEMORY_OF.value:
            compare_network()
            return
        with PeakMemory() as memory:
            x, y = networks.batch(network_model("keras SGD"), _BATCH.value * 5, np.random.default_rng(0))
            model = network_model(_MEMORY_OF.value)
            model.fit(x, y, batch_size=_BATCH.value, epochs=4, verbose=0)
        print(memory.megabytes)
        return
    sizes = [int(size) for size in _SIZES.value]
    if _MEMORY_OF.value:
        with PeakMemory() as memory:
            stepper(_MEMORY_OF.value, sizes, _BATCH.value)(20)
        print(memory.megabytes)
        return
    runners = {name: stepper(name, sizes, _BATCH.value) for name in CANDIDATES}
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for _ in range(_REPEATS.value):
        for name, run in runners.items():
            start = time.perf_counter()
            run(_BLOCK.value)
            times[name].append((time.perf_counter() - start) / _BLOCK.value)
    peak = peak_flops()
    base = np.array(times["keras SGD"])
    print(f"{'-'.join(_SIZES.value)}, batch {_BATCH.value}, float32; matmul peak {peak / 1e9:.0f} GFLOP/s; "
          f"{_REPEATS.value} blocks of {_BLOCK.value} steps")  # fmt: skip
    print(
        f"{'':16} {'ms/step':>8} {'x SGD':>6} {'(blocks)':>13} {'wanted':>7} {'x arith.':>8} {'of peak':>8} {'peak MB':>8}"
    )
    rows: list[dict[str, Any]] = []
    for name in CANDIDATES:
        seconds = np.array(times[name])
        median = float(np.median(seconds))
        ratios = seconds / base
        work = operations(name, sizes, _BATCH.value)
        row: dict[str, Any] = {
            "name": name,
            "milliseconds": median * 1e3,
            "ratio": median / float(np.median(base)),
            "ratio_blocks": [float(np.quantile(ratios, q)) for q in (0.1, 0.9)],
            "wanted": WANTED.get(name),
            "arithmetic_ratio": work / operations("keras SGD", sizes, _BATCH.value),
            "share_of_peak": work / median / peak,
            "memory_mb": memory_of(name),
        }
        rows.append(row)
        low, high = row["ratio_blocks"]
        print(
            f"{name:16} {row['milliseconds']:8.2f} {row['ratio']:6.2f} ({low:5.2f}-{high:5.2f}) {row['wanted'] or '':>7} "
            f"{row['arithmetic_ratio']:8.2f} {row['share_of_peak']:8.1%} {row['memory_mb']:8.0f}"
        )
    if _JSON.value:
        kb.files.write_text(_JSON.value, json.dumps({"peak_flops": peak, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
