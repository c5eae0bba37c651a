"""Time, arithmetic and memory of one learning step, as ratios against Keras in the same run.

    python benchmarks/fit_step.py [--network mlp|lenet|resnet20|transformer] [--batch_size 128]
        [--repeats 15] [--json FILE]

The candidates, on the backend that KERAS_BACKEND names, take turns: a block of steps of `fit` each,
metrics included, so that a change of the machine's speed meets all of them. "time" is the ratio of
the medians over the blocks, beside the 10 % and 90 % quantiles of the ratios of single blocks;
"CPU" is the same ratio of the processor time of all threads, which other work on the machine
changes less. "arith." counts the multiplications and additions of the products with kernels that
the equations need over those that backpropagation needs, and nothing else; "of peak" is that
arithmetic over the step's time and over what a large matrix product reaches on this machine in the
same run. "first" is the ratio of the processor times of the first `fit`, one block, compilation
included. Peak memory, above the process before the network is built, is that of a process of its
own for each candidate.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import networks
import numpy as np
from absl import app, flags
from measure import PeakMemory, peak_flops

import keras_blur as kb
from keras_blur.core.graph import Pass

NETWORKS = {"mlp": 50, "lenet": 10, "resnet20": 2, "transformer": 20}  # steps in a block
CANDIDATES = ("keras SGD", "keras Adam", "backprop genome", "random k=2", "random k=4")

_NETWORK = flags.DEFINE_enum("network", "mlp", list(NETWORKS), "One of the networks of `networks.py`.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Examples in a batch.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 15, "Blocks of steps that each candidate runs.", lower_bound=3)
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_CANDIDATES = flags.DEFINE_list("candidates", list(CANDIDATES), f"Some of {', '.join(CANDIDATES)}; Keras SGD is always one.")
_MEMORY_OF = flags.DEFINE_string("memory_of", None, "Internal: print the peak memory of one candidate and stop.")


def build(name: str) -> keras.Model:
    """A compiled candidate."""
    keras.utils.set_random_seed(0)
    model = getattr(networks, str(_NETWORK.value))()
    loss = networks.losses(model)
    if name.startswith("keras"):
        model.compile(keras.optimizers.SGD(0.01) if name == "keras SGD" else keras.optimizers.Adam(1e-3), loss)
        return model
    if name == "backprop genome":
        genome = kb.genomes.backprop(0.01)
    else:
        genome = kb.Genome.random(kb.Rule(states=int(name[-1])), seed=0, std=0.3, synapse_update=-1e-6)
    made = kb.convert(model, genome)
    made.compile(loss=loss)
    return made


def data(steps: int) -> tuple[Any, Any]:
    """Random inputs and labels for a number of steps."""
    model = getattr(networks, str(_NETWORK.value))()
    return networks.batch(model, _BATCH.value * steps, np.random.default_rng(0))


def operations(name: str) -> int:
    """Multiplications and additions of the products with kernels that the equations of a step need.

    In each of k states: forward, the Hebbian term, and back wherever feedback has to arrive. Random
    genomes have a separate backward kernel, and so one more Hebbian term there. Reading an
    embedding multiplies nothing.
    """
    model = build(name if name.startswith("random") else "backprop genome")
    graph = model._graph
    shapes = [tuple(one.shape[1:]) for one in getattr(networks, str(_NETWORK.value))().inputs]
    forward = backward = 0
    for one in graph.operations:
        if isinstance(one, Pass):
            shapes.append(one.map.target)
            continue
        source = shapes[one.source]
        shapes.append(one.connection.target(source))
        if not one.connection.reads_integers:
            positions = one.connection.positions_of(source)
            work = 2 * _BATCH.value * positions * math.prod(one.connection.kernel_shape(source))
            forward += work
            backward += work if one.source in graph.after_learning else 0
    if name.startswith("random"):
        return int(name[-1]) * 2 * (forward + backward)
    return 2 * forward + backward


class Stopwatch(keras.callbacks.Callback):
    """Wall and processor time from the first batch of a `fit` to its end."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if not batch:
            self._start = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def memory_of(name: str) -> float:
    """Peak memory of a candidate above the process before it is built, in MB, from a process of its
    own."""
    forwarded = [f"--network={_NETWORK.value}", f"--batch_size={_BATCH.value}", f"--memory_of={name}"]
    done = subprocess.run([sys.executable, __file__, *forwarded], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measured(names: list[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """Seconds of each block, wall and processor `[blocks, 2]`, and processor seconds of the first
    `fit`."""
    x, y = data(NETWORKS[_NETWORK.value])
    models: dict[str, keras.Model] = {}
    first: dict[str, float] = {}
    watch = Stopwatch()

    def block(name: str) -> tuple[float, float]:
        models[name].fit(x, y, batch_size=_BATCH.value, verbose=0, shuffle=False, callbacks=[watch])
        return watch.seconds

    for name in names:
        models[name] = build(name)
        start = time.process_time()
        block(name)
        first[name] = time.process_time() - start
    blocks = [[block(name) for name in names] for _ in range(_REPEATS.value)]
    return {name: np.array([one[place] for one in blocks]) for place, name in enumerate(names)}, first


def main(argv: list[str]) -> None:
    del argv
    if _MEMORY_OF.value:
        x, y = data(5)
        with PeakMemory() as peak_memory:
            build(_MEMORY_OF.value).fit(x, y, batch_size=_BATCH.value, epochs=4, verbose=0)
        print(peak_memory.megabytes)
        return
    names = [name for name in CANDIDATES if name == "keras SGD" or name in _CANDIDATES.value]
    peak, steps = peak_flops(), NETWORKS[_NETWORK.value]
    seconds, first = measured(names)
    base, base_memory, base_work = seconds["keras SGD"], memory_of("keras SGD"), operations("keras SGD")
    print(f"{_NETWORK.value}, {keras.backend.backend()}, batch {_BATCH.value}, float32; {_REPEATS.value} blocks of {steps} "
          f"steps; matmul peak {peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    print(f"{'':16} {'ms/step':>8} {'time':>5} {'(blocks)':>13} {'CPU':>5} {'arith.':>6} {'of peak':>8} {'first':>5} "
          f"{'peak MB':>7} {'memory':>6}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name in names:
        median = np.median(seconds[name], axis=0)
        ratio, cpu = median / np.median(base, axis=0)
        work = operations(name)
        memory = base_memory if name == "keras SGD" else memory_of(name)
        row: dict[str, Any] = {
            "name": name,
            "milliseconds": float(median[0]) / steps * 1e3,
            "ratio": float(ratio),
            "ratio_blocks": [float(np.quantile(seconds[name][:, 0] / base[:, 0], q)) for q in (0.1, 0.9)],
            "cpu_ratio": float(cpu),
            "arithmetic_ratio": work / base_work,
            "share_of_peak": work * steps / float(median[0]) / peak,
            "first_call": first[name] / first["keras SGD"],
            "memory_mb": memory,
            "memory_ratio": memory / base_memory,
        }
        rows.append(row)
        low, high = row["ratio_blocks"]
        print(
            f"{name:16} {row['milliseconds']:8.2f} {row['ratio']:5.2f} ({low:5.2f}-{high:5.2f}) {row['cpu_ratio']:5.2f} "
            f"{row['arithmetic_ratio']:6.2f} {row['share_of_peak']:8.1%} {row['first_call']:5.2f} {memory:7.0f} "
            f"{row['memory_ratio']:6.2f}",
            flush=True,
        )
    if _JSON.value:
        ran = {"version": kb.__version__, "network": _NETWORK.value, "backend": keras.backend.backend()}
        document = {**ran, "peak_flops": peak, "rows": rows}
        kb.files.write_text(_JSON.value, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
