"""What `import keras_blur` says where it cannot work; each in a process of its own."""

import os
import subprocess
import sys


def attempt(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_missing_tensorflow_names_the_install_command():
    hide = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'tensorflow' else find(name, *rest)\n"
        "import keras_blur"
    )
    done = attempt(hide, KERAS_BACKEND="tensorflow")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: keras_blur needs tensorflow, which is not installed: pip install 'keras_blur[cpu]' (or [gpu], [tpu]); "
        "or, for JAX, pip install 'keras_blur[jax]' and set KERAS_BACKEND=jax."
    )


def test_chosen_backend_that_is_missing_names_the_install_command():
    hide = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'jax' else find(name, *rest)\n"
        "import keras_blur"
    )
    last = attempt(hide, KERAS_BACKEND="jax").stderr.strip().splitlines()[-1]
    assert last == "ImportError: keras_blur needs jax, which is not installed: pip install 'keras_blur[jax]'."


def test_wrong_backend_is_named():
    done = attempt("import keras_blur", KERAS_BACKEND="numpy")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: keras_blur needs the TensorFlow or the JAX backend of Keras; the backend is 'numpy'."
    )


def test_import_is_silent():
    done = attempt("import keras_blur", TF_CPP_MIN_LOG_LEVEL="3")
    assert done.returncode == 0
    assert done.stdout == ""
