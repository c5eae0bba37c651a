"""Meta-training and bilevel training on JAX: the numbers of TensorFlow, one device or several,
resumed to the bit."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from keras import ops

from keras_blur import Genome, backend

pytest.importorskip("jax")

META, BILEVEL = (pathlib.Path(__file__).with_name(name) for name in ("jax_meta.py", "jax_bilevel.py"))
# Those of a group share a process.
FAST, SLOW = ("unroll", "cma"), ("recomputed", "truncated", "es", "pes", "warpgrad", "offline")
OF_BILEVEL = ["one step", "difference", "evograd", "cut", "sampler", "scaled"]
HIDE = "import sys; sys.modules['tensorflow'] = None; "


def start(backend="jax", script=META, float64=False, **asked):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_ENABLE_X64": str(int(float64))}
    if "devices" in asked:
        devices = f"--xla_force_host_platform_device_count={asked['devices']}"
        environment["XLA_FLAGS"] = f"{environment['XLA_FLAGS']} {devices}"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), json.dumps({"epochs": 2, **asked})],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def result(process):
    out, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def alone():
    """Results of one device by case, each group computed once."""
    known = {}

    def of(*cases, **asked):
        key = json.dumps([cases, asked])
        if key not in known:
            known[key] = result(start(cases=cases, **asked))
        return known[key]

    return of


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def assert_close(found, wanted, tolerance):
    size = max(np.abs(value).max() for value in wanted["outer"].values())
    for name, value in wanted["outer"].items():
        np.testing.assert_allclose(found["outer"][name], value, rtol=tolerance, atol=tolerance * size, err_msg=name)
    for name, values in wanted["history"].items():
        np.testing.assert_allclose(found["history"][name], values, rtol=10 * tolerance, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(found["score"], wanted["score"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [FAST, SLOW])
def test_jax_learns_what_tensorflow_learns(alone, cases):
    wanted = result(start("tensorflow", cases=cases))
    for case in cases:
        # CMA-ES computes in float64 on TensorFlow and in float32 on JAX.
        assert_close(alone(*cases)[case], wanted[case], 1e-4 if case == "cma" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [FAST, SLOW])
def test_four_devices_split_tasks_and_are_one(alone, cases):
    four = result(start(cases=cases, devices=4))
    for case, one in alone(*cases).items():
        assert (one["devices"], four[case]["devices"]) == (1, 4)
        assert (one["work"], four[case]["work"]) == (([[4, 9]], [[4, 3]]) if case == "cma" else ([[4, 2]], [[1, 2]]))
        assert_close(four[case], one, 1e-6)


@pytest.mark.slow
def test_four_devices_split_members_where_tasks_do_not_fit(alone):
    cases, options = ("unroll", "pes", "offline"), {"tasks": 1, "members": 4}
    four = result(start(cases=cases, devices=4, **options))
    for case, one in alone(*cases, **options).items():
        assert (one["work"], four[case]["work"]) == ([[1, 4]], [[1, 1]])
        assert_close(four[case], one, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("of_tasks", [1, 4])
def test_four_devices_give_copies_the_networks_of_one(alone, of_tasks):
    cases, options = ("unroll", "warpgrad"), {"tasks": of_tasks, "members": 4, "copies": True}
    four, tensorflow = result(start(cases=cases, devices=4, **options)), result(start("tensorflow", cases=cases, **options))
    for case, one in alone(*cases, **options).items():
        assert four[case]["work"] == ([[1, 1]] if of_tasks == 1 else [[1, 4]])
        assert_close(four[case], one, 1e-6)
        assert_close(one, tensorflow[case], 1e-5)
        values = [np.array(value).reshape(4, -1) for value in one["outer"].values()]
        assert (case == "unroll") == any((value[1:] != value[:-1]).any(axis=1).all() for value in values)


@pytest.mark.slow
def test_the_command_line_takes_virtual_devices(tmp_path):
    options = ["--estimator=cma", "--population=5", "--hidden=8", "--unroll=3", "--epochs=1", "--steps_per_epoch=2"]

    def genome(backend, devices):
        path = tmp_path / f"{backend}-{devices}.json"
        found = subprocess.run(
            [sys.executable, "-m", "keras_blur", "meta-train", *options, f"--devices={devices}", f"--genome={path}"],
            env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr[-3000:]
        return Genome.load(path)

    one, *others = genome("tensorflow", 1), genome("tensorflow", 2), genome("jax", 2)
    for other in others:
        for name, value in one.arrays.items():
            np.testing.assert_allclose(other.arrays[name], value, atol=1e-4, err_msg=name)


def test_more_devices_than_there_are():
    ops.ones(1)  # from now on, the CPU is in use
    with (
        pytest.raises(ValueError, match=r"must be at most the \d that there are. Received: devices=64"),
        backend.on_devices(64),
    ):
        pass


@pytest.mark.slow
def test_two_processes_are_one(alone):
    port = free_port()
    both = [start(cases=FAST, worker=number, workers=2, port=port) for number in range(2)]
    for found in map(result, both):
        for case, one in alone(*FAST).items():
            assert found[case]["devices"] == 2
            assert_close(found[case], one, 1e-6)


@pytest.mark.slow
def test_a_resumed_run_is_an_unbroken_one(tmp_path):
    path = str(tmp_path / "run.weights.h5")
    result(start(cases=["truncated"], epochs=1, checkpoint=path))
    resumed, unbroken = (result(start(cases=["truncated"], **own))["truncated"] for own in ({"checkpoint": path}, {}))
    assert resumed["outer"] == unbroken["outer"]
    assert resumed["score"] == unbroken["score"]


def assert_same(found, wanted, case, tolerance):
    """Weights, relative to the largest, and metrics, which are float32."""
    limit = tolerance * max(np.abs(own).max() for own in wanted["learned"])
    for place, (one, other) in enumerate(zip(found["learned"], wanted["learned"], strict=True)):
        np.testing.assert_allclose(one, other, rtol=0, atol=limit, err_msg=f"{case}, weight {place}")
    for name, column in wanted["history"].items():
        np.testing.assert_allclose(found["history"][name], column, rtol=1e-5, err_msg=f"{case}, {name}")


@pytest.mark.slow
def test_bilevel_training_on_four_devices_is_that_on_one():
    options = {"script": BILEVEL, "cases": OF_BILEVEL, "float64": True}
    wanted, found = map(result, [start(**options), start(**options, devices=4)])
    for case in OF_BILEVEL:
        assert (wanted[case]["examples"], found[case]["examples"]) == ([32], [8] * 4)
        assert_same(found[case], wanted[case], case, 1e-12)


@pytest.mark.slow
def test_layers_that_see_the_whole_batch_are_the_same_on_four_devices():
    """Dropout and batch normalisation, which Keras computes in float32 here."""
    options = {"script": BILEVEL, "cases": ["layers"]}
    wanted, found = (result(process)["layers"] for process in [start(**options), start(**options, devices=4)])
    assert_same(found, wanted, "layers", 1e-6)


@pytest.mark.slow
def test_bilevel_training_in_two_processes_is_that_in_one():
    port, options = free_port(), {"script": BILEVEL, "cases": ["one step", "sampler"], "float64": True}
    wanted, *both = map(result, [start(**options), *(start(**options, worker=n, workers=2, port=port) for n in range(2))])
    for found in both:
        for case in options["cases"]:
            assert found[case]["examples"] == [16]
            assert_same(found[case], wanted[case], case, 1e-12)


@pytest.mark.slow
def test_a_resumed_bilevel_run_on_four_devices_is_an_unbroken_one(tmp_path):
    options = {"script": BILEVEL, "cases": ["sampler"], "devices": 4}
    path = str(tmp_path / "run.weights.h5")
    unbroken = start(**options)
    result(start(**options, epochs=1, checkpoint=path))
    resumed = result(start(**options, checkpoint=path))["sampler"]
    assert resumed["bits"] == result(unbroken)["sampler"]["bits"]
    assert len(resumed["history"]["loss"]) == 1  # the epoch that was left


def test_the_command_meta_trains_without_tensorflow(tmp_path):
    genome, table = tmp_path / "genome.json", tmp_path / "run.json"
    flags = ["meta-train", "--epochs=2", "--steps_per_epoch=3", "--hidden=8", "--members=2", "--batch_size=8",
             "--query_size=16", "--unroll=2", "--validate=2", f"--genome={genome}", f"--json={table}"]  # fmt: skip
    code = f"{HIDE} from keras_blur import cli; sys.exit(cli.run({flags!r}))"
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "running query accuracy of the members" in done.stdout
    assert json.loads(genome.read_text())["rule"]["states"] == 2
    assert len(json.loads(table.read_text())["history"]["val_accuracy"]) == 2
