"""Compares a genome with tuned optimizers in the same network, on the same batches.

Every learner is a Keras model, compiled and run as a user would run it. All learn the same network
from the same initial weights. They also learn a twin with batch normalisation before each
activation, since a rule may normalise by itself. Each optimizer runs over a full grid of learning
rates, constant and decayed linearly to each scored step. The grid runs on the first seeds only. The
settings that lead at a scored step there, and each optimizer's best setting at the last step, run
on all seeds. An envelope is the best mean accuracy among these at each step. It is tuned for every
step separately, which no single run can be.

Time is measured separately, as the median over blocks of `fit` without compilation, with the
learners taking turns. Scores are those of `predict`. Only the optimizers' batch normalisation is
scored with the statistics of the test examples, since Keras's moving averages start far from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_blur import arguments
from keras_blur.core.genome import Genome
from keras_blur.layers.base import numbers_of
from keras_blur.models.convert import convert
from keras_blur.models.networks import activation_of, builder, normalized
from keras_blur.report import envelopes
from keras_blur.report.baselines import GRIDS, OPTIMIZERS, optimizer_of, slots_of
from keras_blur.report.progress import Progress, Watch
from keras_blur.report.scoring import score
from keras_blur.report.sources import Source, source_of
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.datasets import Images
from keras_blur.training.settings import described, differences

Array = Any

SCHEDULES = ("constant", "linear")
PLAIN, NORMALIZED = "plain", "normalized"
_LEADERS = 3  # number of leading settings at each scored step that run on all seeds
_BLOCKS, _BLOCK_SECONDS, _BLOCK_STEPS = 7, 0.25, 50
_BLOCK_NUMBERS = 2e7  # of the examples of a block, at most


def compare(
    genome: Genome,
    data: Images | Tasks,
    network: str | Sequence[int] | keras.Model,
    *,
    steps: int = 1000,
    seeds: int = 5,
    batch_size: int = 128,
    seed: int = 0,
    split: str = "test",
    grids: Mapping[str, Sequence[float]] | None = None,
    schedules: Sequence[str] = SCHEDULES,
    normalize: bool = True,
    score_at: Sequence[int] | None = None,
    tuning_seeds: int = 1,
    baselines: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Compares a genome with Keras optimizers.

    Args:
        genome: a single genome.
        data: an image set of `keras_blur.tasks.datasets.load_images` (learners train on its
            training images and are scored on its test images), or a task distribution of classes
            (each seed is one episode, scored on up to 2,000 examples outside its batches).
        network: units of the hidden layers of an MLP, `"lenet"`, `"resnet20"`, the path of a
            `.keras` file, or a Keras model with one input and one output per class. An MLP, LeNet
            and ResNet have the genome's activation. Weights are drawn anew for each seed.
        steps: number of learning steps.
        seeds: number of initial networks and data orders, or of episodes.
        batch_size: batch size.
        seed: random seed of networks and batches.
        split: split of tasks: `"test"` for reporting, `"validation"` for model selection. Image
            sets have no validation images.
        grids: learning rates by name of optimizer, from `OPTIMIZERS`; `None` uses all of them,
            with half decades around the usual rates.
        schedules: one or both of `"constant"` and `"linear"`, which decays to 0 at the scored step.
        normalize: whether the genome and the optimizers also learn the network with batch
            normalisation. A network that has normalisation layers is compared as it is.
        score_at: steps at which learners are scored, besides 0 and `steps`; `None` takes 1, 2, 5,
            10, ..., 1000. Fewer scores are cheaper, as a decayed rate has a run for each of them.
        tuning_seeds: number of seeds, from the first, on which the whole grid runs.
        baselines: an earlier result, even a partial one, in the same setting and on the same
            examples, whose optimizer runs are reused. Seconds are always measured anew.
        watch: a function that is called before each run with a `report.progress.Progress`: what
            runs, how far it is, and the curves so far. An exception in it ends the comparison.

    Returns:
        JSON values: `steps`; `examples`, a summary of the data; `curves` of the genome and of each
        optimizer's settings, with accuracy and cross-entropy by seed and step, and seconds by step.
        By network (`"plain"`, `"normalized"`): `envelopes`, with the accuracy at each step and
        `which` curve reached it; `best`, each optimizer's best curve at the last step; `edges`, the
        curves of an envelope whose rate ends its grid; `speedup` of the genome in the plain
        network, in `steps` and in `seconds`. `normalized_speedup` is that of the genome with batch
        normalisation against the optimizers there. `by_seconds` has accuracies at the times at
        which the fastest plain optimizer has done `steps`. A non-finite score counts as the worst:
        accuracy 0, cross-entropy `None`.

    Raises:
        ValueError: if the genome does not fit the network, an optimizer is unknown, a number does
            not fit the data, a schedule is repeated, or `baselines` has another setting or other
            examples.

    Example:

    >>> from keras_blur import genomes, tasks
    >>> xor = tasks.functions("xor")
    >>> found = compare(genomes.backprop(0.5, "tanh"), xor, (8,), steps=5, seeds=2, batch_size=16,
    ...                 grids={"SGD": (0.5,)}, schedules=("constant",), normalize=False)
    >>> found["steps"], list(found["curves"])
    ([0, 1, 2, 5], ['genome', 'SGD 0.5'])
    """
    arguments.instance("genome", genome, Genome, "a Genome")
    if genome.population:
        raise ValueError(f"`genome` must be a single genome. Received: a population of shape {genome.population}")
    arguments.flag("normalize", normalize)
    chosen = _checked_grids(GRIDS if grids is None else grids)
    if not schedules or set(schedules) - set(SCHEDULES) or len(set(schedules)) != len(schedules):
        raise ValueError(f"`schedules` must be some of {', '.join(SCHEDULES)}, each once. Received: schedules={schedules!r}")
    source, at = source_of(data, steps=steps, seeds=seeds, batch_size=batch_size, seed=seed, split=split, score_at=score_at)
    if not 1 <= tuning_seeds <= seeds:
        raise ValueError(
            f"`tuning_seeds` must be from 1 to {seeds}, the number of seeds. Received: tuning_seeds={tuning_seeds}"
        )
    title, build = builder(network)
    start = _Start(source, build, activation_of(genome.rule.forward_activation))
    header = {
        "data": data.name, "network": title, "batch_size": batch_size, "seeds": seeds, "seed": seed, "split": split,
        "activation": genome.rule.forward_activation, "parameters": start.network(0).count_params(), "steps": list(at),
        "examples": source.described(), "layers": _layers(network, start),
    }  # fmt: skip
    known = _known(baselines, header)
    variants = [PLAIN, *([NORMALIZED] if normalize and normalized(start.network(0)) is not None else [])]
    learners = {(variant, "genome"): _Learner(start, variant, genome=genome) for variant in variants}
    for variant in variants:
        learners |= {(variant, name): _Learner(start, variant, optimizer=name) for name in chosen}
    run = _Runs(header, learners, known, at, tuning_seeds, watch, arms=2 + len(variants) * (len(chosen) + 1))
    run.time()
    run.genome(variants, seeds)
    for variant in variants:
        grid = [
            _Setting(variant, name, float(rate), schedule)
            for name, rates in chosen.items()
            for rate in rates
            for schedule in schedules
        ]
        run.grid(grid)
        run.leaders(grid, seeds)
    return run.result(partial=False)


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A tuned optimizer: network, name, learning rate and schedule."""

    variant: str
    optimizer: str
    rate: float
    schedule: str

    @property
    def name(self) -> str:
        """The name of the curve."""
        decayed = ", linear decay" if self.schedule == "linear" else ""
        return f"{self.optimizer} {self.rate:g}{decayed}{', normalized' if self.variant == NORMALIZED else ''}"


def _checked_grids(grids: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The grids with defaults filled in. Raises a `ValueError` if one is invalid."""
    labels = [f"{name} {rate:g}" for name, rates in grids.items() for rate in rates]
    if not all(grids.values()) or not labels or len(set(labels)) != len(labels) or set(grids) - set(OPTIMIZERS):
        raise ValueError(
            f"`grids` must give different rates for some of {', '.join(OPTIMIZERS)}. Received: grids={dict(grids)!r}"
        )
    return dict(grids)


