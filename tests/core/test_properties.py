"""What must hold for every genome: symmetries of a network, and what a population or a compiler may
not change.

Tensors are float64 unless a test is about compiled code, which `fit` runs in float32.
"""

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import rule_table
from keras import ops
from marks import slow_but
from on_backend import compiled
from rule_table import COVER, SIZES, dense_chain, draw_batch, draw_genome, draw_synapses

from keras_blur import Genome, Rule
from keras_blur.core import network, terms
from keras_blur.core.companions import AVERAGE, TRACE
from keras_blur.core.states import joined

STEPS = 2
# Rules whose batch is a plain sum over examples, so that a weight is a count.
COUNTED = {name: options for name, options in COVER.items() if name not in ("batch", "three", "whitened_rows")}
QUICK = ("plain", "three", "layers", "pair", "whitened")
PLENTY = hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None)


def learn(genome, synapses, batches, *, weights=None, chain=None, neurons=()):
    """Synapses, prediction and neurons after a few steps."""
    state, result = network.NetworkState(tuple(synapses), 0, neurons), None
    for x, y in batches:
        result = network.step(genome, chain or dense_chain(), state, x, respond(genome.rule, y), sample_weight=weights)
        state = result.state
    synapses = [{name: np.asarray(value) for name, value in own.items()} for own in state.synapses]
    return synapses, np.asarray(result.output), [np.asarray(states) for states in result.neurons]


def respond(rule, y):
    return (lambda _: y) if rule.feedback == "labels" else (lambda prediction: prediction - y)


def setting(rule, seed=0):
    """A genome, synapses and batches."""
    return draw_genome(rule, seed), draw_synapses(rule, seed + 1), [draw_batch(seed + 2 + i) for i in range(STEPS)]


def same(actual, expected, rtol=1e-9, atol=1e-11):
    keras.tree.assert_same_structure(actual, expected)
    for one, other in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        assert np.isfinite(other).all()
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def permuted(synapses, layer, order):
    """The same network with the units of a layer of neurons (1: the first hidden one) in another
    order."""
    new = [dict(own) for own in synapses]
    new[layer - 1] = {name: value[..., order] for name, value in new[layer - 1].items()}
    if layer < len(new):
        new[layer] = {name: value if "bias" in name else value[..., order, :] for name, value in new[layer].items()}
    return new


@pytest.mark.parametrize("name", slow_but(QUICK, COVER))
@hypothesis.given(layer=st.integers(1, len(SIZES) - 2), seed=st.integers(0, 9), data=st.data())
@hypothesis.settings(PLENTY, max_examples=3)
def test_permuted_hidden_units_learn_permuted_synapses(name, layer, seed, data):
    genome, synapses, batches = setting(Rule(**COVER[name]), seed)
    order = data.draw(st.permutations(range(SIZES[layer])))
    new, prediction, neurons = learn(genome, synapses, batches)
    new_permuted, prediction_permuted, neurons_permuted = learn(genome, permuted(synapses, layer, order), batches)
    same(new_permuted, permuted(new, layer, order))
    same(prediction_permuted, prediction)
    same(neurons_permuted[layer], neurons[layer][..., order])


@pytest.mark.parametrize("name", COVER)
def test_permuted_classes_learn_permuted_synapses(name):
    genome, synapses, batches = setting(Rule(**COVER[name]))
    order = [2, 0, 1]
    new, prediction, _ = learn(genome, synapses, batches)
    relabelled = [(x, y[:, order]) for x, y in batches]
    new_permuted, prediction_permuted, _ = learn(genome, permuted(synapses, len(SIZES) - 1, order), relabelled)
    same(new_permuted, permuted(new, len(SIZES) - 1, order))
    same(prediction_permuted, prediction[:, order])


@pytest.mark.parametrize("name", [name for name in COVER if "whitening_rows" not in COVER[name]])  # consecutive ones
def test_order_of_examples_does_not_matter(name):
    genome, synapses, batches = setting(Rule(**COVER[name]))
    order = np.array([3, 1, 0, 2])
    new, prediction, neurons = learn(genome, synapses, batches)
    shuffled = learn(genome, synapses, [(x[order], y[order]) for x, y in batches])
    same(shuffled, (new, prediction[order], [states[..., order, :] for states in neurons]))


