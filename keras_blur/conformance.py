"""Replays published numbers through the network step that `fit` uses and reports the differences.

A vector file holds a small network and its batches. It also holds the synapses, neurons, prediction
and meta-gradients computed by the authors' implementation of "Meta-Learning Bidirectional Update
Rules" (2021). `tests/conformance/README.md` describes the format. There is no second implementation
here. The options of the file become a `Rule`, its arrays become a `Genome` and synapses, and
`keras_blur.core.network.step` computes the rest. Meta-gradients come from the backend's automatic
differentiation of a second run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from keras import ops

from keras_blur.core import network
from keras_blur.core.connections.dense import DenseConnection
from keras_blur.core.derivatives import vjp
from keras_blur.core.genome import Genome
from keras_blur.core.graph import chain
from keras_blur.core.rule import Rule

Array = Any

RTOL, ATOL = 1e-4, 1e-5
GROUPS = ("neurons", "synapses", "prediction", "meta-gradients")

_NETWORK_OPTIONS = {
    "backward_update",
    "symmetric_in_out_synapses",
    "symmetric_states_synapses",
    "forward_synapse_update",
    "supervised_every",
    "use_forward_activations_for_synapse_update",
    "zero_out_neurons",
    "synapse_saturation_type",
    "synapse_saturation_eps",
}
_OJA_OPTIONS = {"use_ojas_rule", "use_multiplier", "extra_multiplier", "use_synapse_weights"}
_NORMALIZATION_OPTIONS = {"normalize_synapses", "rescale", "normalize_in_activations"}

# Published array names, under `genome/synapse/` and `genome/forward_synapse/`.
_SYNAPSE_ARRAYS = {
    "nu_tilde": "transform/pre",
    "mu_tilde": "transform/post",
    "synapse_keep": "keep",
    "synapse_update": "update",
    "oja_multiplier": "transform/ojas_multiplier",
    "saturation": "saturation",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """Differences between a replayed case and its file.

    Attributes:
        case: name of the file without its suffix.
        errors: largest absolute difference in each group.
        excess: largest difference in each group divided by its tolerance, `atol + rtol |expected|`.
            A value above 1 is a failure.
        worst: key of the file with the largest excess.
    """

    case: str
    errors: dict[str, float]
    excess: dict[str, float]
    worst: str

    @property
    def agrees(self) -> bool:
        """Whether every number is within its tolerance."""
        return all(value <= 1.0 for value in self.excess.values())


def find(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Lists `.npz` files: the given files and those directly inside the given folders, sorted.

    Raises:
        ValueError: if a path does not exist or a folder has no `.npz` file.
    """
    found: list[str] = []
    for given in paths:
        path = os.fspath(given)
        if os.path.isdir(path):
            files = sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".npz"))
            if not files:
                raise ValueError(f"The folder {path!r} holds no .npz file.")
            found += files
        elif os.path.exists(path):
            found.append(path)
        else:
            raise ValueError(f"There is no file or folder {path!r}.")
    return found


def replay(path: str | os.PathLike[str]) -> Report:
    """Replays one file.

    Args:
        path: an `.npz` file.

    Returns:
        A `Report`.

    Raises:
        ValueError: if the file cannot be read, is incomplete, or contains an unknown option.
    """
    vectors = _Vectors(os.fspath(path))
    rule = _rule(vectors)
    keys = vectors.keys_under("genome/")
    arrays = [ops.convert_to_tensor(vectors[key]) for key in keys]

    def run(*arrays: Array) -> tuple[dict[str, Array], Array, Array]:
        computed, prediction = _run(vectors, _genome(vectors, rule, dict(zip(keys, arrays, strict=True))))
        return computed, prediction, ops.mean(ops.square(prediction - vectors["labels"][-1]))

    computed, computed["query_prediction"], computed["query_l2_loss"] = run(*arrays)
    loss, pull = vjp(lambda *arrays: run(*arrays)[-1], *arrays)
    for key, gradient in zip(keys, pull(ops.ones_like(loss)), strict=True):
        computed["meta_" + key.replace("genome", "gradient", 1)] = gradient

    errors, excess = dict.fromkeys(GROUPS, 0.0), dict.fromkeys(GROUPS, 0.0)
    worst, largest = "", -1.0
    for key, value in computed.items():
        group = _group(key)
        expected = vectors[key]
        value = np.asarray(value)
        if value.shape != expected.shape:
            raise ValueError(f"{vectors.name}: {key!r} has shape {expected.shape}; the case gives {value.shape}.")
        difference = np.abs(value.astype(np.float64) - expected)
        error = _largest(difference)
        over = _largest(difference / (ATOL + RTOL * np.abs(expected)))
        errors[group], excess[group] = max(errors[group], error), max(excess[group], over)
        if over > largest:
            worst, largest = key, over
    return Report(os.path.splitext(os.path.basename(vectors.name))[0], errors, excess, worst)


