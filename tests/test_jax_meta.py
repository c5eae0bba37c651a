"""Meta-training on JAX: the numbers of TensorFlow, one device or several, resumed to the bit."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("jax")

SCRIPT = pathlib.Path(__file__).with_name("jax_meta.py")
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("recomputed", "truncated", "es", "pes")]
CASES = ["unroll", "cma", *SLOW]
HIDE = "import sys; sys.modules['tensorflow'] = None; "


def start(backend="jax", **asked):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("JAX_ENABLE_X64", None)
    if "devices" in asked:
        devices = f"--xla_force_host_platform_device_count={asked['devices']}"
        environment["XLA_FLAGS"] = f"{environment['XLA_FLAGS']} {devices}"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(SCRIPT), json.dumps({"epochs": 2, **asked})],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def result(process):
    out, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def alone():
    """Results of one device by case, each computed once."""
    known = {}

    def of(case):
        if case not in known:
            known[case] = result(start(case=case))
        return known[case]

    return of


def assert_close(found, wanted, tolerance):
    size = max(np.abs(value).max() for value in wanted["outer"].values())
    for name, value in wanted["outer"].items():
        np.testing.assert_allclose(found["outer"][name], value, rtol=tolerance, atol=tolerance * size, err_msg=name)
    for name, values in wanted["history"].items():
        np.testing.assert_allclose(found["history"][name], values, rtol=10 * tolerance, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(found["score"], wanted["score"], rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_jax_learns_what_tensorflow_learns(alone, case):
    # CMA-ES computes in float64 on TensorFlow and in float32 on JAX.
    assert_close(alone(case), result(start("tensorflow", case=case)), 1e-4 if case == "cma" else 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_four_devices_are_one(alone, case):
    four = result(start(case=case, devices=4))
    assert (alone(case)["devices"], four["devices"]) == (1, 4)
    assert_close(four, alone(case), 1e-6)


@pytest.mark.parametrize("case", ["unroll", "cma"])
def test_two_processes_are_one(alone, case):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    both = [start(case=case, worker=number, workers=2, port=port) for number in range(2)]
    for found in map(result, both):
        assert found["devices"] == 2
        assert_close(found, alone(case), 1e-6)


def test_a_resumed_run_is_an_unbroken_one(alone, tmp_path):
    path = str(tmp_path / "run.weights.h5")
    result(start(case="truncated", epochs=1, checkpoint=path))
    resumed = result(start(case="truncated", checkpoint=path))
    assert resumed["outer"] == alone("truncated")["outer"]
    assert resumed["score"] == alone("truncated")["score"]


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
