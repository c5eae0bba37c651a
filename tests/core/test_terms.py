"""Whitened and normalised Hebbian terms by their definitions, and by either of two systems."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_blur as kb
from keras_blur import backend
from keras_blur.backend import solve_positive
from keras_blur.core import network, terms
from keras_blur.core.connections.conv import ConvConnection, DepthwiseConnection, TransposedConnection
from keras_blur.core.connections.dense import DenseConnection
from keras_blur.core.connections.einsum import einsum_connection
from keras_blur.core.connections.embedding import EmbeddingConnection
from keras_blur.core.connections.scale import scale_connection
from keras_blur.core.graph import chain
from keras_blur.core.patches import coarser, unfold

pytestmark = pytest.mark.usefixtures("float64")

LOSS = keras.losses.MeanSquaredError(reduction="sum")
SHAPES = [(4, 9, 3), (12, 5, 7), (6, 6, 20), (3, 40, 2)]  # rows, inputs, units
ONE = {"size": (1, 1), "strides": (1, 1), "dilation": (1, 1)}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def genome_of(**options):
    """Backpropagation with a rule's options, a large gate and no decay."""
    start = kb.genomes.backprop(learning_rate=0.25, activation="tanh", loss=LOSS)
    return start.with_rule(start.rule.replace(**options))


def terms_of(connection, x, y, *, weight=None, kernel=None, **options):
    """What a step adds to kernel and bias of one layer from zeros, over the gate: the finished
    term."""
    genome = genome_of(**options)
    graph = chain([connection], features=len(x.shape) - 1)
    source = tuple(x.shape[1:])
    shapes = connection.shapes(genome.rule, source, feeds_back=False)
    own = {name: np.zeros(shape) for name, shape in shapes.items()}
    result = network.step(
        genome, graph, network.NetworkState((own,)), ops.convert_to_tensor(x), lambda output: ops.convert_to_tensor(y),
        sample_weight=weight,
    )  # fmt: skip
    return {name: np.asarray(value)[0] / -0.25 for name, value in result.state.synapses[0].items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0.01, 0.3, 10.0])
def test_both_systems_give_what_numpy_solves(shape, damping):
    rows, inputs, units = shape
    x, d = normal(rows, inputs), normal(rows, units, seed=1)
    gram = x.T @ x
    wanted = np.linalg.solve(gram * rows / np.trace(gram) + damping * np.eye(inputs), x.T @ d)
    one = np.full((1, 1), damping)
    np.testing.assert_allclose(terms.whitened(gram, x.T @ d, one, rows), wanted, rtol=1e-9, atol=1e-12)
    sent = np.asarray(terms.whitened_senders(x @ x.T, d, one, rows))
    np.testing.assert_allclose(x.T @ sent, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_by_rows_is_that_of_the_matrix(shape):
    rows, inputs, units = shape
    x, d = normal(rows, inputs), normal(rows, units, seed=1)
    wanted = np.asarray(terms.orthogonal((x.T @ d)[None], 5))[0]
    sent = np.asarray(terms.orthogonal_senders(d, x @ x.T @ d, 5))
    np.testing.assert_allclose(x.T @ sent, wanted, rtol=1e-7, atol=1e-10)
    nothing = np.zeros_like(d)
    assert not np.asarray(terms.orthogonal_senders(nothing, nothing, 5)).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0.01, 0.3, 10.0])
def test_responses_are_the_product(shape, damping):
    rows, inputs, units = shape
    x, d, one = normal(rows, inputs), normal(rows, units, seed=1), np.full((1, 1), damping)
    inner = x @ x.T
    whitened = np.asarray(terms.whitened_senders(inner, d, one, rows))
    found = terms.responses(inner, d, whitened, one, rows)
    np.testing.assert_allclose(found, inner @ whitened, rtol=1e-7, atol=1e-10)
    assert np.isfinite(np.asarray(terms.responses(0.0 * inner, d, d / damping, one, rows))).all()


