"""The JAX backend, in processes of its own: fit, callbacks, files across backends, several devices."""

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


@pytest.mark.parametrize(("first", "second"), [("jax", "tensorflow"), ("tensorflow", "jax")])
def test_files_and_ten_steps_are_the_same_on_both_backends(tmp_path, first, second):
    run(first, "make", tmp_path)
    run(second, "check", tmp_path)


def test_what_people_do_with_a_model(tmp_path):
    run("jax", "features", tmp_path)


def test_four_devices_are_one(tmp_path):
    run("jax", "make", tmp_path)
    run("jax", "parallel", tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=4")


def test_a_genome_is_a_tree_of_arrays(tmp_path):
    run("jax", "core", tmp_path)


def test_random_integers_are_the_published_ones(tmp_path):
    run("jax", "philox", tmp_path)


def test_core_and_models_need_no_tensorflow(tmp_path):
    """A fresh interpreter in which importing TensorFlow fails."""
    hide = "import sys; sys.modules['tensorflow'] = None; sys.argv = ['x', 'features', sys.argv[1]];"
    code = f"{hide} import runpy; runpy.run_path({str(PROGRAMS)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
