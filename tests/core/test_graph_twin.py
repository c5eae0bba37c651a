"""Convolutions, residual sums and shared layers against the plain numpy step (`numpy_twin`).

Everything is float64, as in `test_twin`.
"""

import threading

import keras
import numpy as np
import numpy_twin
import pytest
import rule_table
from keras import ops
from marks import slow_but

from keras_blur import Genome, Rule, genomes
from keras_blur.core import equations, feedback, graph, network, weightless
from keras_blur.core.companions import companions
from keras_blur.core.connections.conv import ConvConnection, DepthwiseConnection
from keras_blur.core.connections.dense import DenseConnection
from keras_blur.core.connections.einsum import einsum_connection
from keras_blur.core.connections.scale import scale_connection

STEPS = 3
BATCH = 3
CLASSES = 3


class Net:
    """One network, built for the core and for the twin at once.

    Args:
        shapes: shape of the features of each input.
    """

    def __init__(self, *shapes):
        self.inputs, self.shapes = shapes, list(shapes)
        self.builder = graph.Builder([len(shape) for shape in shapes])
        self.twin = []
        self.sources = []  # shape of what each set of synapses reads
        self._holders = {}

    def _connect(self, connection, source, key=None, **said):
        holder = self._holders.setdefault(object() if key is None else key, len(self._holders))
        if holder == len(self.sources):
            self.sources.append(self.shapes[source])
        self.twin.append(numpy_twin.Layer(source, connection.units, holder, activation=connection.activation, **said))
        self.shapes.append(connection.target(self.shapes[source]))
        return self.builder.connect(connection, source, key=key)

    def dense(self, source, units, **options):
        return self._connect(DenseConnection(units, **options), source)

    def conv(self, source, units, window, stride=1, groups=1, key=None, **options):
        strides, ones = (stride,) * len(window), (1,) * len(window)
        connection = ConvConnection(
            units, **options, size=window, strides=strides, padding="same", dilation=ones, groups=groups
        )
        return self._connect(connection, source, key, window=window, stride=stride, groups=groups)

    def depthwise(self, source, multiplier, window):
        channels, ones = self.shapes[source][-1], (1,) * len(window)
        connection = DepthwiseConnection(
            channels * multiplier, size=window, strides=ones, padding="same", dilation=ones,
            groups=channels, multiplier=multiplier,
        )  # fmt: skip
        return self._connect(connection, source, window=window, groups=channels)

    def scale(self, source):
        shape = self.shapes[source]
        connection = scale_connection(shape, (len(shape) - 1,), scales=True, offsets=True)
        return self._connect(connection, source, own=True)

    def map(self, name, *sources):
        shapes = [self.shapes[source] for source in sources]
        maps = {
            "sum": lambda: weightless.Linear(ops.add, shapes, shapes[0]),
            "product": lambda: weightless.Jacobian(ops.multiply, shapes, shapes[0]),
            "flatten": lambda: weightless.Linear(
                lambda x: ops.reshape(x, (-1, int(np.prod(shapes[0])))), shapes, (int(np.prod(shapes[0])),)
            ),
            "relu": lambda: weightless.Elementwise(ops.relu, shapes, shapes[0]),
            "pool": lambda: weightless.MaxPooling(
                lambda x: ops.max_pool(x, 2, 1, "same", data_format="channels_last"),
                shapes[0],
                shapes[0],
                (2, 2),
                (1, 1),
                "same",
            ),
            "centre": lambda: weightless.Normalize(shapes[0], range(len(shapes[0])), numpy_twin.BATCH_EPSILON),
        }
        self.twin.append(numpy_twin.Map(name, sources))
        made = maps[name]()
        self.shapes.append(made.target)
        return self.builder.map(made, *sources)

    @property
    def graph(self):
        """The network for the core; its output is the last value."""
        return self.builder.graph([len(self.shapes) - 1])

    def synapses(self, rule, seed):
        """Random synapses."""
        rng = np.random.default_rng(seed)
        plan, result = self.graph, []
        for connection, source, feeds_back in zip(plan.holders, self.sources, plan.feeds_back, strict=True):
            shapes = connection.shapes(rule, source, feeds_back=feeds_back)
            shapes |= {name: shapes[like] for name, like in companions(rule, tuple(shapes)).items()}
            result.append({name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()})
        return tuple(result)

    def batch(self, seed, examples=BATCH):
        """Inputs and labels."""
        rng = np.random.default_rng(seed)
        x = tuple(rng.normal(0, 1, (examples, *shape)) for shape in self.inputs)
        y = 2 * np.eye(CLASSES)[rng.integers(CLASSES, size=examples)] - 1
        return x, y

    def zeros(self, rule, examples=BATCH):
        """Neurons before the first step, if the rule keeps them."""
        if not rule.keep_neurons:
            return ()
        return tuple(np.zeros((rule.states, examples, *self.shapes[node])) for node in self.graph.nodes)


