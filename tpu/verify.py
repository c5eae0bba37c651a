"""Checks training steps for TPU without one: traced, lowered, executed on CPU devices, compiled for
every chip.

    python tpu/verify.py [--backend jax] [--case NAME] [--cores N] [--chip KIND] [--json FILE]

On JAX, for each step (of `fit`; of meta-training by each estimator) and each number of cores:

1. executed on so many CPU devices, among which the compiler splits the work: gives what one device
   gives;
2. lowered for each chip, without a call to the host; compiled by libtpu for v4, v5e, v5p and v6e,
   each in a process of its own, and fits into the chip's memory.

With `--backend tensorflow`, for each step and each number of cores, which are logical CPU devices:

1. traced under `TPUStrategy`; every operation has a TPU kernel, every shape is static;
2. lowered by TensorFlow's TPU kernels;
3. what was lowered is executed on so many CPU devices with a real all-reduce, and gives what
   `MirroredStrategy` gives, what one device gives, and the same variables on all cores;
4. compiled by libtpu for v4, v5e, v5p and v6e, each in a process of its own, and fits into the
  chip's memory.

Exit status 0 only if everything holds. Steps that are wrong on purpose (`--case undivided` and so
on) must be refused: tests/tpu/test_tpu_verify.py. It needs the environment of
requirements-verify.txt. What it cannot show: README.md here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from absl import app, flags

NAMES = ("fit", "unroll", "truncated", "es", "pes", "cma", "warpgrad", "bilevel", "famus")
CONTROLS = ("undivided", "unreduced", "printing", "python", "large")  # wrong on purpose: each must be refused
ON_TENSORFLOW = ("warpgrad", "bilevel", "famus", "undivided")  # checked there alone
KINDS = ("v4", "v5e", "v5p", "v6e")
FROM_MIRRORED, FROM_ONE_DEVICE = 1e-6, 1e-4  # of the largest number among what has one scale

_BACKEND = flags.DEFINE_enum("backend", "jax", ["jax", "tensorflow"], "Backend of Keras.")
_CASE = flags.DEFINE_multi_enum("case", None, [*NAMES, *CONTROLS], "Steps to check; all by default.")
_CORES = flags.DEFINE_multi_integer("cores", [1, 4, 8], "Numbers of cores.", lower_bound=1)
_CHIP = flags.DEFINE_multi_enum("chip", None, KINDS, "Chips to compile for; all by default.")
_SIZE = flags.DEFINE_list("size", [], "Sizes in place of the small ones, as in sizes=784-128-10,batch=128,steps=20.")
_EXECUTE = flags.DEFINE_boolean("execute", True, "Whether to execute on CPU devices; large steps may only be compiled.")
_FOLDER = flags.DEFINE_string("folder", None, "Folder for lowered programs; a temporary one by default.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_KERNELS = flags.DEFINE_string("kernels", None, "Only write the names of all operations with a TPU kernel to this file.")
_STAGE = flags.DEFINE_enum("stage", None, ["program", "execute", "compile"], "Internal: what this process does.")

# libtpu asks Google's metadata server for what it is given here, and finds no chip.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
}


# Stages, each in a process of its own.


def make_program(name: str, cores: int, folder: pathlib.Path) -> dict[str, Any]:
    """Traces, cuts out and lowers a step; says what it must give."""
    import keras
    import pretend
    import program
    import tensorflow as tf
    from cases import CASES, CONTROLS

    from keras_blur.compiling import without_tpu_kernel

    pretend.logical_cpus(cores)
    build = {**CASES, **CONTROLS}[name]

    def built(strategy: Any) -> Any:
        keras.utils.set_random_seed(0)
        with strategy.scope():
            return build(_size())

    case = built(pretend.tpu_strategy(cores))
    found = program.cut(case.step.get_concrete_function(*case.arguments), case.arguments, case.variables, cores)
    unknown = without_tpu_kernel(found.traced)
    if unknown:
        raise ValueError(f"No TPU kernel for {', '.join(unknown)}.")
    moving = [str(shape) for shape in found.traced.structured_outputs if not shape.shape.is_fully_defined()]
    if moving:
        raise ValueError(f"Shapes are not static: {', '.join(moving)}.")
    (folder / "lowered.hlo").write_bytes(found.lowered())
    arrays: dict[str, Any] = {f"argument_{number}": value for number, value in enumerate(found.arguments)}
    if _EXECUTE.value:
        devices = [f"CPU:{number}" for number in range(cores)]
        mirrored = tf.distribute.MirroredStrategy(devices, tf.distribute.ReductionToOneDevice())
        for label, strategy in (("mirrored", mirrored), ("alone", tf.distribute.get_strategy())):
            case = built(strategy)
            outputs = tf.nest.flatten(case.step(*case.arguments))
            for number, output in enumerate(outputs):
                arrays[f"{label}_output_{number}"] = output.numpy()
            for number in found.written:
                arrays[f"{label}_variable_{number}"] = np.stack(_copies(case.variables[number]))
        np.savez(folder / "arrays.npz", **arrays)
    return {
        "sums": found.sums,
        "outputs": found.outputs,
        "written": found.written,
        "names": [case.variables[number].path for number in found.written],
        "groups": [_group(case.variables[number].path) for number in found.written],
        "adds_up": [case.variables[number].aggregation == "sum" for number in found.written],
    }


def _size() -> Any:
    """The sizes that the flags ask for."""
    from sizes import Size

    given = dict(pair.split("=") for pair in _SIZE.value)
    unknown = set(given) - {field.name for field in dataclasses.fields(Size)}
    if unknown:
        raise ValueError(f"--size has no {', '.join(unknown)}")
    numbers: dict[str, Any] = {name: int(value) for name, value in given.items() if name != "sizes"}
    if "sizes" in given:
        numbers["sizes"] = tuple(map(int, given["sizes"].split("-")))
    return Size(**numbers)


def _group(path: str) -> str:
    """Which variables have one scale: a layer's synapses; carried states; what is learned outside,
    clipped by one norm, and an optimizer's slots for it, parts of one gradient."""
    carried = re.fullmatch(r"(.*/carried_\d+)_\d+", path)
    outer = re.fullmatch(r"(.*/outer)_\w+", path)
    synapses = re.fullmatch(r"(.*)/\w*(kernel|bias)", path)
    slots = re.fullmatch(r".*_(momentum|velocity)", path)
    return next((found[1] for found in (carried, outer, synapses, slots) if found), path)


