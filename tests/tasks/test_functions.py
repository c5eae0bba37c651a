"""Functions of the plane as tasks: their shapes, and episodes that follow from seed and number
alone."""

import keras
import numpy as np
import pytest
from keras import ops
from marks import slow_but
from on_backend import JAX, compiled, in_a_graph
from task_harness import arrays, rows, same, specs, take

from keras_blur import random, tasks
from keras_blur.tasks.functions import _SIDES, function_names

SHAPE = {"steps": 3, "batch": 8, "query": 10}

RANDOM_SIDES = ("angular_slice", "random_xor")
ALL = function_names()


def drawn(name, count=2000, number=0, split="train", **options):
    return arrays(tasks.functions(name, **options).examples(random.seed_of(number), count, split))


def points_of(episode):
    return np.concatenate([episode["x"].reshape(-1, episode["x"].shape[-1]), episode["query_x"]])


def angle_of(number, index=0, low=0.0, high=2 * np.pi):
    """What an episode draws for itself, by the place of its seed."""
    task = random.fold_in(random.seed_of(number), 0)
    return ops.convert_to_numpy(random.uniform(random.fold_in(task, index), (), low, high))


def side(name, points, task):
    """Whether points are of class 1 in an episode."""
    return ops.convert_to_numpy(_SIDES[name](ops.convert_to_tensor(points), task))


