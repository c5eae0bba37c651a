"""Reads, alters and writes vector files of the format of `tests/conformance/README.md`.

The new ones hold numbers of the plain numpy step. Nothing of the library computes them: the
learning steps are those of `numpy_twin` in float64, and the meta-gradients are central differences
of its query loss.
"""

import itertools
import json
import os

import numpy as np
import numpy_twin

from keras_blur import Genome

FOLDER = os.path.join(os.path.dirname(__file__), "conformance")
ARRAYS = {
    "neuron/transform": 2,
    "neuron/keep": 0,
    "neuron/update": 0,
    "neuron/norm_multiplier": 0,
    "neuron/norm_shift": 0,
    **{
        f"{folder}/{name}": rank
        for folder in ("synapse", "forward_synapse")
        for name, rank in {
            "transform/pre": 2,
            "transform/post": 2,
            "transform/ojas_multiplier": 0,
            "keep": 0,
            "update": 0,
            "saturation": 0,
            "rescale_to": 0,
        }.items()
    },
}
NAMES = {
    "nu_tilde": "transform/pre",
    "mu_tilde": "transform/post",
    "synapse_keep": "keep",
    "synapse_update": "update",
    "oja_multiplier": "transform/ojas_multiplier",
    "saturation": "saturation",
}


def published(name="default_2state"):
    """The arrays of a published file."""
    with np.load(os.path.join(FOLDER, f"{name}.npz")) as archive:
        return {key: archive[key] for key in archive.files}


def config_of(arrays):
    """The config among the arrays of a file."""
    return json.loads(bytes(arrays["config"]).decode())


def as_bytes(config):
    """A config as a file holds it."""
    return np.frombuffer(json.dumps(config).encode(), np.uint8)


def write(tmp_path, arrays, **config):
    """A file of these arrays, with some of its config changed."""
    arrays = {**arrays, **({"config": as_bytes({**config_of(arrays), **config})} if config else {})}
    path = tmp_path / "changed.npz"
    np.savez(path, **arrays)
    return path


