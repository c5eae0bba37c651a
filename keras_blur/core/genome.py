"""The genome: a rule and its numbers.

A `Genome` is a `Rule`, every discrete choice of how a network learns, plus its arrays. These are
the "genome" G = {f, eta, f~, eta~, nu, mu, nu~, mu~} of "Meta-Learning Bidirectional Update Rules"
(Sandler et al., ICML 2021, section 3.2, Table 1), with the learned numbers of the stabilising
options of sections 3.4, B and C.6. All neurons share it and, unless `Rule.layers` says otherwise,
all layers.

Rule and arrays are two objects for a reason. The rule decides shapes and which code runs, so it
must be known when a graph is traced, and it is hashable. The arrays may be numpy constants (inside
`fit`) or tensors (inside a meta-gradient). Files are JSON with exact floats and a checksum: a
genome is an experimental result, so a file that was cut short or edited by hand is refused. A file
also states the version of its format, the release that wrote it, and a licence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras
import numpy as np

from keras_blur import arguments
from keras_blur._version import __version__
from keras_blur.backend import register
from keras_blur.core.rule import Rule
from keras_blur.files import check_output, read_text, write_text

FORMAT = "keras_blur.genome"
VERSION = 1
NO_LICENSE = "NOASSERTION"  # SPDX's word for a licence that is not stated

# Where a random genome starts. Matrices are drawn; these numbers are those of the published code.
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
    "log_decay_steps": math.log(10.0),
    "log_damping": 0.0,
    "log_averaging": math.log(8.0),
    "momentum": 0.0,
    "forward_scale": 1.0,
    "forward_shift": 0.0,
    "backward_scale": 1.0,
    "backward_shift": 0.0,
}


@keras.saving.register_keras_serializable(package="keras_blur")
class Genome:
    """A rule and its arrays: all that a network needs to learn.

    Arrays are attributes (`genome.nu`). The transforms `nu`, `mu` (neurons) and `nu_tilde`
    (synapses) are indexed `[source state, target state]`; `mu_tilde` is
    `[synapse channel, source state]`. Each array may have a leading layer axis (`Rule.layers`), and
    then population axes, the same for all arrays.

    Args:
        rule: a `Rule`.
        arrays: a mapping from the names of `rule.shapes()` to arrays of these shapes, after the
            shared leading axes. Numbers become float32 unless they are float64 arrays; tensors are
            kept as they are.

    Raises:
        ValueError: if a name is missing or unknown, a shape is wrong, or a number is not finite.

    Example:

    >>> genome = Genome.random(Rule(states=2), seed=0)
    >>> genome.nu.shape
    (2, 2)
    """

    _license = NO_LICENSE

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
        if rule.layers is not None and (not leading or leading[0] != rule.layer_count):
            raise ValueError(
                f"With `layers={rule.layers}` each array must have a leading axis of size {rule.layer_count}. "
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

    @classmethod
    def unchecked(cls, rule: Rule, arrays: Mapping[str, Any]) -> Genome:
        """A genome of arrays that are known to fit, or of what a tree transformation puts in their
        place."""
        made = object.__new__(cls)
        made.__dict__.update(_rule=rule, _arrays=MappingProxyType(dict(arrays)))
        return made

    @property
    def _leading(self) -> tuple[int, ...]:
        """Sizes of the layer axis and the population axes."""
        return tuple(self._arrays["neuron_keep"].shape)

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

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._arrays})

    def __reduce__(self) -> tuple[type[Genome], tuple[Rule, dict[str, Any]]]:
        return type(self), (self._rule, dict(self._arrays))

    def __copy__(self) -> Genome:
        return self

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
        """A copy with some arrays changed.

        Args:
            **arrays: new arrays by name, of the same shapes.

        Raises:
            ValueError: if a name is unknown, or an array has a wrong shape.

        Example:

        >>> float(Genome.random(Rule(), seed=0).replace(temperature=2.0).temperature)
        2.0
        """
        return Genome(self.rule, {**self.arrays, **arrays})

    def with_rule(self, rule: Rule) -> Genome:
        """The same numbers under another rule with as many states. Numbers that only the new rule
        has start as in `random`.

        Args:
            rule: the other rule.

        Raises:
            ValueError: if the new rule lacks one of the arrays, or has an additional matrix.

        Example:

        >>> Genome.random(Rule(), seed=0).with_rule(Rule(oja="weights")).rule.oja
        'weights'
        """
        leading = tuple(np.shape(self.arrays["neuron_keep"]))
        new = {
            name: np.full(leading + shape, _START[name], np.float32)
            for name, shape in rule.shapes().items()
            if name in _START and name not in self.arrays
        }
        return Genome(rule, {**self.arrays, **new})

    def by_member(self) -> dict[str, Any]:
        """The arrays by name, with members first: `[members, (layers,) ...]`. A single genome is
        one member.

        Raises:
            ValueError: if there is more than one population axis.

        Example:

        >>> Genome.random(Rule(), seed=0).by_member()["nu"].shape
        (1, 2, 2)
        """
        if len(self.population) > 1:
            raise ValueError(f"A genome must be single or have one population axis. Received: {self!r}")
        arrays = {name: np.asarray(array) for name, array in self.arrays.items()}
        if not self.population:
            return {name: array[None] for name, array in arrays.items()}
        return {name: np.moveaxis(array, len(self._leading) - 1, 0) for name, array in arrays.items()}

    @classmethod
    def from_members(cls, rule: Rule, arrays: Mapping[str, Any]) -> Genome:
        """A population of the arrays that `by_member` gives.

        Args:
            rule: the rule of all members.
            arrays: arrays by name, with members on the first axis.

        Raises:
            ValueError: if the arrays do not fit the rule.
        """
        place = 0 if rule.layers is None else 1
        return cls(rule, {name: np.moveaxis(np.asarray(array), 0, place) for name, array in arrays.items()})

    @classmethod
    def stack(cls, genomes: Sequence[Genome]) -> Genome:
        """Joins genomes and populations of one rule into one population, in their order.

        Args:
            genomes: genomes, or populations on one axis.

        Raises:
            ValueError: if there are none, or their rules differ.

        Example:

        >>> Genome.stack([Genome.random(Rule(), seed) for seed in (1, 2)]).member(1) == Genome.random(Rule(), 2)
        True
        """
        if not genomes or any(genome.rule != genomes[0].rule for genome in genomes):
            raise ValueError(f"`genomes` must be one or more genomes of the same rule. Received: {list(genomes)!r}")
        rows = [genome.by_member() for genome in genomes]
        return cls.from_members(genomes[0].rule, {name: np.concatenate([row[name] for row in rows]) for name in rows[0]})

    def member(self, number: int) -> Genome:
        """One genome of a population.

        Args:
            number: its index on the population axis.

        Raises:
            ValueError: if there is more than one population axis.
            IndexError: if there is no such member.

        Example:

        >>> Genome.random(Rule(), seed=0, population=(3,)).member(1).nu.shape
        (2, 2)
        """
        return Genome(self.rule, {name: array[number] for name, array in self.by_member().items()})

    def layer(self, index: int) -> Genome:
        """The genome of one layer: this genome, unless `Rule.layers` gives each layer its own.

        Args:
            index: index of the layer's genome, from 0.

        Raises:
            IndexError: if each layer has its own, and there is no such layer.

        Example:

        >>> Genome.random(Rule(layers=3), seed=0).layer(1).nu.shape
        (2, 2)
        """
        if self.rule.layers is None:
            return self
        return Genome.unchecked(self.rule.replace(layers=None), {n: a[index] for n, a in self.arrays.items()})

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
        """A genome whose four transforms are drawn from a normal distribution; the gates start as
        in the published code.

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
        arguments.instance("rule", rule, Rule, "a keras_blur.Rule")
        arguments.integer("seed", seed, 0)
        arguments.real("std", std, low=0.0)
        arguments.real("synapse_update", synapse_update)
        population = arguments.counts("population", population)
        leading = (() if rule.layers is None else (rule.layer_count,)) + population
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

    @property
    def license(self) -> str:
        """The licence of the file that the genome was loaded from, as an SPDX identifier.

        A genome that was made, learned or changed has `"NOASSERTION"`. `save` can give its file
        another.
        """
        return self._license

    def to_dict(self, license: str | None = None) -> dict[str, Any]:
        """The genome as plain JSON values, with its checksum.

        Args:
            license: the SPDX identifier of a licence; `None` uses the genome's own.
        """
        arrays = {}
        for name, array in self.arrays.items():
            value = np.asarray(array)
            arrays[name] = {
                "dtype": value.dtype.name,
                "shape": list(value.shape),
                "values": [float(number) for number in value.ravel()],
            }
        document = {
            "format": FORMAT,
            "version": VERSION,
            "written_by": f"keras_blur {__version__}",
            "license": self.license if license is None else _license(license),
            "rule": self.rule.get_config(),
            "arrays": arrays,
        }
        return {**document, "checksum": _checksum(document)}

    @classmethod
    def from_dict(cls, document: Any, *, source: str = "document") -> Genome:
        """Makes a genome from what `to_dict` returned.

        Args:
            document: the mapping.
            source: what to call it in an error.

        Raises:
            ValueError: if it is of another format or version, incomplete, or altered since it was
                written.
        """
        if not isinstance(document, Mapping) or document.get("format") != FORMAT:
            raise ValueError(f"{source} is not a genome: expected a JSON object with format {FORMAT!r}.")
        if document.get("version") != VERSION:
            raise ValueError(
                f"{source} has genome format version {document.get('version')!r}; this release reads version {VERSION}."
            )
        body = {key: value for key, value in document.items() if key != "checksum"}
        if document.get("checksum") != _checksum(body):
            raise ValueError(f"{source} is damaged: its checksum does not match its content.")
        try:
            if not isinstance(body["rule"], Mapping):
                raise TypeError(f"its rule is {body['rule']!r}")
            rule = Rule.from_config(body["rule"])
            with np.errstate(over="ignore"):  # a number too large becomes infinite, and is refused
                arrays = {
                    name: np.array(entry["values"], dtype=entry["dtype"]).reshape(entry["shape"])
                    for name, entry in body["arrays"].items()
                }
            genome = cls(rule, arrays)
            genome._license = _license(body.get("license", NO_LICENSE))  # older files have none
            return genome
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source} is not a complete genome: {error!r}.") from error
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{source} is not a valid genome: {error}") from error

    def to_json(self, license: str | None = None) -> str:
        """The genome as JSON text; floats are exact. `license` is that of `to_dict`."""
        return json.dumps(self.to_dict(license), indent=1)

    @classmethod
    def from_json(cls, text: str, *, source: str = "text") -> Genome:
        """Makes a genome from what `to_json` returned. Raises a `ValueError` as `from_dict` does.

        Example:

        >>> genome = Genome.random(Rule(), seed=0)
        >>> Genome.from_json(genome.to_json()) == genome
        True
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not a genome: not JSON ({error}).") from error
        return cls.from_dict(document, source=source)

    def save(self, path: str | os.PathLike[str], license: str | None = None) -> None:
        """Writes the genome to a JSON file, which appears whole or not at all.

        Args:
            path: the file, with the ending `.json`: on a disk, in a bucket (`gs://...`), or on the
                Hugging Face Hub (`hf://OWNER/REPOSITORY/FILE.json`).
            license: the SPDX identifier of a licence, such as `"Apache-2.0"`; `None` uses that of
                the file that the genome was loaded from, or else `"NOASSERTION"`.

        Raises:
            ValueError: if the path has another ending, is a folder, or is in a folder that cannot
                be written; or if `license` is empty or not text.
            OSError: if a bucket or the Hub cannot be reached, or what it needs is not installed.
        """
        check_output("path", path, (".json",))
        write_text(path, self.to_json(license) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Genome:
        """Reads a genome that `save` wrote.

        Args:
            path: the file: on a disk, in a bucket (`gs://...`), or on the Hugging Face Hub
                (`hf://OWNER/REPOSITORY/FILE.json`, or `hf://OWNER/REPOSITORY@REVISION/FILE.json`).

        Raises:
            ValueError: if the file is missing, damaged, or not a genome.
        """
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"Genome file {os.fspath(path)!r} could not be read: {error}") from error
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
            + (f", {rule.layer_count} layers with their own" if rule.layers else ""),
            f"forward   (eq. 5)  z_j = sum_i w_ij (a_i nu);  a_j = {activation}({keep_old}"
            f"{self._number('neuron_update')} {forward_in}), last layer {last}",
            f"feedback           output state 2 <- {'labels +1/-1' if rule.feedback == 'labels' else 'output error'}",
            f"backward  (eq. 6)  z_i = sum_j w_ji (a_j mu);  a_i = {rule.backward}({body})",
            f"synapses  (eq. 7)  H_ij = {rule.batch_reduction}_batch (a_i nu~) (mu~ a_j);  "
            + "".join(f"H = {step};  " for step in self._steps_of_a_term())
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

    def _steps_of_a_term(self) -> list[str]:
        """The steps from a Hebbian term to the gate, as text."""
        rule, beta = self.rule, self._number("momentum") if self.rule.momentum != "none" else ""
        trace = [f"H + {beta} m where m = {beta} m + H"] if beta else []
        steps = ["whitened(H)"] if rule.whitening else []
        steps += trace if rule.momentum == "before" else []
        steps += [] if rule.normalize_term == "none" else [f"{rule.normalize_term}(H)"]
        return steps + (trace if rule.momentum == "after" else [])

    def _number(self, name: str) -> str:
        value = np.asarray(self.arrays[name])
        return f"{float(value):.4g}" if value.ndim == 0 else name


def _flatten(genome: Genome) -> tuple[Any, tuple[Any, ...]]:
    return (genome.rule, tuple(genome.arrays)), tuple(genome.arrays.values())


def _unflatten(static: Any, arrays: Any) -> Genome:
    rule, names = static
    return Genome.unchecked(rule, dict(zip(names, arrays, strict=True)))


register(Genome, _flatten, _unflatten)


def _checksum(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _license(license: Any) -> str:
    if not isinstance(license, str) or not license.strip():
        raise ValueError(f"`license` must be an SPDX identifier, as in 'Apache-2.0'. Received: license={license!r}")
    return license


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
        raise ValueError(f"`{name}` must be an array of real numbers. {arguments.received(name, value)}")
    if array.dtype != np.float64 or not isinstance(value, (np.ndarray, np.generic)):
        array = array.astype(np.float32)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"`{name}` must be finite. {arguments.received(name, array)}")
    array = np.array(array)
    array.flags.writeable = False
    return array
