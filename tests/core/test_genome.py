"""`Rule` and `Genome`: what they refuse, their shapes and types, and that nothing changes behind
one's back."""

import copy
import json
import multiprocessing
import pickle
import re
from concurrent import futures

import keras
import numpy as np
import pytest
from keras import ops

from keras_blur import Genome, Rule, genomes

LOSS = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)

WRONG_OPTIONS = {
    "states": [1, 0, 2.0, True, "2", None],
    "forward_activation": ["softmax", None, 3],
    "backward_activation": ["softmax", 3],
    "last_activation": ["softmax", None],
    "derivative_state": ["yes", 1, None],
    "backward_update": ["none", None],
    "directions": ["symmetric", True],
    "channels": ["single", 1],
    "normalize_activations": [True, "all"],
    "normalization_axis": [0, "states"],
    "normalization_epsilon": [0.0, -1.0, float("nan"), "small"],
    "normalization_momentum": [-0.1, 1.1, float("nan")],
    "oja": ["synapses", True, [1]],
    "oja_factor": [float("inf"), "1", None],
    "oja_learned": ["yes", 0],
    "saturation": ["exp", 1.0],
    "saturation_epsilon": [-1e-3, float("nan")],
    "normalize_synapses": [True, "weights"],
    "rescale_synapses": ["yes", 1],
    "forward_synapse_update": ["yes", 1],
    "separate_forward_synapse": ["yes", 1],
    "supervised_every": [0, 1.0, True],
    "presynaptic": ["both", None],
    "keep_neurons": ["yes", 1],
    "layers": [0, -1, 1.5, True],
    "update_decay": ["exponential", 0.5],
    "momentum": ["yes", 0.9, True],
    "whitening": ["yes", 1],
    "normalize_term": ["norm", True, None],
    "slow_synapses": ["yes", 1],
    "orthogonal_iterations": [0, 2.5, True],
    "whitening_positions": [-1, 2.5, True],
    "whitening_rows": [0, 2.5, True],
    "term_rank": [0, 2.5, True],
    "batch_reduction": ["none", "average"],
    "feedback": ["targets", None],
    "loss": ["no_such_loss", 3],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG_OPTIONS for value in WRONG_OPTIONS[name]])
def test_wrong_option_is_named(name, value):
    needed = {"loss": {"feedback": "error"}}.get(name, {})
    with pytest.raises(ValueError, match=f"`{name}` must .*Received: .*{re.escape(repr(value))}"):
        Rule(**{**needed, name: value})


def test_every_option_has_a_wrong_value():
    assert set(WRONG_OPTIONS) == set(Rule().get_config())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"separate_forward_synapse": True}, "forward_synapse_update"),
        ({"oja_learned": True}, "oja='none'"),
        ({"rescale_synapses": True}, "normalize_synapses='none'"),
        ({"loss": "mse"}, "feedback='labels'"),
        ({"whitening_positions": 4}, "whitening=False"),
        ({"whitening_rows": 4}, "whitening=False"),
        ({"term_rank": 4}, "normalize_term='none'"),
    ],
)
def test_options_that_need_another(options, named):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}.*{re.escape(named)}"):
        Rule(**options)


def test_rule_is_a_value():
    rule = Rule(states=3, oja="weights")
    assert rule == Rule(states=3, oja="weights")
    assert hash(rule) == hash(Rule(states=3, oja="weights"))
    assert rule.replace(states=4) != rule
    assert Rule.from_config(json.loads(json.dumps(rule.get_config()))) == rule
    with pytest.raises(AttributeError):
        rule.states = 2
    with pytest.raises(ValueError, match=r"Unknown option\(s\) of a Rule: state; its docstring"):
        Rule.from_config({"state": 2})


def test_loss_of_a_rule_keeps_its_arguments():
    rule = Rule(feedback="error", loss=LOSS)
    assert rule == Rule(feedback="error", loss=keras.losses.deserialize(keras.losses.serialize(LOSS)))
    assert rule != Rule(feedback="error", loss="categorical_crossentropy")
    assert rule.keras_loss.get_config() == LOSS.get_config()
    assert Rule.from_config(rule.get_config()) == rule
    assert Rule(feedback="error").keras_loss is None


