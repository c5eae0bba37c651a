"""Compares a genome with tuned optimizers on the same batches and initial networks.

Optimizers train plain networks with the activation of the genome. They have no batch normalisation,
even if the rule normalises its sums over the batch. Each optimizer runs over a full grid of
learning rates. The envelope is the best mean accuracy of all optimizers and rates at each step. It
is tuned for every step separately, which no single run can be. A genome above the envelope is
faster than all of them in such networks.

Seeds and rates run in parallel on leading axes of one compiled program. Time is measured
separately, for each learner with one rate and all seeds, because wider programs are cheaper per
network. It is the median over several compiled blocks, divided by the number of seeds.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_blur import random
from keras_blur.checks import Expected, checked_arrays
from keras_blur.checks.tasks import check_tasks
from keras_blur.compiling import compiled
from keras_blur.core.genome import Genome
from keras_blur.files import check_output
from keras_blur.learners import BaselineLearner, Blur, Learner, updates
from keras_blur.learners.blur import check_genome
from keras_blur.meta.estimator import classes_of
from keras_blur.report import style
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.datasets import Images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = Any

STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
GRIDS: dict[str, tuple[float, ...]] = {
    "SGD": tuple(float(f"{10.0 ** (exponent / 2):.3g}") for exponent in range(-5, 2)),
    "momentum": tuple(float(f"{10.0 ** (exponent / 2):.3g}") for exponent in range(-6, 1)),
    "Adam": tuple(float(f"{10.0 ** (exponent / 2):.3g}") for exponent in range(-7, -1)),
    "RMSprop": tuple(float(f"{10.0 ** (exponent / 2):.3g}") for exponent in range(-8, -2)),
}
_CHUNK = 2000  # test examples that are predicted at once, and those of an episode
_BLOCK = 25  # steps of one compiled call at most


_OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "SGD": keras.optimizers.SGD,
    "momentum": lambda: keras.optimizers.SGD(momentum=0.9),
    "Adam": keras.optimizers.Adam,
    "RMSprop": keras.optimizers.RMSprop,
}


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a comparison or an evaluation.

    Attributes:
        data: name of the data.
        arm: current arm: `"genome"`, or an optimizer with all its rates.
        number: number of the arm, from 1.
        arms: number of arms.
        step: learning step of the last score.
        result: curves so far, in the form of the final result with `partial: True`: those of
            finished arms or, before that, the first arm's up to the last score. `None` before the
            first score.
    """

    data: str
    arm: str
    number: int
    arms: int
    step: int
    result: dict[str, Any] | None


Watch = Callable[[Progress], None]


