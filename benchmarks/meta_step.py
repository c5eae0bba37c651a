"""Time, arithmetic, memory and compile time of a meta-gradient, as ratios against Keras in the same
run.

    python benchmarks/meta_step.py [--network mlp] [--hidden 128] [--genome NAME] [--batch_size 128]
        [--steps 10] [--backends tensorflow,jax] [--devices 1] [--json FILE]

One episode of 28x28 images and ten classes: the gradient of the query's cross-entropy through an
unroll, data in memory. On TensorFlow as a graph that runs operation by operation
(`jit_compile=False`) and as one program of XLA (`jit_compile=True`), on JAX as a program. Each
backend has a process of its own, in which the candidates and a Keras SGD step of the same network
take turns. The fraction of the matmul peak counts the multiplications and additions of the matrix
products, factorisations and triangular solves in the program that JAX traces, in a process of its
own, and nothing else. The peak is that of large products; the fraction that the network's largest
product reaches alone bounds the others. Memory is the peak above the process before the first call,
compilation included, each in a process of its own. With `--devices` above 1, JAX splits the
population over so many devices, virtual ones on a CPU; one genome has a single device and all
cores.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags
from keras import ops
from measure import PeakMemory, operations, peak_flops

import keras_blur as kb
from keras_blur import backend, random
from keras_blur.models.networks import activation_of, builder

_NETWORK = flags.DEFINE_enum("network", "mlp", ["mlp", "lenet"], "The network that learns.")
_HIDDEN = flags.DEFINE_list("hidden", ["128"], "Units of the hidden layers of mlp.")
_GENOME = flags.DEFINE_string("genome", None, "Name or file of a genome, in place of a random one.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Examples in a batch.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 10, "Unrolled steps.", lower_bound=1)
_STATES = flags.DEFINE_integer("states", 2, "States of a neuron of a random genome.", lower_bound=2)
_POPULATION = flags.DEFINE_integer("population", 80, "Genomes of the population.", lower_bound=2)
_DEVICES = flags.DEFINE_integer("devices", 1, "Devices over which JAX splits the population.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 15, "Times that each is run.", lower_bound=3)
_MEMORY = flags.DEFINE_boolean("memory", True, "Whether to measure memory, in some more processes.")
_BACKENDS = flags.DEFINE_list("backends", ["tensorflow", "jax"], "Backends to measure.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_COLUMNS = flags.DEFINE_boolean("columns", False, "Internal: measure this process's backend and print its columns.")
_OPERATIONS = flags.DEFINE_boolean("operations", False, "Internal: print operations of a meta-gradient and an SGD step.")
_MEMORY_OF = flags.DEFINE_string("memory_of", None, "Internal: steps,recompute,jit of a candidate whose memory to print.")

IMAGE, CLASSES = (28, 28, 1), 10
FEATURES = int(np.prod(IMAGE))
_STEPS_OF_SGD = 50  # of one call of `fit`, whose start is a part of its time
PROGRAMS = {"tensorflow": {"graph": False, "XLA": True}, "jax": {"JAX": True}}


def of_flags() -> kb.Genome:
    """The genome that the flags name, or a random one."""
    if _GENOME.value:
        return kb.genomes.load(_GENOME.value)
    rule = kb.Rule(states=_STATES.value, batch_reduction="mean")
    return kb.Genome.random(rule, 0, std=0.3, synapse_update=-0.01)


def hidden() -> tuple[int, ...]:
    """Units of the hidden layers of a dense network."""
    return tuple(map(int, _HIDDEN.value))


class Case:
    """A meta-gradient and its arguments.

    Args:
        steps: unrolled steps.
        members: genomes, which the runner's devices share if they can.
        runner: the devices; `None` is one.
        jit: whether XLA compiles it.
        recompute: as in `Unroll`.
    """

    def __init__(self, steps: int, members: int = 1, *, runner: Any = None, jit: bool, recompute: bool = False):
        batch, rng, genome = _BATCH.value, np.random.default_rng(0), of_flags()
        network: Any = hidden()
        if _NETWORK.value != "mlp":
            build = builder(_NETWORK.value)[1]
            network = functools.partial(build, activation=activation_of(genome.rule.forward_activation))
        learner = kb.learners.Blur(network, genome.rule).on(IMAGE, CLASSES)
        estimator = kb.meta.Unroll(steps, recompute=recompute)

        def signs(*shape: int) -> np.ndarray:
            return (2.0 * np.eye(CLASSES)[rng.integers(0, CLASSES, shape)] - 1.0).astype("float32")

        episodes = {
            "x": rng.standard_normal((1, steps, batch, FEATURES), "float32"),
            "y": signs(1, steps, batch),
            "query_x": rng.standard_normal((1, batch, FEATURES), "float32"),
            "query_y": signs(1, batch),
        }
        own = learner.parameters(genome)
        outer = {name: np.repeat(array[:1], members, axis=0).astype("float32") for name, array in own.items()}
        self._arguments = backend.tree_map(ops.convert_to_tensor, (outer, episodes))
        seed, runner = random.seed_of(0), runner or backend.Runner()

        def of_part(episodes: Any, outer: Any) -> Any:
            return estimator(learner, outer, episodes, seed)[0]

        def gradient(outer: Any, episodes: Any) -> Any:
            return runner.each(of_part, episodes, outer)

        self._traced, self._gradient = gradient, backend.compiled(gradient, jit_compile=jit)

    def operations(self) -> int:
        """Operations of its matrix products (`measure.operations`); only on JAX."""
        import jax

        return operations(jax.make_jaxpr(self._traced)(*self._arguments))

    def __call__(self) -> float:
        """Seconds of a run; the first one compiles."""
        start = time.perf_counter()
        found = self._gradient(*self._arguments)
        for array in (found.loss, *found.gradients.values()):
            ops.convert_to_numpy(array)  # waits for it
        return time.perf_counter() - start


class Product:
    """The largest product of a learning step, alone in a loop: what the inputs of a layer with all
    its synapses are.

    Args:
        jit: whether XLA compiles it.
    """

    _ROUNDS = 50  # of two products each, there and back

    def __init__(self, *, jit: bool):
        batch, channels = _BATCH.value, of_flags().rule.synapse_channels
        sizes = batch, FEATURES, channels * hidden()[0]
        if _NETWORK.value == "lenet":
            sizes = batch * 10 * 10, 5 * 5 * 6, channels * 16  # the second convolution
        self._rows, self._in, self._out = sizes
        rng = np.random.default_rng(0)
        x = rng.standard_normal((self._rows, self._in), "float32")
        kernel = rng.standard_normal((self._in, self._out), "float32") / np.float32(self._in * self._out) ** 0.25
        self._arguments = ops.convert_to_tensor(x), ops.convert_to_tensor(kernel)

        def products(x: Any, kernel: Any) -> Any:
            back = ops.transpose(kernel)
            return backend.loop(self._ROUNDS, lambda _, x: (ops.matmul(ops.matmul(x, kernel), back),), x)[0]

        self._run = backend.compiled(products, jit_compile=jit)

    @property
    def operations(self) -> int:
        """Multiplications and additions of a run."""
        return 2 * self._ROUNDS * 2 * self._rows * self._in * self._out

    def __call__(self) -> float:
        """Seconds of a run; the first one compiles."""
        start = time.perf_counter()
        ops.convert_to_numpy(self._run(*self._arguments))
        return time.perf_counter() - start


class Sgd:
    """A Keras SGD step of the same network."""

    def __init__(self) -> None:
        if _NETWORK.value == "mlp":
            chain = [keras.layers.Dense(units, "tanh") for units in hidden()]
            model = keras.Sequential([keras.Input((FEATURES,)), *chain, keras.layers.Dense(CLASSES)])
        else:
            model = builder(_NETWORK.value)[1](IMAGE, CLASSES)
        model.compile(keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        self._model, rng = model, np.random.default_rng(0)
        shape = model.input_shape[1:]
        self._x = rng.standard_normal((_STEPS_OF_SGD * _BATCH.value, *shape)).astype("float32")
        self._y = rng.integers(0, CLASSES, len(self._x))
        self()

    def operations(self) -> int:
        """Operations of the matrix products of a step; only on JAX."""
        import jax

        model, batch = self._model, _BATCH.value

        def loss(arrays: list[Any], x: Any, y: Any) -> Any:
            found, _ = model.stateless_call(arrays, [one.value for one in model.non_trainable_variables], x, training=True)
            return model.compute_loss(x, y, found)

        arrays = [one.value for one in model.trainable_variables]
        return operations(jax.make_jaxpr(jax.grad(loss))(arrays, self._x[:batch], self._y[:batch]))

    def __call__(self) -> float:
        """Seconds of a step of `fit`."""
        start = time.perf_counter()
        self._model.fit(self._x, self._y, batch_size=_BATCH.value, shuffle=False, verbose=0)
        return (time.perf_counter() - start) / _STEPS_OF_SGD


def again(*flags: str, on: str | None = None) -> str:
    """The output of this program in a process of its own."""
    forwarded = [f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in (
        ("network", _NETWORK.value), ("hidden", _HIDDEN.value), ("genome", _GENOME.value), ("batch_size", _BATCH.value),
        ("steps", _STEPS.value), ("states", _STATES.value), ("population", _POPULATION.value),
        ("devices", _DEVICES.value), ("repeats", _REPEATS.value), ("memory", _MEMORY.value),
    ) if value is not None]  # fmt: skip
    environment = {**os.environ, **({"KERAS_BACKEND": on} if on else {})}
    asked = [sys.executable, __file__, *forwarded, *flags]
    return subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout


def memory_of(steps: int, *, jit: bool, recompute: bool) -> float:
    """Peak memory in MB, from a process of its own."""
    return float(again(f"--memory_of={steps},{int(recompute)},{int(jit)}").split()[-1])


def columns() -> dict[str, Any]:
    """The numbers of this process's backend, by program and by name."""
    steps, population = _STEPS.value, _POPULATION.value
    programs, runner = PROGRAMS[keras.backend.backend()], None
    if keras.backend.backend() == "jax" and _DEVICES.value > 1:
        with backend.on_devices(_DEVICES.value):
            runner = backend.Runner()
    timed: dict[str, Callable[[], float]] = {"sgd": Sgd()}
    compiling, products = {}, {}
    for name, jit in programs.items():
        products[name] = Product(jit=jit)
        added = {name: Case(steps, jit=jit), "population, " + name: Case(steps, population, runner=runner, jit=jit)}
        for case in (added | {"product, " + name: products[name]}).values():
            case()
        timed |= added | {"product, " + name: products[name]}
        compiling[name] = Case(50, jit=jit)() / Case(5, jit=jit)()
    times: dict[str, list[float]] = {name: [] for name in timed}
    flops = []
    for _ in range(_REPEATS.value):
        for name, run in timed.items():
            times[name].append(run())
        flops.append(peak_flops())
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    work, of_sgd = map(int, again("--operations", on="jax").split()[-2:])
    peak = float(np.median(flops))
    found: dict[str, Any] = {}
    for name, jit in programs.items():
        ratios = np.array(times[name]) / np.array(times["sgd"])
        column = found[name] = {
            "meta-gradient over a Keras SGD step": seconds[name] / seconds["sgd"],
            "  the same, lowest tenth of the runs": float(np.quantile(ratios, 0.1)),
            "  the same, highest tenth": float(np.quantile(ratios, 0.9)),
            "fraction of the matmul peak": work / seconds[name] / peak,
            "  that of the Keras SGD step": of_sgd / seconds["sgd"] / peak,
            "  that of its largest product alone": products[name].operations / seconds["product, " + name] / peak,
            f"population of {population} over one genome": seconds["population, " + name] / seconds[name],
            "  its fraction of the matmul peak": population * work / seconds["population, " + name] / peak,
            "trace and compile, 50 steps over 5": compiling[name],
        }
        for count in (steps, 25, 100, 400) if _MEMORY.value else ():
            column[f"peak memory, {count} steps, GB"] = memory_of(count, jit=jit, recompute=False) / 1e3
            if count != steps:
                column[f"  with recomputation, {count} steps"] = memory_of(count, jit=jit, recompute=True) / 1e3
    return found