@pytest.mark.parametrize("text", ["{bad", '{"class_name": "NoSuchLoss", "config": {}}'])
def test_damaged_loss_text_is_named(text):
    with pytest.raises(ValueError, match=r"`loss` must be a keras\.losses\.Loss or its name"):
        Rule(feedback="error", loss=text)


def test_shapes():
    """Table 1: 4 k^2 + 4 numbers, and the temperature."""
    for k in (2, 3, 4, 8):
        assert Genome.random(Rule(states=k), 0).size == 4 * k**2 + 4 + 1
    rule = Rule(states=3, layers=2, separate_forward_synapse=True, forward_synapse_update=True, update_decay="power")
    genome = Genome.random(rule, 0, population=(4, 5))
    assert set(genome.arrays) == set(rule.shapes())
    assert genome.forward_mu_tilde.shape == (2, 4, 5, 3, 3)
    assert genome.decay_power.shape == (2, 4, 5)
    assert genome.population == (4, 5)
    assert genome.layer(1).population == (4, 5)
    np.testing.assert_array_equal(genome.layer(1).nu, genome.nu[1])
    assert genome.size == 2 * 4 * 5 * (6 * 9 + 2 + 2 + 2 + 1 + 2)
    assert repr(genome) == "Genome(states=3, numbers=2520, population=(4, 5))"


def test_random_is_its_seed():
    rule = Rule(states=3, normalize_activations="both")
    genome = Genome.random(rule, 3)
    assert genome == Genome.random(rule, 3)
    assert genome != Genome.random(rule, 4)
    assert genome.nu.dtype == np.float32
    np.testing.assert_array_equal(Genome.random(rule, 3, std=0.5).nu, genome.nu / 2)
    assert Genome.random(rule, 3, synapse_update=0.25).synapse_update == 0.25
    many = Genome.random(Rule(), 0, population=(2000,))
    for name in ("nu", "mu", "nu_tilde", "mu_tilde"):
        values = many.arrays[name]
        assert abs(values.mean()) < 0.05
        assert abs(values.std() - 1) < 0.05
    assert many.synapse_update[0] == np.float32(-1e-3)
    assert (many.neuron_keep == 1).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"seed": -1}, "`seed`.*-1"),
        ({"seed": 1.5}, "`seed`.*1.5"),
        ({"std": -1}, "`std`.*-1"),
        ({"synapse_update": float("nan")}, "`synapse_update`.*nan"),
        ({"population": 3}, "`population`.*3"),
        ({"population": (-1,)}, "`population`.*-1"),
    ],
)
def test_random_names_a_wrong_argument(arguments, named):
    with pytest.raises(ValueError, match=named):
        Genome.random(Rule(), **{"seed": 0, **arguments})


def replaced(**arrays):
    return {**Genome.random(Rule(), 0).arrays, **arrays}


def without(name):
    return {key: value for key, value in replaced().items() if key != name}


IDS = [
    "missing", "unknown", "states", "columns", "member", "population", "scalar", "layers", "nan", "infinite", "ragged",
    "text", "none", "complex", "rule",
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "arrays", "named"),
    [
        (Rule(), without("mu_tilde"), r"Missing: mu_tilde\. Not known to this rule: none"),
        (Rule(), replaced(rescale=1.0), r"Missing: none\. Not known to this rule: rescale"),
        (Rule(states=3), replaced(), r"`nu` must have shape \(3, 3\).*Received shape \(2, 2\)"),
        (Rule(), replaced(mu=np.zeros((2, 3))), r"`mu` must have shape \(2, 2\).*Received shape \(2, 3\)"),
        (Rule(), replaced(mu=np.zeros((4, 2, 2))), r"`mu` must have shape \(2, 2\).*Received shape \(4, 2, 2\)"),
        (Rule(), replaced(nu=np.zeros((4, 2, 2))), r"`mu` must have shape \(4, 2, 2\).*Received shape \(2, 2\)"),
        (Rule(), replaced(nu=1.0), r"`nu` must have shape \(2, 2\).*Received shape \(\)"),
        (Rule(layers=2), replaced(), "With `layers=2` each array must have a leading axis"),
        (Rule(), replaced(mu=[[1.0, float("nan")], [0.0, 0.0]]), "`mu` must be finite.*nan"),
        (Rule(), replaced(temperature=float("inf")), "`temperature` must be finite.*inf"),
        (Rule(), replaced(mu=[[1.0, 2.0], [3.0]]), "`mu`"),
        (Rule(), replaced(mu="abc"), "`mu`"),
        (Rule(), replaced(mu=None), "`mu`"),
        (Rule(), replaced(mu=1j * np.ones((2, 2))), "`mu`"),
        ("rule", replaced(), "`rule` must be a keras_blur.Rule. Received: 'rule'"),
    ],
    ids=IDS,
)
def test_genome_names_what_is_wrong(rule, arrays, named):
    with pytest.raises(ValueError, match=named):
        Genome(rule, arrays)