def turned(x, angle):
    return x @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def test_function_names():
    assert len(ALL) == len(set(ALL)) == 23
    assert set(ALL) == {
        "and", "or", "xor", "nxor", "nand", "two_moons", "rotated_moons", "circle", "concentric_circles", "square",
        "cross", "triangle", "angular_slice", "random_xor", "sine", *(f"blobs{n}" for n in range(2, 10)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", slow_but(["sine", "xor", "blobs2"], [name for name in ALL if name not in [f"blobs{n}" for n in range(3, 9)]])
)
def test_function_episodes_are_equal_under_every_compiler(name):
    some = tasks.functions(name)
    features, outputs = (1, 1) if name == "sine" else (2, int(name[5:]) if name.startswith("blobs") else 2)
    assert (some.features, some.outputs) == (features, outputs)
    assert some.kind == ("values" if name == "sine" else "classes")

    def draw(seed):
        return some.episode(seed, **SHAPE)

    program = compiled(draw)
    shapes = {"x": (3, 8, features), "y": (3, 8, outputs), "query_x": (10, features), "query_y": (10, outputs)}
    for number in (1, 2):
        seed = random.seed_of(number)
        eager, fast = arrays(draw(seed)), arrays(program(seed))
        for found in (eager, fast):
            assert {key: (part.shape, part.dtype.name) for key, part in found.items()} == {
                key: (shape, "float32") for key, shape in shapes.items()
            }
        for key, value in eager.items():
            exact = name != "sine" and key.endswith("y")
            np.testing.assert_allclose(fast[key], value, rtol=0, atol=0 if exact else 5e-6)


@pytest.mark.parametrize("names", [["xor", "rotated_moons"], "sine", "blobs5"])
def test_function_streams(names):
    some = tasks.functions(names, relabel=names != "sine", noise=0.01)
    sizes = {"x": (3, 8, some.features), "y": (3, 8, some.outputs), "query_x": (10, some.features)}
    sizes["query_y"] = (10, some.outputs)
    assert specs(some.dataset(0, **SHAPE)) == {name: (shape, "float32") for name, shape in sizes.items()}
    whole = take(some.dataset(5, **SHAPE), 6)
    assert same(take(some.dataset(5, **SHAPE, start=4), 1)[0], whole[4])
    shards = [take(some.dataset(5, **SHAPE, start=shard, stride=2), 3) for shard in range(2)]
    assert all(same(shards[number % 2][number // 2], episode) for number, episode in enumerate(whole))
    assert len({episode["x"].tobytes() for episode in whole}) == 6
    number = keras.Variable(0, dtype="int32", trainable=False)
    stream = some.dataset(5, **SHAPE, start=number)
    number.assign(3)
    assert same(take(stream, 1)[0], whole[3])
    assert not same(take(some.dataset(6, **SHAPE), 1)[0], whole[0])


@pytest.mark.parametrize("name", ALL)
def test_no_point_is_in_two_splits_nor_in_support_and_query(name):
    some = tasks.functions(name)
    seen = [set(), set(), set()]
    for number in range(4):
        for place, split in enumerate(("train", "validation", "test")):
            episode = arrays(some.episode(random.seed_of(number), **SHAPE, split=split))
            support = rows(episode["x"].reshape(-1, some.features))
            query = rows(episode["query_x"])
            assert (len(support), len(query)) == (24, 10)  # none twice
            assert not support & query
            seen[place] |= support | query
    assert [len(points) for points in seen] == [136] * 3
    assert len(set().union(*seen)) == 3 * 136


def test_splits_have_other_points_of_the_same_tasks():
    for name in ("angular_slice", "blobs4"):
        train, test = (drawn(name, split=split) for split in ("train", "test"))
        assert not rows(train[0]) & rows(test[0])
        for label in range(train[1].shape[1]):
            middle = [x[y.argmax(-1) == label].mean(0) for x, y in (train, test)]
            np.testing.assert_allclose(middle[0], middle[1], atol=0.08)


@pytest.mark.parametrize("name", [name for name in ALL if name != "sine"])
def test_classes_are_balanced(name):
    low, high = (0.3, 0.7)
    if name in ("and", "or", "nand"):
        low, high = (0.2, 0.8)  # a quarter of the square, by what they are
    for number in range(5):
        x, y = drawn(name, number=number)
        classes = y.shape[1]
        fraction = (y > 0).mean(0)
        assert set(np.unique(y)) == {-1.0, 1.0}
        np.testing.assert_array_equal(y.sum(1), 2 - classes)
        if classes == 2:
            assert low < fraction.min() <= fraction.max() < high
        else:
            assert np.abs(fraction * classes - 1).max() < 0.35
        assert np.abs(x).max() <= (1.2 if name.startswith("blobs") else 1.0)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("and", [(0.5, 0.5)], [(0.5, -0.5), (-0.5, 0.5), (-0.5, -0.5)]),
        ("or", [(0.5, 0.5), (0.5, -0.5), (-0.5, 0.5)], [(-0.5, -0.5)]),
        ("xor", [(0.5, -0.5), (-0.5, 0.5)], [(0.5, 0.5), (-0.5, -0.5)]),
        ("nxor", [(0.5, 0.5), (-0.5, -0.5)], [(0.5, -0.5), (-0.5, 0.5)]),
        ("nand", [(0.5, -0.5), (-0.5, 0.5), (-0.5, -0.5)], [(0.5, 0.5)]),
        ("circle", [(0.0, 0.0), (0.0, 0.79), (-0.56, 0.56)], [(0.81, 0.0), (0.57, 0.57), (-1.0, -1.0)]),
        ("concentric_circles", [(0.5, 0.0), (0.0, -0.89), (0.3, 0.3)], [(0.0, 0.0), (0.39, 0.0), (0.0, 0.91)]),
        ("square", [(0.0, 0.0), (0.69, -0.69), (-0.69, 0.1)], [(0.71, 0.0), (0.0, -0.71), (0.9, 0.9)]),
        ("cross", [(0.0, 0.0), (0.29, 0.99), (-0.99, -0.29)], [(0.31, 0.31), (-0.9, 0.9), (0.31, -0.9)]),
        ("triangle", [(0.0, 0.0), (0.0, 0.98), (0.98, -0.99), (-0.98, -0.99)], [(0.51, 0.0), (-0.1, 0.9), (1.0, -0.9)]),
    ],
)
def test_geometry(name, inside, outside):
    answer = side(name, np.array(inside + outside, np.float32), random.seed_of(0))
    assert answer.tolist() == [True] * len(inside) + [False] * len(outside)
    x, y = drawn(name)  # class 1 is the inside
    np.testing.assert_array_equal(y.argmax(1) == 1, side(name, x, random.seed_of(0)))


def test_angular_slice_is_three_eighths_of_a_turn():
    for number in range(4):
        angle, task = angle_of(number), random.fold_in(random.seed_of(number), 0)
        offset = np.array([0.0, 1.17, -1.17, 1.19, -1.19, np.pi])  # the edge is at 3 pi / 8 = 1.178
        for radius in (0.01, 1.0):
            ray = radius * np.stack([np.cos(angle + offset), np.sin(angle + offset)], 1).astype(np.float32)
            assert side("angular_slice", ray, task).tolist() == [True] * 3 + [False] * 3
        x, y = drawn("angular_slice", number=number)
        away = np.abs((np.arctan2(x[:, 1], x[:, 0]) - angle + np.pi) % (2 * np.pi) - np.pi)
        clear = np.abs(away - 3 * np.pi / 8) > 1e-4
        np.testing.assert_array_equal(y.argmax(1)[clear], (away < 3 * np.pi / 8)[clear])


def test_random_xor_is_a_turned_checkerboard():
    frequencies = []
    for number in range(6):
        angle, frequency = angle_of(number), angle_of(number, 1, 1.0, 3.0)
        frequencies.append(frequency)
        x, y = drawn("random_xor", number=number)
        board = frequency * turned(x, angle)
        clear = np.abs(board - np.round(board)).min(1) > 1e-4
        np.testing.assert_array_equal(y.argmax(1)[clear], (np.floor(board).sum(1) % 2)[clear])
    assert 1.0 <= min(frequencies) < max(frequencies) < 3.0
    task = random.fold_in(random.seed_of(0), 0)
    here = np.array([[0.11, 0.07]], np.float32)
    quarter = turned(here, np.pi / 2).astype(np.float32)  # a quarter of a turn exchanges the classes
    assert side("random_xor", here, task) != side("random_xor", quarter, task)


def test_moons_are_half_circles_that_interlock():
    x, y = drawn("two_moons")
    label = y.argmax(1)
    wide = 1.55 * x + [0.5, 0.25]  # scikit-learn's coordinates
    upper, lower = wide[label == 0], wide[label == 1]
    np.testing.assert_allclose(np.linalg.norm(upper, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(lower - [1.0, 0.5], axis=1), 1.0, atol=1e-5)
    assert upper[:, 1].min() > -1e-5
    assert lower[:, 1].max() < 0.5 + 1e-5
    angles = []
    for number in range(4):
        plain, label = drawn("two_moons", number=number)
        rotated, other = drawn("rotated_moons", number=number)
        angles.append(angle_of(number))
        np.testing.assert_allclose(rotated, turned(plain, angles[-1]), atol=1e-5)
        np.testing.assert_array_equal(label, other)
        assert np.linalg.norm(rotated, axis=1).max() < 1.0
    assert np.ptp(angles) > 0.5


@pytest.mark.parametrize("classes", range(2, 10))
def test_blobs_are_apart_and_elsewhere_in_each_episode(classes):
    found = []
    for number in range(3):
        x, y = drawn(f"blobs{classes}", number=number)
        label = y.argmax(1)
        centres = np.stack([x[label == one].mean(0) for one in range(classes)])
        distance = np.linalg.norm(centres[:, None] - centres, axis=2) + 9.0 * np.eye(classes)
        assert distance.min() > 0.33
        assert (x - centres[label]).std() == pytest.approx(0.08, abs=0.004)
        nearest = np.linalg.norm(x[:, None] - centres, axis=2).argmin(1)
        assert (nearest == label).mean() > 0.97
        found.append(centres)
    assert np.abs(found[0] - found[1]).max() > 0.05
    assert np.abs(found[1] - found[2]).max() > 0.05


def test_sines_have_an_amplitude_and_a_phase():
    found = []
    for number in range(30):
        x, y = drawn("sine", count=100, number=number)
        assert x.shape == y.shape == (100, 1)
        assert -5.0 <= x.min() < -4.0
        assert 4.0 < x.max() <= 5.0
        (sine, cosine), *_ = np.linalg.lstsq(np.concatenate([np.sin(x), np.cos(x)], 1), y[:, 0])
        np.testing.assert_allclose(sine * np.sin(x) + cosine * np.cos(x), y, atol=1e-4)
        # a sin(x - p) = a cos p sin x - a sin p cos x
        found.append((np.hypot(sine, cosine), np.arctan2(-cosine, sine)))
    amplitude, phase = np.array(found).T
    assert 0.1 <= amplitude.min() < 1.5
    assert 3.5 < amplitude.max() <= 5.0
    assert -1e-4 <= phase.min() < 0.8
    assert 2.3 < phase.max() <= np.pi + 1e-4


@pytest.mark.parametrize("name", RANDOM_SIDES)
def test_random_sides_differ_between_episodes(name):
    points = drawn("xor")[0]
    answers = {side(name, points, random.seed_of(number)).tobytes() for number in range(5)}
    assert len(answers) == 5


def test_a_list_draws_one_name_an_episode():
    names = ["xor", "circle", "two_moons"]
    mixed, single = tasks.functions(names), [tasks.functions(name) for name in names]
    assert mixed.name == "xor, circle, two_moons"
    draw = in_a_graph(lambda seed: [one.examples(seed, 60, "train") for one in (mixed, *single)], JAX)
    chosen = []
    for number in range(90):
        (x, y), *others = map(arrays, draw(random.seed_of(number)))
        equal = [np.allclose(x, a, atol=1e-6) and np.array_equal(y, b) for a, b in others]
        assert sum(equal) == 1
        chosen.append(equal.index(True))
    assert np.bincount(chosen).min() > 15


@pytest.mark.slow
def test_a_list_is_equal_under_every_compiler():
    mixed = tasks.functions([name for name in ALL if name != "sine" and not name.startswith("blobs")] + ["blobs2"])
    fast = compiled(lambda seed: mixed.examples(seed, 50, "train"))
    for number in range(6):
        seed = random.seed_of(number)
        for value, other in zip(arrays(mixed.examples(seed, 50, "train")), arrays(fast(seed)), strict=True):
            np.testing.assert_allclose(other, value, atol=1e-6)


@pytest.mark.parametrize(("name", "episodes", "least"), [("xor", 20, 2), ("blobs4", 8, 6), (["xor", "circle"], 20, 2)])
def test_functions_relabelled_by_one_permutation_an_episode(name, episodes, least):
    plain, relabelled = tasks.functions(name), tasks.functions(name, relabel=True)
    draw = in_a_graph(lambda seed: (plain.episode(seed, **SHAPE), relabelled.episode(seed, **SHAPE)), JAX)
    found = set()
    for number in range(episodes):
        before, after = map(arrays, draw(random.seed_of(number)))
        np.testing.assert_array_equal(before["x"], after["x"])
        labels = [np.concatenate([e["y"].reshape(-1, plain.outputs), e["query_y"]]).argmax(1) for e in (before, after)]
        pairs = set(zip(*(one.tolist() for one in labels), strict=True))
        assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs}) == plain.outputs
        found.add(tuple(sorted(pairs)))
    assert len(found) >= least


def test_noise_is_added_after_the_classes_are_known():
    for name in ("xor", "two_moons", "blobs3"):
        (clean, label), (noisy, same_label) = drawn(name), drawn(name, noise=0.2)
        np.testing.assert_array_equal(label, same_label)
        assert (noisy - clean).std() == pytest.approx(0.2, abs=0.01)
        assert (noisy - clean).mean() == pytest.approx(0.0, abs=0.015)
        assert abs(np.corrcoef((noisy - clean).T)[0, 1]) < 0.1
    (x, value), (same_x, noisy) = drawn("sine"), drawn("sine", noise=0.2)
    np.testing.assert_array_equal(x, same_x)
    assert (noisy - value).std() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("nor", {}, r"`names` must be one or more different names, each one of and, or, .*sine. Received: names='nor'"),
        ([], {}, r"Received: names=\[\]"),
        (["xor", "xor"], {}, r"different names.* Received: names=\['xor', 'xor'\]"),
        (["xor", "blobs10"], {}, "Received: names=.*'blobs10'"),
        (["xor", "blobs3", "sine"], {}, "one list for each .* Received: xor has 2, blobs3 has 3, sine has 1"),
        ("xor", {"noise": -0.1}, "`noise` must be a finite number of at least 0. Received: noise=-0.1"),
        ("xor", {"noise": float("nan")}, "Received: noise=nan"),
        ("sine", {"relabel": True}, "`relabel` must be False for 'sine'"),
    ],
)
def test_function_errors(names, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.functions(names, **options)


def test_function_episode_errors():
    with pytest.raises(ValueError, match=r"`split` must be one of 'train', .*'test'\. Received: split='all'"):
        tasks.functions("xor").episode(random.seed_of(0), **SHAPE, split="all")
    with pytest.raises(ValueError, match=r"at most 16777216, the number of .* in the split 'test' of xor"):
        tasks.functions("xor").episode(random.seed_of(0), steps=1, batch=2**24, query=1, split="test")