def convolutional():
    net = Net((6, 5, 2))
    value = net.conv(0, 3, (3, 2), stride=2)
    value = net.map("pool", value)
    value = net.conv(value, 2, (2, 3), stride=2)
    net.dense(net.map("flatten", value), CLASSES)
    return net


def residual():
    net = Net((3, 2, 2))
    first = net.conv(0, 3, (2, 2))
    branch = net.scale(net.map("centre", net.conv(first, 3, (3, 3), use_bias=False)))
    value = net.map("relu", net.map("sum", first, branch))
    net.dense(net.map("flatten", value), CLASSES)
    return net


def twice():
    """One convolution that reads both inputs, and once itself."""
    net = Net((2, 3, 2), (2, 3, 2))
    left, right = (net.conv(source, 2, (2, 2), key="shared") for source in (0, 1))
    again = net.conv(left, 2, (2, 2), key="shared")
    value = net.map("sum", net.map("product", again, right), left)
    net.dense(net.map("flatten", value), CLASSES)
    return net


def grouped(groups=2):
    """Units that read some of the inputs only."""
    net = Net((3, 2, 2))
    value = net.conv(0, 4, (2, 2))
    value = net.depthwise(value, 2, (2, 1))
    if groups > 1:
        value = net.conv(value, 4, (2, 2), groups=groups)
    net.dense(net.map("flatten", value), CLASSES)
    return net


def depthwise():
    return grouped(1)


NETS = {"convolutional": convolutional, "residual": residual, "twice": twice}
RULES = {
    "plain": {},
    "pair": {**rule_table.COVER["pair"], "channels": "own", "directions": "untied"},
    "stabilised": {
        "oja": "activations", "normalize_activations": "both", "normalize_synapses": "effective",
        "rescale_synapses": True, "saturation": "exp_update", "batch_reduction": "mean", "momentum": "before",
        "forward_activation": "relu_tanh",
    },
    "whitened": {
        "whitening": True, "normalize_term": "frobenius", "momentum": "after", "slow_synapses": True,
        "directions": "tied_updates", "update_decay": "power",
    },
    "whitened_orthogonal": {"whitening": True, "normalize_term": "orthogonal", "directions": "tied", "channels": "tied"},
}  # fmt: skip


def square_slope(prediction, labels):
    return 2 * (prediction - labels) / labels.size


def respond(rule, y):
    """The feedback of the library for a rule."""
    if rule.feedback == "labels":
        return lambda prediction: y
    loss = keras.losses.MeanSquaredError()
    return lambda prediction: feedback.error(loss, y, prediction, population=len(prediction.shape) - len(y.shape))


def close(actual, expected, name):
    assert np.asarray(actual).dtype == np.float64
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-11, err_msg=name)


def with_axis(tree):
    """Arrays with a leading axis of one member of a population."""
    return keras.tree.map_structure(lambda value: value[None], tree)


