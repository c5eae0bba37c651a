"""The network step against a plain numpy step that was written from the paper on its own
(`numpy_twin`).

Everything is float64, so that agreement is to rounding: a term that is left out cannot hide in a
tolerance.
"""

import keras
import numpy as np
import numpy_twin
import pytest
import rule_table
from marks import slow_but

from keras_blur import Genome, Rule, genomes
from keras_blur.core import feedback, graph, network
from keras_blur.core.connections.dense import DenseConnection

STEPS = 3
WHOLE = ["default", "four_states", "oja_weights", "oja_activations", "mean", "directions_tied_updates", "fixed", "signs"]
TABLE = {**rule_table.SINGLE, **rule_table.combinations(32, seed=2)}


def square_slope(prediction, labels):
    return 2 * (prediction - labels) / labels.size


def respond(rule, y):
    """The feedback of the library for a rule."""
    if rule.feedback == "labels":
        return lambda prediction: y
    loss = rule.keras_loss or keras.losses.MeanSquaredError()
    return lambda prediction: feedback.error(loss, y, prediction, population=len(prediction.shape) - len(y.shape))


def close(actual, expected, name):
    assert np.asarray(actual).dtype == np.float64
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11, err_msg=name)


def compare(rule, *, seed=0, weights=None, chain=None, activations=None, **kinds):
    """Runs both for a few steps and compares all that they have."""
    genome = rule_table.draw_genome(rule, seed)
    synapses = rule_table.draw_synapses(rule, seed + 1, **kinds)
    before = synapses
    state = network.NetworkState(synapses, 0, ())
    if rule.keep_neurons:
        zeros = [np.zeros((rule.states, rule_table.BATCH, size)) for size in rule_table.SIZES]
        state = state._replace(neurons=tuple(zeros))
    chain = chain or rule_table.dense_chain()
    neurons = None
    for time in range(STEPS):
        x, y = rule_table.draw_batch(seed + 2 + time)
        result = network.step(genome, chain, state, x, respond(rule, y), sample_weight=weights)
        state = result.state
        synapses, neurons, prediction = numpy_twin.step(
            genome, synapses, x, y,
            time=time, neurons=neurons, weights=weights, loss_slope=square_slope, activations=activations,
        )  # fmt: skip
        assert state.step == time + 1
        close(result.output, prediction, f"prediction, step {time}")
        assert result.neurons[0].shape[-3] in (1, rule.states)
        close(result.neurons[0][0], neurons[0][0], "input")
        for layer, (actual, expected) in enumerate(zip(result.neurons[1:], neurons[1:], strict=True)):
            close(actual, expected, f"neurons of layer {layer + 1}, step {time}")
        for layer, (actual, expected) in enumerate(zip(state.synapses, synapses, strict=True)):
            assert set(actual) == set(expected)
            for name, value in expected.items():
                close(actual[name], value, f"{name} of layer {layer}, step {time}")
    for old, new in zip(before, synapses, strict=True):
        for name, value in old.items():
            moved = np.abs(new[name] - value).max()
            if rule.changes(name):
                assert moved > 1e-7, f"{name} did not learn, so the test shows nothing"
            elif rule.normalize_synapses not in ("stored", "both"):
                assert moved == 0.0, f"{name} is held"


def test_the_tables_have_every_option():
    # For `predict`, outside the step; and for positions, which a dense layer has not.
    assert rule_table.never_set(rule_table.SINGLE) == ["normalization_momentum", "whitening_positions"]
    for table in (rule_table.SINGLE, rule_table.COVER, rule_table.combinations(32, seed=2)):
        assert rule_table.never_chosen(table) == []


@pytest.mark.parametrize("name", slow_but(rule_table.SINGLE, TABLE))
def test_step_agrees(name):
    compare(Rule(**TABLE[name]))


@pytest.mark.parametrize("name", WHOLE)
def test_first_backward_arrays_are_updated_when_given(name):
    """Nothing reads the backward kernel of the first layer, nor any backward bias; published
    numbers have them."""
    compare(Rule(**rule_table.SINGLE[name]), whole=True)


@pytest.mark.parametrize("name", ["rescaled_stored_untied", "synapses_effective", "exp_update", "presynaptic"])
def test_first_backward_arrays_with_stabilisers(name):
    compare(Rule(**rule_table.SINGLE[name]), whole=True, seed=5)


@pytest.mark.parametrize("name", rule_table.COVER)
def test_sample_weights(name):
    compare(Rule(**rule_table.COVER[name]), weights=np.array([0.5, 2.0, 0.0, 1.3]))


@pytest.mark.parametrize("name", rule_table.COVER)
def test_without_bias(name):
    compare(Rule(**rule_table.COVER[name]), use_bias=False, chain=rule_table.dense_chain(use_bias=False))


@pytest.mark.parametrize("derivative_state", [False, True])
def test_activation_of_one_layer(derivative_state):
    names = ["sigmoid", None, "linear"]
    pairs = zip(rule_table.SIZES[1:], names, strict=True)
    chain = graph.chain([DenseConnection(units, activation=name) for units, name in pairs])
    compare(Rule(derivative_state=derivative_state), chain=chain, activations=names)


def test_feedback_goes_where_the_paper_says():
    """Section 3.3: the output keeps state 1, state 2 is the label, all others are zero."""
    rule = Rule(states=4)
    genome, synapses = rule_table.draw_genome(rule), rule_table.draw_synapses(rule)
    x, y = rule_table.draw_batch()
    result = network.step(genome, rule_table.dense_chain(), network.NetworkState(synapses), x, lambda _: y)
    last = np.asarray(result.neurons[-1])
    np.testing.assert_allclose(last[0] / genome.temperature, result.output, rtol=1e-12)
    np.testing.assert_array_equal(last[1], y)
    np.testing.assert_array_equal(last[2:], 0)


def test_twin_with_the_backpropagation_genome_descends_the_loss():
    """The twin itself is checked against calculus: its change is the finite difference of a squared
    error."""
    given = genomes.backprop(0.1, last_activation="tanh")
    genome = Genome(given.rule, {name: np.asarray(value, np.float64) for name, value in given.arrays.items()})
    synapses = rule_table.draw_synapses(genome.rule)
    x, y = rule_table.draw_batch()

    def loss(own):
        return np.mean((numpy_twin.step(genome, own, x, y, loss_slope=square_slope)[2] - y) ** 2)

    new, _, _ = numpy_twin.step(genome, synapses, x, y, loss_slope=square_slope)
    places = [(0, "kernel", (0, 1, 2)), (1, "kernel", (0, 3, 4)), (1, "bias", (0, 0, 2)), (2, "bias", (0, 0, 1))]
    for layer, name, place in places:
        ends = []
        for shift in (1e-5, -1e-5):
            moved = [{key: value.copy() for key, value in own.items()} for own in synapses]
            moved[layer][name][place] += shift
            ends.append(loss(moved))
        slope = (ends[0] - ends[1]) / 2e-5
        change = new[layer][name][place] - synapses[layer][name][place]
        np.testing.assert_allclose(change, float(genome.synapse_update) * slope, rtol=1e-6)