def _copies(variable: Any) -> list[np.ndarray]:
    """A variable's value on each replica."""
    inner = variable.value
    return [copy.numpy() for copy in getattr(inner, "values", [inner])]


def run_program(cores: int, folder: pathlib.Path, made: dict[str, Any]) -> dict[str, Any]:
    """Executes what was lowered; says how far it is from what it must give."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={cores}"
    import xla

    arrays = np.load(folder / "arrays.npz")
    count = sum(name.startswith("argument_") for name in arrays)
    results = xla.execute((folder / "lowered.hlo").read_bytes(), [arrays[f"argument_{n}"] for n in range(count)])
    outputs, variables = results[: made["outputs"]], results[made["outputs"] :]
    largest: dict[str, float] = {}
    for number, group in zip(made["written"], made["groups"], strict=True):
        own = float(np.max(np.abs(arrays[f"mirrored_variable_{number}"].astype("float64")), initial=0.0))
        largest[group] = max(own, largest.get(group, 0.0))
    mirrored, alone, apart = [], [], []
    for number, output in enumerate(outputs):
        wanted = arrays[f"mirrored_output_{number}"]
        mirrored.append((_difference(output[0], wanted, float(np.max(np.abs(wanted)))), f"result {number}"))
    for number, name, group, adds_up, value in zip(
        made["written"], made["names"], made["groups"], made["adds_up"], variables, strict=True
    ):
        if not adds_up and (value != value[:1]).any():
            apart.append(name)
        if name.endswith("evolution_B"):  # eigenvectors of equal eigenvalues are free to turn; C and D say the rest
            continue
        mirrored.append((_difference(value, arrays[f"mirrored_variable_{number}"], largest[group]), name))
        if not adds_up:  # a metric's copies each have a part, or each the whole
            alone.append((_difference(value[0], arrays[f"alone_variable_{number}"][0], largest[group]), name))
    return {"from_mirrored": max(mirrored), "from_one_device": max(alone), "apart": apart}


def _difference(got: np.ndarray, wanted: np.ndarray, largest: float) -> float:
    """The largest difference, relative to a number."""
    if got.shape != wanted.shape or not np.isfinite(wanted.astype("float64")).all():
        return float("inf")
    difference = float(np.max(np.abs(got.astype("float64") - wanted.astype("float64")), initial=0.0))
    if not np.isfinite(difference):
        return float("inf")
    return difference and difference / max(largest, 1e-30)


def write_kernels(path: str) -> None:
    """Writes the names of all operations that TensorFlow's registry has a TPU kernel for."""
    import tensorflow as tf
    from tensorflow.python.framework import kernels

    spec = tf.TensorSpec(())  # kernels are registered when something is lowered for the first time
    tf.function(lambda x: x + 1, jit_compile=True).experimental_get_compiler_ir(spec)(stage="hlo", platform_name="TPU")
    every = kernels.get_all_registered_kernels().kernel
    names = sorted({kernel.op for kernel in every if kernel.device_type == "XLA_TPU_JIT"})
    write(path, {"tensorflow": tf.__version__, "operations": names})


def write(path: str, document: Any) -> None:
    """Writes a JSON file."""
    os.environ.update(NO_TPU)  # before TensorFlow, which the library imports
    from keras_blur.files import write_text

    write_text(path, json.dumps(document, indent=1) + "\n")