@pytest.mark.parametrize("name", slow_but(QUICK, COVER))
def test_population_is_a_loop_over_genomes_and_replicas(name):
    """Leading axes: 3 genomes, each with 2 networks on data of their own."""
    rule, genomes, replicas = Rule(**COVER[name]), 3, 2
    population = draw_genome(rule, population=(genomes, 1))
    synapses = draw_synapses(rule, 1, leading=(genomes, replicas))
    batches = [draw_batch(2 + step, leading=(genomes, replicas)) for step in range(STEPS)]
    together = learn(population, synapses, batches)
    for g in range(genomes):
        member = (slice(None), g, 0) if rule.layers else (g, 0)
        genome = Genome(rule, {key: value[member] for key, value in population.arrays.items()})
        for r in range(replicas):
            own = [{key: value[g, r] for key, value in layer.items()} for layer in synapses]
            alone = learn(genome, own, [(x[g, r], y[g, r]) for x, y in batches])
            same(keras.tree.map_structure(lambda value, g=g, r=r: value[g, r], together), alone)


# A state more, which nothing reads and which reads nothing: these arrays of k = 2 go into the
# corner of k = 3.
WIDER = [name for name, options in COVER.items() if "states" not in options]


@pytest.mark.parametrize("name", WIDER)
def test_smaller_genome_embeds_in_a_larger_one(name):
    """Rows of zeros: no other state reads state 3. Its own column may hold anything, since it is
    read nowhere.

    The bias is 1 in every state, the third too: the zero row of nu and nu~ cuts that off, so
    nothing has to be made up.
    """
    small_rule = Rule(**COVER[name])
    rule = small_rule.replace(states=3)
    small, synapses, batches = setting(small_rule)
    drawn, wide = draw_genome(rule, 7), draw_synapses(rule, 8)
    arrays = {}
    for key, shape in rule.shapes().items():
        array = np.array(drawn.arrays[key] if shape else small.arrays[key])
        if shape:
            corner = small.arrays[key]
            array[(..., *[slice(2)] * len(shape))] = corner
        if key.endswith("mu_tilde"):
            array[..., :2, 2] = 0  # [channel, source]
        elif len(shape) == 2:
            array[..., 2, :2] = 0  # [source, target]
        arrays[key] = array
    if small_rule.channels == "own":
        wide = [
            {key: np.concatenate([own[key], extra[key][2:]]) for key in own}
            for own, extra in zip(synapses, wide, strict=True)
        ]
    elif small_rule.channels == "tied_updates":
        wide = [{key: np.concatenate([own[key], own[key][:1]]) for key in own} for own in synapses]
    else:
        wide = synapses
    new, prediction, neurons = learn(small, synapses, batches)
    new_wide, prediction_wide, neurons_wide = learn(Genome(rule, arrays), wide, batches)
    same(prediction_wide, prediction)
    same([states[:2] for states in neurons_wide], neurons)
    channels = 1 if rule.channels == "tied" else 2
    same([{key: value[:channels] for key, value in own.items()} for own in new_wide], new)


@pytest.mark.parametrize("name", [name for name in COVER if "normalize_term" not in COVER[name]])  # where scale is taken out
def test_sum_is_mean_with_a_gate_times_the_batch(name):
    rule = Rule(**COVER[name]).replace(batch_reduction="sum")
    if rule.oja == "weights":  # Oja's term on weights is no sum over a batch
        rule = rule.replace(oja="none", oja_learned=False)
    genome, synapses, batches = setting(rule)
    gates = {key: value * rule_table.BATCH for key, value in genome.arrays.items() if key.endswith("synapse_update")}
    mean = Genome(rule.replace(batch_reduction="mean"), {**genome.arrays, **gates})
    same(learn(mean, synapses, batches), learn(genome, synapses, batches))