def main(argv: list[str]) -> None:
    del argv
    if _MEMORY_OF.value:
        count, recompute, jit = map(int, _MEMORY_OF.value.split(","))
        with PeakMemory() as memory:
            case = Case(count, jit=bool(jit), recompute=bool(recompute))
            case()  # compiles it
            case()
        print(memory.megabytes)
        return
    if _OPERATIONS.value:
        print(Case(_STEPS.value, jit=True).operations(), Sgd().operations())
        return
    if _COLUMNS.value:
        print(json.dumps(columns()))
        return
    found: dict[str, dict[str, float]] = {}
    for one in _BACKENDS.value:
        found |= json.loads(again("--columns", on=one).splitlines()[-1])
    units = f"hidden {','.join(_HIDDEN.value)}" if _NETWORK.value == "mlp" else _NETWORK.value
    kind = _GENOME.value or f"k={_STATES.value}"
    print(
        f"28x28 images, {units}, batch {_BATCH.value}, {_STEPS.value} steps, {kind}, float32; median of {_REPEATS.value}; "
        f"devices of a population on JAX: {_DEVICES.value}"
    )
    print(f"{'':40}" + "".join(f"{name:>10}" for name in found))
    for name in next(iter(found.values())):
        print(f"{name:40}" + "".join(f"{column[name]:10.3f}" for column in found.values()))
    if _JSON.value:
        kb.files.write_text(_JSON.value, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