def stage() -> None:
    """What a process of its own does: reads and writes reports in the folder."""
    folder, cores = pathlib.Path(_FOLDER.value or "."), _CORES.value[0]
    report, case = _STAGE.value, str(_CASE.value and _CASE.value[0])
    if _BACKEND.value == "jax":
        if report == "execute":
            os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={cores}"
        import ahead

        if report == "execute":
            found = ahead.execute(case, _size(), cores)
        else:
            report = str(_CHIP.value and _CHIP.value[0])
            found = ahead.compile_for(case, _size(), report, cores)
    elif _STAGE.value == "program":
        found = make_program(case, cores, folder)
    elif _STAGE.value == "execute":
        found = run_program(cores, folder, json.loads((folder / "program.json").read_text()))
    else:
        import xla

        report = str(_CHIP.value and _CHIP.value[0])
        found = xla.compile_for((folder / "lowered.hlo").read_bytes(), report, cores)
    (folder / f"{report}.json").write_text(json.dumps(found))


# The command.


class Refused(Exception):
    """A check that did not hold."""


def run_stage(what: str, folder: pathlib.Path, case: str, cores: int, chip: str | None = None) -> dict[str, Any]:
    """A stage's report.

    Raises:
        Refused: if its process failed, with the line that says why.
    """
    command = [
        sys.executable, __file__, f"--stage={what}", f"--folder={folder}", f"--cores={cores}", f"--case={case}",
        f"--size={','.join(_SIZE.value)}", f"--execute={_EXECUTE.value}", f"--backend={_BACKEND.value}",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, f"--chip={chip}"] if chip else command, capture_output=True, text=True,
        env={**os.environ, **NO_TPU, "KERAS_BACKEND": _BACKEND.value},
    )  # fmt: skip
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line or "RESOURCE_EXHAUSTED" in line or "Check failed" in line]
        raise Refused(f"{chip or what}: {(telling or lines or ['no message'])[-1][:300]}")
    return json.loads((folder / f"{chip or what}.json").read_text())


def check(case: str, cores: int, chips: list[str], folder: pathlib.Path) -> dict[str, Any]:
    """All that is checked of a step.

    Raises:
        Refused: at the first check that does not hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    found = []
    if _BACKEND.value == "tensorflow":
        report = run_stage("program", folder, case, cores)
        found.append(f"{report['sums']:2d} cross-replica sums")
        if cores > 1 and not report["sums"]:
            raise Refused("program: no sum over the replicas")
    if _EXECUTE.value:
        ran = run_stage("execute", folder, case, cores)
        report |= ran
        if ran.get("apart"):
            raise Refused(f"execute: variables differ between cores: {', '.join(ran['apart'][:5])}")
        for what, most in (("one_device", FROM_ONE_DEVICE), ("mirrored", FROM_MIRRORED)):
            if f"from_{what}" not in ran:
                continue
            far, name = ran[f"from_{what}"]
            words = what.replace("_", " ")
            if not far <= most:
                raise Refused(f"execute: {far:.1e} from {words} in {name}, at most {most:.0e} allowed")
            found.append(f"{far:.0e} from {words}")
    print(f"{case:>10} x {cores}: {'; '.join(found)}", flush=True)
    report["chips"] = {}
    for chip in chips:
        built = run_stage("compile", folder, case, cores, chip)
        needed = sum(built[part] for part in ("arguments", "results", "temporary", "code"))
        if needed > built["available"]:
            raise Refused(f"{chip}: needs {needed / 2**30:.2f} of {built['available'] / 2**30:.0f} GiB")
        print(
            f"{chip:>14}: compiled in {built['seconds']:.1f} s, {built['reductions']} all-reduce, "
            f"{needed / 2**20:.1f} MiB of {built['available'] / 2**30:.0f} GiB"
            + (f", {built['flops']:.2g} operations" if "flops" in built else ""),
            flush=True,
        )  # fmt: skip
        report["chips"][chip] = built | {"needed": needed}
    return report


def main(argv: list[str]) -> None:
    del argv
    if _KERNELS.value:
        os.environ.update(NO_TPU)
        write_kernels(_KERNELS.value)
        return
    if _STAGE.value:
        stage()
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(_FOLDER.value or temporary)
        reports, failed = {}, 0
        left_out = ON_TENSORFLOW if _BACKEND.value == "jax" else ()
        for case in _CASE.value or [name for name in NAMES if name not in left_out]:
            if case in left_out:
                raise app.UsageError(f"--case={case} is checked with --backend tensorflow alone")
            for cores in _CORES.value:
                try:
                    reports[f"{case} x {cores}"] = check(case, cores, _CHIP.value or list(KINDS), folder / f"{case}-{cores}")
                except Refused as refused:
                    failed += 1
                    print(f"{case:>10} x {cores}: REFUSED, {refused}", flush=True)
        print(f"{len(reports)} steps hold, {failed} refused")
        if _JSON.value:
            write(_JSON.value, reports)
        sys.exit(bool(failed))


if __name__ == "__main__":
    app.run(main)
