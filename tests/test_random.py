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


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "draw",
    [lambda seed: random.normal(seed, (50,)), lambda seed: random.uniform(seed, (50,), -5.0, 5.0)],
    ids=["normal", "uniform with products that round"],
)
def test_equal_to_rounding_under_every_compiler(draw, jit):
    compiled = tf.function(draw, jit_compile=jit)(SEED).numpy()
    np.testing.assert_allclose(compiled, draw(SEED).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DRAWS)
def test_a_seed_is_all_there_is(name):
    first = DRAWS[name](SEED).numpy()
    random.normal(SEED, (3,))
    tf.random.set_seed(99)
    again = random.fold_in(random.seed_of(tf.constant(7, tf.int64)), 3)
    np.testing.assert_array_equal(DRAWS[name](again).numpy(), first)
    assert not np.array_equal(DRAWS[name](random.fold_in(random.seed_of(7), 4)).numpy(), first)
    assert not np.array_equal(DRAWS[name](random.fold_in(random.seed_of(8), 3)).numpy(), first)


def test_types_shapes_and_ranges():
    assert random.seed_of(5).numpy().tolist() == [0, 5]
    assert random.bits(SEED, (2, 3)).dtype == tf.uint32
    for drawn in (random.uniform(SEED, (2, 3)), random.normal(SEED, (2, 3))):
        assert (drawn.dtype, drawn.shape) == (tf.float32, (2, 3))
    assert random.uniform(SEED, ()).shape == random.integers(SEED, (), 4).shape == ()
    whole = random.integers(SEED, (1000,), 5)
    assert whole.dtype == tf.int32
    assert set(whole.numpy()) == set(range(5))
    assert not random.integers(SEED, (10,), 1).numpy().any()
    wide = random.uniform(SEED, (10_000,), -2.0, 6.0).numpy()
    assert -2.0 <= wide.min() < -1.9
    assert 5.9 < wide.max() < 6.0


def test_moments():
    flat = random.uniform(SEED, (200_000,)).numpy()
    assert flat.min() >= 0.0
    assert flat.max() < 1.0
    assert flat.mean() == pytest.approx(0.5, abs=0.003)
    assert flat.var() == pytest.approx(1 / 12, abs=0.001)
    bell = random.normal(SEED, (200_000,)).numpy()
    assert bell.mean() == pytest.approx(0.0, abs=0.01)
    assert bell.std() == pytest.approx(1.0, abs=0.01)
    assert np.mean(bell**3) == pytest.approx(0.0, abs=0.05)
    assert np.mean(bell**4) == pytest.approx(3.0, abs=0.1)
    assert np.mean(np.abs(bell) < 1.0) == pytest.approx(0.6827, abs=0.005)
    counts = np.bincount(random.integers(SEED, (90_000,), 9).numpy(), minlength=9)
    assert counts.min() > 9_500
    assert counts.sum() == 90_000


@pytest.mark.parametrize("size", [1, 2, 97])
def test_permutation_has_everything_once(size):
    assert sorted(random.permutation(SEED, size).numpy()) == list(range(size))


def test_permutations_are_equally_likely():
    draw = tf.function(lambda: tf.map_fn(lambda n: random.permutation(random.fold_in(SEED, n), 3), tf.range(3000)))
    found, counts = np.unique(draw().numpy(), axis=0, return_counts=True)
    assert len(found) == 6
    assert counts.min() > 400
    assert counts.max() < 600


def test_streams_of_neighbouring_seeds_are_unrelated():
    drawn = [random.normal(random.fold_in(random.seed_of(0), number), (20_000,)).numpy() for number in range(4)]
    drawn += [random.normal(random.seed_of(number), (20_000,)).numpy() for number in range(4)]  # roots, unfolded
    table = np.corrcoef(drawn)
    assert np.abs(table - np.eye(8)).max() < 0.03
    shifted = np.corrcoef(np.array(drawn)[:, 1:], np.array(drawn)[:, :-1])  # nor is one the other, moved on
    assert np.abs(shifted - np.eye(16)).max() < 0.03
    swapped = (
        random.bits(random.fold_in(random.seed_of(0), 1, 2), (4,)),
        random.bits(random.fold_in(random.seed_of(0), 2, 1), (4,)),
    )
    assert not np.array_equal(*swapped)


def test_each_fold_is_another_seed():
    root = random.seed_of(0)
    paths = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1,)]
    assert len({random.fold_in(root, *numbers).numpy().tobytes() for numbers in paths}) == 7
    np.testing.assert_array_equal(random.fold_in(root, 4, 9), random.fold_in(random.fold_in(root, 4), 9))


@pytest.mark.parametrize("jit", [None, False, True])
@pytest.mark.parametrize("size", [1, 3, 4, 6, 641])
def test_rows_are_those_of_the_whole_draw_bit_for_bit(size, jit):
    def rows(seed, numbers):
        return random.bits_of_rows(seed, numbers, size)

    draw = rows if jit is None else tf.function(rows, jit_compile=jit)
    seed, numbers = random.seed_of(7), tf.constant([8, 0, 3])
    np.testing.assert_array_equal(draw(seed, numbers), tf.gather(random.bits(seed, (9, size)), numbers))
    whole, part = random.normal(seed, (9, size, 2)), random.normal(seed, (9, size, 2), numbers)
    np.testing.assert_allclose(part, tf.gather(whole, numbers), rtol=1e-6, atol=1e-7)  # a logarithm and a cosine later
