"""What evolves: a rule and its numbers.

A `Rule` is every discrete choice of how a network learns; a `Genome` is a rule plus its arrays, the
"genome" G = {f, eta, f~, eta~, nu, mu, nu~, mu~} of "Meta-Learning Bidirectional Update Rules"
(Sandler et al., ICML 2021, section 3.2, Table 1), with the learned numbers of the stabilising options
of sections 3.4, B and C.6. It is shared by all neurons and, unless `Rule.layers` says otherwise, by
all layers.

Why two objects: the rule decides shapes and which code runs, so it must be known when a graph is
traced and is hashable; the arrays may be numpy constants (inside `fit`) or tensors (inside a
meta-gradient). Files are JSON with exact floats and a checksum: a genome is an experimental result, so
a file that was cut short or edited by hand must not pass for one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import keras
import numpy as np

from keras_blur.feedback import loss_text, resolve_loss

FORMAT = "keras_blur.genome"
VERSION = 1

ACTIVATIONS = ("tanh", "relu", "relu_tanh", "sigmoid", "linear")

_CHOICES: dict[str, tuple[str, ...]] = {
    "forward_activation": ACTIVATIONS,
    "last_activation": ACTIVATIONS,
    "backward_update": ("additive", "multiplicative", "multiplicative_after_first"),
    "directions": ("untied", "tied", "tied_updates"),
    "channels": ("own", "tied", "tied_updates"),
    "normalize_activations": ("none", "forward", "backward", "both"),
    "normalization_axis": ("batch", "units"),
    "oja": ("none", "weights", "activations"),
    "saturation": ("none", "exp_update", "tanh"),
    "normalize_synapses": ("none", "stored", "effective", "both"),
    "presynaptic": ("backward", "forward"),
    "update_decay": ("none", "power"),
    "batch_reduction": ("sum", "mean"),
    "feedback": ("labels", "error"),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Every discrete choice of how a network learns. Immutable, hashable, validated.

    Equation numbers are those of "Meta-Learning Bidirectional Update Rules" (ICML 2021).

    Args:
        states: k, the number of states of a neuron and of channels of a synapse; at least 2.
        forward_activation: nonlinearity of hidden neurons in the forward pass (eq. 5): `"tanh"`, `"relu"`,
            `"relu_tanh"` (relu of tanh), `"sigmoid"` or `"linear"`.
        backward_activation: nonlinearity of the backward pass (eq. 6); `None` takes `forward_activation`.
        last_activation: nonlinearity of the output layer, used in the forward pass only.
        derivative_state: the value-and-derivative pair of eq. 1: after the forward pass state 1 is
            `s(z)` and state 2 is `s'(z)` of the same argument, the argument of state 1.
        backward_update: how the backward pass changes a state (eq. 6): `"additive"`; `"multiplicative"`
            (old * new); `"multiplicative_after_first"` (state 1 is left as it is; eq. 2 and 4).
        directions: `"untied"`: forward and backward synapses are separate parameters; `"tied"`: one kernel is
            read both ways; `"tied_updates"`: two kernels that receive the same Hebbian term.
        channels: `"own"`: each state has a synapse channel of its own; `"tied"`: one channel serves all states;
            `"tied_updates"`: separate channels that all receive the Hebbian term of channel 1.
        normalize_activations: the pass or passes (`"none"`, `"forward"`, `"backward"`, `"both"`) in which the summed
            input of a neuron is normalised before the nonlinearity, to a learned scale and shift (section 3.4).
        normalization_axis: what the statistics run over: the `"batch"` (each unit has its own) or the `"units"` of
            a layer (each example has its own).
        normalization_epsilon: added to the variance.
        normalization_momentum: share of the old value in the running statistics that `predict` uses with
            `normalization_axis="batch"`; 0 keeps those of the last training batch.
        oja: Oja's term that bounds the synapses: `"weights"` (eq. 8, first term), `"activations"` (the textbook
            form on transformed states) or `"none"`.
        oja_factor: constant factor of Oja's term.
        oja_learned: whether the genome has a learned multiplier of Oja's term too.
        saturation: `"exp_update"`: the change of a synapse is damped by `exp(-|w| (epsilon + |saturation|))`;
            `"tanh"`: `w <- alpha tanh(w / alpha)` (section 3.4); `"none"`.
        saturation_epsilon: the epsilon of `"exp_update"`.
        normalize_synapses: synapses brought to unit norm over their input axis (section C.6): the `"stored"` ones at
            the start of a step, only the `"effective"` ones where they are used, `"both"`, or `"none"`.
        rescale_synapses: whether normalised synapses are multiplied by a learned number.
        forward_synapse_update: whether synapses also change after the forward pass, before feedback.
        separate_forward_synapse: whether that forward change has genome arrays of its own.
        supervised_every: the backward pass and its synapse update run on each step that is a multiple of this.
        presynaptic: whether a layer's input side of the Hebbian term (eq. 7) is taken after the `"backward"` pass or
            as the `"forward"` pass left it.
        keep_neurons: whether neuron states are kept from one step to the next; by default they start at zero.
        layers: number of layers with genome arrays of their own; `None`: one genome for all layers.
        update_decay: `"power"`: the synapse update gate is multiplied by `(1 + t / decay_steps) ** -p` at learning
            step t, with p learned; `"none"`: constant.
        decay_steps: time scale of the decay, in learning steps.
        momentum: whether a synapse keeps a trace of its Hebbian terms, `m <- beta m + H`, and changes by `H + beta m` in
            the place of `H`, with beta learned. A trace is one more array beside each kernel and bias.
        orthogonalize: if not 0, the number of Newton-Schulz iterations that bring the singular values of each layer's
            Hebbian term, the bias as a row of it, near to 1: then only its directions count, and the gate is their size.
        batch_reduction: whether the Hebbian term is the `"sum"` over the batch (as published) or its `"mean"`.
        feedback: what state 2 of the output receives: `"labels"` (+1 and -1, section 3.3) or the `"error"`, the
            derivative of a Keras loss by the output, which a rule with `derivative_state` multiplies by s'.
        loss: the Keras loss of `feedback="error"` (a `keras.losses.Loss` or its name; kept as JSON text); `None` takes
            the one given to `compile`.

    Raises:
        ValueError: if an option has a value that it does not know, or two options exclude each other.

    Example:

    >>> rule = Rule(states=4, normalize_activations="both", batch_reduction="mean")
    >>> rule.states
    4
    """

    states: int = 2
    forward_activation: str = "tanh"
    backward_activation: str | None = None
    last_activation: str = "tanh"
    derivative_state: bool = False
    backward_update: str = "additive"
    directions: str = "untied"
    channels: str = "own"
    normalize_activations: str = "none"
    normalization_axis: str = "batch"
    normalization_epsilon: float = 1e-5
    normalization_momentum: float = 0.9
    oja: str = "none"
    oja_factor: float = 1.0
    oja_learned: bool = False
    saturation: str = "none"
    saturation_epsilon: float = 1e-3
    normalize_synapses: str = "none"
    rescale_synapses: bool = False
    forward_synapse_update: bool = False
    separate_forward_synapse: bool = False
    supervised_every: int = 1
    presynaptic: str = "backward"
    keep_neurons: bool = False
    layers: int | None = None
    update_decay: str = "none"
    decay_steps: float = 10.0
    momentum: bool = False
    orthogonalize: int = 0
    batch_reduction: str = "sum"
    feedback: str = "labels"
    loss: Any = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            _choice(name, getattr(self, name), known)
        if self.backward_activation is not None:
            _choice("backward_activation", self.backward_activation, ACTIVATIONS)
        _integer("states", self.states, 2)
        _integer("supervised_every", self.supervised_every, 1)
        _integer("orthogonalize", self.orthogonalize, 0)
        if self.layers is not None:
            _integer("layers", self.layers, 1)
        for name in (
            "derivative_state",
            "oja_learned",
            "rescale_synapses",
            "forward_synapse_update",
            "separate_forward_synapse",
            "keep_neurons",
            "momentum",
        ):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise ValueError(f"`{name}` must be True or False. Received: {name}={getattr(self, name)!r}")
        _real("normalization_epsilon", self.normalization_epsilon, low=0.0, open_low=True)
        _real("normalization_momentum", self.normalization_momentum, low=0.0, high=1.0)
        _real("saturation_epsilon", self.saturation_epsilon, low=0.0)
        _real("decay_steps", self.decay_steps, low=0.0, open_low=True)
        _real("oja_factor", self.oja_factor)
        for field in dataclasses.fields(self):  # numpy's numbers are not JSON
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())
        if self.separate_forward_synapse and not self.forward_synapse_update:
            raise ValueError(
                "`separate_forward_synapse=True` needs `forward_synapse_update=True`: "
                "without it nothing would read the separate arrays."
            )
        if self.oja_learned and self.oja == "none":
            raise ValueError("`oja_learned=True` needs `oja` to be 'weights' or 'activations'. Received: oja='none'")
        if self.rescale_synapses and self.normalize_synapses == "none":
            raise ValueError(
                "`rescale_synapses=True` needs `normalize_synapses` to be 'stored', 'effective' or 'both'. "
                "Received: normalize_synapses='none'"
            )
        if self.momentum and self.forward_synapse_update:
            raise ValueError("`momentum=True` needs `forward_synapse_update=False`: a trace is that of one Hebbian term.")
        if self.loss is not None:
            if self.feedback != "error":
                raise ValueError(f"`loss` is used by `feedback='error'` only. Received: feedback={self.feedback!r}")
            object.__setattr__(self, "loss", loss_text(self.loss))

    @property
    def backward(self) -> str:
        """Name of the activation of the backward pass."""
        return self.backward_activation or self.forward_activation

    @property
    def synapse_channels(self) -> int:
        """Number of channels that a synapse stores: 1 if they are tied, else k."""
        return 1 if self.channels == "tied" else self.states

    @property
    def update_channels(self) -> int:
        """Number of channels of the Hebbian term that are computed."""
        return self.states if self.channels == "own" else 1

    @property
    def stores_backward(self) -> bool:
        """Whether the way back has a kernel of its own."""
        return self.directions != "tied"

    @property
    def gates_last(self) -> bool:
        """Whether the synapse update gate acts on the finished Hebbian term rather than on its factors."""
        return self.momentum or self.orthogonalize > 0

    @property
    def keras_loss(self) -> keras.losses.Loss | None:
        """The Keras loss of `feedback="error"`, or `None`."""
        return None if self.loss is None else resolve_loss(self.loss)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each genome array, without layer and population axes."""
        k = self.states
        shapes: dict[str, tuple[int, ...]] = {
            "nu": (k, k),
            "mu": (k, k),
            "neuron_keep": (),
            "neuron_update": (),
            **_synapse_shapes(self, ""),
            "temperature": (),
        }
        if self.normalize_activations in ("forward", "both"):
            shapes |= {"forward_scale": (k,), "forward_shift": (k,)}
        if self.normalize_activations in ("backward", "both"):
            shapes |= {"backward_scale": (k,), "backward_shift": (k,)}
        if self.rescale_synapses:
            shapes["rescale"] = ()
        if self.update_decay == "power":
            shapes["decay_power"] = ()
        if self.momentum:
            shapes["momentum"] = ()
        if self.separate_forward_synapse:
            shapes |= _synapse_shapes(self, "forward_")
        return shapes

    def replace(self, **options: Any) -> Rule:
        """A copy with some options changed, validated anew."""
        return dataclasses.replace(self, **options)

    def get_config(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Rule:
        """The rule of a `get_config`; an unknown option raises a `ValueError`."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(config) - known)
        if unknown:
            raise ValueError(f"Unknown option(s) of a Rule: {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
        return cls(**config)


def _synapse_shapes(rule: Rule, prefix: str) -> dict[str, tuple[int, ...]]:
    k = rule.states
    shapes: dict[str, tuple[int, ...]] = {
        "nu_tilde": (k, k),
        "mu_tilde": (k, k),
        "synapse_keep": (),
        "synapse_update": (),
    }
    if rule.oja_learned:
        shapes["oja_multiplier"] = ()
    if rule.saturation != "none":
        shapes["saturation"] = ()
    return {prefix + name: shape for name, shape in shapes.items()}


# Where a random genome starts. Matrices are drawn; these numbers are not. The published code starts so.
_START = {
    "neuron_keep": 1.0,
    "neuron_update": 1.0,
    "synapse_keep": 1.0,
    "synapse_update": -1e-3,
    "forward_synapse_keep": 1.0,
    "forward_synapse_update": -1e-3,
    "oja_multiplier": 1.0,
    "forward_oja_multiplier": 1.0,
    "saturation": 1.0,
    "forward_saturation": 1.0,
    "rescale": 1.0,
    "temperature": 1.0,
    "decay_power": 0.0,
    "momentum": 0.0,
    "forward_scale": 1.0,
    "forward_shift": 0.0,
    "backward_scale": 1.0,
    "backward_shift": 0.0,
}


@keras.saving.register_keras_serializable(package="keras_blur")
class Genome:
    """A rule and its arrays: all that a network needs to learn.

    Arrays are attributes (`genome.nu`). The transforms `nu`, `mu` (neurons) and `nu_tilde` (synapses) are indexed
    `[source state, target state]`; `mu_tilde` is `[synapse channel, source state]`. Each may carry a leading layer axis
    (`Rule.layers`) and then population axes, the same for all arrays.

    Args:
        rule: a `Rule`.
        arrays: a mapping from the names of `rule.shapes()` to arrays, of those shapes after the shared leading axes.
            Numbers are taken as float32 unless they are float64 arrays; tensors are kept as they are.

    Raises:
        ValueError: if a name is missing or unknown, a shape is wrong, or a number is not finite.

    Example:

    >>> genome = Genome.random(Rule(states=2), seed=0)
    >>> genome.nu.shape
    (2, 2)
    """

    def __init__(self, rule: Rule, arrays: Mapping[str, Any]):
        if not isinstance(rule, Rule):
            raise ValueError(f"`rule` must be a keras_blur.Rule. Received: {rule!r}")
        shapes = rule.shapes()
        missing, unknown = sorted(set(shapes) - set(arrays)), sorted(set(arrays) - set(shapes))
        if missing or unknown:
            raise ValueError(
                f"`arrays` must hold exactly the arrays of its rule: {', '.join(shapes)}. "
                f"Missing: {', '.join(missing) or 'none'}. Not known to this rule: {', '.join(unknown) or 'none'}."
            )
        kept = {name: _array(name, arrays[name]) for name in shapes}
        leading = tuple(kept["nu"].shape)[:-2] if len(kept["nu"].shape) >= 2 else ()
        if rule.layers is not None and (not leading or leading[0] != rule.layers):
            raise ValueError(
                f"With `layers={rule.layers}` each array must have a leading axis of that size. "
                f"Received `nu` of shape {tuple(kept['nu'].shape)}."
            )
        for name, shape in shapes.items():
            if tuple(kept[name].shape) != leading + shape:
                raise ValueError(
                    f"`{name}` must have shape {leading + shape} (states={rule.states}, layers={rule.layers}, leading "
                    f"axes {leading} as `nu` has them). Received shape {tuple(kept[name].shape)}."
                )
        self._rule = rule
        self._arrays = MappingProxyType(kept)
        self._leading = leading

    @property
    def rule(self) -> Rule:
        """The options."""
        return self._rule

    @property
    def arrays(self) -> Mapping[str, Any]:
        """The arrays by name; read-only."""
        return self._arrays

    @property
    def population(self) -> tuple[int, ...]:
        """Sizes of the population axes; `()` for a single genome."""
        return self._leading[1:] if self._rule.layers is not None else self._leading

    def __getattr__(self, name: str) -> Any:
        arrays = self.__dict__.get("_arrays")
        if arrays is not None and name in arrays:
            return arrays[name]
        raise AttributeError(f"A Genome has no array or attribute {name!r}.")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_arrays", ()):
            raise AttributeError(f"A Genome does not change; use `genome.replace({name}=...)` for another one.")
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: Any) -> Genome:
        return self

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Genome)
            and self.rule == other.rule
            and all(np.array_equal(np.asarray(a), np.asarray(other.arrays[n])) for n, a in self.arrays.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        population = f", population={self.population}" if self.population else ""
        return f"Genome(states={self.rule.states}, numbers={self.size}{population})"

    @property
    def size(self) -> int:
        """How many numbers the genome has."""
        return int(sum(np.prod(array.shape, dtype=int) for array in self.arrays.values()))

    def replace(self, **arrays: Any) -> Genome:
        """A copy with some arrays changed."""
        return Genome(self.rule, {**self.arrays, **arrays})

    def with_rule(self, rule: Rule) -> Genome:
        """The same numbers under another rule of as many states; numbers that only the new rule has start as in `random`.

        Raises:
            ValueError: if the new rule lacks one of the arrays, or has a matrix more.
        """
        leading = tuple(np.shape(self.arrays["neuron_keep"]))
        new = {
            name: np.full(leading + shape, _START[name], np.float32)
            for name, shape in rule.shapes().items()
            if name in _START and name not in self.arrays
        }
        return Genome(rule, {**self.arrays, **new})

    def layer(self, index: int) -> Genome:
        """The genome of one layer: itself unless `Rule.layers` gives each layer its own."""
        if self.rule.layers is None:
            return self
        return Genome(self.rule.replace(layers=None), {n: a[index] for n, a in self.arrays.items()})

    @classmethod
    def random(
        cls,
        rule: Rule,
        seed: int,
        *,
        std: float = 1.0,
        synapse_update: float = -1e-3,
        population: tuple[int, ...] = (),
    ) -> Genome:
        """A genome whose four transforms are drawn from a normal distribution; gates start as published.

        Args:
            rule: a `Rule`.
            seed: a non-negative integer; the same seed gives the same genome.
            std: standard deviation of the entries of nu, mu, nu~, mu~.
            synapse_update: the update gate of the synapses.
            population: sizes of the population axes.

        Returns:
            A `Genome` of float32 numpy arrays.

        Example:

        >>> Genome.random(Rule(states=3), seed=1, population=(5,)).mu.shape
        (5, 3, 3)
        """
        _integer("seed", seed, 0)
        _real("std", std, low=0.0)
        _real("synapse_update", synapse_update)
        try:
            population = tuple(population)
            for size in population:
                _integer("population", size, 1)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`population` must be a tuple of positive sizes. Received: population={population!r}"
            ) from error
        leading = (() if rule.layers is None else (rule.layers,)) + population
        rng = np.random.default_rng(seed)
        arrays = {}
        for name, shape in rule.shapes().items():
            if name in _START:
                start = synapse_update if name == "synapse_update" else _START[name]
                arrays[name] = np.full(leading + shape, start, np.float32)
            else:
                arrays[name] = (std * rng.standard_normal(leading + shape)).astype(np.float32)
        return cls(rule, arrays)

    # Files.

    def to_dict(self) -> dict[str, Any]:
        """The genome as plain JSON values, with its checksum."""
        arrays = {}
        for name, array in self.arrays.items():
            value = np.asarray(array)
            arrays[name] = {
                "dtype": value.dtype.name,
                "shape": list(value.shape),
                "values": [float(number) for number in value.ravel()],
            }
        document = {"format": FORMAT, "version": VERSION, "rule": self.rule.get_config(), "arrays": arrays}
        return {**document, "checksum": _checksum(document)}

    @classmethod
    def from_dict(cls, document: Any, *, source: str = "document") -> Genome:
        """The genome of a `to_dict`.

        Args:
            document: the mapping.
            source: what to call it in an error.

        Raises:
            ValueError: if it is of another format or version, incomplete, or altered since it was written.
        """
        if not isinstance(document, Mapping) or document.get("format") != FORMAT:
            raise ValueError(f"{source} is not a genome: expected a JSON object with format {FORMAT!r}.")
        if document.get("version") != VERSION:
            raise ValueError(
                f"{source} has genome format version {document.get('version')!r}; this release reads version {VERSION}."
            )
        body = {key: value for key, value in document.items() if key != "checksum"}
        if document.get("checksum") != _checksum(body):
            raise ValueError(f"{source} is damaged: its checksum does not fit its content.")
        try:
            rule = Rule.from_config(body["rule"])
            arrays = {
                name: np.array(entry["values"], dtype=entry["dtype"]).reshape(entry["shape"])
                for name, entry in body["arrays"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source} is not a complete genome: {error!r}.") from error
        return cls(rule, arrays)

    def to_json(self) -> str:
        """The genome as JSON text; floats are exact."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str, *, source: str = "text") -> Genome:
        """The genome of a `to_json`. Raises a `ValueError` as `from_dict` does."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not a genome: not JSON ({error}).") from error
        return cls.from_dict(document, source=source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the genome to a JSON file, to a temporary name first, then renamed."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Genome:
        """Reads a genome that `save` wrote.

        Raises:
            ValueError: if the file is missing, damaged, or not a genome.
        """
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"Genome file {os.fspath(path)!r} could not be read: {error}.") from error
        return cls.from_json(text, source=f"Genome file {os.fspath(path)!r}")

    def get_config(self) -> dict[str, Any]:
        """For Keras saving."""
        return {"document": self.to_dict()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Genome:
        """For Keras loading."""
        return cls.from_dict(config["document"], source="The genome in the Keras config")

    def describe(self) -> str:
        """The rule as readable equations with its numbers.

        Returns:
            Text of several lines. Numbers of a population or of several layers are given as shapes.

        Example:

        >>> print(Genome.random(Rule(), seed=0).describe().splitlines()[0])
        Genome: 2 states, 21 numbers
        """
        rule = self.rule
        norm = rule.normalize_activations
        forward_in = "N(z)" if norm in ("forward", "both") else "z"
        backward_in = "N(z)" if norm in ("backward", "both") else "z"
        keep_old = f"{self._number('neuron_keep')} a + " if rule.keep_neurons else ""
        activation, last = rule.forward_activation, rule.last_activation
        if rule.derivative_state:
            activation, last = (f"({name}, {name}')" for name in (activation, last))
        body = {
            "additive": f"{self._number('neuron_keep')} a_i + {self._number('neuron_update')} {backward_in}",
            "multiplicative": f"{self._number('neuron_keep')} a_i * {backward_in}",
            "multiplicative_after_first": f"{self._number('neuron_keep')} a_i * (1 for state 1, else {backward_in})",
        }[rule.backward_update]
        lines = [
            f"Genome: {rule.states} states, {self.size} numbers"
            + (f", population {self.population}" if self.population else "")
            + (f", {rule.layers} layers with their own" if rule.layers else ""),
            f"forward   (eq. 5)  z_j = sum_i w_ij (a_i nu);  a_j = {activation}({keep_old}"
            f"{self._number('neuron_update')} {forward_in}), last layer {last}",
            f"feedback           output state 2 <- {'labels +1/-1' if rule.feedback == 'labels' else 'output error'}",
            f"backward  (eq. 6)  z_i = sum_j w_ji (a_j mu);  a_i = {rule.backward}({body})",
            f"synapses  (eq. 7)  H_ij = {rule.batch_reduction}_batch (a_i nu~) (mu~ a_j);  "
            + (f"m = {self._number('momentum')} m + H;  H = H + {self._number('momentum')} m;  " if rule.momentum else "")
            + ("H = orthogonal(H);  " if rule.orthogonalize else "")
            + f"w = {self._number('synapse_keep')} w + {self._number('synapse_update')} H",
        ]
        default = Rule(states=rule.states)
        shown = {
            "forward_activation", "backward_activation", "last_activation", "states", "layers", "backward_update",
            "batch_reduction", "feedback", "derivative_state",
        }  # fmt: skip
        options = [
            f"{field.name}={getattr(rule, field.name)!r}"
            for field in dataclasses.fields(rule)
            if field.name not in shown and getattr(rule, field.name) != getattr(default, field.name)
        ]
        if options:
            lines.append("options            " + ", ".join(options))
        for name, array in self.arrays.items():
            lines.append(f"{name:<18} {_format(np.asarray(array))}")
        return "\n".join(lines)

    def _number(self, name: str) -> str:
        value = np.asarray(self.arrays[name])
        return f"{float(value):.4g}" if value.ndim == 0 else name


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes text to a temporary file beside `path` and renames it, so that no reader sees half a file."""
    target = os.path.abspath(os.fspath(path))
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _checksum(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _format(value: np.ndarray) -> str:
    if value.ndim > 2:
        return f"array of shape {value.shape}"
    text = np.array2string(value, precision=4, suppress_small=False, max_line_width=100, threshold=200)
    return text.replace("\n", "\n" + " " * 19)


def _array(name: str, value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic, float, int, list, tuple)):
        if not hasattr(value, "shape"):
            raise ValueError(f"`{name}` must be an array of numbers. Received: {value!r}")
        return value  # A tensor, maybe symbolic: its numbers are not known here.
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"`{name}` must be an array of numbers. Received: {value!r}") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(f"`{name}` must be an array of real numbers. Received: {value!r}")
    if array.dtype != np.float64 or not isinstance(value, (np.ndarray, np.generic)):
        array = array.astype(np.float32)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"`{name}` must be finite. Received: {array!r}")
    array = np.array(array)
    array.flags.writeable = False
    return array


def _choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}. Received: {name}={value!r}")


def _integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}")


def _real(name: str, value: Any, *, low: float = -np.inf, high: float = np.inf, open_low: bool = False) -> None:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not np.isfinite(value) or not low <= value <= high or (open_low and value == low):
        bounds = f"{'above' if open_low else 'of at least'} {low}" + (f" and at most {high}" if high < np.inf else "")
        wanted = "a finite number" + (f" {bounds}" if low > -np.inf else "")
        raise ValueError(f"`{name}` must be {wanted}. Received: {name}={value!r}")
