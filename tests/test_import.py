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
    done = attempt(hide)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: keras_blur needs TensorFlow, which is not installed: pip install 'keras_blur[cpu]' (or [gpu], [tpu])."
    )


def test_wrong_backend_is_named():
    done = attempt("import keras_blur", KERAS_BACKEND="numpy")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: keras_blur needs the TensorFlow backend of Keras; the backend is 'numpy'.")


def test_import_is_silent():
    done = attempt("import keras_blur", TF_CPP_MIN_LOG_LEVEL="3")
    assert done.returncode == 0
    assert done.stdout == ""
