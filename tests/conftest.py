"""Fixtures of all tests."""

import keras
import pytest


@pytest.fixture
def float64():
    """Models, losses and metrics compute in float64."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)
