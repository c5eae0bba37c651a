"""The JAX backend, in processes of its own: fit, callbacks, files across backends, several
devices."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("jax")

PROGRAMS = pathlib.Path(__file__).parent / "jax_programs.py"


def run(backend, program, folder, **environment):
    """A program's output; it fails with what the program printed."""
    done = subprocess.run(
        [sys.executable, str(PROGRAMS), program, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def made_by_jax(tmp_path_factory):
    """A folder with the models of `make`."""
    folder = tmp_path_factory.mktemp("jax")
    run("jax", "make", folder)
    return folder


@pytest.mark.slow
def test_files_and_ten_steps_of_jax_are_the_same_on_tensorflow(made_by_jax):
    run("tensorflow", "check", made_by_jax)


@pytest.mark.slow
def test_files_and_ten_steps_of_tensorflow_are_the_same_on_jax(tmp_path):
    run("tensorflow", "make", tmp_path)
    run("jax", "check", tmp_path)


@pytest.mark.slow
def test_hypergradients_and_what_they_teach_are_the_same_on_both_backends(tmp_path):
    run("tensorflow", "make_hypergradients", tmp_path)
    run("jax", "check_hypergradients", tmp_path)


@pytest.mark.slow
def test_four_devices_are_one(made_by_jax):
    run("jax", "parallel", made_by_jax, XLA_FLAGS=f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4")


def test_core_and_models_need_no_tensorflow(tmp_path):
    """What people do with a model, a genome as a tree of arrays, published random integers, linear
    systems and mixed states, in an interpreter in which importing TensorFlow fails."""
    programs = "features,core,philox,systems,stored,mixing"
    hide = f"import sys; sys.modules['tensorflow'] = None; sys.argv = ['x', '{programs}', sys.argv[1]];"
    code = f"{hide} import runpy; runpy.run_path({str(PROGRAMS)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
