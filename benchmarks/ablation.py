"""What each term of a genome is worth: the genome as it is, and with one term off at a time.

    python benchmarks/ablation.py --data mnist,fashion_mnist [--data_dir DIR]
        [--network mlp|lenet|resnet20] [--hidden 256,128] [--genome fast]
        [--beside mnist-4state,...] [--steps 200] [--seeds 5] [--plot FILE] [--json FILE]

A variant may want another gate, so each runs with several on the first seed. The gate with the best
mean test accuracy over the scored steps then runs on all seeds, which favours the variants: the
genome itself keeps its gate. `--beside` adds other genomes. One with another number of states is
also run with the terms of the genome and their numbers. The command prints accuracies by step and
the change of the error against the genome's: the geometric mean over the scored steps of the ratio
of the errors of a seed, and its deviation from seed to seed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags

import keras_blur as kb
from keras_blur import files
from keras_blur.core.genome import Genome
from keras_blur.layers.base import numbers_of
from keras_blur.models.networks import activation_of, builder
from keras_blur.report import style
from keras_blur.report.scoring import score
from keras_blur.report.sources import Source, source_of
from keras_blur.tasks.datasets import load_images

_DATA = flags.DEFINE_list("data", ["digits"], "Image sets.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets.")
_NETWORK = flags.DEFINE_string("network", "mlp", "'mlp' (see --hidden), 'lenet', 'resnet20', or a .keras file.")
_HIDDEN = flags.DEFINE_list("hidden", ["256", "128"], "Units of the hidden layers.")
_GENOME = flags.DEFINE_string("genome", "fast", "The genome, by name or file.")
_BESIDE = flags.DEFINE_list("beside", ["mnist-4state"], "Other genomes.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Examples of a batch.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 200, "Learning steps.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Initial networks and orders of examples.", lower_bound=2)
_PLOT = flags.DEFINE_string("plot", None, "File for the picture.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")

GATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the genome's
WIDE = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # where the size of a term is its own
AS_IT_IS = "as it is"
OFF: dict[str, dict[str, Any]] = {
    "whitening": {"whitening": False, "whitening_positions": 0, "whitening_rows": None},
    "lifted singular values": {"normalize_term": "frobenius"},
    "bounded rank": {"term_rank": None},
    "normalisation": {"normalize_term": "none", "term_rank": None},
    "momentum": {"momentum": "none"},
    "falling gate": {"update_decay": "none"},
    "slow synapses": {"slow_synapses": False},
}
TERMS = (
    "whitening", "whitening_positions", "whitening_rows", "normalize_term", "orthogonal_iterations", "term_rank",
    "momentum", "update_decay", "slow_synapses",
)  # fmt: skip
NUMBERS = ("decay_power", "log_decay_steps", "log_damping", "momentum", "log_averaging")


def with_options(genome: Genome, options: dict[str, Any]) -> Genome:
    """A genome with other options, less the numbers that only the old ones need."""
    rule = genome.rule.replace(**options)
    kept = {name: array for name, array in genome.arrays.items() if name in rule.shapes()}
    return Genome(rule, kept)


def variants(genome: Genome) -> dict[str, tuple[Genome, tuple[float, ...]]]:
    """The genome and its variants by name, each with the factors of its gate to try."""
    found: dict[str, tuple[Genome, tuple[float, ...]]] = {AS_IT_IS: (genome, (1.0,))}
    for name, options in OFF.items():
        if any(getattr(genome.rule, option) != value for option, value in options.items()):
            found[f"no {name}"] = (with_options(genome, options), WIDE if name == "normalisation" else GATES)
    every = {option: value for options in OFF.values() for option, value in options.items()}
    found["none of these"] = (with_options(genome, every), WIDE)
    for name in _BESIDE.value:
        other = kb.genomes.load(name)
        found[name] = (other, GATES)
        if other.rule.states != genome.rule.states:
            rule = other.rule.replace(**{option: getattr(genome.rule, option) for option in TERMS})
            own = {key: genome.arrays[key] for key in NUMBERS if key in rule.shapes()}
            gate = math.copysign(float(genome.arrays["synapse_update"]), float(other.arrays["synapse_update"]))
            arrays = {**other.arrays, **own, "synapse_update": np.float32(gate), "synapse_keep": np.float32(1.0)}
            found[f"{name}, these terms"] = (Genome(rule, {key: arrays[key] for key in rule.shapes()}), GATES)
    return found


class Learner:
    """A network that learns with a genome, from the beginning for each seed."""

    def __init__(self, source: Source, genome: Genome):
        _, build = builder([int(units) for units in _HIDDEN.value] if _NETWORK.value == "mlp" else _NETWORK.value)
        self._source, self._genome = source, genome
        self._build = lambda: build(source.shape, source.classes, activation=activation_of(genome.rule.forward_activation))
        self._model = self._fresh(0)

    def _fresh(self, number: int) -> Any:
        keras.utils.set_random_seed(number)
        model = kb.convert(self._build(), self._genome)
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    def curve(self, number: int, at: list[int]) -> Iterator[float]:
        """Yields the test accuracy at the scored steps of a seed."""
        for variable, start in zip(self._model.variables, self._fresh(number).variables, strict=True):
            variable.assign(numbers_of(start))
        for step, (x, y) in enumerate(self._source.batches(number), 1):
            self._model.train_on_batch(x, y)
            if step in at:
                yield score(self._model, *self._source.test(number))[0]
            if step == at[-1]:
                return


def ablate(source: Source, at: list[int], genome: Genome) -> dict[str, Any]:
    """Each variant's test accuracies `[seeds][scored steps]` and the gate it ran with."""
    found: dict[str, Any] = {}
    for name, (variant, gates) in variants(genome).items():
        runs = {}
        for factor in gates:
            gated = Learner(source, variant.replace(synapse_update=np.float32(factor * variant.arrays["synapse_update"])))
            runs[factor] = gated, list(gated.curve(0, at))
        best = max(runs, key=lambda factor: float(np.mean(runs[factor][1])))
        learner, first = runs[best]
        curves = [first, *(list(learner.curve(number, at)) for number in range(1, _SEEDS.value))]
        found[name] = {"gate": best, "accuracy": curves}
        print(f"  {name:<32} gate x {best:<6g} {' '.join(f'{value:.3f}' for value in np.mean(curves, axis=0))}", flush=True)
    return found


