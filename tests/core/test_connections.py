"""Connections by each other: convolutions as dense layers on patches, permuted channels,
populations as loops."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

import keras_blur as kb
from keras_blur.core import network
from keras_blur.core.companions import companions
from keras_blur.core.connections import conv
from keras_blur.core.connections.conv import ConvConnection, DepthwiseConnection, TransposedConnection, unfold
from keras_blur.core.connections.dense import DenseConnection
from keras_blur.core.connections.einsum import einsum_connection
from keras_blur.core.connections.embedding import EmbeddingConnection
from keras_blur.core.connections.scale import scale_connection
from keras_blur.core.derivatives import mean
from keras_blur.core.graph import Builder, chain
from keras_blur.core.weightless import Linear

pytestmark = pytest.mark.usefixtures("float64")

RULES = {
    2: kb.Rule(states=2, oja="activations", saturation="tanh", batch_reduction="mean"),
    3: kb.Rule(states=3, oja="weights", normalize_activations="both", normalize_synapses="stored", batch_reduction="mean"),
    4: kb.Rule(states=4, whitening=True, normalize_term="orthogonal", momentum="after", slow_synapses=True),
}
ONE = {"size": (2, 3), "strides": (1, 2), "padding": "same", "dilation": (1, 1)}


def genome_of(states, seed=1, population=()):
    return kb.Genome.random(RULES[states], seed=seed, std=0.4, synapse_update=-0.05, population=population)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def synapses_of(graph, rule, shapes, leading=(), seed=3):
    """Random synapses of each holder, for features of the given shapes."""
    made = []
    for place, (connection, source) in enumerate(zip(graph.holders, shapes, strict=True)):
        wanted = connection.shapes(rule, source, feeds_back=graph.feeds_back[place])
        wanted |= {name: wanted[like] for name, like in companions(rule, tuple(wanted)).items()}
        made.append({
            name: ops.convert_to_tensor(0.5 * normal(*leading, *shape, seed=seed + 10 * place + index))
            for index, (name, shape) in enumerate(wanted.items())
        })  # fmt: skip
    return tuple(made)


def learned(genome, graph, synapses, x, y, steps=2):
    state = network.NetworkState(synapses)
    for _ in range(steps):
        result = network.step(genome, graph, state, ops.convert_to_tensor(x), lambda output: ops.convert_to_tensor(y))
        state = result.state
    return state.synapses, result.output


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        for name, value in other.items():
            np.testing.assert_allclose(np.reshape(one[name], np.shape(value)), value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("states", RULES)
def test_a_convolution_of_single_pixels_is_dense(states):
    genome = genome_of(states)
    small = {"size": (1, 1), "strides": (1, 1), "dilation": (1, 1)}
    images = chain([ConvConnection(4, **small), ConvConnection(3, **small)], features=3)
    rows = chain([DenseConnection(4), DenseConnection(3)])
    kernels = synapses_of(rows, genome.rule, [(5,), (4,)])
    as_images = tuple(
        {name: ops.reshape(v, (v.shape[0], 1, 1, *v.shape[1:])) if "kernel" in name else v for name, v in own.items()}
        for own in kernels
    )
    x, y = normal(6, 5), normal(6, 3, seed=5)
    found, output = learned(genome, images, as_images, x[:, None, None], y[:, None, None])
    wanted, expected = learned(genome, rows, kernels, x, y)
    assert np.abs(wanted[0]["kernel"] - kernels[0]["kernel"]).max() > 1e-3
    assert_equal(found, wanted)
    np.testing.assert_allclose(output[:, 0, 0], expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("size", "strides", "padding", "dilation", "shape"),
    [
        ((2, 2), (1, 1), "valid", (1, 1), (4, 3, 2)),
        ((3, 2), (2, 1), "same", (1, 1), (5, 4, 2)),
        ((2, 2), (1, 1), "same", (2, 1), (4, 4, 1)),
        ((3,), (1,), "causal", (2,), (6, 2)),
        ((2, 1, 2), (1, 2, 1), "valid", (1, 1, 1), (3, 3, 2, 2)),
    ],
)
@pytest.mark.parametrize("states", RULES)
def test_a_convolution_is_dense_on_patches(states, size, strides, padding, dilation, shape):
    """Patches are rows of the batch: the same Hebbian sums, statistics and stabilisers.

    What counts examples, the mean and the damping, does not count rows: there the dense layer has
    positions.
    """
    genome = genome_of(states)
    genome = genome.with_rule(genome.rule.replace(batch_reduction="sum"))
    layer = ConvConnection(4, size=size, strides=strides, padding=padding, dilation=dilation)
    count = int(np.prod(layer.target(shape)[:-1]))
    positions = (count,) if genome.rule.whitening else ()
    images = chain([layer], features=len(shape))
    rows = chain([DenseConnection(4, positions=positions)], features=1 + len(positions))
    kernels = synapses_of(images, genome.rule, [shape])
    matrices = tuple({name: layer.matrix(v) if "kernel" in name else v for name, v in own.items()} for own in kernels)
    x = normal(3, *shape)
    patches = np.array(unfold(ops.convert_to_tensor(x), size, strides, padding, dilation))
    target = layer.target(shape)
    assert patches.shape == (3, *target[:-1], np.prod(size), shape[-1])
    y = normal(3, *target, seed=5)
    found, output = learned(genome, images, kernels, x, y)
    flat = patches.reshape(-1, *positions, patches.shape[-1] * patches.shape[-2])
    wanted, expected = learned(genome, rows, matrices, flat, y.reshape(-1, *positions, 4))
    assert_equal(found, wanted)
    np.testing.assert_allclose(np.reshape(output, np.shape(expected)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("states", RULES)
def test_permuted_channels_learn_permuted(states):
    genome, order = genome_of(states), np.array([2, 0, 3, 1])
    small = {"size": (2, 2), "strides": (1, 1), "dilation": (1, 1)}
    shape = (4, 4, 2)
    builder = Builder([3])
    hidden = builder.connect(ConvConnection(4, **small), 0)
    hidden = builder.connect(scale_connection((3, 3, 4), (2,), scales=True, offsets=True), hidden)
    hidden = builder.connect(ConvConnection(3, **small), hidden)
    graph = builder.graph([builder.map(Linear(lambda x: mean(x, (1, 2)), [(2, 2, 3)], (3,)), hidden)])
    synapses = synapses_of(graph, genome.rule, [shape, (3, 3, 4), (3, 3, 4)])

    def permuted(all_synapses):
        first, scale, last = ({name: np.array(value) for name, value in own.items()} for own in all_synapses)
        outputs = {name: value[..., order] for name, value in first.items()}
        inputs = {name: value[..., order, :] if "kernel" in name else value for name, value in last.items()}
        return outputs, {name: value[..., order] for name, value in scale.items()}, inputs

    x, y = normal(5, *shape), normal(5, 3, seed=5)
    plain, _ = learned(genome, graph, synapses, x, y)
    start = tuple({name: ops.convert_to_tensor(value) for name, value in own.items()} for own in permuted(synapses))
    moved, _ = learned(genome, graph, start, x, y)
    assert np.abs(plain[0]["kernel"] - synapses[0]["kernel"]).max() > 1e-3
    assert_equal(moved, permuted(plain))


POPULATIONS = {
    "dense": (DenseConnection(4, positions=(3,)), (3, 5)),
    "conv": (ConvConnection(4, **ONE), (4, 5, 2)),
    "conv groups": (ConvConnection(4, groups=2, **ONE), (4, 5, 2)),  # Keras compiles it at each call
    "conv channels first": (ConvConnection(3, first=True, **ONE), (2, 4, 5)),
    "causal": (ConvConnection(3, size=(3,), strides=(1,), padding="causal", dilation=(2,)), (6, 2)),
    "depthwise": (DepthwiseConnection(4, groups=2, multiplier=2, **{**ONE, "strides": (1, 1)}), (4, 5, 2)),
    "transposed": (TransposedConnection(3, **ONE), (3, 3, 2)),
    "einsum": (einsum_connection("abc,cde->abde", (3, 4), (3, 2, 3), "de", None), (3, 4)),
    "scale": (scale_connection((3, 4), (1,), scales=True, offsets=True), (3, 4)),
    "embedding": (EmbeddingConnection(3, False, entries=6, positions=(4,)), (4,)),
}


@pytest.mark.parametrize(
    ("name", "states"),
    [
        (name, states)
        for name in POPULATIONS
        for states in RULES
        if (name, states) not in {("conv groups", 3), ("conv groups", 4)}
    ],
)
def test_a_population_is_a_loop_over_members(name, states):
    check_members(*POPULATIONS[name], states)


@pytest.mark.parametrize("states", RULES)
@pytest.mark.parametrize("name", ["conv", "conv channels first", "causal", "depthwise"])
def test_members_are_a_loop_in_the_way_that_the_backend_does_not_choose(name, states, monkeypatch):
    """Patches are gathered on TensorFlow, which convolves in turn here, and the reverse on JAX."""
    chosen = conv.by_operation()
    monkeypatch.setattr(conv, "by_operation", lambda: not chosen)
    assert POPULATIONS[name][0].gathers(2) == chosen
    check_members(*POPULATIONS[name], states)


@pytest.mark.parametrize(("name", "population"), [("dense", (2, 2)), ("conv", (2,)), ("scale", (2,))])
def test_penalties_and_limits_see_a_channel_of_one_member(name, population):
    connection, shape = POPULATIONS[name]
    heeding = dataclasses.replace(
        connection,
        penalties={"kernel": lambda channel: 0.1 * ops.sum(ops.square(ops.sum(channel, axis=0)))},
        limits={"kernel": keras.constraints.UnitNorm(axis=0)},
    )
    kernels = check_members(heeding, shape, 2, population)
    np.testing.assert_allclose(np.sum(kernels**2, axis=1 + len(population)), 1.0, rtol=1e-6)


def check_members(connection, shape, states, population=(2,)):
    """Asserts that members learn as they do alone, and returns their kernels. Members have genomes,
    synapses and data of their own; two connections, so that feedback passes the second."""
    embedding = isinstance(connection, EmbeddingConnection)
    builder = Builder([connection.axes])
    value, shapes = 0, [shape]
    if not embedding:
        first = scale_connection(shape, (len(shape) - 1,), scales=True, offsets=False)
        value = builder.connect(first, value)
        shapes.append(shape)
    value = builder.connect(connection, value)
    graph = builder.graph([value])
    genomes = genome_of(states, population=population)
    synapses = synapses_of(graph, genomes.rule, shapes, leading=population)
    rng = np.random.default_rng(2)
    x = rng.integers(0, 6, (*population, 3, 4)) if embedding else normal(*population, 3, *shape)
    y = normal(*population, 3, *connection.target(shape), seed=5)
    found, output = learned(genomes, graph, synapses, x, y)
    for member in np.ndindex(population):
        genome = kb.Genome(genomes.rule, {name: value[member] for name, value in genomes.arrays.items()})
        own = tuple({name: value[member] for name, value in one.items()} for one in synapses)
        wanted, expected = learned(genome, graph, own, x[member], y[member])
        assert_equal(tuple({name: value[member] for name, value in one.items()} for one in found), wanted)
        np.testing.assert_allclose(output[member], expected, rtol=1e-9, atol=1e-12)
        assert np.abs(wanted[-1]["kernel"] - own[-1]["kernel"]).max() > 1e-4
    return ops.convert_to_numpy(found[-1]["kernel"])


def test_unfolded_patches_by_hand():
    x = ops.reshape(ops.arange(6.0), (1, 6, 1))
    patches = unfold(x, (2,), (2,), "causal", (2,))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(patches)[0, :, :, 0], [[0, 0], [0, 2], [2, 4]])
