"""Fixtures of all tests, and what runs on which backend.

`KERAS_BACKEND=jax pytest tests` runs what needs no TensorFlow: the rest is left out here, in one
place.
"""

import gc
import os
import random

# Before TensorFlow or JAX is imported. Programs of tests run once or twice: LLVM need not make them
# fast.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"  # the last one counts
JAX = os.environ.get("KERAS_BACKEND") == "jax"
if JAX:
    os.environ["JAX_ENABLE_X64"] = "1"  # many tests compute in float64

import keras
import numpy as np
import pytest

# Files about TensorFlow alone (`tf.data`, `tf.distribute`, its graphs), files not ported yet, and
# those that run a backend in processes of their own.
collect_ignore = [
    "learners/test_single_output.py", "learners/test_same_learners.py", "learners/test_online.py",
    "learners/test_meta_learners.py", "learners/test_identity.py", "checks", "replicas.py", "core/test_losses.py",
    "core/test_singular.py", "genomes", "meta/test_estimates_on_jax.py", "meta/test_memorisation.py",
    "meta/test_meta_estimators.py", "meta/test_meta_trainer.py", "meta/test_on_arrays.py", "meta/test_warp.py",
    "models/test_on_tensorflow.py", "tasks/test_two_backends.py", "test_claims.py", "test_compiled.py",
    "test_examples.py", "test_files.py", "test_fuzz.py", "test_jax.py", "test_jax_meta.py", "test_notebooks.py",
    "test_readme.py", "test_site.py", "tpu", "training/test_distribution.py", "training/test_duties.py",
    "training/test_resume.py",
] if JAX else []  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same initial weights and orders of examples in every run."""
    if not JAX:
        keras.utils.set_random_seed(0)
        return
    random.seed(0)  # `set_random_seed` would import TensorFlow
    np.random.seed(0)  # noqa: NPY002


@pytest.fixture(autouse=True, scope="module")
def collected_once():
    """The garbage collector looks at the programs that a file leaves behind once, not ever
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
    """The dtype policy that a test is parametrised by (`indirect`)."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.fixture
def eagerly():
    """`tf.function` only calls its function: a few steps take less time than the making of a
    program."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