@pytest.mark.parametrize("shape", [(1, 5, 3), (4, 2, 7), (3, 1, 1)])
def test_frobenius_has_the_norm_of_an_orthogonal_matrix(shape):
    blocks, inputs, units = shape
    term = normal(1, blocks * inputs, units)
    found = np.asarray(terms.frobenius([term], shape)[0])
    left, _, right = np.linalg.svd(normal(inputs, units), full_matrices=False)
    wide = max(1.0, (units / inputs) ** 0.5)
    np.testing.assert_allclose(np.linalg.norm(found), wide * np.linalg.norm(left @ right) * blocks**0.5, rtol=1e-12)
    np.testing.assert_allclose(found / np.linalg.norm(found), term / np.linalg.norm(term), rtol=1e-9)
    parts = [np.asarray(one) for one in terms.frobenius([term[:, :-1], term[:, -1:]], shape)]
    np.testing.assert_allclose(np.concatenate(parts, axis=-2), found, rtol=1e-12)
    assert not np.asarray(terms.frobenius([np.zeros_like(term)], shape)[0]).any()


@pytest.mark.parametrize("shape", [(2, 6, 4), (1, 4, 6)])
@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_frobenius_counts_no_more_singular_values_than_the_rank(shape, rank):
    blocks, inputs, units = shape
    left, _, right = np.linalg.svd(normal(inputs, units), full_matrices=False)
    wanted = max(1.0, (units / inputs) ** 0.5) * np.linalg.norm(left[:, :rank] @ right[:rank]) * blocks**0.5
    (found,) = terms.frobenius([normal(1, blocks * inputs, units)], shape, rank=rank)
    np.testing.assert_allclose(np.linalg.norm(found), wanted, rtol=1e-12)


@pytest.mark.parametrize("norm", ["frobenius", "orthogonal"])
def test_a_rule_bounds_the_rank_of_a_term(norm):
    layer, x, y = DenseConnection(9), normal(10, 9), normal(10, 9, seed=1)
    for most, rank in ((None, 9), (4, 4), (9, 9), (20, 9)):
        found = terms_of(layer, x, y, term_rank=most, normalize_term=norm)
        squares = np.sum(np.square(found["kernel"])) + np.sum(np.square(found["bias"]))
        np.testing.assert_allclose(squares, rank, rtol=1e-6)


def test_a_member_without_sound_numbers_harms_no_other():
    matrix = np.stack([np.eye(3), np.full((3, 3), np.nan), np.full((3, 3), np.inf)])
    found = np.asarray(solve_positive(matrix, np.ones((3, 3, 2))))
    np.testing.assert_array_equal(found[0], np.ones((3, 2)))
    assert np.isnan(found[1:]).all()


@pytest.mark.parametrize("size", [9, 37])  # XLA factorises large matrices in blocks
def test_a_program_solves_systems_and_differentiates_them_twice(size):
    roots, turn = normal(3, 1, size, 2 * size), normal(size, size)
    systems, right = roots @ roots.swapaxes(-1, -2) / size + 0.1 * np.eye(size), normal(2, size, 4, seed=1)
    systems[2] = np.nan

    def loss(arrays):
        system = arrays["system"] + ops.swapaxes(arrays["system"], -1, -2)
        return ops.sum(solve_positive(system / 2, ops.convert_to_tensor(right))[:2] ** 3), ()

    def slopes(arrays):
        return backend.gradient(loss, arrays)[1]

    def squares(arrays):
        return ops.sum(ops.square(slopes(arrays)["system"][:2])), ()

    @backend.compiled
    def program(arrays):
        solution = solve_positive(arrays["system"], ops.convert_to_tensor(right))
        return solution, slopes(arrays)["system"], squares(arrays)[0], backend.gradient(squares, arrays)[1]["system"]

    def at(system):
        return [ops.convert_to_numpy(one) for one in program({"system": ops.convert_to_tensor(system)})]

    solution, slope, _, curved = at(systems)
    wanted = np.linalg.solve(systems[:2], right)
    np.testing.assert_allclose(solution[:2], wanted, rtol=1e-9)
    assert np.isnan(solution[2]).all()
    product = -np.linalg.solve(systems[:2], 3 * wanted**2) @ wanted.swapaxes(-1, -2)
    product = product.sum(1, keepdims=True)  # two right sides for each system
    np.testing.assert_allclose(slope[:2], (product + product.swapaxes(-1, -2)) / 2, rtol=1e-8, atol=1e-8)
    (up, down), far = (at(systems + sign * 1e-5 * turn)[2] for sign in (1, -1)), 2e-5
    np.testing.assert_allclose((up - down) / far, np.sum(curved[:2] * turn), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"normalize_term": "orthogonal"}, {"normalize_term": "frobenius"}])
