"""Random numbers that follow from a seed alone, under any compiler."""

import hashlib
import math
import statistics

import numpy as np
import pytest
from keras import ops
from on_backend import in_a_graph

from keras_blur import random

SEED = random.fold_in(random.seed_of(7), 3)
DRAWS = {
    "bits": lambda seed: random.bits(seed, (50,)),
    "uniform": lambda seed: random.uniform(seed, (50,)),
    "uniform of a power of two": lambda seed: random.uniform(seed, (50,), -1.0, 3.0),
    "uniform with products that round": lambda seed: random.uniform(seed, (50,), 0.1, 5.0),
    "normal": lambda seed: random.normal(seed, (50,)),
    "integers": lambda seed: random.integers(seed, (50,), 9),
    "permutation": lambda seed: random.permutation(seed, 50),
    "fold_in": lambda seed: random.fold_in(seed, 1, 2),
}
# SHA-256 of the draws' bytes: what this file draws on TensorFlow, on JAX and on every machine.
KNOWN = {
    "bits": "1f398e56ea27966c",
    "uniform": "f0ed44582ea45678",
    "uniform of a power of two": "ba6c4c4891e22cfe",
    "uniform with products that round": "7cd548326d4154c8",
    "normal": "9010ff9c1cc5ede5",
    "integers": "39c104ec43b943ed",
    "permutation": "492e0fd593b28231",
    "fold_in": "be7cde6a9c35f2cc",
}


def array(value):
    return ops.convert_to_numpy(value)


@pytest.mark.parametrize("jit", [None, False, True])
@pytest.mark.parametrize("name", DRAWS)
def test_equal_on_both_backends_and_under_every_compiler_bit_for_bit(name, jit):
    draw = DRAWS[name] if jit is None else in_a_graph(DRAWS[name], jit)
    assert hashlib.sha256(array(draw(SEED)).tobytes()).hexdigest()[:16] == KNOWN[name]


def test_the_table_of_quantiles_is_the_same_on_every_machine():
    table = random._quantiles()
    assert hashlib.sha256(table.tobytes()).hexdigest()[:16] == "ab68f8284e7a5870"
    assert table.astype("int64").sum() == 0
    assert np.mean((table / 2.0**random._POINT) ** 2) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("name", DRAWS)
def test_a_seed_is_all_there_is(name):
    first = array(DRAWS[name](SEED))
    random.normal(SEED, (3,))
    again = random.fold_in(random.seed_of(ops.array(7, "int32")), 3)
    np.testing.assert_array_equal(array(DRAWS[name](again)), first)
    assert not np.array_equal(array(DRAWS[name](random.fold_in(random.seed_of(7), 4))), first)
    assert not np.array_equal(array(DRAWS[name](random.fold_in(random.seed_of(8), 3))), first)


def test_types_shapes_and_ranges():
    assert array(random.seed_of(5)).tolist() == [0, 5]
    assert array(random.bits(SEED, (2, 3))).dtype == np.uint32
    for drawn in (random.uniform(SEED, (2, 3)), random.normal(SEED, (2, 3))):
        assert (array(drawn).dtype, drawn.shape) == (np.float32, (2, 3))
    assert array(random.uniform(SEED, ())).shape == array(random.integers(SEED, (), 4)).shape == ()
    whole = array(random.integers(SEED, (1000,), 5))
    assert whole.dtype == array(random.permutation(SEED, 5)).dtype == np.int32
    assert set(whole) == set(range(5))
    assert not array(random.integers(SEED, (10,), 1)).any()
    wide = array(random.uniform(SEED, (10_000,), -2.0, 6.0))
    assert -2.0 <= wide.min() < -1.9
    assert 5.9 < wide.max() < 6.0


@pytest.mark.parametrize("number", [2**31, np.int64(2**40), 1.5])
def test_seeds_are_integers_of_32_bits(number):
    with pytest.raises(ValueError, match=rf"A seed must be an integer that fits in 32 bits, .* Received: {number}"):
        random.seed_of(number)


@pytest.mark.parametrize("limit", [0, -3, 2**24 + 1])
def test_limits_are_those_that_hardly_bias(limit):
    with pytest.raises(ValueError, match=rf"`limit` must be from 1 to 2\*\*24. Received: limit={limit}"):
        random.integers(SEED, (2,), limit)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.0, math.inf), (math.nan, 1.0), (0.0, 1e-30), (0.0, 0.0)])
def test_bounds_are_finite_and_in_order(bounds):
    with pytest.raises(ValueError, match="`low` and `high` must be finite, in order"):
        random.uniform(SEED, (2,), *bounds)