def compare(
    genome: Genome,
    data: Images | Tasks,
    hidden: Sequence[int],
    *,
    steps: int = 1000,
    seeds: int = 5,
    batch_size: int = 128,
    seed: int = 0,
    split: str = "test",
    grids: Mapping[str, Sequence[float]] | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Compares a genome with SGD, momentum, Adam and RMSprop.

    Args:
        genome: a single genome.
        data: an image set (learners train on its training images and are scored on its test
            images), or a task distribution of classes (each seed is one episode, scored on up to
            2,000 examples outside its batches).
        hidden: units of the hidden layers.
        steps: number of learning steps. Scores are taken at 0, 1, 2, 5, 10, ...
        seeds: number of initial networks and data orders, or of episodes.
        batch_size: batch size.
        seed: random seed of networks and batches.
        split: split of tasks: `"test"` for reporting, `"validation"` for model selection. Image
            sets have no validation images.
        grids: learning rates by optimizer; `None` uses half decades around the usual ones.
        watch: called with a `Progress` at the start of each arm and after each score, for display
            or for keeping partial results. An exception ends the comparison.

    Returns:
        JSON values: `steps`; `curves`, with accuracy and cross-entropy by seed and step and seconds
            by step, for the genome and each optimizer and rate; and `envelope` and `best`, computed
            from them. A rule that normalises over the batch is scored with the statistics of up to
            2,000 test images at a time. A non-finite score counts as the worst: accuracy 0,
            cross-entropy `None`.

    Raises:
        ValueError: if the genome does not fit the network, an optimizer is unknown, or a number
            does not fit the data.
    """
    chosen = GRIDS if grids is None else grids
    labels = [f"{name} {rate:g}" for name, rates in chosen.items() for rate in rates]
    if not labels or len(set(labels)) != len(labels) or set(chosen) - set(_OPTIMIZERS):
        raise ValueError(
            f"`grids` must give different rates for some of {', '.join(_OPTIMIZERS)}. Received: grids={dict(chosen)!r}"
        )
    source, at = _prepared(genome, data, hidden, steps, seeds, batch_size, seed, split)

    def optimizer(name: str, rates: Sequence[float]) -> Iterator[list[dict[str, Any]]]:
        learner = BaselineLearner(_OPTIMIZERS[name](), tuple(hidden), genome.rule.forward_activation)
        grid = {"learning_rate": tf.constant(list(rates), tf.float32)[:, None]}
        for found in _curves(learner, grid, len(rates), source, at):
            yield [{"optimizer": name, "rate": float(rate), **one} for rate, one in zip(rates, found, strict=True)]

    arms = [_Arm("genome", ["genome"], _of_genomes(genome, hidden, source, at))]
    arms += [_Arm(name, [f"{name} {rate:g}" for rate in rates], optimizer(name, rates)) for name, rates in chosen.items()]
    return _learn(arms, _header(data, hidden, batch_size, seeds, seed, split), at, watch)


def evaluate(
    genome: Genome,
    data: Images | Tasks,
    hidden: Sequence[int],
    *,
    steps: int = 1000,
    seeds: int = 5,
    batch_size: int = 128,
    seed: int = 0,
    split: str = "test",
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Evaluates a genome alone. As `compare`, without optimizers, `envelope` and `best`.

    A population of genomes (one axis) learns in parallel, on the same batches and networks.
    `curves` then contains `"genome 0"`, `"genome 1"`, ... instead of `"genome"`.

    Example:

    >>> from keras_blur import Rule, tasks
    >>> genome = Genome.random(Rule(batch_reduction="mean"), seed=0)
    >>> result = evaluate(genome, tasks.functions("xor"), (8,), steps=5, seeds=2, batch_size=16)
    >>> result["steps"]
    [0, 1, 2, 5]
    """
    source, at = _prepared(genome, data, hidden, steps, seeds, batch_size, seed, split, axes=1)
    members = int(np.prod(genome.population)) if genome.population else 1
    names = [f"genome {number}" for number in range(members)] if genome.population else ["genome"]
    arms = [_Arm("genome", names, _of_genomes(genome, hidden, source, at))]
    return _learn(arms, _header(data, hidden, batch_size, seeds, seed, split), at, watch)


class _Arm(NamedTuple):
    """Learners that run in parallel: a name, the names of their curves, and the growing curves."""

    name: str
    curves: Sequence[str]
    learning: Iterator[list[dict[str, Any]]]


def _header(
    data: Images | Tasks, hidden: Sequence[int], batch_size: int, seeds: int, seed: int, split: str
) -> dict[str, Any]:
    """The settings stored in a result."""
    return {
        "data": data.name, "hidden": list(hidden), "batch_size": batch_size, "seeds": seeds, "seed": seed, "split": split,
    }  # fmt: skip


def _learn(arms: Sequence[_Arm], header: Mapping[str, Any], at: Sequence[int], watch: Watch | None) -> dict[str, Any]:
    """Runs all arms in turn and returns the result."""
    curves: dict[str, Any] = {}

    def result(curves: Mapping[str, Any], scores: int) -> dict[str, Any]:
        summary = _summary(curves, at) if any("optimizer" in curve for curve in curves.values()) else {}
        return {**header, "steps": list(at[:scores]), "curves": dict(curves), **summary}

    def tell(number: int, step: int, so_far: Mapping[str, Any], scores: int) -> None:
        if watch is not None:
            partial = {**result(so_far, scores), "partial": True} if so_far else None
            watch(Progress(header["data"], arms[number].name, number + 1, len(arms), step, partial))

    for number, arm in enumerate(arms):
        tell(number, 0, curves, len(at))
        for scores, found in enumerate(arm.learning, 1):
            own = dict(zip(arm.curves, found, strict=True))
            tell(number, at[scores - 1], curves or own, len(at) if curves else scores)
        curves |= own
    return result(curves, len(at))


def _prepared(
    genome: Genome, data: Images | Tasks, hidden: Sequence[int], steps: int, seeds: int, batch_size: int, seed: int,
    split: str, axes: int = 0,
) -> tuple[_Source, list[int]]:  # fmt: skip
    """Checks the arguments; returns the batches and the steps to score."""
    check_genome(genome, hidden, axes)
    if not isinstance(data, (Images, Tasks)):
        raise ValueError(f"`data` must be a task distribution or an image set. Received: data={data!r}")
    if isinstance(data, Tasks) and data.kind != "classes":
        raise ValueError(f"`data` must be tasks of classes. Received: {data.name}, tasks of {data.kind}")
    if split not in ("validation", "test") or (split != "test" and not isinstance(data, Tasks)):
        raise ValueError(f"`split` must be 'test' or, of tasks, 'validation'. Received: split={split!r} of {data.name}")
    limit = data.available(split) - 1 if isinstance(data, Tasks) else len(data.x_train)
    if steps < 1 or seeds < 2 or not 1 <= batch_size <= limit:
        raise ValueError(
            f"`steps` must be at least 1, `seeds` at least 2, `batch_size` from 1 to {limit}. "
            f"Received: steps={steps}, seeds={seeds}, batch_size={batch_size}"
        )
    if isinstance(data, Tasks):
        check_tasks(data, batch_size, 1, split)
    else:
        expected = Expected(outputs=(data.classes,), labels="classes", classes=data.classes)
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
            checked_arrays(x, y, None, expected, within="data")
    at = sorted({step for step in STEPS if step <= steps} | {steps})
    if isinstance(data, Tasks):
        Blur(tuple(hidden), genome.rule).check(data.kind, data.outputs)
        return _Episodes(data, batch_size, seeds, seed, steps, split), at
    return _Passes(data, batch_size, seeds, seed), at


def _of_genomes(genome: Genome, hidden: Sequence[int], source: _Source, at: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    """Yields the curves of a genome, or of each genome of a population, after each score."""
    outer = {name: tf.constant(array[:, None]) for name, array in genome.by_member().items()}  # [members, tasks, ...]
    members = outer["nu"].shape[0]
    return _curves(Blur(tuple(hidden), genome.rule), outer, members, source, at)


class _Source(abc.ABC):
    """Batches and test examples, the same for every learner.

    Attributes:
        features, classes: numbers of inputs and outputs.
        test_x, test_y: `[1 or seeds, examples, features]` and labels `[1 or seeds, examples]`.
    """

    features: int
    classes: int
    test_x: np.ndarray
    test_y: np.ndarray

    def __init__(self, batch_size: int, seeds: int, seed: int):
        self.batch_size, self.seeds, self.seed = batch_size, seeds, seed

    @abc.abstractmethod
    def reader(self) -> Callable[[int], tuple[Array, Array]]:
        """Returns a function that reads the next `count` batches.

        It returns x `[1, seeds, count, batch, features]` and y of corresponding shape.
        """


class _Passes(_Source):
    """An image set, in a different order for each seed."""

    def __init__(self, images: Images, batch_size: int, seeds: int, seed: int):
        super().__init__(batch_size, seeds, seed)
        flat = images.x_train.reshape(len(images.x_train), -1).astype(np.float32) / images.scale
        mean, deviation = flat.mean(), flat.std() + 1e-6
        self.x = (flat - mean) / deviation
        test = images.x_test.reshape(len(images.x_test), -1).astype(np.float32) / images.scale
        self.test_x, self.test_y = ((test - mean) / deviation)[None], images.y_test[None]
        self.signs = 2.0 * np.eye(images.classes, dtype=np.float32)[images.y_train] - 1.0
        self.features, self.classes = self.x.shape[1], images.classes

    def _orders(self, number: int) -> Any:
        """Yields batches of image indices endlessly. Each pass is without repeats."""
        rng = np.random.default_rng([self.seed, number])
        while True:
            order = rng.permutation(len(self.x))
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                yield order[start : start + self.batch_size]

    def reader(self) -> Callable[[int], tuple[Array, Array]]:
        streams = [self._orders(number) for number in range(self.seeds)]

        def read(count: int) -> tuple[Array, Array]:
            chosen = np.stack([[next(stream) for _ in range(count)] for stream in streams])
            return tf.constant(self.x[chosen][None]), tf.constant(self.signs[chosen][None])

        return read


class _Episodes(_Source):
    """Tasks, with one episode per seed."""

    def __init__(self, tasks: Tasks, batch_size: int, seeds: int, seed: int, steps: int, split: str):
        super().__init__(batch_size, seeds, seed)
        query = min(_CHUNK, tasks.available(split) - batch_size)
        stream = tasks.dataset(seed, steps=steps, batch=batch_size, query=query, split=split)
        drawn = {name: value.numpy() for name, value in next(iter(stream.batch(seeds))).items()}
        self.x, self.signs = drawn["x"], drawn["y"]
        self.test_x, self.test_y = drawn["query_x"], classes_of(drawn["query_y"]).numpy()
        self.features, self.classes = tasks.features, tasks.outputs

    def reader(self) -> Callable[[int], tuple[Array, Array]]:
        place = 0

        def read(count: int) -> tuple[Array, Array]:
            nonlocal place
            cut = slice(place, place + count)
            place += count
            return tf.constant(self.x[None, :, cut]), tf.constant(self.signs[None, :, cut])

        return read


def _curves(
    learner: Learner, outer: Mapping[str, Array], members: int, data: _Source, at: Sequence[int]
) -> Iterator[list[dict[str, Any]]]:
    """Yields the curves of each member after each score.

    Accuracy and cross-entropy are `[seeds][scores]`, seconds `[scores]`.
    """
    leading = (members, data.seeds)
    state = learner.init(outer, random.seed_of(data.seed), data.features, data.classes, leading)

    @compiled
    def learn(outer: Mapping[str, Array], state: Any, x: Array, y: Array) -> Any:
        count = x.shape[2]

        def body(time: Array, state: Any) -> tuple[Array, Any]:
            state, _ = learner.step(outer, state, tf.gather(x, time, axis=2), tf.gather(y, time, axis=2))
            return time + 1, state

        return tf.while_loop(lambda time, _: time < count, body, (tf.constant(0), state), maximum_iterations=count)[1]

    @compiled
    def score(outer: Mapping[str, Array], state: Any, x: Array, y: Array) -> tuple[Array, Array]:
        prediction = learner.predict(outer, state, x[None])
        y = tf.broadcast_to(y[None], tf.shape(prediction)[:-1])
        correct = tf.cast(tf.equal(classes_of(prediction), y), tf.float32)
        signs = tf.one_hot(y, data.classes, on_value=1.0, off_value=-1.0)
        if data.classes == 1:  # one output tells two classes
            signs = 2.0 * tf.cast(y, tf.float32)[..., None] - 1.0
        losses = updates.losses("cross_entropy", prediction, signs)
        finite = tf.reduce_all(tf.math.is_finite(prediction), axis=-1)
        return tf.reduce_sum(tf.where(finite, correct, 0.0), -1), tf.reduce_sum(losses, -1)

    single = {name: value[:1] for name, value in outer.items()}
    begin = learner.init(single, random.seed_of(data.seed), data.features, data.classes, (1, data.seeds))
    count = min(_BLOCK, at[-1])
    block = data.reader()(count)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        tf.nest.flatten(learn(single, begin, *block))[0].numpy()
        times.append(time.perf_counter() - start)
    one_step = float(np.median(times[1:])) / (count * data.seeds)  # the first compiles
    examples = data.test_x.shape[1]
    curves: list[dict[str, Any]] = [
        {"accuracy": [[] for _ in range(data.seeds)], "loss": [[] for _ in range(data.seeds)], "seconds": []}
        for _ in range(members)
    ]
    read, done = data.reader(), 0
    for target in at:
        while done < target:
            count = min(_BLOCK, target - done)
            x, y = read(count)
            state = learn(outer, state, x, y)
            done += count
        correct, loss = np.zeros(leading), np.zeros(leading)
        for rows in np.array_split(np.arange(examples), -(-examples // _CHUNK)):
            label = tf.constant(data.test_y[:, rows].astype(np.int32))
            found = score(outer, state, tf.constant(data.test_x[:, rows]), label)
            correct, loss = correct + found[0].numpy(), loss + found[1].numpy()
        for member, curve in enumerate(curves):
            curve["seconds"].append(one_step * target)
            for number in range(data.seeds):
                curve["accuracy"][number].append(float(correct[member, number] / examples))
                curve["loss"][number].append(_finite(loss[member, number] / examples))
        yield copy.deepcopy(curves)


def _finite(value: float) -> float | None:
    """The number, or `None` if it is not finite, for JSON."""
    return float(value) if math.isfinite(value) else None


def _summary(curves: Mapping[str, Any], at: Sequence[int]) -> dict[str, Any]:
    """The envelope of all optimizers, and each optimizer's best curve at the last step."""
    means = {name: np.mean(curve["accuracy"], axis=0) for name, curve in curves.items() if name != "genome"}
    envelope, which = [], []
    for index in range(len(at)):
        name = max(means, key=lambda name: means[name][index])
        envelope.append(float(means[name][index]))
        which.append(name)
    best = {}
    for optimizer in dict.fromkeys(curve["optimizer"] for name, curve in curves.items() if name != "genome"):
        own = [name for name, curve in curves.items() if curve.get("optimizer") == optimizer]
        best[optimizer] = max(own, key=lambda name: means[name][-1])
    return {"envelope": {"accuracy": envelope, "which": which}, "best": best}


def format_compare(result: Mapping[str, Any]) -> str:
    """Formats a result as a table of mean accuracy and standard deviation over seeds by step."""
    at = result["steps"]
    width = 18
    lines = [
        f"{result['data']}, hidden {','.join(map(str, result['hidden']))}, batch {result['batch_size']}, "
        f"{result['seeds']} seeds: {result['split']} accuracy by learning step, mean (and deviation over seeds)",
        f"{'':<22}" + "".join(f"{step:>{width}}" for step in at),
    ]
    genomes = [name for name in result["curves"] if name.startswith("genome")]
    if "partial" in result:
        lines[0] += "; interrupted, so far:"
    rows = [(label_of(result, name), name) for name in genomes]
    rows += [(f"best {name}", name) for name in result.get("best", {}).values()]
    for label, name in rows:
        values = np.array(result["curves"][name]["accuracy"])
        cells = [f"{m:.3f} ({s:.3f})" for m, s in zip(values.mean(0), values.std(0, ddof=1), strict=True)]
        lines.append(f"{label:<22}" + "".join(cell.rjust(width) for cell in cells))
    if "envelope" not in result:
        return "\n".join(lines)
    envelope = result["envelope"]
    lines.append(f"{'envelope':<22}" + "".join(f"{value:.3f}".rjust(width) for value in envelope["accuracy"]))
    lines.append(f"{'  reached by':<22}" + "".join(name.rjust(width) for name in envelope["which"]))
    return "\n".join(lines)


def steps_to(result: Mapping[str, Any], target: float) -> dict[str, int | None]:
    """The first scored step with a mean accuracy of at least `target`, for genome and envelope."""
    rows = {
        "genome": np.mean(result["curves"]["genome"]["accuracy"], axis=0),
        "envelope": result["envelope"]["accuracy"],
    }
    return {
        name: next((step for step, value in zip(result["steps"], row, strict=True) if value >= target), None)
        for name, row in rows.items()
    }


def format_several(results: Sequence[Mapping[str, Any]], step: int = 10, target: float = 0.9) -> str:
    """Formats several comparisons as a table: accuracy at `step`, and steps to `target`.

    `-` means that the target was not reached.
    """
    percent = f"{100 * target:g} %"
    lines = [
        f"{'task':<24}{f'genome at {step}':>20}{f'envelope at {step}':>20}{f'genome to {percent}':>20}"
        f"{f'envelope to {percent}':>20}"
    ]
    means = []
    for result in results:
        nearest = max(index for index, at in enumerate(result["steps"]) if at <= step)
        values = np.array(result["curves"]["genome"]["accuracy"])[:, nearest]
        envelope = result["envelope"]["accuracy"][nearest]
        means.append((float(values.mean()), envelope))
        reached = steps_to(result, target)
        ends = ["-" if reached[name] is None else str(reached[name]) for name in ("genome", "envelope")]
        own = f"{values.mean():.3f} ({values.std(ddof=1):.3f})"
        lines.append(f"{result['data']:<24}{own:>20}{envelope:>20.3f}{ends[0]:>20}{ends[1]:>20}")
    genome, envelope = np.mean(means, axis=0)
    lines.append(f"{'mean':<24}{genome:>20.3f}{envelope:>20.3f}")
    return "\n".join(lines)


def label_of(result: Mapping[str, Any], curve: str) -> str:
    """The label of a curve. Genomes are called by `result["name"]` if it exists.

    Example:

    >>> label_of({"name": "mnist-4state"}, "genome"), label_of({}, "genome"), label_of({"name": "mine"}, "genome 3")
    ('mnist-4state', 'genome', 'mine 3')
    """
    return curve.replace("genome", result.get("name", "genome"), 1) if curve.startswith("genome") else curve


def plot_compare(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Figure:
    """Draws accuracy by step and by time.

    The curves are the genomes and, for a comparison, the best rate of each optimizer and the
    envelope.

    Args:
        result: result of `compare` or `evaluate`. Its `name`, if any, replaces "genome" in the
            legend.
        path: output file: .png, .pdf or .svg.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the file has another suffix or cannot be written.

    Example:

    >>> import tempfile
    >>> from keras_blur import Rule, tasks
    >>> genome = Genome.random(Rule(batch_reduction="mean"), seed=0)
    >>> result = evaluate(genome, tasks.functions("xor"), (8,), steps=2, seeds=2, batch_size=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     figure = plot_compare({**result, "name": "mine"}, f"{folder}/curves.png")
    >>> figure.get_suptitle()
    'mine on xor, hidden 8, mean and deviation of 2 seeds'
    """
    check_output("path", path, style.ENDINGS)
    made, axes = style.figure(columns=2)
    at = np.array(result["steps"])
    genomes = [name for name in result["curves"] if name.startswith("genome")]
    shown = genomes + list(result.get("best", {}).values())
    for panel, axis in enumerate(axes[0]):
        for index, name in enumerate(shown):
            curve = result["curves"][name]
            values = np.array(curve["accuracy"])
            x = at if panel == 0 else np.array(curve["seconds"])
            style.line(axis, index, x, values.mean(0), label_of(result, name), values.std(0, ddof=1), (0.0, 1.0))
        if panel == 0:
            if "envelope" in result:
                envelope = result["envelope"]["accuracy"]
                axis.plot(at, envelope, color="0.6", linewidth=4, zorder=0, label="best optimizer at each step")
            style.step_axis(axis, at[-1])
        axis.set_xlabel("learning step" if panel == 0 else "time to learn one network (s)")
        axis.set_ylabel(f"{result['split']} accuracy")
    style.legend(made, axes[0][0])
    alone = f"{label_of(result, genomes[0])} on " if len(genomes) == 1 else ""
    made.suptitle(
        f"{alone}{result['data']}, hidden {','.join(map(str, result['hidden']))}, mean and deviation of "
        f"{result['seeds']} seeds" + (" (interrupted)" if "partial" in result else ""),
        fontsize=10,
    )
    style.save(made, path)
    return made