@pytest.mark.parametrize("name", COUNTED)
def test_weight_two_is_the_example_twice(name):
    genome, synapses, batches = setting(Rule(**COUNTED[name]))
    twice = np.array([0, 1, 1, 2, 3])
    new, prediction, _ = learn(genome, synapses, batches, weights=np.array([1.0, 2.0, 1.0, 1.0]))
    new_twice, prediction_twice, _ = learn(genome, synapses, [(x[twice], y[twice]) for x, y in batches])
    same(new_twice, new)
    same(prediction_twice, prediction[twice])


@pytest.mark.parametrize("name", COUNTED)
def test_weight_zero_is_the_example_left_out(name):
    genome, synapses, batches = setting(Rule(**COUNTED[name]))
    new, _, _ = learn(genome, synapses, batches, weights=np.array([1.0, 0.0, 1.0, 1.0]))
    keep = np.array([0, 2, 3])
    left, _, _ = learn(genome, synapses, [(x[keep], y[keep]) for x, y in batches])
    same(left, new)


@pytest.mark.parametrize("name", COVER)
def test_zero_update_gate_and_full_keep_leave_synapses(name):
    """f~ = 1 and eta~ = 0: nothing but normalisation and saturation is left of equation 7, and
    those are removed."""
    rule = Rule(**COVER[name]).replace(normalize_synapses="none", rescale_synapses=False, saturation="none")
    genome, synapses, batches = setting(rule)
    still = {}
    for key, value in genome.arrays.items():
        if key.endswith(("synapse_update", "synapse_keep")):
            still[key] = np.full_like(value, key.endswith("keep"))
    new, _, _ = learn(genome.replace(**still), synapses, batches)
    for old, own in zip(synapses, new, strict=True):  # a trace goes on, an average follows
        for key in old:
            like = key.removesuffix(AVERAGE)
            if not key.endswith(TRACE):
                np.testing.assert_allclose(own[key], old[like], rtol=0 if key == like else 1e-12)


@hypothesis.given(step=st.integers(0, 50), every=st.integers(1, 5))
@PLENTY
def test_step_may_be_a_tensor(step, every):
    rule = Rule(supervised_every=every, update_decay="power")
    genome, synapses, batches = setting(rule)
    results = []
    for counter in (step, ops.convert_to_tensor(step)):
        state = network.NetworkState(synapses, counter)
        results.append(network.step(genome, dense_chain(), state, batches[0][0], respond(rule, batches[0][1])))
    same(results[1].state.synapses, results[0].state.synapses)
    same(results[1].neurons, results[0].neurons)
    assert int(results[1].state.step) == results[0].state.step == step + 1
    labelled = np.array_equal(results[0].neurons[-1][1], batches[0][1])
    learnt = not np.array_equal(results[0].state.synapses[0]["kernel"], synapses[0]["kernel"])
    assert labelled == learnt == (step % every == 0)


def compiled_step(rule, chain):
    """A compiled function of one step, of all that a step reads, and a list that grows when it is
    traced."""
    traces = []

    def run(arrays, state, x, y):
        traces.append(1)
        result = network.step(Genome(rule, arrays), chain, network.NetworkState(*state), x, respond(rule, y))
        return tuple(result.state), result.output

    return compiled(run), traces


