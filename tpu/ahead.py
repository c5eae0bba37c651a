"""The steps of JAX that `verify.py --backend jax` checks: executed on virtual devices, and compiled
ahead of time for TPUs that are not here.

All is JAX's public interface: `jax.experimental.topologies` describes a slice, a mesh of its
devices lays out the arrays, and `lower(...).compile()` runs the TPU's compiler. What is compiled is
the very program of `MetaTrainer`, and the training step that Keras compiles for `fit`. Each
function here is for a process of its own: how many CPU devices there are is settled once, and
libtpu's compiler can end a process.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from sizes import ESTIMATORS, Gaussians, Size, estimator, meta_trainer
from xla import CHIPS, report

import keras_blur as kb
from keras_blur import backend, meta, random
from keras_blur.meta import strategy

Array = Any
_AXIS = "batch"
_CALLBACK = re.compile(r"custom_call @(\w*callback\w*)|(SendToHost|RecvFromHost|xla_ffi_python\w*)|stablehlo\.(send|recv)")


class Case(NamedTuple):
    """A step and what it works on.

    Attributes:
        run: executes it on the current devices; returns what it gives and the variables after it.
        lower: the program for a mesh, a `jax.stages.Lowered`.
    """

    run: Callable[[], list[tuple[str, np.ndarray]]]
    lower: Callable[[Mesh], Any]


def _meta(size: Size, by: Any, descent: type[strategy.Descent] = strategy.Descent) -> Case:
    class Trainer(meta.MetaTrainer):
        pass

    Trainer.descent = descent
    made = meta_trainer(size, by, Trainer)
    window = np.zeros((), "int32")

    def run() -> list[tuple[str, np.ndarray]]:
        logs = made._program(0)(made._episodes(0, 0), window)
        state = [(one.path, np.array(one.value)) for one in made._all_variables()]
        return [*((name, np.array(value)) for name, value in logs.items()), *state]

    def lower(mesh: Mesh) -> Any:
        episodes = made._episodes(0, 0)
        made.runner.on(mesh, _AXIS)
        shapes = backend.tree_map(made.runner.shape_of, (episodes, window))
        return made._program(0).lower(*shapes)

    return Case(run, lower)


def _fit(size: Size) -> Case:
    layers = [
        kb.layers.Dense(units, kernel_initializer=keras.initializers.GlorotUniform(number))
        for number, units in enumerate(size.sizes[1:])
    ]
    made = kb.Sequential([keras.Input(size.sizes[:1]), *layers], genome=kb.Genome.random(size.rule, 0, std=0.3))
    made.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    drawn = Gaussians(size.sizes[0], size.sizes[-1]).examples(random.seed_of(1), size.batch * size.tasks, "train")
    x, y = np.array(drawn[0]), np.argmax(np.array(drawn[1]), -1)

    def run() -> list[tuple[str, np.ndarray]]:
        logs = made.train_on_batch(x, y, return_dict=True)
        state = [(one.path, np.array(one.value)) for one in made.variables]
        return [*((name, np.array(value)) for name, value in logs.items()), *state]

    def lower(mesh: Mesh) -> Any:
        made._symbolic_build(data_batch=(x[:2], y[:2]))
        kinds = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
        state = made._get_jax_state(**dict.fromkeys(kinds, True))
        runner = backend.Runner()
        runner.on(mesh, _AXIS)
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        held = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole), state)
        return jax.jit(made.train_step).lower(held, jax.tree.map(runner.shape_of, (x, y)))

    return Case(run, lower)


def _by(kind: Any, size: Size) -> Case:
    return _meta(size, estimator(kind, size))


CASES: dict[str, Callable[[Size], Case]] = {
    "fit": _fit,
    **{name: functools.partial(_by, kind) for name, kind in ESTIMATORS.items()},
}


# Wrong on purpose: verify.py must refuse each.


class _Unreduced(strategy.Descent):
    """Goes by the tasks of the first device alone."""

    def step(self, family: int, estimator: Any, episodes: Any, seed: Array, window: Array, copies: bool) -> Any:
        own = backend.tree_map(lambda array: array[: array.shape[0] // self.runner.shares], episodes)
        return super().step(family, estimator, own, seed, window, copies)


class _Printing(strategy.Descent):
    """Says something from inside the step."""

    def step(self, family: int, estimator: Any, episodes: Any, seed: Array, window: Array, copies: bool) -> Any:
        jax.debug.print("window {}", window)
        return super().step(family, estimator, episodes, seed, window, copies)


class _Python(strategy.Descent):
    """Calls Python from inside the step."""

    def step(self, family: int, estimator: Any, episodes: Any, seed: Array, window: Array, copies: bool) -> Any:
        x = episodes["x"]
        doubled = jax.pure_callback(lambda x: 2 * np.asarray(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return super().step(family, estimator, {**episodes, "x": doubled}, seed, window, copies)


LARGE = Size(sizes=(8, 65536, 4), batch=65536, tasks=8)

CONTROLS: dict[str, Callable[[Size], Case]] = {
    "unreduced": lambda size: _meta(size, estimator(meta.Unroll, size), _Unreduced),
    "printing": lambda size: _meta(size, estimator(meta.Unroll, size), _Printing),
    "python": lambda size: _meta(size, estimator(meta.Unroll, size), _Python),
    "large": lambda size: _fit(LARGE),
}


def execute(name: str, size: Size, cores: int) -> dict[str, Any]:
    """Runs a step on one CPU device and on several.

    Returns:
        The largest difference of what it gives and of the variables after it, relative to the
        largest number of each, with its name; and the number of devices.
    """
    build = {**CASES, **CONTROLS}[name]
    results = []
    for devices in (None, keras.distribution.list_devices("cpu")[:cores]):
        layout = None if devices is None else keras.distribution.DataParallel(devices=devices)
        keras.distribution.set_distribution(layout)
        keras.utils.set_random_seed(0)
        results.append(build(size).run())
    far = []
    for (label, one), (_, several) in zip(*results, strict=True):
        if label.endswith(("evolution_B", "seed_generator_state")):  # eigenvectors of equal eigenvalues are free to turn
            continue
        largest = float(np.max(np.abs(one), initial=0.0))
        difference = float(np.max(np.abs(one.astype("float64") - several), initial=0.0))
        if not np.isfinite(difference):
            far.append((float("inf"), label))  # the largest of all, which NaN is not
        else:
            far.append((difference / largest if difference else 0.0, label))
    return {"from_one_device": max(far), "devices": cores}


def compile_for(name: str, size: Size, kind: str, cores: int) -> dict[str, Any]:
    """Compiles a step with libtpu.

    Args:
        name: of the step.
        size: its size.
        kind: of chip, one of `xla.CHIPS`.
        cores: number of devices.

    Returns:
        An `xla.report`, and floating-point operations (those in a loop count once).

    Raises:
        ValueError: if the program calls back to the host.
    """
    chip = CHIPS[kind]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topologies[cores])
    lowered = {**CASES, **CONTROLS}[name](size).lower(Mesh(np.array(topology.devices[:cores]), (_AXIS,)))
    callback = _CALLBACK.search(lowered.as_text())
    if callback:
        raise ValueError(f"The program calls back to the host: {callback[0]}.")
    begin = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - begin
    found = report(chip, seconds, program.memory_analysis(), program.as_text())
    return {**found, "flops": float(program.cost_analysis()["flops"])}
