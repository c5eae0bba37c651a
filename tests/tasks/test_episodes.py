"""Few-shot episodes: classes of the splits are apart, support and query are balanced and
disjoint."""

import os

import numpy as np
import pytest
from keras import ops
from on_backend import JAX, compiled, in_a_graph
from task_harness import arrays, rows, same, specs, take

from keras_blur import random, tasks
from keras_blur.tasks.datasets import Images, load_images
from keras_blur.tasks.episodes import EpisodeTasks, _split_by_class

SHAPE = {"steps": 3, "batch": 15, "query": 12}
SPLITS = ("train", "validation", "test")


def numbered(sizes, ways=2, shots=1):
    """Classes of the given sizes in each split; an image is two numbers, its class and its place in
    it."""
    splits = {}
    for place, split in enumerate(SPLITS):
        labels = np.repeat(np.arange(len(sizes)) + 100 * place, sizes)
        order = np.random.default_rng(place).permutation(len(labels))
        images = np.stack([labels, np.concatenate([np.arange(size) for size in sizes])], 1).astype(np.float32)
        splits[split] = images[order], labels[order]
    return EpisodeTasks(splits, ways, shots, "numbers")


def images_of(classes):
    """The images of a split."""
    return ops.convert_to_numpy(classes.images)


def write_set(folder, train, test, shape=(6, 6, 3), kin=None):
    """A prepared set with the given labels, an image each, and the feature `kin`, a function of a
    label, if there is one."""
    tf, tfds = map(pytest.importorskip, ("tensorflow", "tensorflow_datasets"))
    rng = np.random.default_rng(0)
    parts = {
        split: {"image": rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8), "label": np.array(labels)}
        for split, labels in (("train", train), ("test", test))
    }
    features = {"image": tfds.features.Image(shape=shape), "label": tfds.features.ClassLabel(num_classes=100)}
    if kin:
        features["kin"] = tfds.features.Tensor(shape=(), dtype=np.int64)
        for part in parts.values():
            part["kin"] = np.array([kin(label) for label in part["label"]])
    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny_letters",
        version="1.0.0",
        data_dir=str(folder),
        split_datasets={split: tf.data.Dataset.from_tensor_slices(columns) for split, columns in parts.items()},
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
    )
    return parts


@pytest.fixture(scope="module")
def digits():
    return tasks.episodes("digits", ways=3, shots=5)


def test_shapes_are_static(digits):
    shapes = {"x": (3, 15, 64), "y": (3, 15, 3), "query_x": (12, 64), "query_y": (12, 3)}
    assert specs(digits.dataset(0, **SHAPE)) == {name: (shape, "float32") for name, shape in shapes.items()}
    assert (digits.features, digits.outputs, digits.kind) == (64, 3, "classes")
    assert digits.name == "digits 8x8, 3 ways, 5 shots"