def build(path, rule, *, sizes, spec=None, oja=None, norm=None, batch=4, steps=3, species=1, replicas=1, seed=0):
    """Writes one file.

    Args:
        path: where to.
        rule: the Rule that the published options below amount to.
        sizes, batch, steps, species, replicas: as in the config.
        spec, oja, norm: the published options.
        seed: of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    genome = draw_genome(rule, rng, species)
    shape = (steps + 1, species, replicas, batch)
    inputs = rng.normal(size=(*shape, sizes[0])).astype("float32")
    labels = 2 * np.eye(sizes[-1], dtype="float32")[rng.integers(sizes[-1], size=shape)] - 1
    config = {
        "states": rule.states, "sizes": list(sizes), "batch": batch, "steps": steps, "species": species,
        "replicas": replicas, "hidden_activation": rule.forward_activation, "last_activation": rule.last_activation,
        "backward_activation": rule.backward_activation, "network_spec": spec or {}, "ojas_spec": oja,
        "synapse_normalization_spec": norm, "separate_forward_synapse": rule.separate_forward_synapse,
        "per_layer_genome": rule.layers is not None,
    }  # fmt: skip
    file = {"config": as_bytes(config), "inputs": inputs, "labels": labels}
    starts = {}
    for layer, (before, units) in enumerate(itertools.pairwise(sizes)):
        for way, ends in (("forward", (before + 1, units)), ("backward", (units, before + 1))):
            start = rng.normal(0, 0.5, (species, replicas, *ends, rule.states)).astype("float32")
            if way == "backward" and rule.directions != "untied":
                start = np.swapaxes(starts[layer, "forward"], 2, 3)
            if rule.channels != "own":
                start = np.repeat(start[..., :1], rule.states, axis=-1)
            starts[layer, way] = start
    file |= {f"synapse_init/{layer}/{way}": value for (layer, way), value in starts.items()}
    file |= {f"genome/{name}": value.astype("float32") for name, value in genome.items()}

    def run(genome):
        return learn(rule, genome, starts, inputs, labels)

    file |= run(genome)
    for name, value in genome.items():
        slope = np.zeros_like(value)
        for place in np.ndindex(value.shape):
            ends = []
            for shift in (1e-5, -1e-5):
                moved = value.copy()
                moved[place] += shift
                ends.append(run({**genome, name: moved})["query_l2_loss"])
            slope[place] = (ends[0] - ends[1]) / 2e-5
        file[f"meta_gradient/{name}"] = slope
    np.savez(path, **{key: value if key == "config" else np.asarray(value, "float32") for key, value in file.items()})


def draw_genome(rule, rng, species):
    """The genome by its published names: transforms of each species, common numbers. As exact in
    float32."""
    layers = () if rule.layers is None else (rule.layers,)
    genome = {}
    for name, rank in ARRAYS.items():
        k = 2 * rule.states if name == "neuron/transform" else rule.states
        if rank:
            value = 0.6 * rng.normal(size=(*layers, species, k, k))
        else:
            value = rng.uniform(0.8, 1.2, layers) * (-0.02 if name.endswith("update") and "synapse" in name else 1.0)
        genome[name] = np.asarray(value, "float32").astype("float64")
    return genome


def learn(rule, genome, starts, inputs, labels):
    """What the file holds after each step and of the query."""
    *_, species, replicas, _, _ = inputs.shape
    parts = [
        [member(rule, genome, starts, inputs[:, s, r], labels[:, s, r], s, r) for r in range(replicas)]
        for s in range(species)
    ]
    result = {key: np.array([[part[key] for part in row] for row in parts]) for key in parts[0][0]}
    result["query_l2_loss"] = np.mean((result["query_prediction"] - labels[-1]) ** 2)
    return result


def member(rule, published, starts, inputs, labels, species, replica):
    """The same for one network."""
    genome = as_genome(rule, published, species)
    synapses = [{} for _ in range(inputs.ndim and len(starts) // 2)]
    for (layer, way), start in starts.items():
        kernel = start[species, replica]
        if way == "backward":
            kernel = np.swapaxes(kernel, 0, 1)
        kernel = np.moveaxis(kernel, -1, 0).astype("float64")
        names = ("kernel", "bias") if way == "forward" else ("backward_kernel", "backward_bias")
        synapses[layer] |= {names[0]: kernel[:, :-1], names[1]: kernel[:, -1:]}
    result, neurons = {}, None
    for time in range(len(inputs) - 1):
        synapses, neurons, _ = numpy_twin.step(genome, synapses, inputs[time], labels[time], time=time, neurons=neurons)
        for layer, own in enumerate(synapses):
            there = np.concatenate([own["kernel"], own["bias"]], axis=1)
            back = np.concatenate([own["backward_kernel"], own["backward_bias"]], axis=1)
            result[f"step{time}/synapse/{layer}/forward"] = np.moveaxis(there, 0, -1)
            result[f"step{time}/synapse/{layer}/backward"] = np.swapaxes(np.moveaxis(back, 0, -1), 0, 1)
        for layer, states in enumerate(neurons):
            result[f"step{time}/neurons/{layer}"] = np.moveaxis(states, 0, -1)
    _, _, prediction = numpy_twin.step(genome, synapses, inputs[-1], labels[-1], time=len(inputs) - 1, neurons=neurons)
    return {**result, "query_prediction": prediction}


def as_genome(rule, published, species):
    """The published arrays of one species as a Genome."""
    k = rule.states
    own = {name: value[..., species, :, :] if ARRAYS[name] else value for name, value in published.items()}
    arrays = {
        "nu": own["neuron/transform"][..., :k, k:],
        "mu": own["neuron/transform"][..., k:, :k],
        "neuron_keep": own["neuron/keep"],
        "neuron_update": own["neuron/update"],
        "rescale": own["synapse/rescale_to"],
        "temperature": np.ones_like(own["neuron/keep"]),
    }
    for name, published_name in NAMES.items():
        arrays[name] = own[f"synapse/{published_name}"]
        arrays[f"forward_{name}"] = own[f"forward_synapse/{published_name}"]
    return Genome(rule, {name: np.asarray(arrays[name]) for name in rule.shapes()})
