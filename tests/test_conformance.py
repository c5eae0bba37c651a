"""The replay of vector files: it agrees with correct ones, published or made here, and with no
others."""

import json
import os

import numpy as np
import pytest
import vector_builder
from marks import slow_but
from vector_builder import FOLDER, published, write

from keras_blur import Rule, conformance

PUBLISHED = sorted(name for name in os.listdir(FOLDER) if name.endswith(".npz"))


def test_there_are_the_published_files():
    assert len(PUBLISHED) >= 18
    assert [os.path.basename(path) for path in conformance.find([FOLDER])] == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_agrees(name):
    report = conformance.replay(os.path.join(FOLDER, name))
    assert report.agrees, (report.worst, report.excess)
    assert report.case == name.removesuffix(".npz")
    assert set(report.errors) == set(report.excess) == set(conformance.GROUPS)
    assert max(report.errors.values()) < 1e-4
    assert max(report.excess.values()) <= 1.0


CHANGES = {
    "step0/synapse/0/forward": (0, 0, 2, 3, 1),
    "step2/synapse/1/forward": (0, 0, 7, 2, 0),
    "step2/synapse/1/backward": (0, 0, 2, 3, 1),
    "step1/synapse/1/backward": (0, 0, 1, -1, 0),  # its bias column, which nothing reads
    "step1/synapse/0/backward": (0, 0, 6, 4, 1),  # of the first layer, which nothing reads
    "step0/neurons/0": (0, 0, 1, 2, 1),
    "step1/neurons/1": (0, 0, 5, 6, 0),
    "step2/neurons/2": (0, 0, 0, 0, 1),
    "query_prediction": (0, 0, 4, 2),
    "query_l2_loss": (),
    "meta_gradient/neuron/transform": (0, 0, 3),
    "meta_gradient/neuron/keep": (),
    "meta_gradient/synapse/transform/post": (0, 1, 0),
    "meta_gradient/synapse/update": (),
    "meta_gradient/synapse/saturation": (),  # not read by this rule, so zero
    "genome/neuron/transform": (0, 1, 2),
    "genome/neuron/update": (),
    "genome/synapse/transform/pre": (0, 1, 1),
    "genome/synapse/keep": (),
    "inputs": (1, 0, 0, 2, 3),
    "labels": (2, 0, 0, 3, 1),
    "synapse_init/0/forward": (0, 0, 5, 1, 0),
    "synapse_init/0/backward": (0, 0, 3, 2, 1),
    "synapse_init/1/backward": (0, 0, 1, 2, 0),
}


@pytest.mark.parametrize("key", slow_but(list(CHANGES)[::4], CHANGES))
def test_one_changed_number_is_found(tmp_path, key):
    arrays = published()
    arrays[key] = arrays[key].copy()
    arrays[key][CHANGES[key]] += 0.02
    report = conformance.replay(write(tmp_path, arrays))
    assert not report.agrees
    if key.startswith(("step", "query", "meta_gradient")):
        assert report.worst == key
        group = next(name for name, value in report.excess.items() if value > 1)
        assert group in {"step": ("neurons", "synapses"), "quer": ("prediction",), "meta": ("meta-gradients",)}[key[:4]]
        np.testing.assert_allclose(report.errors[group], 0.02, rtol=0.05)
        assert sum(value > 1 for value in report.excess.values()) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_activation": "tanh"},
        {"last_activation": "linear"},
        {"backward_activation": "linear"},
        {"network_spec": {"backward_update": "multiplicative"}},
        {"network_spec": {"use_forward_activations_for_synapse_update": True}},
        {"network_spec": {"zero_out_neurons": False}},
        {"network_spec": {"symmetric_in_out_synapses": True}},
        {"network_spec": {"synapse_saturation_type": "exp_update", "synapse_saturation_eps": 0.05}},
        {"ojas_spec": {"use_ojas_rule": True, "use_synapse_weights": True}},
        {"synapse_normalization_spec": {"normalize_synapses": True}},
    ],
    ids=lambda config: json.dumps(config),
)
def test_another_rule_is_found(tmp_path, config):
    """The files are not so lax that another rule would pass."""
    assert not conformance.replay(write(tmp_path, published(), **config)).agrees