def test_few_rows_and_many_rows_learn_the_same(options):
    """A batch in parts that are given twice: the rows are more than the inputs, the examples as
    many in weight."""
    x, y = normal(4, 6), normal(4, 3, seed=1)
    few = terms_of(DenseConnection(3), x, y, whitening=True, **options)
    many = np.repeat(np.arange(4), 5)
    same = terms_of(DenseConnection(3), x[many], y[many], weight=np.full(20, 0.2), whitening=True, **options)
    for name, value in few.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-7, atol=1e-10)
    assert np.abs(few["kernel"]).max() > 1e-3


def split_rows(x, y, size, weight=None):
    """A batch as the batches of its groups."""
    cuts = range(size, len(x), size)
    weights = [None] * (len(cuts) + 1) if weight is None else np.split(weight, cuts)
    return zip(np.split(x, cuts), np.split(y, cuts), weights, strict=True)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("inputs", [2, 9])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("weight", [None, np.array([0.5, 2.0, 0.0, 1.3, 1.0, 0.7, 0.0, 0.4, 0.0, 0.0])])
def test_groups_are_batches_of_their_own_that_add_up(use_bias, inputs, size, weight):
    """By rows and by features; the last group of ten rows is shorter, and may have no weight."""
    layer, x, y = DenseConnection(3, use_bias), normal(10, inputs), normal(10, 3, seed=1)
    found = terms_of(layer, x, y, weight=weight, whitening=True, whitening_rows=size)
    parts = [terms_of(layer, *one[:2], weight=one[2], whitening=True) for one in split_rows(x, y, size, weight)]
    for name, value in found.items():
        np.testing.assert_allclose(value, sum(part[name] for part in parts), rtol=1e-9, atol=1e-12)
    assert np.abs(found["kernel"] - terms_of(layer, x, y, weight=weight, whitening=True)["kernel"]).max() > 1e-3


@pytest.mark.parametrize("inputs", [2, 30])
@pytest.mark.parametrize("norm", ["none", "frobenius", "orthogonal"])
def test_one_group_is_the_whole_batch(inputs, norm):
    layer, x, y = DenseConnection(3), normal(10, inputs), normal(10, 3, seed=1)
    options = {"whitening": True, "normalize_term": norm}
    whole = terms_of(layer, x, y, **options)
    for rows in (10, 11, 100):
        for name, value in terms_of(layer, x, y, whitening_rows=rows, **options).items():
            np.testing.assert_array_equal(value, whole[name])