@pytest.mark.parametrize(("low", "high"), [(0.1, 5.0), (-0.15, 0.15), (1e-6, 1.0 - 1e-6), (-9.0, -2.0), (0.0, 2 * math.pi)])
def test_a_range_is_met_to_rounding(low, high):
    unit = (array(random.bits(SEED, (5000,))) >> 8) * 2.0**-24
    drawn = array(random.uniform(SEED, (5000,), low, high))
    np.testing.assert_allclose(drawn, low + (high - low) * unit, rtol=2.0**-23, atol=2.0**-30 * max(-low, high))
    assert np.float32(low) <= drawn.min() < drawn.max() <= np.float32(high)


def test_moments():
    flat = array(random.uniform(SEED, (200_000,)))
    assert flat.min() >= 0.0
    assert flat.max() < 1.0
    assert flat.mean() == pytest.approx(0.5, abs=0.003)
    assert flat.var() == pytest.approx(1 / 12, abs=0.001)
    bell = array(random.normal(SEED, (1_000_000,))).astype("float64")
    assert bell.mean() == pytest.approx(0.0, abs=0.004)  # four standard deviations of each
    assert bell.var() == pytest.approx(1.0, abs=0.006)
    assert np.mean(bell**3) == pytest.approx(0.0, abs=0.016)
    assert np.mean(bell**4) == pytest.approx(3.0, abs=0.04)
    for size in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(size / math.sqrt(2.0))
        assert np.mean(np.abs(bell) > size) == pytest.approx(share, abs=4.0 * math.sqrt(share / 1_000_000))
    counts = np.bincount(array(random.integers(SEED, (90_000,), 9)), minlength=9)
    assert counts.min() > 9_500
    assert counts.sum() == 90_000


@pytest.mark.parametrize("size", [1, 2, 97])
def test_permutation_has_everything_once(size):
    assert sorted(array(random.permutation(SEED, size))) == list(range(size))


def test_permutations_are_equally_likely():
    found, counts = np.unique(array(random.permutation(SEED, 3, (3000,))), axis=0, return_counts=True)
    assert len(found) == 6
    assert counts.min() > 400
    assert counts.max() < 600


def test_streams_of_neighbouring_seeds_are_unrelated():
    drawn = [array(random.normal(random.fold_in(random.seed_of(0), number), (20_000,))) for number in range(4)]
    drawn += [array(random.normal(random.seed_of(number), (20_000,))) for number in range(4)]  # roots, unfolded
    table = np.corrcoef(drawn)
    assert np.abs(table - np.eye(8)).max() < 0.03
    shifted = np.corrcoef(np.array(drawn)[:, 1:], np.array(drawn)[:, :-1])  # nor is one the other, moved on
    assert np.abs(shifted - np.eye(16)).max() < 0.03
    swapped = (
        array(random.bits(random.fold_in(random.seed_of(0), 1, 2), (4,))),
        array(random.bits(random.fold_in(random.seed_of(0), 2, 1), (4,))),
    )
    assert not np.array_equal(*swapped)


def test_each_fold_is_another_seed():
    root = random.seed_of(0)
    paths = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1,)]
    assert len({array(random.fold_in(root, *numbers)).tobytes() for numbers in paths}) == 7
    np.testing.assert_array_equal(array(random.fold_in(root, 4, 9)), array(random.fold_in(random.fold_in(root, 4), 9)))


@pytest.mark.parametrize("jit", [None, False, True])
@pytest.mark.parametrize("size", [1, 3, 4, 6, 641])
def test_rows_are_those_of_the_whole_draw_bit_for_bit(size, jit):
    def rows(seed, numbers):
        return random.bits_of_rows(seed, numbers, size)

    draw = rows if jit is None else in_a_graph(rows, jit)
    seed, numbers = random.seed_of(7), ops.array([8, 0, 3], "int32")
    np.testing.assert_array_equal(array(draw(seed, numbers)), array(random.bits(seed, (9, size)))[[8, 0, 3]])
    whole, part = random.normal(seed, (9, size, 2)), random.normal(seed, (9, size, 2), numbers)
    np.testing.assert_array_equal(array(part), array(whole)[[8, 0, 3]])


@pytest.mark.parametrize(("beyond", "share"), [(4.0, 0.98), (5.0, 0.83)])
def test_tails_of_normal_numbers_have_the_share_that_is_said(beyond, share):
    """Exactly, over all pairs of quantiles."""
    table = random._quantiles().astype("int64")
    first_above = np.searchsorted(table, beyond * 2.0**28 - table, side="right")
    found = np.sum(len(table) - first_above) / len(table) ** 2
    assert found / statistics.NormalDist().cdf(-beyond) == pytest.approx(share, abs=0.005)
