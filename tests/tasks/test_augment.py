"""Meta-augmentation: one key an episode for support and query, of a stream of its own, never
outside meta-training."""

import functools
import math

import numpy as np
import pytest
from keras import ops
from on_backend import JAX, in_a_graph
from task_harness import arrays

from keras_blur import random, tasks
from keras_blur.tasks.episodes import EpisodeTasks

SHAPE = {"steps": 2, "batch": 5, "query": 10}

# An augmentation, tasks that it fits, and whether undoing it gives the same bits.
AUGMENTED = {
    "labels of functions": (tasks.LabelPermutation, lambda: tasks.functions("blobs5"), True),
    "labels of images": (tasks.LabelPermutation, lambda: tasks.images("digits"), True),
    "labels of groups": (tasks.LabelPermutation, lambda: tasks.classes(exclusive=False), True),
    "offset": (lambda: tasks.LabelOffset(-1.0, 1.0), lambda: tasks.functions("sine"), False),
    "offset of a circle": (lambda: tasks.LabelOffset(0.0, 10.0, modulo=10.0, values=8), tasks.sines, False),
    "rotation": (tasks.LabelRotation, tasks.pose, False),
    "two": (lambda: tasks.Compose([tasks.LabelOffset(0.0, 2.0), tasks.LabelRotation()]), tasks.pose, False),
    "classes and labels": (
        lambda: tasks.Compose([tasks.ClassResample(), tasks.LabelPermutation()]),
        lambda: tasks.classes(exclusive=False),
        True,
    ),
}


def made(name, **options):
    augmentation, of, _ = AUGMENTED[name]
    return tasks.augment(of(), augmentation(), **options)


@functools.cache
def drawing(of, split, seed):
    """Episodes of the stream `of.dataset(seed, split=split)`, by number."""
    root = random.fold_in(random.seed_of(seed), ["train", "validation", "test"].index(split))
    return in_a_graph(lambda number: of.episode(random.fold_in(root, number), **SHAPE, split=split), JAX)


def episode(of, number, split="train", seed=3):
    return arrays(drawing(of, split, seed)(ops.array(number)))


def test_the_stream_has_these_episodes():
    of = made("labels of functions")
    stream = of.dataset(3, **SHAPE, start=2, stride=3)
    for number, drawn in zip((2, 5), stream, strict=False):
        for part, value in episode(of, number).items():
            np.testing.assert_array_equal(drawn[part], value)


def labels(drawn):
    return np.concatenate([drawn["y"].reshape(-1, drawn["y"].shape[-1]), drawn["query_y"]])


@pytest.mark.parametrize("name", AUGMENTED)
def test_inputs_stay_labels_change_and_undoing_the_key_restores_them(name):
    of = made(name)
    for number in range(3):
        plain, changed = episode(of._prepared, number), episode(of, number)
        for part in ("x", "query_x"):
            np.testing.assert_array_equal(plain[part], changed[part])
        seed = random.fold_in(random.fold_in(random.seed_of(3), 0), number)
        keys = of.keys(seed, 20)
        back = ops.convert_to_numpy(of.augmentation.undo(keys, ops.array(labels(changed))))
        wanted = labels(plain)
        if AUGMENTED[name][2]:
            np.testing.assert_array_equal(back, wanted)
        elif name == "offset of a circle":  # modulo 10 on both sides
            np.testing.assert_allclose(np.mod(back - wanted + 5.0, 10.0) - 5.0, 0.0, atol=1e-5)
        else:
            np.testing.assert_allclose(back, wanted, atol=1e-5)


@pytest.mark.parametrize("name", AUGMENTED)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_meta_validation_and_meta_test_are_untouched(name, split):
    plain, of = AUGMENTED[name][1](), made(name)
    for part, value in episode(plain, 1, split).items():
        np.testing.assert_array_equal(episode(of, 1, split)[part], value)


def permutation_of(plain, changed):
    """The place that each class went to, which must be one for all examples."""
    moved = {(int(a), int(b)) for a, b in zip(plain.argmax(-1), changed.argmax(-1), strict=True)}
    assert len({a for a, _ in moved}) == len(moved) == len({b for _, b in moved})
    return dict(moved)