@pytest.mark.parametrize(("inputs", "units"), [(30, 40), (30, 2), (3, 7)])
def test_groups_are_orthogonal_each_and_normalised_together(inputs, units):
    """Eq. N3, by either system of the orthogonal term."""
    layer, x, y = DenseConnection(units), normal(10, inputs), normal(10, units, seed=1)
    for weight in (None, np.ones(10), np.array([1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 1.0, 1.0, 0.2, 0.7])):
        groups = [terms_of(layer, *one[:2], weight=one[2], whitening=True) for one in split_rows(x, y, 4, weight)]
        whole = sum(terms.orthogonal(np.concatenate([one["kernel"], one["bias"]])[None], 5) for one in groups)
        wanted = np.asarray(terms.frobenius([whole], (1, inputs + 1, units))[0])[0]
        found = terms_of(layer, x, y, weight=weight, whitening=True, whitening_rows=4, normalize_term="orthogonal")
        np.testing.assert_allclose(np.concatenate([found["kernel"], found["bias"]]), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("joins", ["trace", "penalty"])
def test_what_joins_a_term_joins_it_before_it_is_orthogonal(joins):
    """So the sum of the groups is made orthogonal, with the trace or the penalty in it."""
    x, y = normal(10, 6), normal(10, 3, seed=1)
    layer = DenseConnection(3, penalties={"kernel": lambda channel: ops.sum(channel)} if joins == "penalty" else {})
    rule = {"whitening": True, "whitening_rows": 4, "momentum": "before" if joins == "trace" else "none"}
    whitened = terms_of(layer, x, y, **{**rule, "momentum": "none"})
    whole = np.concatenate([whitened["kernel"], whitened["bias"]])
    wanted = np.asarray(terms.frobenius([terms.orthogonal(whole[None], 5)], (1, 7, 3))[0])[0]
    found = terms_of(layer, x, y, normalize_term="orthogonal", **rule)
    np.testing.assert_allclose(np.concatenate([found["kernel"], found["bias"]]), wanted, rtol=1e-6, atol=1e-9)


def test_positions_are_rows_of_groups_and_examples_are_counted_by_them():
    x, y = normal(4, 3, 5), normal(4, 3, 2, seed=1)
    layer = DenseConnection(2, positions=(3,))
    found = terms_of(layer, x, y, whitening=True, whitening_rows=6)
    parts = [terms_of(layer, x[one], y[one], whitening=True) for one in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(found["kernel"], parts[0]["kernel"] + parts[1]["kernel"], rtol=1e-9)
    thinned = {"whitening": True, "whitening_positions": 1}
    np.testing.assert_array_equal(
        terms_of(layer, x, y, whitening_rows=6, **thinned)["kernel"], terms_of(layer, x, y, **thinned)["kernel"]
    )


def test_a_penalty_joins_a_term_after_its_groups_are_whitened():
    x, y = normal(10, 9), normal(10, 3, seed=1)
    penalised = DenseConnection(3, penalties={"kernel": lambda channel: ops.sum(channel)})
    options = {"whitening": True, "whitening_rows": 4}
    plain = terms_of(DenseConnection(3), x, y, **options)["kernel"]
    np.testing.assert_allclose(terms_of(penalised, x, y, **options)["kernel"], plain + 1.0, rtol=1e-9)


@pytest.mark.parametrize("norm", ["frobenius", "orthogonal"])
def test_groups_of_batches_whose_size_is_not_known(norm):
    """A compiled `fit` does not know how many rows come; step by step they are known."""
    x, y, synapses = normal(19, 5), normal(19, 3, seed=1), []
    for eagerly in (False, True):
        keras.utils.set_random_seed(0)
        genome = genome_of(whitening=True, whitening_rows=4, normalize_term=norm)
        layers = [keras.Input((5,)), kb.layers.Dense(2), kb.layers.Dense(9), kb.layers.Dense(3)]
        model = kb.Sequential(layers, genome=genome)
        model.compile(loss="mean_squared_error", run_eagerly=eagerly)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        synapses.append([np.asarray(value) for layer in model.layers for value in layer.synapses.values()])
    for one, other in zip(*synapses, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


class Halves:
    """The second of two devices' halves of a batch: sums over both, in the order in which they are
    asked for."""

    def __init__(self):
        self.sums = []

    def step(self, layer, x, y, options):
        state = network.NetworkState(({"kernel": np.zeros((1, x.shape[-1], 3)), "bias": np.zeros((1, 1, 3))},))
        own = []

        def total(values):
            own.append(values)
            known = self.sums[len(own) - 1] if len(own) <= len(self.sums) else [0.0] * len(values)
            return [value + other for value, other in zip(values, known, strict=True)]

        batch = kb.core.equations.SharedBatch(8, total)
        respond = lambda _: ops.convert_to_tensor(y)  # noqa: E731
        result = network.step(genome_of(**options), chain([layer]), state, ops.convert_to_tensor(x), respond, batch=batch)
        self.sums = own
        return {name: np.asarray(value)[0] / -0.25 for name, value in result.state.synapses[0].items()}


@pytest.mark.parametrize("rows", [2, 4, 8, 20])
@pytest.mark.parametrize("norm", ["none", "orthogonal"])
def test_devices_with_whole_groups_learn_as_one_does(rows, norm):
    """So too where all their rows are one group."""
    x, y, halves = normal(8, 9), normal(8, 3, seed=1), Halves()
    options = {"whitening": True, "whitening_rows": rows, "normalize_term": norm}
    for half in (slice(0, 4), slice(4, 8)):
        found = halves.step(DenseConnection(3), x[half], y[half], options)
    wanted = terms_of(DenseConnection(3), x, y, **options)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9)


def test_a_dense_layer_is_whitened_with_its_bias():
    x, y = normal(5, 4), normal(5, 3, seed=1)
    found = terms_of(DenseConnection(3), x, y, whitening=True)
    wide = np.concatenate([x, np.ones((5, 1))], axis=1)
    gram = wide.T @ wide
    wanted = np.linalg.solve(gram * 5 / np.trace(gram) + np.eye(5), wide.T @ y)
    np.testing.assert_allclose(np.concatenate([found["kernel"], found["bias"]]), wanted, rtol=1e-9)


def test_an_embedding_is_dense_on_one_hot_inputs():
    numbers = np.array([[0, 3, 1], [3, 3, 5], [2, 0, 3]])
    y = normal(3, 3, 2, seed=1)
    weight = np.array([0.5, 2.0, 1.0])
    for options in ({}, {"normalize_term": "orthogonal"}):
        table = EmbeddingConnection(2, False, "linear", entries=6, positions=(3,))
        found = terms_of(table, numbers, y, weight=weight, whitening=True, **options)
        dense = DenseConnection(2, False, "linear", positions=(3,))
        wanted = terms_of(dense, np.eye(6)[numbers], y, weight=weight, whitening=True, **options)
        np.testing.assert_allclose(found["kernel"], wanted["kernel"], rtol=1e-9, atol=1e-12)


def test_an_einsum_dense_is_dense_and_letters_of_its_own_are_layers_of_their_own():
    x, y = normal(4, 3, 5), normal(4, 3, 2, 2, seed=1)
    einsum = einsum_connection("abc,cde->abde", (3, 5), (3, 2, 2), "de", None)
    found = terms_of(einsum, x, y, whitening=True)
    wanted = terms_of(DenseConnection(4, positions=(3,)), x, y.reshape(4, 3, 4), whitening=True)
    np.testing.assert_allclose(found["kernel"].reshape(5, 4), wanted["kernel"], rtol=1e-9)
    apart = einsum_connection("abc,bcd->abd", (3, 5), (3, 2), "bd", None)
    y = normal(4, 3, 2, seed=2)
    found = terms_of(apart, x, y, whitening=True)
    for place in range(3):
        wanted = terms_of(DenseConnection(2), x[:, place], y[:, place], whitening=True)
        np.testing.assert_allclose(found["kernel"][place], wanted["kernel"], rtol=1e-9)
        np.testing.assert_allclose(found["bias"].reshape(3, 2)[place], wanted["bias"][0], rtol=1e-9)


def test_groups_and_depthwise_convolutions_are_layers_of_their_own():
    x, y = normal(4, 1, 1, 6), normal(4, 1, 1, 4, seed=1)
    grouped = terms_of(ConvConnection(4, groups=2, **ONE), x, y, whitening=True)
    for group in range(2):
        own, to = slice(3 * group, 3 * group + 3), slice(2 * group, 2 * group + 2)
        wanted = terms_of(DenseConnection(2), x[:, 0, 0, own], y[:, 0, 0, to], whitening=True)
        np.testing.assert_allclose(grouped["kernel"][0, 0][:, to], wanted["kernel"], rtol=1e-9)
        np.testing.assert_allclose(grouped["bias"][:, to], wanted["bias"], rtol=1e-9)
    y = normal(4, 1, 1, 12, seed=1)
    layer = DepthwiseConnection(12, groups=6, multiplier=2, **ONE)
    deep = terms_of(layer, x, y, whitening=True)
    for channel in range(6):
        to = slice(2 * channel, 2 * channel + 2)
        wanted = terms_of(DenseConnection(2), x[:, 0, 0, channel : channel + 1], y[:, 0, 0, to], whitening=True)
        np.testing.assert_allclose(deep["kernel"][0, 0, channel], wanted["kernel"][0], rtol=1e-9)


def test_a_transposed_convolution_reads_what_it_multiplies():
    """Its term is the transposed system's: the Gram matrix of patches that a kernel of single ones
    passes on."""
    layer = TransposedConnection(3, size=(2, 2), strides=(2, 1), dilation=(1, 1), padding="valid")
    x = normal(4, 3, 2, 2)
    y = normal(4, *layer.target((3, 2, 2)), seed=1)
    found = terms_of(layer, x, y, whitening=True)
    kernel = normal(1, *layer.kernel_shape((3, 2, 2)), seed=3)
    read = np.asarray(layer.patches(ops.convert_to_tensor(x[None]), (3, 2, 2), 0))[0, 0]
    through = np.asarray(layer.rows(layer.product(ops.convert_to_tensor(kernel), ops.convert_to_tensor(x[None]))))[0]
    np.testing.assert_allclose(read @ np.asarray(layer.matrix(kernel))[0], through, rtol=1e-9, atol=1e-12)
    wide = np.concatenate([read, np.ones((len(read), 1))], axis=1)
    gram = wide.T @ wide
    wanted = np.linalg.solve(gram * 4 / np.trace(gram) + np.eye(9), wide.T @ y.reshape(-1, 3))
    np.testing.assert_allclose(np.asarray(layer.matrix(found["kernel"][None]))[0], wanted[:-1], rtol=1e-9)


def test_each_unit_of_a_scale_is_a_layer_of_its_own():
    x, y = normal(6, 3), normal(6, 3, seed=1)
    found = terms_of(scale_connection((3,), (0,), scales=True, offsets=True), x, y, whitening=True)
    for unit in range(3):
        wanted = terms_of(DenseConnection(1), x[:, unit : unit + 1], y[:, unit : unit + 1], whitening=True)
        np.testing.assert_allclose(found["kernel"][unit], wanted["kernel"][0, 0], rtol=1e-9)
        np.testing.assert_allclose(found["bias"][0, unit], wanted["bias"][0, 0], rtol=1e-9)
    offsets = terms_of(scale_connection((3,), (0,), scales=False, offsets=True), x, y, whitening=True)
    np.testing.assert_allclose(offsets["bias"][0], y.sum(0) / (6 + 1.0), rtol=1e-9)


@pytest.mark.parametrize(("most", "by"), [(3, (3, 3)), (6, (2, 2)), (0, (1, 1)), (100, (1, 1))])
def test_positions_of_a_convolution_may_be_fewer(most, by):
    """The Gram matrix of some positions, the term of all."""
    layer = ConvConnection(3, size=(2, 2), strides=(1, 1), dilation=(1, 1), padding="valid")
    x = normal(5, 4, 6, 2)
    y = normal(5, *layer.target((4, 6, 2)), seed=1)
    assert coarser((3, 5), most) == by
    found = terms_of(layer, x, y, whitening=True, whitening_positions=most)
    every, few = (
        np.asarray(unfold(ops.convert_to_tensor(x), (2, 2), strides, "valid", (1, 1))).reshape(-1, 8)
        for strides in ((1, 1), by)
    )
    wide, read = (np.concatenate([one, np.ones((len(one), 1))], axis=1) for one in (every, few))
    gram = read.T @ read
    wanted = np.linalg.solve(gram * 5 / np.trace(gram) + np.eye(9), wide.T @ y.reshape(-1, 3))
    np.testing.assert_allclose(found["kernel"].reshape(8, 3), wanted[:-1], rtol=1e-9)


def image_model(**options):
    keras.utils.set_random_seed(0)
    genome = genome_of(whitening=True, normalize_term="frobenius", momentum="after", **options)
    layers = [
        keras.Input((6, 6, 1)), kb.layers.Conv2D(3, 3), kb.layers.BatchNormalization(), keras.layers.Activation("relu"),
        keras.layers.Flatten(), kb.layers.Dense(4),
    ]  # fmt: skip
    model = kb.Sequential(layers, genome=genome)
    model.compile(loss="mean_squared_error")
    return model


def test_slow_synapses_predict(tmp_path):
    """`predict` reads averages: those of a convolution, of a dense layer, and of the statistics of
    a normalisation."""
    x, y = normal(32, 6, 6, 1).astype("float64"), normal(32, 4, seed=1)
    model, fast = image_model(slow_synapses=True), image_model()
    assert model.predict(x, verbose=0).shape == (32, 4)
    np.testing.assert_allclose(model.predict(x, verbose=0), fast.predict(x, verbose=0), rtol=1e-6)
    seen, breadth = [], np.exp(float(model.genome.log_averaging))
    for one in (model, fast):
        one.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    for name, variable in model.layers[0].synapses.items():
        if not name.endswith("_average"):
            np.testing.assert_allclose(variable, fast.layers[0].synapses[name], rtol=1e-6, atol=1e-8)
    average = None
    fast = image_model()
    for step in range(4):
        fast.train_on_batch(x[8 * step : 8 * step + 8], y[8 * step : 8 * step + 8])
        kernel = np.asarray(fast.layers[0].synapses["kernel"])
        share = (breadth + 1) / (step + 1 + breadth)
        average = kernel if average is None else average + (kernel - average) * share
        seen.append(kernel)
    np.testing.assert_allclose(model.layers[0].synapses["kernel_average"], average, rtol=1e-6, atol=1e-9)
    assert np.abs(average - seen[-1]).max() > 1e-4
    prediction = model.predict(x, verbose=0)
    np.testing.assert_allclose(model.to_keras().predict(x, verbose=0), prediction, rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), prediction, rtol=1e-6)


def test_whitening_learns_a_damping():
    """The derivative of a loss after a step by the damping's logarithm is that of finite
    differences."""
    x, y = normal(6, 9), normal(6, 3, seed=1)
    genome = genome_of(whitening=True, normalize_term="frobenius")
    graph = chain([DenseConnection(4), DenseConnection(3)])
    own = tuple(
        {"kernel": 0.4 * normal(1, *shape, seed=2), "bias": np.zeros((1, 1, shape[1]))} for shape in ((9, 4), (4, 3))
    )

    def loss(log_damping):
        one = kb.Genome.unchecked(genome.rule, {**genome.arrays, "log_damping": log_damping})
        state = network.NetworkState(own)
        for _ in range(2):
            result = network.step(one, graph, state, ops.convert_to_tensor(x), lambda output: output - y)
            state = result.state
        return ops.sum(ops.square(network.step(one, graph, state, ops.convert_to_tensor(x), lambda o: o - y).output - y))

    start = ops.convert_to_tensor(np.float64(-0.5))
    _, pull = kb.core.derivatives.vjp(loss, start)
    slope = float(pull(ops.ones((), dtype="float64"))[0])
    step = 1e-5
    difference = (float(loss(start + step)) - float(loss(start - step))) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-5)
    assert abs(slope) > 1e-4
