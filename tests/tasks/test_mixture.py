"""Mixtures of tasks: parts by weight, by seed and number alone; one stream where shapes allow."""

import math

import keras
import numpy as np
import pytest
from task_harness import same, specs, take

from keras_blur import tasks

SHAPE = {"steps": 2, "batch": 4, "query": 6}
XOR, CIRCLE, BLOBS, SINE = (tasks.functions(name) for name in ("xor", "circle", "blobs5", "sine"))


@pytest.mark.parametrize("given", [{XOR: 3, BLOBS: 1}, [[XOR, 3], [BLOBS, 1]], [(XOR, np.float32(0.75)), (BLOBS, 0.25)]])
def test_weights_are_shares(given):
    mixed = tasks.mixture(given)
    assert isinstance(mixed, tasks.Mixture)
    assert mixed.parts == (XOR, BLOBS)
    assert mixed.weights == (0.75, 0.25)
    assert all(type(weight) is float for weight in mixed.weights)


def test_parts_are_drawn_by_weight_from_seed_and_number():
    mixed = tasks.mixture({XOR: 6, CIRCLE: 3, BLOBS: 1})
    drawn = [mixed.part_of(7, number) for number in range(3000)]
    for part, weight in enumerate(mixed.weights):
        deviation = math.sqrt(weight * (1 - weight) / 3000)
        assert drawn.count(part) / 3000 == pytest.approx(weight, abs=4 * deviation)
    assert [mixed.part_of(7, number) for number in range(99, 49, -1)] == drawn[99:49:-1]  # whatever came before
    assert [mixed.part_of(8, number) for number in range(50)] != drawn[:50]
    assert mixed.part_of(-1, 0) in (0, 1, 2)


def test_a_stream_is_that_of_its_parts():
    mixed = tasks.mixture({XOR: 1, CIRCLE: 2})
    stream = mixed.dataset(5, **SHAPE, split="validation")
    shapes = {"x": (2, 4, 2), "y": (2, 4, 2), "query_x": (6, 2), "query_y": (6, 2)}
    assert specs(stream) == {name: (shape, "float32") for name, shape in shapes.items()}
    whole = take(stream, 12)
    parts = [take(part.dataset(5, **SHAPE, split="validation"), 12) for part in mixed.parts]
    taken = [mixed.part_of(5, number) for number in range(12)]
    assert set(taken) == {0, 1}
    assert all(same(episode, parts[part][number]) for number, (part, episode) in enumerate(zip(taken, whole, strict=True)))
    assert not any(
        same(episode, parts[1 - part][number]) for number, (part, episode) in enumerate(zip(taken, whole, strict=True))
    )


def test_streams_are_sharded_by_number():
    mixed = tasks.mixture({XOR: 1, CIRCLE: 2})
    whole = take(mixed.dataset(5, **SHAPE), 6)
    shards = [take(mixed.dataset(5, **SHAPE, start=shard, stride=2), 3) for shard in range(2)]
    assert all(same(shards[number % 2][number // 2], episode) for number, episode in enumerate(whole))
    number = keras.Variable(0, dtype="int32", trainable=False)
    stream = mixed.dataset(5, **SHAPE, start=number)
    number.assign(3)
    assert same(take(stream, 1)[0], whole[3])
    assert not same(take(mixed.dataset(6, **SHAPE), 1)[0], whole[0])
    assert not same(take(mixed.dataset(5, **SHAPE, split="test"), 1)[0], whole[0])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64"])
def test_weights_of_any_precision_sum_to_one(dtype):
    weights = (np.array([0.1, 0.7, 0.3]) * 10).astype(dtype)
    mixed = tasks.mixture(list(zip([XOR, CIRCLE, BLOBS], weights, strict=True)))
    assert sum(mixed.weights) == pytest.approx(1.0, abs=1e-12)
    assert mixed.part_of(0, 0) in range(3)


def test_one_part_and_values():
    assert same(take(tasks.mixture({SINE: 0.1}).dataset(1, **SHAPE), 1)[0], take(SINE.dataset(1, **SHAPE), 1)[0])


def test_images_and_episodes_mix():
    mixed = tasks.mixture({tasks.images("digits", classes=range(3)): 1, tasks.episodes("digits", ways=3, shots=2): 1})
    episodes = take(mixed.dataset(0, **SHAPE), 8)
    assert {mixed.part_of(0, number) for number in range(8)} == {0, 1}
    assert len({episode["x"].tobytes() for episode in episodes}) == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"`weights` must give a weight for each of one or more .* Received: \{\}"),
        ([], r"Received: \[\]"),
        ([XOR], "`weights` must give a weight for each"),
        ([(XOR, 1, 2)], "`weights` must give a weight for each"),
        ({"xor": 1.0}, r"Received: \{'xor': 1.0\}"),
        ({XOR: 0.0}, "`weights` must be positive, finite numbers. Received: 0.0 for xor"),
        ({XOR: 1.0, CIRCLE: -1}, "Received: -1 for circle"),
        ({XOR: math.inf}, "Received: inf for xor"),
        ({XOR: math.nan}, "Received: nan for xor"),
        ({XOR: "1"}, "Received: '1' for xor"),
        ({XOR: 1, SINE: 1}, "of one kind, classes or values. Received: xor has classes, sine has values"),
    ],
)
def test_errors(given, message):
    with pytest.raises(ValueError, match=message):
        tasks.mixture(given)


def test_stream_errors():
    mixed = tasks.mixture({XOR: 1, BLOBS: 1})
    with pytest.raises(ValueError, match=r"Received: xor: examples \(2,\), 2 classes; blobs5: examples \(2,\), 5 classes"):
        mixed.dataset(0, **SHAPE)
    with pytest.raises(ValueError, match=r"`split` must be one of .*Received: split='all'"):
        tasks.mixture({XOR: 1}).dataset(0, **SHAPE, split="all")