def test_an_episode_follows_from_seed_and_number(digits):
    whole = take(digits.dataset(5, **SHAPE), 6)
    assert same(take(digits.dataset(5, **SHAPE, start=4), 1)[0], whole[4])
    shards = [take(digits.dataset(5, **SHAPE, start=shard, stride=2), 3) for shard in range(2)]
    assert all(same(shards[number % 2][number // 2], episode) for number, episode in enumerate(whole))
    assert len({episode["x"].tobytes() for episode in whole}) == 6
    assert not same(take(digits.dataset(6, **SHAPE), 1)[0], whole[0])


def test_episodes_are_equal_under_every_compiler(digits):
    def draw(seed):
        return digits.episode(seed, **SHAPE)

    program = compiled(draw)
    for number in range(3):
        seed = random.seed_of(number)
        assert same(arrays(draw(seed)), arrays(program(seed)))


def test_splits_of_digits_share_no_class_and_cover_the_set(digits):
    classes = [digits.classes(split) for split in SPLITS]
    assert [len(some) for some in classes] == [6, 2, 2]
    assert sorted(sum(classes, ())) == list(range(10))
    # Fixed by the set alone, so that other episodes of it test on classes that these never trained
    # on.
    assert classes == [tasks.episodes("digits", ways=2, shots=1, size=4).classes(split) for split in SPLITS]


def test_images_have_the_labels_of_their_split():
    plain = tasks.episodes("digits", ways=2, shots=3, standardize=False)
    loaded = load_images("digits")
    x = np.concatenate([loaded.x_train, loaded.x_test]).reshape(-1, 64).astype(np.float32) / 16.0
    label = dict(zip(map(bytes, x), np.concatenate([loaded.y_train, loaded.y_test]), strict=True))
    for split in SPLITS:
        for episode in take(plain.dataset(0, **SHAPE, split=split), 4):
            images = np.concatenate([episode["x"].reshape(-1, 64), episode["query_x"]])
            outputs = np.concatenate([episode["y"].reshape(-1, 2), episode["query_y"]]).argmax(1)
            assert 0.0 <= images.min() < images.max() == 1.0
            pairs = {(int(label[bytes(image)]), int(output)) for image, output in zip(images, outputs, strict=True)}
            assert len(pairs) == len({one for one, _ in pairs}) == 2  # a class an output
            assert {one for one, _ in pairs} <= set(plain.classes(split))


@pytest.mark.parametrize("query", [12, 13])
def test_support_and_query_are_balanced_and_apart(digits, query):
    for episode in take(digits.dataset(1, steps=1, batch=15, query=query), 5):
        assert set(np.unique(episode["y"])) == {-1.0, 1.0}
        assert (episode["y"].sum(-1) == 2 - 3).all()
        support = episode["y"][0].argmax(1)
        assert np.bincount(support).tolist() == [5, 5, 5]
        asked = np.bincount(episode["query_y"].argmax(1), minlength=3)
        assert asked.sum() == query
        assert np.ptp(asked) <= 1
        assert len(rows(episode["x"][0])) == 15  # none twice
        assert len(rows(episode["query_x"])) == query
        assert not rows(episode["x"][0]) & rows(episode["query_x"])


@pytest.mark.parametrize(("steps", "batch"), [(10, 15), (7, 4), (2, 40)])
def test_batches_go_through_the_support_again(digits, steps, batch):
    seed = random.seed_of(3)
    once = arrays(digits.episode(seed, steps=1, batch=15, query=9))
    many = arrays(digits.episode(seed, steps=steps, batch=batch, query=9))
    place = np.arange(steps * batch) % 15
    for name in ("x", "y"):
        np.testing.assert_array_equal(many[name].reshape(steps * batch, -1), once[name][0][place])
    np.testing.assert_array_equal(many["query_x"], once["query_x"])


def test_every_class_and_every_image_is_drawn_alike():
    some = numbered([3, 5, 8, 4], ways=2, shots=2)
    draw = in_a_graph(lambda seed: some.examples(seed, 6, "test")[0], JAX)
    drawn = np.concatenate([draw(random.seed_of(number)) for number in range(1500)]).astype(int)
    assert (np.bincount(drawn[:, 0] - 200) / len(drawn)) == pytest.approx([0.25] * 4, abs=0.03)
    for label, size in enumerate([3, 5, 8, 4]):
        fraction = np.bincount(drawn[drawn[:, 0] - 200 == label, 1]) / (drawn[:, 0] - 200 == label).sum()
        assert fraction == pytest.approx([1 / size] * size, abs=0.05)


def test_a_class_can_be_used_up():
    some = numbered([5, 4], ways=2, shots=1)
    assert some.available("train") == 8
    for number in range(20):
        x, y = arrays(some.examples(random.seed_of(number), 8, "train"))
        assert len(rows(x)) == 8
        assert len(set(zip(x[:, 0], y.argmax(1), strict=True))) == 2


def test_a_set_with_test_classes_of_its_own_keeps_them():
    def some(train, test):
        def images(labels):
            return np.array(labels, np.float32)[:, None, None, None]

        return Images("any", images(train), np.array(train), images(test), np.array(test), 30, 255.0)

    own = _split_by_class(some(np.arange(20).repeat(2), np.arange(20, 28)))
    assert [len(set(own[split][1])) for split in SPLITS] == [15, 5, 8]
    assert set(own["test"][1]) == set(range(20, 28))
    shared = _split_by_class(some(np.arange(20).repeat(2), np.arange(15, 25)))
    assert [len(set(shared[split][1])) for split in SPLITS] == [15, 5, 5]
    assert sum(len(shared[split][1]) for split in SPLITS) == 50  # pooled, none lost
    for splits in (own, shared):
        labels = [set(splits[split][1]) for split in SPLITS]
        assert sum(map(len, labels)) == len(set().union(*labels))
        for x, y in splits.values():
            np.testing.assert_array_equal(x[:, 0, 0, 0], y)


@pytest.mark.filterwarnings("ignore")  # tensorflow_datasets' own, while it writes
def test_prepared_set_in_colour_resized(tmp_path):
    parts = write_set(tmp_path, [0, 1, 2, 3] * 300, [7, 8, 9] * 4)  # more than one reading
    some = tasks.episodes("tiny_letters", ways=3, shots=2, size=3, standardize=False, data_dir=tmp_path)
    assert some.features == 9
    assert some.classes("test") == (7, 8, 9)
    assert sorted(some.classes("train") + some.classes("validation")) == [0, 1, 2, 3]
    grey = parts["test"]["image"].astype(np.float64).mean(-1).reshape(12, 3, 2, 3, 2).mean((2, 4)).reshape(12, 9) / 255.0
    (episode,) = take(some.dataset(0, steps=1, batch=6, query=6, split="test"), 1)
    label = {}
    for image, output in zip(
        np.concatenate([episode["x"][0], episode["query_x"]]),
        np.concatenate([episode["y"][0], episode["query_y"]]).argmax(1),
        strict=True,
    ):
        distance = np.abs(grey - image).max(1)
        assert distance.min() < 1e-6
        label.setdefault(int(output), set()).add(int(parts["test"]["label"][distance.argmin()]))
    assert sorted(label) == [0, 1, 2]
    assert sorted(one for found in label.values() for one in found) == [7, 8, 9]
    assert tasks.episodes("tiny_letters", ways=2, data_dir=tmp_path).features == 36  # left as they are


@pytest.mark.filterwarnings("ignore")
def test_classes_of_an_episode_are_of_one_group(tmp_path):
    """Groups of ten classes, but the first of three: too few for four ways."""

    def kin(label):
        return 0 if label < 3 else 1 + (label - 3) // 10

    write_set(tmp_path, list(range(83)) * 2, list(range(83, 93)) * 2, shape=(2, 2, 1), kin=kin)
    some = tasks.episodes("tiny_letters", ways=4, group="kin", data_dir=tmp_path)
    assert some.name == "tiny_letters 2x2, 4 ways of one kin, 1 shots"
    groups = {split: {kin(label) for label in some.classes(split)} for split in SPLITS}
    assert [len(groups[split]) for split in SPLITS] == [7, 2, 1]
    assert len(set().union(*groups.values())) == 10
    label_of = {row.tobytes(): label for known in some._splits.values()
                for row, label in zip(images_of(known), np.repeat(known.labels, known.counts), strict=True)}  # fmt: skip
    seen, orders = [], set()
    draw = in_a_graph(lambda seed: some.examples(seed, 4, "train"), JAX)
    for number in range(300):
        x, y = arrays(draw(random.seed_of(number)))
        labels = [label_of[row.tobytes()] for row in x]
        assert len(set(labels)) == 4 == len(set(y.argmax(1)))
        assert len({kin(label) for label in labels}) == 1
        seen += labels
        orders.add(tuple(labels))
    assert len(orders) > 290  # any classes of a group, in any order
    drawn = sorted(groups["train"] - {0})
    fractions = np.bincount([kin(label) for label in seen], minlength=10)[drawn] / len(seen)
    assert fractions == pytest.approx([1 / len(drawn)] * len(drawn), abs=0.06)
    assert 0 not in {kin(label) for label in seen}
    whole = {
        kin(label_of[row.tobytes()])
        for n in range(20)
        for row in arrays(some.resampled().examples(random.seed_of(n), 4, "train"))[0]
    }
    assert whole == groups["train"]  # and without groups any
    for options, message in (
        ({"ways": 11}, "`ways` must be at most 10, the largest number of classes of a group in the split 'train'"),
        (
            {"group": "tribe"},
            "`group` must be a feature of 'tiny_letters', one of image, kin, label. Received: group='tribe'",
        ),
        ({"group": "image"}, "`group` must be the name of an integer feature, one number per image."),
        ({"exclusive": False}, "`exclusive` must be True with `group`"),
        ({"name": "digits", "ways": 2}, "`group` must be None for the digits"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.episodes(**{"name": "tiny_letters", "ways": 4, "group": "kin", "data_dir": tmp_path} | options)


@pytest.mark.filterwarnings("ignore")
def test_a_class_in_two_groups_is_refused(tmp_path):
    turn = iter(range(100))
    write_set(tmp_path, [0, 1] * 4, [2, 3] * 4, shape=(2, 2, 1), kin=lambda label: next(turn) % 3)
    with pytest.raises(ValueError, match="`group` must be the same in all images of a class; 'kin' is not"):
        tasks.episodes("tiny_letters", ways=2, group="kin", data_dir=tmp_path)


def test_standardised_by_the_classes_of_meta_training():
    digits, plain = (tasks.episodes("digits", ways=2, standardize=option) for option in (True, False))
    known = {split: images_of(some) for split, some in digits._splits.items()}
    training = images_of(plain._splits["train"])
    assert known["train"].mean() == pytest.approx(0.0, abs=1e-4)
    assert known["train"].std() == pytest.approx(1.0, abs=1e-3)
    for split in SPLITS:
        expected = (images_of(plain._splits[split]) - training.mean()) / training.std()
        np.testing.assert_allclose(known[split], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 1}, "`ways` must be an integer of at least 2. Received: ways=1"),
        ({"ways": 2.5}, "`ways` must be an integer of at least 2. Received: ways=2.5"),
        ({"ways": 7}, "`ways` must be at most 6, the number of classes that digits has for meta-training. Received: ways=7"),
        ({"shots": 0}, "`shots` must be a positive integer. Received: shots=0"),
        ({"size": 0}, "`size` must be a positive integer. Received: size=0"),
        ({"name": "no_such_set"}, "Received: name='no_such_set'"),
    ],
)
def test_errors(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tasks.episodes(**{"name": "digits", "ways": 3, "data_dir": tmp_path} | options)


def test_episode_errors(digits):
    seed = random.seed_of(0)
    with pytest.raises(ValueError, match=r"`split` must be one of .*Received: split='all'"):
        digits.episode(seed, **SHAPE, split="all")
    with pytest.raises(ValueError, match=r"`ways` must be at most 2, .* the split 'test' of digits .* Received: ways=3"):
        digits.dataset(0, **SHAPE, split="test")
    with pytest.raises(ValueError, match=r"`ways` must be at most 2"):
        digits.examples(seed, 6, "validation")
    some = numbered([6, 4, 5], ways=2, shots=3)
    some.episode(seed, steps=1, batch=6, query=2)
    with pytest.raises(
        ValueError, match=r"`shots` must be at most 2 where `query` is 3: .* 'train' of numbers has 4 .* shots=3, query=3"
    ):
        some.episode(seed, steps=1, batch=6, query=3)
    with pytest.raises(ValueError, match=r"`count` must be at most 8 .* smallest class has 4 images. Received: count=9"):
        some.examples(seed, 9, "train")


@pytest.mark.slow
def test_omniglot(tmp_path):
    """Where it is prepared, its classes; elsewhere, the error that says how to get it."""
    if not os.path.isdir(os.path.join(os.environ.get("TFDS_DATA_DIR", ""), "omniglot")):
        with pytest.raises(ValueError, match="'omniglot'"):
            tasks.episodes(ways=20, shots=5, data_dir=tmp_path)
        return
    some = tasks.episodes(ways=20, shots=5)
    assert (some.features, [len(some.classes(split)) for split in SPLITS]) == (784, [723, 241, 659])
    assert set(some.classes("test")) == set(range(964, 1623))
    for split in SPLITS:
        (episode,) = take(some.dataset(0, steps=1, batch=100, query=300, split=split), 1)
        assert len(rows(episode["x"][0]) | rows(episode["query_x"])) == 400
