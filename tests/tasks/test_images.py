"""Images as tasks: episodes follow from seed and number alone, and splits are disjoint."""

import keras
import numpy as np
import pytest
from keras import ops
from on_backend import compiled
from task_harness import arrays, rows, same, specs, take

from keras_blur import random, tasks
from keras_blur.tasks.images import _prime_up_to, resized

SHAPE = {"steps": 3, "batch": 8, "query": 10}


@pytest.fixture(scope="module")
def digits():
    return tasks.images("digits")


def test_shapes_are_static(digits):
    shapes = {"x": (3, 8, 64), "y": (3, 8, 10), "query_x": (10, 64), "query_y": (10, 10)}
    assert specs(digits.dataset(0, **SHAPE)) == {name: (shape, "float32") for name, shape in shapes.items()}


def test_an_episode_follows_from_seed_and_number(digits):
    whole = take(digits.dataset(5, **SHAPE), 6)
    assert same(take(digits.dataset(5, **SHAPE, start=4), 1)[0], whole[4])
    shards = [take(digits.dataset(5, **SHAPE, start=shard, stride=2), 3) for shard in range(2)]
    assert all(same(shards[number % 2][number // 2], episode) for number, episode in enumerate(whole))
    assert not same(whole[0], whole[1])
    assert not same(take(digits.dataset(6, **SHAPE), 1)[0], whole[0])


def test_start_of_a_variable_is_read_when_the_stream_starts(digits):
    number = keras.Variable(0, dtype="int32", trainable=False)
    stream = digits.dataset(5, **SHAPE, start=number)
    for value in (4, 2):  # each time that it is started
        number.assign(value)
        assert same(take(stream, 1)[0], take(digits.dataset(5, **SHAPE, start=value), 1)[0])


def test_splits_share_no_image_and_cover_the_set(digits):
    seen = {split: rows(np.round(x * 1e4)) for split, (x, _) in digits._arrays.items()}
    assert [len(x) for x, _ in digits._arrays.values()] == [1294, 143, 360]
    assert not seen["train"] & seen["validation"]
    assert not (seen["train"] | seen["validation"]) & seen["test"]
    for split in ("train", "validation", "test"):
        (episode,) = take(digits.dataset(1, steps=2, batch=40, query=40, split=split), 1)
        drawn = rows(np.round(np.concatenate([episode["x"].reshape(-1, 64), episode["query_x"]]) * 1e4))
        assert drawn <= seen[split]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_order_without_repeats_for_any_count(digits, split):
    prime = digits.available(split)
    assert prime == {"train": 1291, "validation": 139, "test": 359}[split]
    index = {row.tobytes(): number for number, row in enumerate(digits._arrays[split][0])}
    orders = []
    for number, count in enumerate((2, 17, prime - 1, prime)):
        x, _ = digits.examples(random.seed_of(number), count, split)
        orders.append([index[row.tobytes()] for row in ops.convert_to_numpy(x)])
        assert len(set(orders[-1])) == count
    assert len({order[0] for order in orders}) > 1


@pytest.mark.parametrize(("limit", "prime"), [(2, 2), (3, 3), (4, 3), (9, 7), (100, 97), (121, 113), (1294, 1291)])
def test_largest_prime(limit, prime):
    assert _prime_up_to(limit) == prime


def test_a_split_of_one_image():
    with pytest.raises(ValueError, match=r"A split must have at least 2 examples\. Received: 1"):
        _prime_up_to(1)


def test_images_are_equal_under_every_compiler():
    many = tasks.images("digits", relabel=True, permute=True, project=12)

    def draw(seed):
        return many.episode(seed, **SHAPE)

    seed = random.seed_of(3)
    eager, fast = arrays(draw(seed)), arrays(compiled(draw)(seed))
    for name, value in eager.items():
        assert value.shape == fast[name].shape
        np.testing.assert_allclose(fast[name], value, atol=1e-5)


def test_query_is_not_in_the_support(digits):
    for episode in take(digits.dataset(2, steps=10, batch=64, query=128), 3):
        support, query = rows(episode["x"].reshape(-1, 64)), rows(episode["query_x"])
        assert len(support) == 640  # none twice
        assert not support & query


def test_labels_are_signs_of_the_right_class(digits):
    images, labels = digits._arrays["train"]
    known = {row.tobytes(): label for row, label in zip(images, labels, strict=True)}
    (episode,) = take(digits.dataset(0, **SHAPE), 1)
    assert set(np.unique(episode["y"])) == {-1.0, 1.0}
    assert (episode["y"].sum(-1) == 2 - 10).all()
    for x, y in zip(episode["query_x"], episode["query_y"], strict=True):
        assert known[x.tobytes()] == y.argmax()


def test_relabelling_is_one_permutation_an_episode():
    relabelled = tasks.images("digits", relabel=True)
    images, labels = relabelled._arrays["train"]
    known = {row.tobytes(): label for row, label in zip(images, labels, strict=True)}
    found = []
    for episode in take(relabelled.dataset(0, steps=6, batch=32, query=64), 4):
        x = np.concatenate([episode["x"].reshape(-1, 64), episode["query_x"]])
        y = np.concatenate([episode["y"].reshape(-1, 10), episode["query_y"]]).argmax(-1)
        pairs = {(int(known[row.tobytes()]), int(label)) for row, label in zip(x, y, strict=True)}
        assert len(pairs) == 10
        assert len({after for _, after in pairs}) == 10
        found.append(tuple(sorted(pairs)))
    assert len(set(found)) == 4


def test_pixels_permuted_projected_cropped_resized():
    plain = take(tasks.images("digits").dataset(0, **SHAPE), 1)[0]
    permuted = take(tasks.images("digits", permute=True).dataset(0, **SHAPE), 1)[0]
    np.testing.assert_allclose(np.sort(permuted["query_x"], -1), np.sort(plain["query_x"], -1))
    assert not np.array_equal(permuted["query_x"], plain["query_x"])
    assert same({"y": permuted["y"]}, {"y": plain["y"]})
    before, after = (np.concatenate([e["x"].reshape(-1, 64), e["query_x"]]) for e in (plain, permuted))
    np.testing.assert_array_equal(np.unique(before, axis=1), np.unique(after, axis=1))  # one order for all the images
    projected = take(tasks.images("digits", project=20).dataset(0, **SHAPE), 1)[0]
    assert projected["x"].shape == (3, 8, 20)
    assert np.linalg.matrix_rank(np.linalg.lstsq(plain["x"].reshape(-1, 64), projected["x"].reshape(-1, 20))[0]) == 20
    seed = random.seed_of(8)
    matrix = ops.convert_to_numpy(random.normal(random.fold_in(seed, 3), (64, 20)))
    unseen, seen = (
        ops.convert_to_numpy(tasks.images("digits", project=side).examples(seed, 9, "train")[0]) for side in (None, 20)
    )
    np.testing.assert_allclose(seen, unseen.reshape(9, 64) @ matrix / 8.0, atol=1e-5)
    cropped = tasks.images("digits", crop=4, standardize=False)._arrays["test"][0]
    full = tasks.images("digits", standardize=False)._arrays["test"][0]
    np.testing.assert_array_equal(cropped.reshape(-1, 4, 4), full.reshape(-1, 8, 8)[:, 2:6, 2:6])
    halved = tasks.images("digits", size=4, standardize=False)._arrays["test"][0]
    np.testing.assert_allclose(halved.reshape(-1, 4, 4), full.reshape(-1, 4, 2, 4, 2).mean((2, 4)), atol=1e-6)
    assert 0.0 <= full.min() < full.max() == 1.0
    both = tasks.images("digits", crop=6, size=3, standardize=False)  # cropped first, then resized
    inner = full.reshape(-1, 8, 8)[:, 1:7, 1:7].reshape(-1, 3, 2, 3, 2).mean((2, 4))
    np.testing.assert_allclose(both._arrays["test"][0].reshape(-1, 3, 3), inner, atol=1e-6)
    assert (both.shape, both.name) == ((3, 3, 1), "digits 3x3, 10 classes")


def test_standardised_by_the_training_images(digits):
    every = np.concatenate([digits._arrays["train"][0], digits._arrays["validation"][0]])
    assert every.mean() == pytest.approx(0.0, abs=1e-4)
    assert every.std() == pytest.approx(1.0, abs=1e-3)
    plain = tasks.images("digits", standardize=False)._arrays
    training = np.concatenate([plain["train"][0], plain["validation"][0]])
    for split in plain:
        expected = (plain[split][0] - training.mean()) / training.std()
        np.testing.assert_allclose(digits._arrays[split][0], expected, atol=1e-3)


def test_classes_in_the_order_given():
    some = tasks.images("digits", classes=[7, 2], standardize=False)
    assert some.outputs == 2
    reference = tasks.images("digits", standardize=False)
    seven = reference._arrays["test"][0][reference._arrays["test"][1] == 7]
    own, label = some._arrays["test"]
    assert (label == 0).sum() == len(seven)
    assert own.shape == (len(label), 64)
    np.testing.assert_array_equal(own[label == 0], seven)
    two = reference._arrays["test"][0][reference._arrays["test"][1] == 2]
    np.testing.assert_array_equal(own[label == 1], two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": [1]}, "`classes` must be at least two"),
        ({"classes": [1, 1]}, "`classes` must be at least two"),
        ({"classes": [0, 10]}, r"from 0 to 9. Received: classes=\[0, 10\]"),
        ({"classes": [-1, 3]}, "from 0 to 9"),
        ({"size": 0}, "`size` must be a positive integer. Received: size=0"),
        ({"crop": 0}, "`crop` must be a positive integer"),
        ({"crop": 9}, "`crop` must be at most 8"),
        ({"project": -1}, "`project` must be a positive integer"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.images("digits", **options)


def test_episode_errors(digits):
    with pytest.raises(ValueError, match="`split` must be one of"):
        digits.episode(random.seed_of(0), **SHAPE, split="all")
    said = r"^`batch` and `query` .* must .* at most 1291, .* in the split 'train' of digits .* batch=1200, query=128"
    with pytest.raises(ValueError, match=said):
        digits.episode(random.seed_of(0), steps=1, batch=1200, query=128)
    with pytest.raises(ValueError, match=said):  # the same words from a stream
        take(digits.dataset(0, steps=1, batch=1200, query=128), 1)


def test_a_long_support_goes_through_the_examples_again(digits):
    (episode,) = take(digits.dataset(2, steps=30, batch=64, query=128), 1)
    support, query = episode["x"].reshape(-1, 64), rows(episode["query_x"])
    assert len(rows(support)) == 1291 - 128
    np.testing.assert_array_equal(support[: 1920 - 1163], support[1163:])
    assert not rows(support) & query


def test_a_split_that_is_none_is_named_at_once(digits):
    with pytest.raises(ValueError, match=r"`split` must be one of.*split='tests'"):
        digits.dataset(0, steps=1, batch=2, query=2, split="tests")


@pytest.mark.parametrize(("before", "after"), [((28, 28), 10), ((28, 28), 20), ((8, 8), 3), ((9, 14), 7), ((5, 5), 9)])
def test_images_are_resized_by_area_as_tensorflow_does(before, after):
    x = np.random.default_rng(0).uniform(0.0, 255.0, (6, *before, 3)).astype(np.float32)
    resize = pytest.importorskip("tensorflow").image.resize
    theirs = resize(x / 255.0, (after, after), method="area").numpy()
    np.testing.assert_allclose(resized(x, after, 255.0), theirs, atol=1e-5)
