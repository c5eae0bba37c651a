"""Tasks on the user's own arrays: splits without common examples, and meta-training on them."""

import numpy as np
import pytest
from keras import ops
from task_harness import rows, same, take

from keras_blur import tasks
from keras_blur.core import random
from keras_blur.tasks.base import SPLITS

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 5))
Y = (X[:, 0] > 0).astype(int) + (X[:, 1] > 1)
SHAPE = {"steps": 2, "batch": 4, "query": 6}


def splits_of(own):
    return {split: own._arrays[split] for split in SPLITS}


@pytest.mark.parametrize(("shares", "sizes"), [((0.6, 0.2, 0.2), (72, 24, 24)), ((2, 1, 1), (60, 30, 30))])
def test_splits_share_no_example_and_cover_all(shares, sizes):
    own = tasks.arrays(X, Y, shares=shares, standardize=False)
    found = splits_of(own)
    assert tuple(len(x) for x, _ in found.values()) == sizes
    assert set.union(*(rows(x) for x, _ in found.values())) == rows(X.astype("float32"))
    labels = {row.tobytes(): label for row, label in zip(X.astype("float32"), Y, strict=True)}
    for x, y in found.values():
        assert [labels[row.tobytes()] for row in x] == y.tolist()
    assert (own.features, own.outputs, own.kind) == (5, 3, "classes")