@pytest.mark.parametrize("name", slow_but(QUICK, COVER))
def test_compiler_changes_nothing_and_traces_once(name):
    """XLA gives the eager numbers, and no argument that changes from step to step makes a new
    trace."""
    rule, sizes = Rule(**COVER[name]), (4, 5, 4, 3)
    synapses = draw_synapses(rule, 1, sizes, dtype="float32")
    neurons = tuple(np.zeros((rule.states, rule_table.BATCH, size), "float32") for size in sizes)
    neurons = (neurons[0][:1], *neurons[1:]) if rule.keep_neurons else ()
    eager = network.NetworkState(synapses, 0, neurons)
    state = keras.tree.map_structure(ops.convert_to_tensor, tuple(eager))
    run, traces = compiled_step(rule, dense_chain(sizes))
    for index in range(3):
        x, y = map(ops.convert_to_tensor, draw_batch(2 + index, sizes, dtype="float32"))
        genome = draw_genome(rule, index, dtype="float32")
        result = network.step(genome, dense_chain(sizes), eager, x, respond(rule, y))
        eager = result.state
        state, output = run(keras.tree.map_structure(ops.convert_to_tensor, dict(genome.arrays)), state, x, y)
        same(state, tuple(eager), rtol=1e-5, atol=1e-5)
        same(output, result.output, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("genome_type", ["float32", "float64"])
@pytest.mark.parametrize("states_type", ["float32", "float64"])
@pytest.mark.parametrize("name", ["plain", "three", "batch", "effective"])
def test_results_have_the_type_of_the_states(name, states_type, genome_type):
    """A genome of any type works with states of any type; the states' type is that of the
    result."""
    rule = Rule(**COVER[name])
    genome = draw_genome(rule, dtype=genome_type)
    synapses = draw_synapses(rule, 1, dtype=states_type)
    x, y = draw_batch(2, dtype=states_type)
    result = network.step(genome, dense_chain(), network.NetworkState(synapses), x, respond(rule, y))
    types = {np.asarray(value).dtype.name for value in keras.tree.flatten((result.state.synapses, result.neurons))}
    assert types == {states_type}
    _, exact, _ = learn(draw_genome(rule), draw_synapses(rule, 1), [draw_batch(2)])
    same(result.output, exact, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("normalize_synapses", ["stored", "effective", "both"])
def test_effective_synapses_do_not_depend_on_the_size_of_stored_ones(normalize_synapses):
    """Section C.6: a column of a kernel counts only by its direction."""
    rule = Rule(normalize_synapses=normalize_synapses)
    genome, synapses, batches = setting(rule)
    larger = [{key: 10 * value for key, value in own.items()} for own in synapses]
    outputs = [learn(genome, own, batches[:1])[1] for own in (synapses, larger)]
    same(outputs[1], outputs[0], rtol=1e-6)


@pytest.mark.parametrize("axis", ["batch", "units"])
def test_normalised_sums_have_the_mean_and_deviation_of_the_genome(axis):
    """Section 3.4, on linear neurons of which nothing else is left."""
    rule = Rule(
        states=3,
        forward_activation="linear",
        normalize_activations="forward",
        normalization_axis=axis,
        normalization_epsilon=1e-12,
    )
    genome, synapses, batches = setting(rule)
    genome = genome.replace(neuron_update=np.array(1.0))
    sweep = network.forward(genome, dense_chain(), synapses, batches[0][0])
    hidden = np.asarray(joined(sweep.values[1]))
    for state in range(3):
        over = 0 if axis == "batch" else 1
        means, deviations = hidden[state].mean(axis=over), hidden[state].std(axis=over)
        np.testing.assert_allclose(means, genome.forward_shift[state], atol=1e-12)
        np.testing.assert_allclose(deviations, genome.forward_scale[state], rtol=1e-7)


@pytest.mark.parametrize("shape", [(3, 40, 12), (2, 12, 40), (1, 9, 9)])
def test_orthogonal_leaves_directions_and_levels_their_sizes(shape):
    """Singular vectors stay, singular values come near 1, whatever the scale was."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal(shape)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    for scale in (1e-20, 1.0, 1e30):
        found = np.asarray(terms.orthogonal(ops.convert_to_tensor(scale * matrix), 5))
        core = np.einsum("cai,cab,cjb->cij", left, found, right)
        off = core - np.einsum("cii->ci", core)[:, :, None] * np.eye(core.shape[-1])
        assert np.abs(off).max() < 1e-9
        sizes = np.einsum("cii->ci", core)
        assert sizes[values > 0.02 * values[:, :1]].min() > 0.6
        assert sizes.max() < 1.25
    assert not np.asarray(terms.orthogonal(ops.zeros(shape, "float32"), 5)).any()
