"""Learning curves of a genome, or of each genome of a population, in networks of dense layers.

Members and seeds run in parallel on leading axes of one compiled program. Time is measured
separately with one member and all seeds: the median over several compiled blocks, divided by the
number of seeds.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_blur import backend
from keras_blur.backend import compiled
from keras_blur.core import random
from keras_blur.core.genome import Genome
from keras_blur.learners import Blur, updates
from keras_blur.learners.blur import check_genome
from keras_blur.learners.networks import Network
from keras_blur.meta.estimator import at as batch_of
from keras_blur.meta.estimator import classes_of
from keras_blur.report.progress import Progress, Watch
from keras_blur.report.sources import Source, source_of
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.datasets import Images

Array = Any

_CHUNK = 2000  # maximum number of test examples predicted at once
_BLOCK = 25  # maximum number of steps in one compiled call


def evaluate(
    genome: Genome,
    data: Images | Tasks,
    network: Sequence[int] | Network,
    *,
    steps: int = 1000,
    seeds: int = 5,
    batch_size: int = 128,
    seed: int = 0,
    split: str = "test",
    score_at: Sequence[int] | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Scores a genome while it learns.

    A population of genomes (one axis) learns in parallel, on the same batches and networks.
    `curves` then contains `"genome 0"`, `"genome 1"`, ... instead of `"genome"`.

    Args:
        genome: a genome, or a population on one axis.
        data: an image set of `keras_blur.tasks.datasets.load_images` or a task distribution of
            classes, as in `compare`. If a split has few examples, all steps use one batch and the
            rest is scored.
        network: units of the hidden layers, or a function from the shape of an example and the
            number of outputs to Keras layers, as in `learners.Blur`.
        steps: number of learning steps.
        seeds: number of initial networks and data orders, or of episodes.
        batch_size: batch size.
        seed: random seed of networks and batches.
        split: split of tasks: `"test"` for reporting, `"validation"` for model selection.
        score_at: steps at which the genome is scored, besides 0 and `steps`; `None` takes 1, 2, 5,
            10, ..., 1000.
        watch: a function that is called with a `report.progress.Progress` at the start and after
            each score. An exception in it ends the evaluation.

    Returns:
        JSON values: `steps`, and `curves` with accuracy and cross-entropy by seed and step and
        seconds by step. A rule that normalises over the batch is scored with the statistics of up
        to 2,000 test examples at a time. A non-finite score counts as the worst: accuracy 0,
        cross-entropy `None`.

    Raises:
        ValueError: if the genome does not fit the network, or a number does not fit the data.

    Example:

    >>> from keras_blur import Rule, tasks
    >>> genome = Genome.random(Rule(batch_reduction="mean"), seed=0)
    >>> result = evaluate(genome, tasks.functions("xor"), (8,), steps=5, seeds=2, batch_size=16)
    >>> result["steps"]
    [0, 1, 2, 5]
    """
    check_genome(genome, None if callable(network) else network, axes=1)
    source, at = source_of(data, steps=steps, seeds=seeds, batch_size=batch_size, seed=seed, split=split, score_at=score_at)
    learner = Blur(network, genome.rule)
    if isinstance(data, Tasks):
        learner.check(data.kind, data.outputs)
    learner = learner.on(source.shape, source.classes)
    outer = {
        name: ops.convert_to_tensor(array[:, None]) for name, array in genome.by_member().items()
    }  # [members, tasks, ...]
    members = outer["nu"].shape[0]
    names = [f"genome {number}" for number in range(members)] if genome.population else ["genome"]
    header = {
        "data": data.name, "network": _name(network), "batch_size": batch_size, "seeds": seeds,
        "seed": seed, "split": split,
    }  # fmt: skip

    def tell(done: int, result: dict[str, Any] | None) -> None:
        if watch is not None:
            partial = None if result is None else {**result, "partial": True}
            watch(Progress(data.name, "genome", 1, 1, done, steps, "step", partial))

    tell(0, None)
    result: dict[str, Any] = {}
    for scores, found in enumerate(_curves(learner, outer, members, source, at), 1):
        result = {**header, "steps": list(at[:scores]), "curves": dict(zip(names, found, strict=True))}
        tell(at[scores - 1], result)
    return result


def _name(network: Sequence[int] | Network) -> str:
    if callable(network):
        return getattr(network, "__name__", type(network).__name__)
    return f"hidden {','.join(map(str, network))}"