def test_equal_inputs_are_in_one_split():
    found = splits_of(tasks.arrays(np.concatenate([X, X, -0.0 * X[:1], 0.0 * X[:1]]), np.concatenate([Y, Y, [0, 0]])))
    seen = [rows(x) for x, _ in found.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 121
    assert sum(len(x) for x, _ in found.values()) == 242


def test_the_split_follows_from_the_seed():
    first, again, other = (splits_of(tasks.arrays(X, Y, seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(first["test"][0], again["test"][0])
    assert not np.array_equal(first["test"][0], other["test"][0])


def test_the_split_keeps_the_shuffle_of_the_same_seed():
    """Data sorted by class and shuffled by numpy's generator of the seed of the split."""
    order = np.random.default_rng(0).permutation(600)
    own = tasks.arrays(np.arange(600)[order, None], np.sort(np.arange(600) % 10)[order], standardize=False, seed=0)
    assert {len(np.unique(labels)) for _, labels in splits_of(own).values()} == {10}


def test_each_example_is_drawn():
    """Splits of 24 and 12 examples, whose largest primes are 23 and 11, sorted by class."""
    own = tasks.arrays(np.arange(48)[:, None], np.sort(np.arange(48) % 6), shares=(2, 1, 1), standardize=False)
    for split, (x, _) in splits_of(own).items():
        drawn = [take_rows(own, seed, own.available(split), split) for seed in range(80)]
        assert all(len(set(one)) == own.available(split) for one in drawn)
        assert set().union(*drawn) == set(x[:, 0])
        assert not np.all(np.diff(x[:, 0]) > 0)


def take_rows(own, seed, count, split):
    return ops.convert_to_numpy(own.examples(random.seed_of(seed), count, split)[0])[:, 0].tolist()


def test_episodes_are_of_their_split_and_query_and_support_differ():
    own = tasks.arrays(X, Y)
    for split in SPLITS:
        for episode in take(own.dataset(3, **SHAPE, split=split), 3):
            support, query = rows(episode["x"].reshape(-1, 5)), rows(episode["query_x"])
            assert support | query <= rows(own._arrays[split][0])
            assert not support & query
            assert set(np.unique(episode["y"])) == {-1.0, 1.0}
    assert same(take(own.dataset(3, **SHAPE, start=2), 1)[0], take(own.dataset(3, **SHAPE), 3)[2])


def test_inputs_are_standardized_over_the_training_split():
    x, _ = tasks.arrays(100 * X + 7, Y)._arrays["train"]
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-4)


def test_values_stay_as_they_are():
    own = tasks.arrays(X, X[:, :2] * 3, kind="values", standardize=False)
    (episode,) = take(own.dataset(0, **SHAPE), 1)
    np.testing.assert_allclose(episode["query_y"], 3 * episode["query_x"][:, :2], rtol=1e-6)
    assert (own.outputs, own.kind) == (2, "values")
    assert tasks.arrays(X, X[:, 0], kind="values").outputs == 1


def test_options_of_image_tasks():
    images = RNG.integers(0, 256, (60, 8, 8), dtype="uint8")
    assert tasks.arrays(images, np.arange(60) % 4, size=4).features == 16
    assert tasks.arrays(images[..., None], np.arange(60) % 4, project=3).features == 3
    own = tasks.arrays(X, Y, relabel=True, permute=True, classes=4)
    assert own.outputs == 4
    label_of = {round(float(x.sum()), 3): label for x, label in zip(*own._arrays["train"], strict=True)}  # in any order
    found = set()
    for episode in take(own.dataset(0, steps=1, batch=20, query=20), 8):
        truth = [label_of[round(float(x.sum()), 3)] for x in episode["query_x"]]
        pairs = set(zip(truth, episode["query_y"].argmax(-1).tolist(), strict=True))
        assert len(pairs) == len(set(truth))  # a class has one output in an episode
        found |= pairs
    assert len(found) > 4  # and others in others


@pytest.mark.parametrize("y", [Y.astype(t) for t in ("bool", "int8", "uint64", "float16", ">i4")] + [Y[:, None], Y.tolist()])
def test_labels_of_any_form(y):
    own = tasks.arrays(X.astype("float16"), y)
    assert own.outputs == int(np.max(y)) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, Y[:5]), "`y` must have as many examples as `x`, 120"),
        ((X * np.nan, Y), "`x` must be finite"),
        ((X, Y - 1), "`y` must hold integers from 0"),
        ((X, Y + 0.5), "`y` must hold integers from 0.*fractions"),
        ((X, np.eye(3)[Y]), "`y` must have shape"),
        ((X, Y, {"classes": 2}), "`y` must hold integers from 0 to 1"),
        ((X, Y, {"kind": "bits"}), "`kind` must be one of 'classes', 'values'"),
        ((X, Y, {"kind": "values", "relabel": True}), "`relabel` and `classes` must be left out"),
        ((X, Y, {"shares": (1, 0, 1)}), "`shares` must be 3 positive"),
        ((X, Y, {"shares": (1, 1)}), "`shares` must be 3 positive"),
        ((X, Y, {"shares": (100, 1, 1)}), "`shares` must leave each split 2 or more examples"),
        ((X, Y, {"size": 3}), "`x` must be images"),
        ((X, Y, {"size": 0}), "`size` must be an integer of at least 1"),
        ((X, Y, {"project": True}), "`project` must be an integer of at least 1"),
        ((X[:, 0], Y), "`x` must have a batch axis and features"),
        (([X], Y), "`y` must have as many examples"),
        ((1e300 * X, Y, {"standardize": False}), "`x` must be in the range of float32"),
        ((1e20 * X, Y), "`x` must have a standard deviation in the range of float32"),
        ((X, Y * 2**33), "`y` must hold integers from 0 to 2147483646. Received: 17179869184"),
        ((X, 1e300 * Y, {"kind": "values"}), "`y` must be in the range of float32"),
        ((X, Y, {"seed": -1}), "`seed` must be an integer of at least 0. Received: seed=-1"),
        ((X, Y, {"seed": 1.5}), "`seed` must be an integer"),
        ((X, Y, {"relabel": "no"}), "`relabel` must be True or False. Received: relabel='no'"),
        ((X, Y, {"permute": 1}), "`permute` must be True or False"),
        ((X, Y, {"standardize": None}), "`standardize` must be True or False"),
        ((X, X[:, None], {"kind": "values"}), r"`y` must have shape \(batch,\) or \(batch, outputs\)"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    *data, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        tasks.arrays(*data, **options)