def test_types_of_numbers():
    assert Genome(Rule(), replaced(mu=[[1, 2], [3, 4]])).mu.dtype == np.float32
    assert Genome(Rule(), replaced(mu=np.eye(2))).mu.dtype == np.float64
    assert Genome(Rule(), replaced(mu=np.eye(2, dtype=int))).mu.dtype == np.float32
    tensor = ops.eye(2, dtype="float32")
    assert Genome(Rule(), replaced(mu=tensor)).mu is tensor


def test_genome_cannot_be_changed():
    given = np.eye(2)
    genome = Genome(Rule(), replaced(mu=given))
    given[0, 0] = 5
    assert genome.mu[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        genome.mu[0, 0] = 5
    with pytest.raises(TypeError):
        genome.arrays["mu"] = given
    with pytest.raises(AttributeError):
        genome.rule = Rule()
    with pytest.raises(AttributeError, match="no array or attribute 'rescale'"):
        _ = genome.rescale


@pytest.mark.parametrize("name", ["mu", "temperature"])
def test_array_cannot_be_assigned(name):
    """It would shadow the array that learning reads."""
    genome = Genome.random(Rule(), 0)
    with pytest.raises(AttributeError):
        setattr(genome, name, 0.0)


@pytest.mark.parametrize(("layers", "population"), [(None, ()), (None, (4,)), (3, ()), (3, (2,))])
def test_with_rule_starts_what_is_new_as_random_does(layers, population):
    """And a rule whose new numbers are neutral learns as before."""
    genome = Genome.random(Rule(layers=layers), 0, population=population)
    richer = genome.with_rule(Rule(layers=layers, update_decay="power", momentum="after"))
    assert richer.population == population
    for name in ("decay_power", "momentum"):
        np.testing.assert_array_equal(richer.arrays[name], np.zeros(np.shape(genome.synapse_keep)))
    for name, array in genome.arrays.items():
        np.testing.assert_array_equal(richer.arrays[name], array)


@pytest.mark.parametrize("layers", [None, 3])
def test_members_and_populations(layers):
    """Stacking singles and populations keeps each genome; members come first in `by_member`,
    whatever the layers do."""
    rule = Rule(layers=layers)
    singles = [Genome.random(rule, seed) for seed in range(3)]
    pair = Genome.stack(singles[:2])
    assert pair.population == (2,)
    assert Genome.stack([pair, singles[2]]) == Genome.stack(singles)
    for number, single in enumerate(singles):
        assert Genome.stack(singles).member(number) == single
    for name, array in pair.by_member().items():
        np.testing.assert_array_equal(array, np.stack([one.arrays[name] for one in singles[:2]]))
    assert Genome.from_members(rule, pair.by_member()) == pair
    assert singles[0].by_member()["nu"].shape[0] == 1
    with pytest.raises(ValueError, match="one population axis"):
        Genome.random(rule, 0, population=(2, 2)).by_member()
    for wrong in ([], [singles[0], Genome.random(rule.replace(states=3), 0)]):
        with pytest.raises(ValueError, match="`genomes` must be one or more genomes of the same rule"):
            Genome.stack(wrong)


def test_momentum_excludes_a_second_hebbian_term():
    with pytest.raises(ValueError, match=r"`momentum` must be .none. with .*Received: momentum=.after."):
        Rule(momentum="after", forward_synapse_update=True)


def test_equality():
    genome = Genome.random(Rule(), 0)
    assert genome.replace(temperature=2.0) != genome
    assert genome.replace(temperature=2.0).replace(temperature=1.0) == genome
    assert genome.with_rule(Rule(batch_reduction="mean")) != genome
    assert genome != "genome"
    assert Genome.random(Rule(), 0, population=(1,)) != genome
    with pytest.raises(ValueError, match="`arrays` must hold exactly"):
        genome.with_rule(Rule(forward_synapse_update=True, separate_forward_synapse=True))
    with pytest.raises(TypeError):
        hash(genome)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


GENOMES = {
    "single": Genome.random(Rule(), 0),
    "population": Genome.random(Rule(layers=2, oja="weights", oja_learned=True), 0, population=(3,)),
    "with a loss": genomes.load("mnist-orthogonal"),
    "float64": Genome(Rule(), {n: np.asarray(a, np.float64) for n, a in Genome.random(Rule(), 1).arrays.items()}),
}


@pytest.mark.parametrize("function", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("name", GENOMES)
def test_copies(name, function):
    genome = GENOMES[name]
    copied = function(genome)
    assert copied == genome
    assert copied.population == genome.population
    assert {n: a.dtype for n, a in copied.arrays.items()} == {n: a.dtype for n, a in genome.arrays.items()}
    assert function(genome.rule) == genome.rule
    assert hash(function(genome.rule)) == hash(genome.rule)
    with pytest.raises(ValueError, match="read-only"):
        copied.nu[...] = 0.0
    assert copied != genome.replace(synapse_update=2.0 * genome.synapse_update)


def test_a_genome_of_tensors_goes_through_pickle():
    genome = GENOMES["single"].replace(nu=ops.convert_to_tensor(GENOMES["single"].nu))
    assert pickled(genome) == GENOMES["single"]


def numbers(genome):
    return genome.size


def test_process_pool():
    with futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(numbers, GENOMES.values())) == [genome.size for genome in GENOMES.values()]


def test_describe():
    genome = Genome.random(Rule(states=3, oja="weights", backward_update="multiplicative", keep_neurons=True), 0)
    text = genome.describe()
    for expected in ("(eq. 5)", "(eq. 6)", "(eq. 7)", "oja='weights'", "3 states", "-0.001 H", "labels +1/-1"):
        assert expected in text
    assert [name for name in genome.arrays if not re.search(rf"^{name} ", text, re.MULTILINE)] == []
    assert "output error" in genomes.backprop().describe()
    assert "(tanh, tanh')" in genomes.backprop().describe()
    population = Genome.random(Rule(layers=2), 0, population=(5,)).describe()
    assert "population (5,), 2 layers with their own" in population.splitlines()[0]
    assert "array of shape (2, 5, 2, 2)" in population


def test_load_by_name(tmp_path):
    assert genomes.load("backprop") == genomes.backprop()
    path = tmp_path / "mine.json"
    Genome.random(Rule(), 0).save(path)
    assert genomes.load(path) == genomes.load(str(path)) == Genome.random(Rule(), 0)
    for name in genomes.names():
        assert isinstance(genomes.load(name), Genome)
    with pytest.raises(ValueError, match=r"`name` must be backprop, .*Received: name='mnist-5000'"):
        genomes.load("mnist-5000")
    with pytest.raises(ValueError, match=r"`name` must be backprop, .* or the path of a genome file"):
        genomes.load(tmp_path)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), "fast", None, True])
def test_backprop_names_a_wrong_learning_rate(rate):
    with pytest.raises(ValueError, match=f"`learning_rate` must be a positive number.*{rate!r}"):
        genomes.backprop(rate)


def test_backprop_names_other_arguments():
    assert genomes.backprop(0.25).synapse_update == -0.25
    with pytest.raises(ValueError, match=r"activation.*softmax"):
        genomes.backprop(activation="softmax")
    with pytest.raises(ValueError, match=r"`last_activation`.*softmax"):
        genomes.backprop(last_activation="softmax")
    with pytest.raises(ValueError, match=r"`loss`.*no_such"):
        genomes.backprop(loss="no_such")
