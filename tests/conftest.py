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
    "test_arrays.py", "test_augment.py", "test_bilevel.py", "test_checks.py", "test_claims.py", "test_cli.py",
    "test_cma.py", "test_compare.py", "test_compiled.py", "test_datasets.py", "test_distribution.py", "test_duties.py",
    "test_episodes.py", "test_estimators.py", "test_examples.py", "test_files.py", "test_functions.py", "test_fuzz.py",
    "test_hypergradients.py", "test_identity.py", "test_images.py", "test_jax.py", "test_losses.py",
    "test_meta_estimators.py", "test_meta_learners.py", "test_meta_trainer.py", "test_mixture.py", "test_online.py",
    "test_pictures.py", "test_random.py", "test_readme.py", "test_resume.py", "test_sentinels.py", "test_sequential.py",
    "test_sequential_details.py", "test_sequential_training.py", "test_single_output.py", "test_singular.py",
    "test_tpu_train.py", "test_tpu_verify.py", "test_unroll.py", "test_warp.py", "test_zoo.py",
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