def changes(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """The change of the error of each variant, as a share, and its deviation from seed to seed."""
    errors = {name: 1.0 - np.array(row["accuracy"]) for name, row in found.items()}
    logs = {name: np.mean(np.log(error / errors[AS_IT_IS]), axis=1) for name, error in errors.items()}
    return {name: (float(np.expm1(log.mean())), float(np.std(log, ddof=1))) for name, log in logs.items()}


def draw(results: dict[str, dict[str, tuple[float, float]]], path: str) -> None:
    """Draws the changes as bars, a panel for each set."""
    names = [name for name in next(iter(results.values())) if name != AS_IT_IS]
    made, axes = style.figure(columns=len(results), height=0.5 + 0.3 * len(names))
    for number, (axis, (data, rows)) in enumerate(zip(axes[0], results.items(), strict=True)):
        values = [100.0 * rows[name][0] for name in names]
        spread = [100.0 * rows[name][1] * (1.0 + rows[name][0]) for name in names]
        axis.barh(names, values, xerr=spread, color=style.COLOURS[0], alpha=0.8, height=0.6)
        axis.axvline(0.0, color="0.3", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(data, fontsize=9)
        axis.set_xlabel("change of the error (%)")
        if number:
            axis.set_yticklabels([])
    style.save(made, path)


def main(argv: list[str]) -> None:
    del argv
    genome = kb.genomes.load(_GENOME.value)
    for path, endings in ((_PLOT.value, style.ENDINGS), (_JSON.value, (".json",))):
        if path:
            files.check_output("path", path, endings)
    runs: dict[str, Any] = {}
    for name in _DATA.value:
        images = load_images(name, _DATA_DIR.value)
        source, at = source_of(
            images, steps=_STEPS.value, seeds=_SEEDS.value, batch_size=_BATCH.value, seed=0, split="test"
        )  # fmt: skip
        at = [step for step in at if step]
        print(
            f"{name}, {_NETWORK.value}, batches of {_BATCH.value}: accuracy after steps {', '.join(map(str, at))}",
            flush=True,
        )
        runs[name] = {"steps": at, "variants": ablate(source, at, genome)}
        results = {name: changes(run["variants"]) for name, run in runs.items()}
        print("\n| variant | change of the error | deviation |\n|---|---|---|")
        for variant, (change, deviation) in results[name].items():
            print(f"| {variant} | {100 * change:+.1f} % | {100 * deviation:.1f} |")
        print(flush=True)
        if _JSON.value:
            files.write_text(_JSON.value, json.dumps(runs, indent=1) + "\n")
        if _PLOT.value:
            draw(results, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