def _known(baselines: Mapping[str, Any] | None, header: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizers' curves of an earlier result."""
    if baselines is None:
        return {}
    examples = baselines.get("examples", [])
    if not examples:
        raise ValueError("`baselines` must be a comparison that describes its `examples`. Received: one without")
    left_out = ("seeds", "examples", *(["network"] if header["layers"] else []))  # a file may have another name
    for name, wanted in header.items():
        if name not in left_out and baselines.get(name) != wanted:
            raise ValueError(
                f"`baselines` must be a comparison with {name}={wanted!r}. Received: one with {name}={baselines.get(name)!r}"
            )
    for before, now in zip(examples, header["examples"], strict=False):  # of the seeds that both have
        if other := next(differences(before, now), None):
            raise ValueError(
                f"`baselines` must be a comparison on the same examples of {header['data']}. Received: one on others "
                f"({other[0]} {other[1]}, now {other[2]})"
            )
    return {name: curve for name, curve in baselines["curves"].items() if "optimizer" in curve}


def _layers(network: Any, start: _Start) -> str | None:
    """A digest of the layers of a user's own network; `None` for one that its name describes."""
    if not isinstance(network, keras.Model) and not (isinstance(network, str) and network.endswith(".keras")):
        return None
    text = json.dumps(described(start.network(0)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Start:
    """Initial networks by seed.

    Attributes:
        source: the batches.
        probabilities: whether the network's outputs are probabilities rather than logits.
    """

    def __init__(self, source: Source, build: Callable[..., keras.Model], activation: Any):
        self.source, self._build, self._activation = source, build, activation
        last = self.network(0).outputs[0]._keras_history.operation
        squashing = (keras.activations.softmax, keras.activations.sigmoid)
        self.probabilities = isinstance(last, keras.layers.Softmax) or getattr(last, "activation", None) in squashing

    def network(self, number: int, variant: str = PLAIN) -> keras.Model:
        """The network of a seed. Both variants have the same weights."""
        keras.utils.set_random_seed(int(np.random.default_rng([self.source.seed, number, 1]).integers(2**31)))
        plain = self._build(self.source.shape, self.source.classes, activation=self._activation)
        made = plain if variant == PLAIN else normalized(plain)
        assert made is not None  # where there is a variant
        return made


class _Learner:
    """A compiled model that is reset for each run."""

    def __init__(self, start: _Start, variant: str, *, optimizer: str | None = None, genome: Genome | None = None):
        self.source = start.source
        self._fresh = (lambda number: start.network(number, variant)) if genome is None else (
            lambda number: convert(start.network(number, variant), genome)
        )  # fmt: skip
        self.model = self._fresh(0)
        self._probabilities = start.probabilities
        kind = keras.losses.BinaryCrossentropy if self.source.classes == 1 else keras.losses.SparseCategoricalCrossentropy
        loss = kind(from_logits=not self._probabilities)
        self._values: dict[int, list[np.ndarray]] = {}  # of the weights, then of the optimizer
        self._predicts, self._name = self.model, optimizer
        if genome is not None:
            self.model.compile(loss=loss)
            return
        assert optimizer is not None
        self._optimizer = optimizer_of(optimizer)
        self.model.compile(self._optimizer, loss)
        self._optimizer.build(self.model.trainable_variables)
        if any(isinstance(layer, keras.layers.BatchNormalization) for layer in self.model.layers):
            self._predicts = _with_batch_statistics(self.model)

    def begin(self, number: int) -> None:
        """Resets the model to the initial weights of a seed, and the optimizer to those weights."""
        variables = [*self.model.variables, *([] if self._name is None else self._optimizer.variables)]
        if number not in self._values:
            fresh = self._fresh(number)
            slots = [] if self._name is None else slots_of(self._name, fresh.trainable_variables)
            self._values[number] = [*(numbers_of(one) for one in fresh.variables), *slots]
        for one, value in zip(variables, self._values[number], strict=True):
            one.assign(value)

    def step(self, x: np.ndarray, y: np.ndarray, rate: float | None = None) -> float:
        """One step of learning. Returns the loss."""
        if rate is not None:
            self._optimizer.learning_rate = rate
        return float(self.model.train_on_batch(x, self._targets(y), return_dict=True)["loss"])

    def score(self, number: int) -> tuple[float, float | None]:
        """Accuracy and cross-entropy on the test examples of a seed."""
        x, y = self.source.test(number)
        return score(self._predicts, x, y, self._probabilities)

    def seconds(self, steps: int) -> float:
        """Seconds per step of `fit`, in a block of steps from the start of its first batch."""
        self.begin(0)
        stream = self.source.batches(0)
        drawn = [batch for batch, _ in zip(stream, range(steps), strict=False)]
        x, y = (np.concatenate(part) for part in zip(*drawn, strict=True))
        watch = _Stopwatch()
        self.model.fit(
            x, self._targets(y), batch_size=self.source.batch_size, shuffle=False, verbose=0, callbacks=[watch]
        )  # fmt: skip
        return watch.seconds / len(drawn)

    def _targets(self, y: np.ndarray) -> np.ndarray:
        return y[:, None].astype(np.float32) if self.source.classes == 1 else y


class _Stopwatch(keras.callbacks.Callback):
    """Measures seconds from the start of an epoch's first batch to the end of the epoch."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if not batch:
            self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = time.perf_counter() - self._start


class _BatchStatistics(keras.layers.Layer):
    """A layer of batch normalisation that always uses the statistics of the batch.

    It is needed because a Functional model overrides the `training` argument of its layers' calls.
    """

    def __init__(self, layer: keras.layers.Layer):
        super().__init__()
        self.layer = layer

    def call(self, x: Array) -> Array:
        return self.layer(x, training=True)


def _with_batch_statistics(model: keras.Model) -> keras.Model:
    """The same layers in a model whose batch normalisation always uses the statistics of the
    batch."""

    def called(layer: Any, *inputs: Any, **options: Any) -> Any:
        if isinstance(layer, keras.layers.BatchNormalization):
            return _BatchStatistics(layer)(*inputs)
        return layer(*inputs, **options)

    functional = keras.Model(model.inputs[0], model.outputs[0])
    return keras.models.clone_model(functional, clone_function=lambda layer: layer, call_function=called)


class _Runs:
    """The runs of a comparison and their results."""

    def __init__(
        self,
        header: Mapping[str, Any],
        learners: Mapping[tuple[str, str], _Learner],
        known: Mapping[str, Any],
        at: Sequence[int],
        tuning_seeds: int,
        watch: Watch | None,
        arms: int,
    ):
        self._header, self._learners, self._known, self._at = header, learners, known, at
        self._tuning, self._watch, self._arms, self._arm = tuning_seeds, watch, arms, 0
        self._curves: dict[str, Any] = {}
        self._seconds: dict[tuple[str, str], float] = {}

    def time(self) -> None:
        """Times all learners, which take turns."""
        self._arm += 1
        steps: dict[tuple[str, str], int] = {}
        source = self._learners[PLAIN, "genome"].source
        most = min(_BLOCK_STEPS, max(5, int(_BLOCK_NUMBERS / (source.features * source.batch_size))))
        found: dict[tuple[str, str], list[float]] = {key: [] for key in self._learners}
        for number in range(-1, _BLOCKS):
            self._tell("seconds of a step", number + 1, _BLOCKS + 1)
            for key, learner in self._learners.items():
                if number < 0:  # the first call compiles
                    learner.seconds(2)
                    steps[key] = int(np.clip(_BLOCK_SECONDS / learner.seconds(5), 5, most))
                else:
                    found[key].append(learner.seconds(steps[key]))
        self._seconds = {key: float(np.median(values)) for key, values in found.items()}

    def genome(self, variants: Sequence[str], seeds: int) -> None:
        """Runs the genome on all seeds, in every network."""
        self._arm += 1
        runs = [(variant, number) for variant in variants for number in range(seeds)]
        for done, (variant, number) in enumerate(runs):
            self._tell("genome", done, len(runs))
            name = envelopes.GENOME if variant == PLAIN else envelopes.NORMALIZED_GENOME
            self._add(name, {}, (variant, "genome"), self._row(self._learners[variant, "genome"], number))

    def grid(self, settings: Sequence[_Setting]) -> None:
        """Runs all settings on the first seeds."""
        for name in dict.fromkeys(setting.optimizer for setting in settings):
            self._arm += 1
            own = [setting for setting in settings if setting.optimizer == name]
            runs = [(setting, number) for setting in own for number in range(self._tuning)]
            label = f"{name}{', normalized' if own[0].variant == NORMALIZED else ''}"
            for done, (setting, number) in enumerate(runs):
                self._tell(label, done, len(runs))
                self._run(setting, number)

    def leaders(self, settings: Sequence[_Setting], seeds: int) -> None:
        """Runs on all seeds the settings that lead on the first ones."""
        self._arm += 1
        means = {s: np.mean(self._curves[s.name]["accuracy"][: self._tuning], axis=0) for s in settings}
        leading: dict[_Setting, None] = {}
        for place in range(1, len(self._at)):
            leading |= dict.fromkeys(sorted(settings, key=lambda s: -means[s][place])[:_LEADERS])
        for name in dict.fromkeys(s.optimizer for s in settings):
            leading[max((s for s in settings if s.optimizer == name), key=lambda s: means[s][-1])] = None
        runs = [(setting, number) for setting in leading for number in range(self._tuning, seeds)]
        for done, (setting, number) in enumerate(runs):
            self._tell(f"leaders, {settings[0].variant}", done, len(runs))
            self._run(setting, number)

    def _run(self, setting: _Setting, number: int) -> None:
        """Runs a setting on a seed, unless the result is known."""
        known = self._known.get(setting.name, {"accuracy": [], "loss": []})
        key = setting.variant, setting.optimizer
        if number < len(known["accuracy"]):
            row = known["accuracy"][number], known["loss"][number]
        elif setting.schedule == "constant":
            row = self._row(self._learners[key], number, setting.rate)
        else:
            row = self._decayed(self._learners[key], number, setting.rate)
        about = {
            "optimizer": setting.optimizer, "rate": setting.rate, "schedule": setting.schedule, "network": setting.variant,
        }  # fmt: skip
        self._add(setting.name, about, key, row)

    def _add(self, name: str, about: Mapping[str, Any], key: tuple[str, str], row: tuple[Any, Any]) -> None:
        seconds = [self._seconds[key] * step for step in self._at]
        curve = self._curves.setdefault(name, {**about, "accuracy": [], "loss": [], "seconds": seconds})
        curve["accuracy"].append(list(row[0]))
        curve["loss"].append(list(row[1]))

    def _row(self, learner: _Learner, number: int, rate: float | None = None) -> tuple[list[float], list[float | None]]:
        """Scores of one run at a constant rate."""
        learner.begin(number)
        batches = learner.source.batches(number)
        scores, done = [], 0
        for target in self._at:
            lost = False
            while done < target:
                lost = not math.isfinite(learner.step(*next(batches), rate)) or lost
                done += 1
            scores.append(learner.score(number))
            if rate is not None and lost:  # an optimizer does not recover from there
                break
        return self._columns(scores)

    def _decayed(self, learner: _Learner, number: int, rate: float) -> tuple[list[float], list[float | None]]:
        """Scores of runs whose rate falls linearly to zero at each scored step."""
        scores = []
        for horizon in self._at:
            learner.begin(number)
            lost = False
            for done, (x, y) in zip(range(horizon), learner.source.batches(number), strict=False):
                lost = not math.isfinite(learner.step(x, y, rate * (1.0 - done / horizon))) or lost
            scores.append(learner.score(number))
            if lost:
                break
        return self._columns(scores)

    def _columns(self, scores: Iterable[tuple[float, float | None]]) -> tuple[list[float], list[float | None]]:
        """Accuracies and losses, with the worst values where a run diverged."""
        accuracy, loss = (list(column) for column in zip(*scores, strict=True))
        missing = len(self._at) - len(accuracy)
        return accuracy + [0.0] * missing, loss + [None] * missing

    def _tell(self, arm: str, done: int, count: int) -> None:
        if self._watch is not None:
            partial = self.result(partial=True) if self._curves else None
            self._watch(Progress(self._header["data"], arm, self._arm, self._arms, done, count, "run", partial))

    def result(self, partial: bool) -> dict[str, Any]:
        """The result so far."""
        found = {**self._header, "curves": dict(self._curves)}
        if partial:
            return {**found, "partial": True}
        return found | envelopes.summary(found)
