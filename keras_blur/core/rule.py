"""Which rule: every discrete choice of how a network learns.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), and later work. The
options of the paper, of its published code and of that later work are fields of `Rule`. A rule
decides shapes and which code runs, so it must be known when a graph is traced, and it is hashable.
The numbers that go with it are in a `keras_blur.core.genome.Genome`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_blur import arguments
from keras_blur.core.feedback import loss_text, resolve_loss

ACTIVATIONS = ("tanh", "relu", "relu_tanh", "sigmoid", "linear")

CHOICES: dict[str, tuple[str, ...]] = {
    "forward_activation": ACTIVATIONS,
    "last_activation": ACTIVATIONS,
    "backward_update": ("additive", "multiplicative", "multiplicative_after_first"),
    "directions": ("untied", "tied", "tied_updates", "fixed", "signs"),
    "channels": ("own", "tied", "tied_updates"),
    "normalize_activations": ("none", "forward", "backward", "both"),
    "normalization_axis": ("batch", "units"),
    "oja": ("none", "weights", "activations"),
    "saturation": ("none", "exp_update", "tanh"),
    "normalize_synapses": ("none", "stored", "effective", "both"),
    "presynaptic": ("backward", "forward"),
    "update_decay": ("none", "power"),
    "normalize_term": ("none", "frobenius", "orthogonal"),
    "momentum": ("none", "before", "after"),
    "batch_reduction": ("sum", "mean"),
    "feedback": ("labels", "error"),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Every discrete choice of how a network learns; immutable, hashable and validated.

    Equation numbers are those of "Meta-Learning Bidirectional Update Rules" (ICML 2021).

    Args:
        states: k, the number of states of a neuron and of channels of a synapse; at least 2.
        forward_activation: nonlinearity of hidden neurons in the forward pass (eq. 5): `"tanh"`,
            `"relu"`, `"relu_tanh"` (relu of tanh), `"sigmoid"` or `"linear"`.
        backward_activation: nonlinearity of the backward pass (eq. 6); `None` uses
            `forward_activation`.
        last_activation: nonlinearity of the output layer, used in the forward pass only.
        derivative_state: the value-and-derivative pair of eq. 1: after the forward pass state 1 is
            `s(z)` and state 2 is `s'(z)` of the same argument, the argument of state 1.
        backward_update: how the backward pass changes a state (eq. 6): `"additive"`;
            `"multiplicative"` (old * new); `"multiplicative_after_first"` (multiplicative, but
            state 1 stays as it is; eq. 2 and 4).
        directions: `"untied"`: forward and backward synapses are separate parameters; `"tied"`: one
            kernel is read both ways; `"tied_updates"`: two kernels that receive the same Hebbian
            term; `"fixed"`: backward synapses stay as they start (feedback alignment); `"signs"`: a
            backward synapse keeps the size that it starts with and takes the current sign of the
            forward one, `|b| sign(w)` (sign-symmetric feedback). `normalize_synapses` applies to
            both.
        channels: `"own"`: each state has a synapse channel of its own; `"tied"`: one channel serves
            all states; `"tied_updates"`: separate channels that all receive the Hebbian term of
            channel 1.
        normalize_activations: the pass or passes (`"none"`, `"forward"`, `"backward"`, `"both"`) in
            which the summed input of a neuron is normalised before the nonlinearity, to a learned
            scale and shift (section 3.4).
        normalization_axis: the axis of the statistics: the `"batch"` (each unit has its own) or the
            `"units"` of a layer (each example has its own).
        normalization_epsilon: added to the variance.
        normalization_momentum: the largest weight of the old value in the running statistics that
            `predict` uses with `normalization_axis="batch"`. The weight is smaller while the
            synapses change much; 0 uses the statistics of the last training batch.
        oja: Oja's term, which bounds the synapses: `"weights"` (eq. 8, first term), `"activations"`
            (the textbook form on transformed states) or `"none"`.
        oja_factor: constant factor of Oja's term.
        oja_learned: whether the genome also has a learned multiplier of Oja's term.
        saturation: `"exp_update"`: the change of a synapse is damped by
            `exp(-|w| (epsilon + |saturation|))`; `"tanh"`: `w <- alpha tanh(w / alpha)`
            (section 3.4); `"none"`.
        saturation_epsilon: the epsilon of `"exp_update"`.
        normalize_synapses: which synapses are scaled to unit norm over their input axis (section
            C.6): the `"stored"` ones, at the start of a step; only the `"effective"` ones, where
            they are used; `"both"`; or `"none"`.
        rescale_synapses: whether normalised synapses are multiplied by a learned number.
        forward_synapse_update: whether synapses also change after the forward pass, before
            feedback.
        separate_forward_synapse: whether that forward change has genome arrays of its own.
        supervised_every: the backward pass and its synapse update run on every step whose number is
            a multiple of this.
        presynaptic: which states of a layer's inputs enter the Hebbian term (eq. 7): those after
            the `"backward"` pass, or those that the `"forward"` pass left.
        keep_neurons: whether neuron states are kept from one step to the next; by default they
            start at zero.
        layers: which layers have genome arrays of their own. `None`: none; all layers share one
            genome. A number: each layer, in the network's order; the network must have that many.
            Names: each group of layers. A layer belongs to the first name that matches its name or
            its class; `*` and `?` match any text and any character, as in `("Conv*", "head", "*")`.
        update_decay: `"power"`: the synapse update gate is multiplied by `(1 + t / steps) ** -p` at
            learning step t, with p and the logarithm of the steps learned; `"none"`: constant.
        whitening: whether the inputs of a Hebbian term are decorrelated over the batch, with a
            learned damping (eq. W1 of `keras_blur.core.terms`).
        whitening_positions: in a convolution, or another layer with shared synapses, the maximum
            number of positions of an example from which the correlations of the inputs are
            computed. They are evenly spaced. 0 uses all positions.
        whitening_rows: the maximum number of consecutive rows of a batch that are whitened
            together, as a group, by their own correlations (eq. W3); `None` uses the whole batch
            as one group. Groups are used in layers that read one row for each example or position,
            as dense layers do. Convolutions, layers that share their synapses, and layers that use
            only some positions whiten by the whole batch. On several devices, so does every layer
            for which a device is not known to hold whole groups.
        normalize_term: `"frobenius"`: a Hebbian term is scaled to a fixed norm (eq. N1);
            `"orthogonal"`: before that, its singular values are brought closer together (eq. N2);
            `"none"`. Normalisation keeps only the direction of a term; the gate alone sets the size
            of the change. The bias is a row of the term. Where rows are whitened in groups, eq. N2
            acts on the term of each group (eq. N3), unless a trace or a penalty is added to the
            term first.
        orthogonal_iterations: number of Newton-Schulz iterations of `"orthogonal"`: 2 lift small
            singular values, 5 make all of them nearly equal.
        term_rank: the maximum number of singular values that the norm of eq. N1 allows for; `None`
            allows for all that a term of its shape can have. A term has few large ones, however
            wide its layer is. Without a bound they would share the norm of many, and wide layers
            would begin with updates that are too large.
        momentum: whether a synapse keeps a trace of its terms, `m <- beta m + H`, and changes by
            `H + beta m` instead of `H`, with beta learned. The terms are those `"before"` or
            `"after"` normalisation; `"none"` keeps no trace. A trace is one more array beside each
            kernel and bias.
        slow_synapses: whether `predict` reads an average of the synapses with polynomial decay,
            `a <- a + (w - a) (e + 1) / (t + 1 + e)`, with the logarithm of e learned. Learning does
            not read the average. An average is one more array beside each kernel and bias.
        batch_reduction: whether the Hebbian term is the `"sum"` over the batch (as published) or
            its `"mean"`.
        feedback: what state 2 of the output receives: `"labels"` (+1 and -1, section 3.3) or the
            `"error"`, the derivative of a Keras loss with respect to the output. A rule with
            `derivative_state` multiplies the error by s'.
        loss: the Keras loss of `feedback="error"` (a `keras.losses.Loss` or its name; kept as JSON
            text). A model learns from it unless its `compile` is given another loss. `None` leaves
            the choice to `compile`.

    Raises:
        ValueError: if an option has an unknown value, or two options exclude each other.

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
    layers: int | tuple[str, ...] | None = None
    update_decay: str = "none"
    whitening: bool = False
    whitening_positions: int = 0
    whitening_rows: int | None = None
    normalize_term: str = "none"
    orthogonal_iterations: int = 5
    term_rank: int | None = None
    momentum: str = "none"
    slow_synapses: bool = False
    batch_reduction: str = "sum"
    feedback: str = "labels"
    loss: Any = None

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            arguments.choice(name, getattr(self, name), known)
        if self.backward_activation is not None:
            arguments.choice("backward_activation", self.backward_activation, ACTIVATIONS)
        arguments.integer("states", self.states, 2)
        arguments.integer("supervised_every", self.supervised_every, 1)
        arguments.integer("orthogonal_iterations", self.orthogonal_iterations, 1)
        arguments.integer("whitening_positions", self.whitening_positions, 0)
        for name in ("whitening_rows", "term_rank"):
            if getattr(self, name) is not None:
                arguments.integer(name, getattr(self, name), 1)
        self._check_layers()
        for name in (
            "derivative_state",
            "oja_learned",
            "rescale_synapses",
            "forward_synapse_update",
            "separate_forward_synapse",
            "keep_neurons",
            "whitening",
            "slow_synapses",
        ):
            arguments.flag(name, getattr(self, name))
        arguments.real("normalization_epsilon", self.normalization_epsilon, low=0.0, open_low=True)
        arguments.real("normalization_momentum", self.normalization_momentum, low=0.0, high=1.0)
        arguments.real("saturation_epsilon", self.saturation_epsilon, low=0.0)
        arguments.real("oja_factor", self.oja_factor)
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
        if self.momentum != "none" and self.forward_synapse_update:
            raise ValueError(
                "`momentum` must be 'none' with `forward_synapse_update=True`: a trace is that of one Hebbian term. "
                f"Received: momentum={self.momentum!r}"
            )
        for name in ("whitening_positions", "whitening_rows"):
            if getattr(self, name) and not self.whitening:
                raise ValueError(
                    f"`{name}` needs `whitening=True`. Received: {name}={getattr(self, name)} with whitening=False"
                )
        if self.term_rank is not None and self.normalize_term == "none":
            raise ValueError(
                "`term_rank` needs `normalize_term` to be 'frobenius' or 'orthogonal'. "
                f"Received: term_rank={self.term_rank} with normalize_term='none'"
            )
        if self.loss is not None:
            if self.feedback != "error":
                raise ValueError(f"`loss` is used by `feedback='error'` only. Received: feedback={self.feedback!r}")
            object.__setattr__(self, "loss", loss_text(self.loss))

    def _check_layers(self) -> None:
        """Checks `layers`, and turns a list of names, as JSON has it, into a tuple."""
        if isinstance(self.layers, (list, tuple)):
            names = tuple(self.layers)
            if not names or len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
                raise ValueError(f"`layers` must be a number or a list of distinct names. Received: layers={self.layers!r}")
            object.__setattr__(self, "layers", names)
        elif self.layers is not None:
            arguments.integer("layers", self.layers, 1)

    @property
    def layer_count(self) -> int:
        """Number of layers, or groups of layers, with genome arrays of their own; 0 if all share
        one."""
        return len(self.layers) if isinstance(self.layers, tuple) else self.layers or 0

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
        """Whether the feedback path has a kernel of its own."""
        return self.directions != "tied"

    def changes(self, name: str) -> bool:
        """Whether the synapse array called `name`, such as `"backward_kernel"`, changes by equation
        7."""
        return self.directions not in ("fixed", "signs") or not name.startswith("backward_")

    @property
    def orthogonal_first(self) -> bool:
        """Whether a term is made orthogonal before its trace is added, while its rows are at
        hand."""
        return self.normalize_term == "orthogonal" and self.momentum != "before"

    @property
    def gates_last(self) -> bool:
        """Whether the synapse update gate acts on the finished Hebbian term rather than on its
        factors."""
        return self.momentum != "none" or self.normalize_term != "none" or self.whitening

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
            shapes |= {"decay_power": (), "log_decay_steps": ()}
        if self.whitening:
            shapes["log_damping"] = ()
        if self.momentum != "none":
            shapes["momentum"] = ()
        if self.slow_synapses:
            shapes["log_averaging"] = ()
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
        """The rule that `get_config` described; an unknown option raises a `ValueError`."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(config) - known)
        if unknown:
            raise ValueError(f"Unknown option(s) of a Rule: {', '.join(unknown)[:150]}; its docstring lists them all.")
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