def compare(net, rule, *, seed=0, weights=None, population=False):
    """Runs both for a few steps and compares all that they have.

    With `population` the core has a population of one, for which a convolution unfolds patches.
    """
    lead = with_axis if population else lambda tree: tree
    only = (lambda value: value[0]) if population else (lambda value: value)
    if rule.layers is not None:
        rule = rule.replace(layers=len(net.sources))
    genome = rule_table.draw_genome(rule, seed)
    before = synapses = net.synapses(rule, seed + 1)
    state, neurons = network.NetworkState(lead(synapses), 0, lead(net.zeros(rule))), None
    for time in range(STEPS):
        x, y = net.batch(seed + 2 + time)
        given = None if weights is None else lead(weights)
        result = network.step(genome, net.graph, state, lead(x), respond(rule, lead(y)), sample_weight=given)
        state = result.state
        synapses, neurons, prediction = numpy_twin.step(
            genome, synapses, x, y,
            graph=net.twin, time=time, neurons=neurons, weights=weights, loss_slope=square_slope,
        )  # fmt: skip
        close(only(result.output), prediction, f"prediction, step {time}")
        inputs = len(net.inputs)
        for number, (actual, expected) in enumerate(zip(result.neurons, neurons, strict=True)):
            actual = only(actual)
            if number < inputs:  # the core leaves out states that are zero
                actual, expected = actual[:1], expected[:1]
            close(actual, expected, f"neurons of value {net.graph.nodes[number]}, step {time}")
        for holder, (actual, expected) in enumerate(zip(state.synapses, synapses, strict=True)):
            assert set(actual) == set(expected)
            for name, value in expected.items():
                close(only(actual[name]), value, f"{name} of synapses {holder}, step {time}")
    for old, new in zip(before, synapses, strict=True):
        for name, value in old.items():
            if rule.changes(name):
                assert np.abs(new[name] - value).max() > 1e-7, f"{name} did not learn, so the test shows nothing"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("states", slow_but([2, 4], [2, 3, 4]))
@pytest.mark.parametrize("net", slow_but(["convolutional", "twice"], NETS))
def test_step_agrees(net, states, rule):
    compare(NETS[net](), Rule(**{**RULES[rule], "states": states}), seed=states)


@pytest.mark.parametrize("name", rule_table.COVER)
@pytest.mark.parametrize("net", slow_but([residual], [convolutional, residual]))
def test_every_option(net, name):
    compare(net(), Rule(**rule_table.COVER[name]))


RANDOM = rule_table.combinations(32, seed=2)


@pytest.mark.parametrize("name", slow_but(list(RANDOM)[:8], RANDOM))
def test_mixtures_of_options(name):
    compare(convolutional(), Rule(**RANDOM[name]))


@pytest.mark.parametrize("net", [depthwise, twice])
@pytest.mark.parametrize("name", ["three", "stored", "effective", "layers", "orthogonal"])
def test_norms_of_synapses_run_over_those_that_are_there(net, name):
    """With fewer synapses than a dense layer has, and with synapses that several layers share."""
    compare(net(), Rule(**rule_table.COVER[name]))


@pytest.mark.parametrize("net", [convolutional, residual, grouped])
@pytest.mark.parametrize("name", ["three", "pair", "stored", "layers"])
def test_population(net, name):
    compare(net(), Rule(**rule_table.COVER[name]), population=True)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ["three", "stored"])
def test_sample_weights_count_examples(net, name):
    compare(NETS[net](), Rule(**rule_table.COVER[name]), weights=np.array([0.5, 0.0, 1.3]))