def _short(error: Exception) -> str:
    """Puts an error message on one line and truncates it."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _largest(values: np.ndarray) -> float:
    return 0.0 if not values.size else float(np.max(np.where(np.isfinite(values), values, np.inf)))


def _group(key: str) -> str:
    if key.startswith("meta_gradient/"):
        return "meta-gradients"
    if "/neurons/" in key:
        return "neurons"
    return "synapses" if "/synapse/" in key else "prediction"


class _Vectors:
    """The arrays of a file by key. A missing key raises an error that names it."""

    def __init__(self, path: str):
        self.name = path
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                self._arrays = {key: archive[key] for key in archive.files}
            self.config: dict[str, Any] = json.loads(bytes(self["config"]).decode())
        except (OSError, zipfile.BadZipFile, ValueError, TypeError, EOFError, zlib.error) as error:
            if isinstance(error, ValueError) and str(error).startswith(path):
                raise
            raise ValueError(f"{path} could not be read as a vector file; it may be damaged: {_short(error)}") from error
        if not isinstance(self.config, dict):
            raise ValueError(f"{path}: `config` must be a JSON object. Received: {self.config!r}")
        sizes = self.option("sizes")
        if not isinstance(sizes, list) or len(sizes) < 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"{path}: 'sizes' must be a list of two or more positive integers. Received: {sizes!r}")
        for key in ("batch", "steps", "species", "replicas"):
            if type(self.option(key)) is not int or self.option(key) < 1:
                raise ValueError(f"{path}: {key!r} must be a positive integer. Received: {self.option(key)!r}")

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._arrays:
            raise ValueError(f"{self.name} is incomplete: it has no array {key!r}.")
        value = self._arrays[key]
        if key != "config":
            if value.dtype.kind != "f":
                raise ValueError(f"{self.name}: {key!r} must hold floating-point numbers. Received {value.dtype}.")
            if not np.isfinite(value).all():
                raise ValueError(f"{self.name}: {key!r} holds a number that is not finite.")
        return value

    def option(self, key: str) -> Any:
        if key not in self.config:
            raise ValueError(f"{self.name} is incomplete: its config has no {key!r}.")
        return self.config[key]

    def options(self, key: str, known: set[str]) -> dict[str, Any] | None:
        given = self.option(key)
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise ValueError(f"{self.name}: {key!r} must be a JSON object or null. Received: {given!r}")
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(f"{self.name}: unknown option(s) in {key!r}: {', '.join(unknown)}. Known: {sorted(known)}.")
        return dict(given)

    def keys_under(self, prefix: str) -> list[str]:
        return [key for key in self._arrays if key.startswith(prefix)]


def _rule(vectors: _Vectors) -> Rule:
    spec = vectors.options("network_spec", _NETWORK_OPTIONS) or {}
    oja = vectors.options("ojas_spec", _OJA_OPTIONS)
    norm = vectors.options("synapse_normalization_spec", _NORMALIZATION_OPTIONS) or {}
    stored, effective = bool(norm.get("normalize_synapses")), bool(norm.get("normalize_in_activations"))
    sizes = vectors.option("sizes")
    saturation = spec.get("synapse_saturation_type")
    if saturation in (None, "disabled", "normalization"):
        saturation = "none"
    backward_update = spec.get("backward_update", "additive")
    forward_update = bool(spec.get("forward_synapse_update"))
    try:
        return Rule(
            states=vectors.option("states"),
            forward_activation=vectors.option("hidden_activation") or "linear",
            backward_activation=vectors.option("backward_activation") or "linear",
            last_activation=vectors.option("last_activation") or "linear",
            backward_update={"multiplicative_second_state": "multiplicative_after_first"}.get(
                backward_update, backward_update
            ),
            directions="tied_updates" if spec.get("symmetric_in_out_synapses") else "untied",
            channels="tied_updates" if spec.get("symmetric_states_synapses") else "own",
            oja="none" if oja is None else "weights" if oja.get("use_synapse_weights") else "activations",
            oja_factor=1.0 if oja is None else oja.get("extra_multiplier", 1.0),
            oja_learned=bool(oja and oja.get("use_multiplier")),
            saturation=saturation,
            saturation_epsilon=spec.get("synapse_saturation_eps") or 0.0,
            normalize_synapses={(0, 0): "none", (1, 0): "stored", (0, 1): "effective", (1, 1): "both"}[stored, effective],
            rescale_synapses=bool(norm.get("rescale")) and (stored or effective),
            forward_synapse_update=forward_update,
            separate_forward_synapse=forward_update,
            supervised_every=spec.get("supervised_every") or 1,
            presynaptic="forward" if spec.get("use_forward_activations_for_synapse_update") else "backward",
            keep_neurons=not spec.get("zero_out_neurons", True),
            layers=len(sizes) - 1 if vectors.option("per_layer_genome") else None,
        )
    except ValueError as error:
        raise ValueError(f"{vectors.name}: {error}") from error


def _genome(vectors: _Vectors, rule: Rule, given: Mapping[str, Array]) -> Genome:
    """The genome of the file, with axes `[layers?, species, 1 for the replicas, ...]`."""
    k, species = rule.states, int(vectors.option("species"))
    leading = (() if rule.layers is None else (rule.layers,)) + (species,)

    def take(key: str, shape: tuple[int, ...]) -> Array:
        vectors[key]
        value, wanted = given[key], leading + shape
        if len(value.shape) == len(wanted) - 1:  # shared by the species
            value = ops.expand_dims(value, len(leading) - 1)
        sizes = tuple(value.shape)
        if len(sizes) != len(wanted) or any(size not in (1, full) for size, full in zip(sizes, wanted, strict=True)):
            raise ValueError(f"{vectors.name}: {key!r} must have shape {wanted}. Received {sizes}.")
        return ops.expand_dims(ops.broadcast_to(value, wanted), len(leading))

    transform = take("genome/neuron/transform", (2 * k, 2 * k))
    sources = {"neuron_keep": "neuron/keep", "neuron_update": "neuron/update", "rescale": "synapse/rescale_to"}
    for prefix, folder in (("", "synapse/"), ("forward_", "forward_synapse/")):
        sources |= {prefix + name: folder + source for name, source in _SYNAPSE_ARRAYS.items()}
    arrays = {}
    for name, shape in rule.shapes().items():
        if name == "nu":
            arrays[name] = transform[..., :k, k:]
        elif name == "mu":
            arrays[name] = transform[..., k:, :k]
        elif name == "temperature":
            arrays[name] = ops.ones((*leading, 1), dtype="float32")
        else:
            arrays[name] = take("genome/" + sources[name], shape)
    return Genome(rule, arrays)


def _run(vectors: _Vectors, genome: Genome) -> tuple[dict[str, Array], Array]:
    """Runs all training steps and the query: what the file holds after each step, by key, and the
    prediction."""
    sizes, steps, batch = (vectors.option(key) for key in ("sizes", "steps", "batch"))
    leading = (int(vectors.option("species")), int(vectors.option("replicas")))
    inputs = _shaped(vectors, "inputs", (steps + 1, *leading, batch, sizes[0]))
    labels = _shaped(vectors, "labels", (steps + 1, *leading, batch, sizes[-1]))
    graph = chain([DenseConnection(units) for units in sizes[1:]])
    k = genome.rule.states
    computed: dict[str, Array] = {}
    synapses = []
    for index, (before, units) in enumerate(pairwise(sizes)):
        forward = _shaped(vectors, f"synapse_init/{index}/forward", (*leading, before + 1, units, k))
        backward = _shaped(vectors, f"synapse_init/{index}/backward", (*leading, units, before + 1, k))
        synapses.append(_from_published(forward, backward))
    neurons: tuple[Any, ...] = ()
    if genome.rule.keep_neurons:
        neurons = tuple(ops.zeros((*leading, k, batch, units), "float32") for units in sizes)
    state = network.NetworkState(tuple(synapses), 0, neurons)
    for index in range(steps):
        feedback = partial(_label, ops.convert_to_tensor(labels[index]))
        result = network.step(genome, graph, state, ops.convert_to_tensor(inputs[index]), feedback)
        state = result.state
        for layer, own in enumerate(state.synapses):
            both = _to_published(own)
            for direction, value in zip(("forward", "backward"), both, strict=True):
                computed[f"step{index}/synapse/{layer}/{direction}"] = value
        for layer, states in enumerate(result.neurons):
            if layer == 0:  # the input has one state; the published array has zeros for the others
                states = ops.concatenate([states, ops.zeros((*leading, k - 1, batch, sizes[0]), states.dtype)], axis=-3)
            computed[f"step{index}/neurons/{layer}"] = ops.einsum("srkbn->srbnk", states)
    sweep = network.forward(
        genome,
        graph,
        network.predicting(genome, graph, state),
        ops.convert_to_tensor(inputs[-1]),
        neurons=state.neurons,
    )
    return computed, network.output(genome, graph, sweep.values)


def _label(label: Array, prediction: Array) -> Array:
    return label


def _shaped(vectors: _Vectors, key: str, shape: tuple[int, ...]) -> np.ndarray:
    value = vectors[key]
    if value.shape != shape:
        raise ValueError(f"{vectors.name}: {key!r} must have shape {shape} by its config. Received {value.shape}.")
    return value


def _from_published(forward: np.ndarray, backward: np.ndarray) -> dict[str, Array]:
    """Converts published kernels to the layout of this library.

    Published kernels have the bias as their last input row and the state axis last.
    """
    forward, backward = (
        ops.einsum(pattern, value) for pattern, value in (("srijk->srkij", forward), ("srjik->srkij", backward))
    )
    return {
        "kernel": forward[..., :-1, :],
        "bias": forward[..., -1:, :],
        "backward_kernel": backward[..., :-1, :],
        "backward_bias": backward[..., -1:, :],
    }


def _to_published(synapses: Mapping[str, Array]) -> tuple[Array, Array]:
    forward = ops.concatenate([synapses["kernel"], synapses["bias"]], axis=-2)
    backward = ops.concatenate([synapses["backward_kernel"], synapses["backward_bias"]], axis=-2)
    return ops.einsum("srkij->srijk", forward), ops.einsum("srkij->srjik", backward)