def _curves(
    learner: Blur, outer: Mapping[str, Array], members: int, data: Source, at: Sequence[int]
) -> Iterator[list[dict[str, Any]]]:
    """Yields the curves of each member after each score.

    Accuracy and cross-entropy are `[seeds][scores]`, seconds `[scores]`.
    """
    leading = (members, data.seeds)
    state = learner.init(outer, random.seed_of(data.seed), data.features, data.classes, leading)

    @compiled
    def learn(outer: Mapping[str, Array], state: Any, x: Array, y: Array) -> Any:
        def body(time: Array, state: Any) -> tuple[Any]:
            return (learner.step(outer, state, batch_of(x, time, axis=2), batch_of(y, time, axis=2))[0],)

        return backend.loop(x.shape[2], body, state)[0]

    @compiled
    def score(outer: Mapping[str, Array], state: Any, x: Array, y: Array) -> tuple[Array, Array]:
        prediction = learner.predict(outer, state, x[None])
        y = ops.broadcast_to(y[None], prediction.shape[:-1])
        # One output tells two classes.
        indicators = ops.cast(y, "float32")[..., None] if data.classes == 1 else ops.one_hot(y, data.classes)
        losses = updates.losses("cross_entropy", prediction, 2.0 * indicators - 1.0)
        correct = ops.equal(classes_of(prediction), y) & ops.all(ops.isfinite(prediction), axis=-1)
        return ops.sum(ops.cast(correct, "float32"), -1), ops.sum(losses, -1)

    single = {name: value[:1] for name, value in outer.items()}
    begin = learner.init(single, random.seed_of(data.seed), data.features, data.classes, (1, data.seeds))
    count = min(_BLOCK, at[-1])
    block = _reader(data)(count)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        ops.convert_to_numpy(backend.leaves(learn(single, begin, *block))[0])
        times.append(time.perf_counter() - start)
    one_step = float(np.median(times[1:])) / (count * data.seeds)  # the first compiles
    tests = [data.test(number) for number in range(data.seeds)]
    shared = all(one[0] is tests[0][0] for one in tests)  # an image set's
    test_x, test_y = (np.stack(part) for part in zip(*(tests[:1] if shared else tests), strict=True))
    test_x = test_x.reshape(*test_y.shape, data.features)
    examples = test_y.shape[1]
    curves: list[dict[str, Any]] = [
        {"accuracy": [[] for _ in range(data.seeds)], "loss": [[] for _ in range(data.seeds)], "seconds": []}
        for _ in range(members)
    ]
    read, done = _reader(data), 0
    for target in at:
        while done < target:
            count = min(_BLOCK, target - done)
            x, y = read(count)
            state = learn(outer, state, x, y)
            done += count
        correct, loss = np.zeros(leading), np.zeros(leading)
        for rows in np.array_split(np.arange(examples), -(-examples // _CHUNK)):
            found = score(outer, state, *(ops.convert_to_tensor(part[:, rows]) for part in (test_x, test_y)))
            correct, loss = (total + ops.convert_to_numpy(own) for total, own in zip((correct, loss), found, strict=True))
        for member, curve in enumerate(curves):
            curve["seconds"].append(one_step * target)
            for number in range(data.seeds):
                curve["accuracy"][number].append(float(correct[member, number] / examples))
                curve["loss"][number].append(_finite(loss[member, number] / examples))
        yield copy.deepcopy(curves)


def _finite(value: float) -> float | None:
    """The number, or `None` if it is not finite, for JSON."""
    return float(value) if math.isfinite(value) else None


def _reader(data: Source) -> Callable[[int], tuple[Array, Array]]:
    """A function that reads the next batches: x `[1, seeds, count, batch, features]`, y as
    +1/-1."""
    streams = [data.batches(number) for number in range(data.seeds)]

    def read(count: int) -> tuple[Array, Array]:
        drawn = [[next(stream) for _ in range(count)] for stream in streams]
        x = np.stack([np.stack([one.reshape(len(one), -1) for one, _ in batches]) for batches in drawn])
        labels = np.stack([np.stack([y for _, y in batches]) for batches in drawn])
        signs = 2.0 * (labels[..., None] == (1 if data.classes == 1 else np.arange(data.classes))) - 1.0
        return ops.convert_to_tensor(x[None]), ops.convert_to_tensor(signs[None].astype(np.float32))

    return read