def test_one_permutation_maps_support_and_query_and_others_map_other_episodes():
    plain = tasks.functions("blobs5")
    of = tasks.augment(plain, tasks.LabelPermutation())
    found = []
    for number in range(40):
        before, after = episode(plain, number), episode(of, number)
        pairs = [(before[part].reshape(-1, 5), after[part].reshape(-1, 5)) for part in ("y", "query_y")]
        support, query = (permutation_of(*pair) for pair in pairs)
        assert all(support[a] == query[a] for a in support.keys() & query.keys())
        found.append(tuple(sorted({**support, **query}.items())))
    assert len(set(found)) > 25  # of 120 permutations
    again = [labels(episode(of, number, seed=4)) for number in range(3)]
    assert any((one != labels(episode(of, number))).any() for number, one in enumerate(again))  # another seed, other keys


def test_one_offset_an_episode_spread_over_its_range():
    plain = tasks.functions("sine")
    of = tasks.augment(plain, tasks.LabelOffset(-1.0, 3.0))
    offsets = []
    for number in range(200):
        difference = labels(episode(of, number)) - labels(episode(plain, number))
        assert np.ptp(difference) < 1e-5
        offsets.append(difference.mean())
    assert abs(np.mean(offsets) - 1.0) < 4 * (4.0 / math.sqrt(12)) / math.sqrt(200)
    assert np.min(offsets) < -0.8
    assert np.max(offsets) > 2.8


def test_a_key_for_each_point_is_noise():
    plain = tasks.functions("sine")
    of = tasks.augment(plain, tasks.LabelOffset(-1.0, 1.0), shared=False)
    difference = labels(episode(of, 0)) - labels(episode(plain, 0))
    assert np.std(difference) > 0.3
    assert len(np.unique(np.round(difference, 4))) == len(difference)


def test_no_key_is_no_change_at_all():
    plain = tasks.classes(exclusive=False)
    for part, value in episode(plain, 5).items():
        np.testing.assert_array_equal(episode(tasks.augment(plain, tasks.Compose([])), 5)[part], value)


def test_signs_of_labels_and_examples_agree_with_episodes():
    """BLUR's labels are +1 and -1: each example keeps one of the first and the others of the
    second."""
    of = tasks.augment(tasks.images("digits"), tasks.LabelPermutation())
    assert set(np.unique(labels(episode(of, 0)))) == {-1.0, 1.0}
    np.testing.assert_array_equal(labels(episode(of, 0)).sum(-1), -8.0)
    seed = random.fold_in(random.seed_of(1), 0)
    x, y = arrays(of.examples(seed, 7, "train"))
    whole = arrays(of.episode(seed, steps=1, batch=3, query=4))
    np.testing.assert_array_equal(np.reshape(x[:4], (4, 64)), whole["query_x"])
    np.testing.assert_array_equal(y[:4], whole["query_y"])


class Numbered(EpisodeTasks):
    """Twelve classes whose images all are the class's number."""

    def __init__(self, exclusive):
        images = np.repeat(np.arange(12), 20)
        part = (images[:, None].astype(np.float32), images)
        super().__init__(dict.fromkeys(("train", "validation", "test"), part), 5, 1, "numbers", exclusive)


def classes_of(of, split="train"):
    found = []
    for number in range(60):
        drawn = episode(of, number, split)
        by_output = [set(drawn["query_x"][drawn["query_y"].argmax(-1) == place, 0].astype(int)) for place in range(5)]
        assert all(len(one) == 1 for one in by_output)
        found.append(tuple(one.pop() for one in by_output))
    return found


def test_settings_of_the_paper():
    fixed = Numbered(exclusive=False)
    assert set(classes_of(fixed)) == {(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)}  # non-exclusive; two classes are in no group
    intra = classes_of(tasks.augment(fixed, tasks.LabelPermutation()))
    assert {tuple(sorted(one)) for one in intra} == {(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)}
    assert len(set(intra)) > 30
    inter = classes_of(tasks.augment(fixed, tasks.ClassResample()))
    assert len({tuple(sorted(one)) for one in inter}) > 40
    assert {number for one in inter for number in one} == set(range(12))
    assert inter == classes_of(Numbered(exclusive=True))
    assert len(set(classes_of(fixed, "test"))) > 40  # in all three


