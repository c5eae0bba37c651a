"""Random numbers that follow from a seed alone, under any compiler."""

import numpy as np
import pytest
import tensorflow as tf

from keras_blur import random

SEED = random.fold_in(random.seed_of(7), 3)
DRAWS = {
    "bits": lambda seed: random.bits(seed, (50,)),
    "uniform": lambda seed: random.uniform(seed, (50,), -1.0, 3.0),
    "integers": lambda seed: random.integers(seed, (50,), 9),
    "permutation": lambda seed: random.permutation(seed, 50),
    "fold_in": lambda seed: random.fold_in(seed, 1, 2),
}


@pytest.mark.parametrize("name", DRAWS)
def test_equal_under_every_compiler_bit_for_bit(name):
    draw = DRAWS[name]
    eager = draw(SEED).numpy()
    for jit in (False, True):
        np.testing.assert_array_equal(tf.function(draw, jit_compile=jit)(SEED).numpy(), eager)


def test_normal_is_equal_to_rounding_under_every_compiler():
    eager = random.normal(SEED, (50,)).numpy()
    compiled = tf.function(lambda seed: random.normal(seed, (50,)), jit_compile=True)(SEED).numpy()
    np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-6)


def test_moments():
    flat = random.uniform(SEED, (200_000,)).numpy()
    assert flat.min() >= 0.0
    assert flat.max() < 1.0
    assert flat.mean() == pytest.approx(0.5, abs=0.003)
    assert flat.var() == pytest.approx(1 / 12, abs=0.001)
    bell = random.normal(SEED, (200_000,)).numpy()
    assert bell.mean() == pytest.approx(0.0, abs=0.01)
    assert bell.std() == pytest.approx(1.0, abs=0.01)
    assert np.mean(bell**4) == pytest.approx(3.0, abs=0.1)
    counts = np.bincount(random.integers(SEED, (90_000,), 9).numpy(), minlength=9)
    assert counts.min() > 9_500
    assert counts.sum() == 90_000


def test_permutation_has_everything_once():
    assert sorted(random.permutation(SEED, 97).numpy()) == list(range(97))


def test_streams_of_neighbouring_seeds_are_unrelated():
    drawn = [random.normal(random.fold_in(random.seed_of(0), number), (20_000,)).numpy() for number in range(4)]
    table = np.corrcoef(drawn)
    assert np.abs(table - np.eye(4)).max() < 0.03
    swapped = (
        random.bits(random.fold_in(random.seed_of(0), 1, 2), (4,)),
        random.bits(random.fold_in(random.seed_of(0), 2, 1), (4,)),
    )
    assert not np.array_equal(*swapped)