class Halves:
    """Runs a function for both halves of a batch, each in a thread, and adds up their totals."""

    def __init__(self):
        self._meet = threading.Barrier(2, timeout=60)
        self._parts = [None, None]

    def total(self, half):
        """`SharedBatch.total` for one half."""

        def total(arrays):
            self._parts[half] = arrays
            self._meet.wait()
            sums = [first + second for first, second in zip(*self._parts, strict=True)]
            self._meet.wait()  # before the next parts are put there
            return sums

        return total

    def run(self, function):
        """What `function(half, total)` returns for each half."""
        found, errors = [None, None], []

        def one(half):
            try:
                found[half] = function(half, self.total(half))
            except Exception as error:
                errors.append(error)
                self._meet.abort()

        threads = [threading.Thread(target=one, args=(half,)) for half in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found


SHARED = {
    "sums": {"normalize_activations": "both", "states": 3},
    "means": {
        "normalize_activations": "forward", "batch_reduction": "mean", "oja": "activations",
        "normalize_term": "orthogonal", "orthogonal_iterations": 2,
        "normalize_synapses": "stored", "presynaptic": "forward",
    },
    "pair": {**rule_table.COVER["pair"], "feedback": "labels", "directions": "untied", "forward_synapse_update": True},
    "whitened": {**rule_table.COVER["whitened"], "normalize_activations": "forward"},
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("net", slow_but([residual], [convolutional, residual]))
def test_two_halves_of_a_batch_are_one(net, name):
    """Statistics of sums and of a normalisation, and Hebbian sums, are those of the whole batch."""
    net, rule = net(), Rule(**SHARED[name])
    genome, synapses = rule_table.draw_genome(rule), net.synapses(rule, 1)
    weights = np.linspace(0.1, 1.5, 32)

    def learn(examples, batch=None):
        state = network.NetworkState(synapses)
        for time in range(2):
            x, y = (keras.tree.map_structure(lambda value: value[examples], one) for one in net.batch(time, 32))
            result = network.step(
                genome, net.graph, state, x, lambda _, y=y: y, sample_weight=weights[examples], batch=batch
            )
            state = result.state
        return result

    whole = learn(slice(None))
    cuts = [slice(0, 16), slice(16, 32)]
    halves = Halves().run(lambda half, total: learn(cuts[half], equations.SharedBatch(32, total)))
    for half, cut in zip(halves, cuts, strict=True):
        close(half.output, whole.output[cut], "output")
        for holder, (actual, expected) in enumerate(zip(half.state.synapses, whole.state.synapses, strict=True)):
            for known, value in expected.items():
                close(actual[known], value, f"{known} of synapses {holder}")
    for first, second in zip(*(half.state.synapses for half in halves), strict=True):
        for known in first:
            np.testing.assert_array_equal(first[known], second[known])


def test_inputs_of_an_einsum_have_their_own_readers():
    """The equation is that of a dense layer for each h: a unit reads the inputs of its own h."""
    connection = einsum_connection("bhd,hdk->bkh", (2, 3), (4, 2), None, None)
    kernel = np.random.default_rng(0).normal(size=(1, 2, 3, 4))
    found = connection.over_readers(connection.matrix(ops.convert_to_tensor(kernel)))
    energies = np.broadcast_to(kernel.sum(-1, keepdims=True), kernel.shape)
    np.testing.assert_allclose(connection.kernel(found, ops.convert_to_tensor(kernel)), energies, rtol=1e-12)


@pytest.mark.parametrize("net", [convolutional, residual, twice, grouped])
def test_twin_with_the_backpropagation_genome_descends_the_loss(net):
    """The twin is checked against calculus: its change is the slope of a squared error."""
    net, given = net(), genomes.backprop(0.1, last_activation="tanh")
    genome = Genome(given.rule, {name: np.asarray(value, np.float64) for name, value in given.arrays.items()})
    synapses = net.synapses(genome.rule, 0)
    x, y = net.batch(1)

    def step(own):
        return numpy_twin.step(genome, own, x, y, graph=net.twin, loss_slope=square_slope)

    new = step(synapses)[0]
    for holder, own in enumerate(synapses):
        for name, value in own.items():
            place = tuple(size // 2 for size in value.shape)
            ends = []
            for shift in (1e-5, -1e-5):
                moved = [dict(arrays) for arrays in synapses]
                moved[holder][name] = value.copy()
                moved[holder][name][place] += shift
                ends.append(np.mean((step(moved)[2] - y) ** 2))
            slope = (ends[0] - ends[1]) / 2e-5
            change = new[holder][name][place] - value[place]
            np.testing.assert_allclose(change, float(genome.synapse_update) * slope, rtol=1e-6, atol=1e-11)