@pytest.mark.parametrize(
    ("augmentation", "of", "bits"),
    [
        (tasks.LabelPermutation(), lambda: tasks.functions("blobs5"), math.log2(120)),
        (tasks.LabelOffset(-1.0, 1.0), tasks.sines, 1.0),
        (tasks.LabelOffset(0.0, 1.0, values=32), tasks.sines, 5.0),
        (tasks.LabelOffset(0.0, 2.0, 1.0, values=32), tasks.sines, 4.0),
        (tasks.LabelOffset(0.0, 3.0, 1.0), tasks.sines, 0.0),
        (tasks.LabelOffset(0.0, 1.5, 1.0), tasks.sines, math.log2(1.5) - 2.0 / 3.0),
        (tasks.LabelRotation(), tasks.pose, math.log2(2 * math.pi)),
        (tasks.ClassResample(), lambda: tasks.classes(pool=6, exclusive=False), math.log2(720)),
        (tasks.Compose([]), tasks.pose, 0.0),
    ],
)
def test_entropy(augmentation, of, bits):
    assert tasks.augment(of(), augmentation).entropy_bits == pytest.approx(bits, abs=1e-9)


def test_a_mixture_is_augmented_part_by_part():
    parts = tasks.functions(["xor", "circle"]), tasks.functions("blobs3")
    mixed = tasks.augment(tasks.mixture({parts[0]: 1.0, parts[1]: 3.0}), tasks.LabelPermutation())
    assert mixed.weights == (0.25, 0.75)
    assert [round(part.entropy_bits, 3) for part in mixed.parts] == [1.0, 2.585]


def test_augmenting_twice_draws_two_keys():
    plain = tasks.functions("sine")
    once = tasks.augment(plain, tasks.LabelOffset(0.0, 1.0))
    twice = tasks.augment(once, tasks.LabelOffset(0.0, 1.0))
    keys = [labels(episode(one, 0)).mean() - labels(episode(plain, 0)).mean() for one in (once, twice)]
    assert keys[1] - keys[0] != pytest.approx(keys[0], abs=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.augment(tasks.pose(), tasks.LabelPermutation()), "needs tasks of classes"),
        (lambda: tasks.augment(tasks.classes(), tasks.LabelOffset(0, 1)), "needs tasks of values"),
        (lambda: tasks.augment(tasks.sines(), tasks.LabelRotation()), "needs tasks of two values"),
        (lambda: tasks.augment(tasks.images("digits"), tasks.ClassResample()), "have a pool of classes"),
        (lambda: tasks.augment(tasks.pose(), "rotation"), "must be a task distribution or a mixture"),
        (lambda: tasks.LabelOffset(1.0, 1.0), "`low` must be less than `high`"),
        (lambda: tasks.LabelOffset(0.0, 1.0, 0.0), "`modulo` must be a positive number"),
        (lambda: tasks.LabelOffset(0.0, 1.0, values=1), "`values` must be an integer of at least 2"),
        (lambda: tasks.pose(0), "`objects` must be a positive integer"),
        (lambda: tasks.classes(9, pool=5), "`ways` must be from 2 to pool=5"),
        (lambda: tasks.classes(noise=-1.0), "`noise` must be a finite number"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pose_by_hand():
    of = tasks.pose(3, held=4, code=2, seed=5)
    rng = np.random.default_rng([0x7A5C5, 5, 0])  # a stream apart from those of learners
    codes, angles = rng.standard_normal((3, 2)).astype("float32"), rng.uniform(0, 2 * np.pi, 3)
    for number in range(8):
        x, y = arrays(of.examples(random.seed_of(number), 6, "train"))
        which = int(np.argmin(np.abs(codes - x[0, :2]).sum(-1)))
        np.testing.assert_array_equal(x[:, :2], np.repeat(codes[which : which + 1], 6, 0))
        view = np.arctan2(x[:, 3], x[:, 2])
        np.testing.assert_allclose(y, np.stack([np.cos(view + angles[which]), np.sin(view + angles[which])], 1), atol=1e-5)


def test_sines_live_where_nobody_else_does():
    of = tasks.sines()
    spans = {}
    for split in ("train", "validation", "test"):
        found = set()
        draw = in_a_graph(lambda number, split=split: of.examples(random.seed_of(number), 10, split), JAX)
        for number in range(80):
            x, y = arrays(draw(ops.array(number)))
            start = float(np.floor(x.min()))
            assert x.max() <= start + 0.5
            which = [4, -1, -2, 1, 3, -3, -5, 2, 0, -4].index(int(start))
            np.testing.assert_allclose(y, of.amplitudes[which] * np.sin(x - of.phases[which]), atol=1e-5)
            found.add(which)
        spans[split] = found
    assert spans == {"train": set(range(6)), "validation": {6, 7}, "test": {8, 9}}