def test_switched_off_options_change_nothing(tmp_path):
    off = {"normalize_synapses": False, "rescale": True, "normalize_in_activations": False}
    path = write(
        tmp_path,
        published(),
        network_spec={"backward_update": "additive", "synapse_saturation_type": "disabled", "supervised_every": 1},
        synapse_normalization_spec=off,
    )
    assert conformance.replay(path).agrees


MADE = {
    "oja_exp_stored": {
        "rule": {
            "states": 3, "forward_activation": "tanh", "backward_activation": "tanh", "oja": "weights",
            "oja_factor": 0.5, "oja_learned": True, "saturation": "exp_update", "saturation_epsilon": 0.1,
            "normalize_synapses": "stored", "rescale_synapses": True,
        },
        "spec": {"synapse_saturation_type": "exp_update", "synapse_saturation_eps": 0.1},
        "oja": {"use_ojas_rule": True, "use_multiplier": True, "extra_multiplier": 0.5, "use_synapse_weights": True},
        "norm": {"normalize_synapses": True, "rescale": True},
        "sizes": (4, 9, 3, 2),
    },
    "kept_neurons_of_each_layer": {
        "rule": {"keep_neurons": True, "layers": 2, "forward_activation": "sigmoid", "backward_activation": "tanh"},
        "spec": {"zero_out_neurons": False},
        "sizes": (3, 5, 2), "steps": 4,
    },
    "forward_update_supervised_every": {
        "rule": {
            "forward_synapse_update": True, "separate_forward_synapse": True, "supervised_every": 2,
            "forward_activation": "relu_tanh", "backward_activation": "relu_tanh", "oja": "activations",
        },
        "spec": {"forward_synapse_update": True, "supervised_every": 2},
        "oja": {"use_ojas_rule": True},
        "sizes": (4, 6, 3), "steps": 4, "seed": 3,
    },
    "multiplicative_symmetric": {
        "rule": {
            "backward_update": "multiplicative", "directions": "tied_updates", "channels": "tied_updates", "states": 3,
            "forward_activation": "tanh", "backward_activation": "linear", "last_activation": "linear",
        },
        "spec": {
            "backward_update": "multiplicative", "symmetric_in_out_synapses": True, "symmetric_states_synapses": True,
        },
        "sizes": (4, 5, 4, 2),
    },
    "population_both_norms": {
        "rule": {
            "normalize_synapses": "both", "presynaptic": "forward", "forward_activation": "tanh",
            "backward_activation": "tanh", "backward_update": "multiplicative_after_first",
        },
        "spec": {
            "use_forward_activations_for_synapse_update": True, "backward_update": "multiplicative_second_state",
        },
        "norm": {"normalize_synapses": True, "normalize_in_activations": True},
        "sizes": (3, 4, 2), "species": 2, "replicas": 2, "steps": 2, "batch": 3,
    },
    "kept_neurons_supervised_every": {
        "rule": {
            "keep_neurons": True, "supervised_every": 3, "directions": "tied_updates", "oja": "weights",
            "forward_activation": "tanh", "backward_activation": "tanh", "last_activation": "sigmoid",
        },
        "spec": {"zero_out_neurons": False, "supervised_every": 3, "symmetric_in_out_synapses": True},
        "oja": {"use_ojas_rule": True, "use_synapse_weights": True},
        "sizes": (3, 4, 4, 2), "steps": 5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(list(MADE)[:2], MADE))
def test_made_file_agrees(tmp_path, name):
    """New mixtures of options, with numbers and meta-gradients of which none comes from the
    library."""
    case = dict(MADE[name])
    rule = Rule(**case.pop("rule"))
    path = tmp_path / f"{name}.npz"
    vector_builder.build(path, rule, **case)
    report = conformance.replay(path)
    assert report.agrees, (report.worst, report.excess)
    with np.load(path) as archive:
        slopes = {key: archive[key] for key in archive.files if key.startswith("meta_gradient/")}
    assert np.abs(slopes["meta_gradient/neuron/transform"]).max() > 1e-3
    assert np.abs(slopes["meta_gradient/synapse/update"]).max() > 1e-2
