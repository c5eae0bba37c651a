"""Fixtures for all tests, and the choice of tests by backend.

`KERAS_BACKEND=jax pytest tests` runs the tests that need no TensorFlow. The others are excluded
here.
"""

import builtins
import gc
import os
import random

# Before TensorFlow or JAX is imported. Test programs run once or twice, so LLVM need not optimise
# them.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"  # the last one counts
JAX = os.environ.get("KERAS_BACKEND") == "jax"
if JAX:
    os.environ["JAX_ENABLE_X64"] = "1"  # many tests compute in float64

import keras
import numpy as np
import pytest

# Files that test TensorFlow only (`tf.data`, `tf.distribute`, its graphs), files not ported yet,
# and files that run a backend in separate processes.
collect_ignore = [
    "checks", "replicas.py", "core/test_losses.py", "core/test_singular.py", "core/test_stored_on_tensorflow.py",
    "meta/test_estimates_on_jax.py", "models/test_on_tensorflow.py", "test_claims.py", "test_compiled.py",
    "test_examples.py", "test_jax.py", "test_jax_meta.py", "test_notebooks.py", "test_readme.py", "test_site.py", "tpu",
    "training/test_distribution.py", "training/test_fit_loop.py",
] if JAX else []  # fmt: skip


def pytest_configure(config):
    """With `--jaxtyping-packages`, functions check arrays against their hints. Only type checkers
    import jaxtyping, so here the names in the hints become known to all modules."""
    if config.getoption("--jaxtyping-packages", None):
        import jaxtyping

        vars(builtins).update({name: getattr(jaxtyping, name) for name in ("Bool", "Float", "Int", "Shaped")})


@pytest.fixture(autouse=True)
def seeded():
    """Seeds each test, so that every run has the same initial weights and orders of examples."""
    if not JAX:
        keras.utils.set_random_seed(0)
        return
    random.seed(0)  # `set_random_seed` would import TensorFlow
    np.random.seed(0)  # noqa: NPY002


@pytest.fixture(autouse=True, scope="module")
def collected_once():
    """Collects garbage once after each file and then freezes the rest, so that it is not scanned
    again."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def float64():
    """Models, losses and metrics compute in float64."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


@pytest.fixture
def policy(request):
    """Sets the dtype policy by which a test is parametrised (`indirect`)."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.fixture
def eagerly():
    """Runs `tf.function` eagerly, since a few steps take less time than tracing."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
