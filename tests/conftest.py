"""Fixtures of all tests, and what runs on which backend.

`KERAS_BACKEND=jax pytest tests` runs what needs no TensorFlow: the rest is left out here, in one place.
"""

import os

JAX = os.environ.get("KERAS_BACKEND") == "jax"
if JAX:
    os.environ["JAX_ENABLE_X64"] = "1"  # before JAX is imported: many tests compute in float64

import keras
import pytest

# Files about what needs TensorFlow: learners, tasks, meta-learning and its trainers, the command line, `tf.data`, TPUs;
# and those that run JAX in processes of their own.
collect_ignore = [
    "bilevel", "bilevel_table.py", "checks", "cli", "replicas.py",
    "core/test_losses.py", "core/test_singular.py", "genomes", "learners", "meta",
    "models/test_identity.py", "models/test_sequential.py", "models/test_sequential_details.py",
    "models/test_sequential_training.py", "report", "tasks", "test_claims.py", "test_compiled.py", "test_examples.py",
    "test_files.py", "test_fuzz.py", "test_jax.py", "test_random.py", "test_readme.py", "tpu", "training",
] if JAX else []  # fmt: skip


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
