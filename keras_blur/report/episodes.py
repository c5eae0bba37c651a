"""Scores of meta-learned learners on many episodes, and a measure of task memorisation.

Memorisation as in "Meta-Learning Requires Meta-Augmentation" (Rajendran, Irpan and Jang, NeurIPS
2020): a learner that memorised its tasks predicts the query from its inputs and ignores the
support. The measure is ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
from keras import ops

from keras_blur import backend
from keras_blur.backend import compiled
from keras_blur.checks.tasks import check_tasks
from keras_blur.core import random
from keras_blur.learners.base import Array, MetaLearner
from keras_blur.meta.estimator import InnerLoop, over_tasks, start
from keras_blur.meta.estimator import at as batch_of
from keras_blur.tasks.augment import Augmentation, LabelPermutation, LabelRotation
from keras_blur.tasks.base import Tasks

_BLOCK = 50  # episodes at once


def score_episodes(
    learner: MetaLearner,
    learned: Any,
    tasks: Tasks,
    *,
    steps: int = 1,
    batch_size: int = 5,
    query_size: int = 10,
    episodes: int = 200,
    split: str = "test",
    loss: str = "auto",
    seed: int = 0,
    jit_compile: bool = True,
) -> dict[str, Any]:
    """Loss and quality of queries after learning from the support.

    Args:
        learner: the learner.
        learned: result of meta-training (`MetaTrainer.learned`) or its file.
        tasks: the task distribution.
        steps, batch_size: number of support batches, and examples per batch.
        query_size: number of query examples.
        episodes: number of episodes.
        split: `"test"` for reporting, `"validation"` for model selection, `"train"` for the
            meta-training tasks.
        loss: as in `meta.Unroll`.
        seed: random seed of episodes and initial networks.
        jit_compile: whether to use XLA. On a CPU, convolutions are many times faster without it.

    Returns:
        `loss` and `accuracy` (`r2` for values), each `[episodes]`, with means `mean_loss` and
        `mean_accuracy` or `mean_r2`. A non-finite loss counts as infinite, with accuracy 0 (or an
        r2 of minus infinity).

    Raises:
        ValueError: if the tasks do not fit the learner or are too small.

    Example:

    >>> from keras_blur import learners, tasks
    >>> learner = learners.Prototypes((4,))
    >>> start = learner.learned({name: own[0] for name, own in learner.draw(0, 1, 2, 2).items()})
    >>> found = score_episodes(learner, start, tasks.functions("xor"), episodes=3, jit_compile=False)
    >>> sorted(found), found["loss"].shape
    (['accuracy', 'loss', 'mean_accuracy', 'mean_loss'], (3,))
    """
    return _scored(learner, learned, tasks, None, steps, batch_size, query_size, episodes, split, loss, seed, jit_compile)


def adaptation_curve(
    learner: MetaLearner,
    learned: Any,
    tasks: Tasks,
    *,
    at: Sequence[int],
    batch_size: int = 16,
    query_size: int = 100,
    episodes: int = 100,
    split: str = "test",
    loss: str = "auto",
    seed: int = 0,
    jit_compile: bool = True,
) -> dict[str, Any]:
    """Loss and quality of queries during learning.

    Args:
        learner, learned, tasks, batch_size, query_size, episodes, split, loss, seed, jit_compile:
            as in `score_episodes`.
        at: numbers of learning steps after which the query is scored, ascending.

    Returns:
        `steps`; `loss` and `accuracy` or `r2`, each `[len(at), episodes]`, treated as in
        `score_episodes`; their means `[len(at)]`; and `area`, the mean loss averaged over steps
        from the first to the last of `at` by the trapezoidal rule.

    Raises:
        ValueError: if `at` is not ascending, and as in `score_episodes`.

    Example:

    >>> from keras_blur import learners, tasks
    >>> learner = learners.NeuralProcess(network=(4,), representation=2)
    >>> start = learner.learned({name: own[0] for name, own in learner.draw(0, 1, 1, 1).items()})
    >>> curve = adaptation_curve(learner, start, tasks.sines(), at=[0, 2], batch_size=4, query_size=8,
    ...                          episodes=3, jit_compile=False)
    >>> curve["steps"], curve["loss"].shape
    ([0, 2], (2, 3))
    """
    at = [int(step) for step in at]
    if len(at) < 2 or at[0] < 0 or any(a >= b for a, b in pairwise(at)):
        raise ValueError(f"`at` must be two or more ascending numbers of steps. Received: at={at!r}")
    outer = over_tasks(_outer(learner, learned, tasks, episodes))
    check_tasks(tasks, batch_size, query_size, split)
    learner = learner.on(tasks.shape, tasks.outputs)
    stream = tasks.dataset(seed, steps=at[-1], batch=batch_size, query=query_size, split=split)
    drawn = next(iter(stream.batch(episodes)))
    inner = InnerLoop(at[-1], loss=loss, kind=tasks.kind)

    def learn(outer: Mapping[str, Array], state: Any, drawn: Mapping[str, Array], start: Array, stop: Array) -> Any:
        def body(time: Array, state: Any) -> tuple[Array, Any]:
            x, y = (batch_of(drawn[name], time, axis=1)[None] for name in ("x", "y"))
            return time + 1, learner.step(outer, state, x, y)[0]

        return ops.while_loop(lambda time, _: time < stop, body, (start, state))[1]

    def score(outer: Mapping[str, Array], state: Any, drawn: Mapping[str, Array]) -> tuple[Array, Array]:
        return inner.scores(learner.predict(outer, state, drawn["query_x"][None]), drawn["query_y"][None])

    learn, score = (compiled(one, jit_compile=jit_compile) for one in (learn, score))
    seeds = random.fold_in(random.seed_of(seed), 1)
    state = learner.init(outer, seeds, tasks.features, tasks.outputs, (1, episodes))
    losses, quality, done = [], [], 0
    for step in at:
        state = learn(outer, state, drawn, ops.array(done, "int32"), ops.array(step, "int32"))
        done = step
        found = score(outer, state, drawn)
        losses.append(ops.convert_to_numpy(found[0][0]))
        quality.append(ops.convert_to_numpy(found[1][0]))
    made = _summary(np.stack(losses), np.stack(quality), tasks.kind)
    means = np.asarray(made["mean_loss"])
    area = np.sum(0.5 * (means[1:] + means[:-1]) * np.diff(at)) / (at[-1] - at[0])
    return {"steps": at, **made, "area": float(area)}


def memorization_gap(
    learner: MetaLearner,
    learned: Any,
    tasks: Tasks,
    augmentation: Augmentation | None = None,
    *,
    steps: int = 1,
    batch_size: int = 5,
    query_size: int = 10,
    episodes: int = 200,
    split: str = "train",
    loss: str = "auto",
    seed: int = 0,
    jit_compile: bool = True,
) -> dict[str, float]:
    """Measures how much predictions depend on memorised tasks.

    A key changes all labels of an episode, in support and query. Inputs are unchanged. For a
    learner that relies on the support, this is another task of equal difficulty. For a learner that
    recognises the task by its inputs, the support now contradicts its memory.

    Args:
        learner, learned, tasks, steps, batch_size, query_size: as in `score_episodes`.
        episodes, split, loss, seed, jit_compile: as in `score_episodes`.
        augmentation: the augmentation that defines keys. `None` uses `LabelPermutation` for classes
            and `LabelRotation` for two values.

    Returns:
        Mean query losses: `own` with original labels, `followed` with keyed support and query,
        `kept` with keyed support and original query labels. `gap` is `followed` minus `own`. It is
        0 for a learner that only uses the support, and for one that learned nothing (with a large
        `own`). A learner that only uses its memory has `kept` equal to `own`. Tasks that cannot be
        memorised (`split="test"`) show what the key costs for other reasons.

    Raises:
        ValueError: if `augmentation` does not fit the tasks or has no key, and as in
            `score_episodes`.

    Example:

    >>> from keras_blur import learners, tasks
    >>> learner = learners.NeuralProcess((8,), representation=4)
    >>> start = {name: own[0] for name, own in learner.draw(0, 1, 10, 2).items()}
    >>> found = memorization_gap(learner, learner.learned(start), tasks.pose(), episodes=4, jit_compile=False)
    >>> sorted(found)
    ['followed', 'gap', 'kept', 'own']
    """
    if augmentation is None:
        if tasks.kind != "classes" and (tasks.kind, tasks.outputs) != ("values", 2):
            raise ValueError(
                "`augmentation` must be given for tasks that are neither classes nor two values. Received: "
                f"augmentation=None, tasks={tasks.name}"
            )
        augmentation = LabelPermutation() if tasks.kind == "classes" else LabelRotation()
    augmentation.prepared(tasks)
    if not backend.leaves(augmentation.draw(random.seed_of(seed), 1, tasks)):
        raise ValueError(f"`augmentation` must change labels by a key. Received: augmentation={augmentation!r}")
    of = augmentation

    def changed(names: Sequence[str], number: int, episodes: Mapping[str, Array]) -> dict[str, Array]:
        count = episodes["y"].shape[0]
        keys = of.draw(random.fold_in(random.seed_of(seed), 2, number), count, tasks)
        found = dict(episodes)
        for name in names:
            labels = found[name]
            each = math.prod(labels.shape[1:-1])
            own = backend.tree_map(lambda key, each=each: ops.repeat(key, each, axis=0), keys)
            flat = ops.reshape(labels, (count * each, labels.shape[-1]))
            found[name] = ops.reshape(of.apply(own, flat), labels.shape)
        return found

    supports = {"own": (), "kept": ("y",), "followed": ("y", "query_y")}
    how = (steps, batch_size, query_size, episodes, split, loss, seed, jit_compile)
    found = {
        name: _scored(learner, learned, tasks, functools.partial(changed, names), *how)["mean_loss"]
        for name, names in supports.items()
    }
    return {**found, "gap": found["followed"] - found["own"]}


def _scored(
    learner: MetaLearner, learned: Any, tasks: Tasks, change: Any, steps: int, batch_size: int, query_size: int,
    episodes: int, split: str, loss: str, seed: int, jit_compile: bool,
) -> dict[str, Any]:  # fmt: skip
    """Scores episodes in blocks. `change` may modify each block."""
    outer = _outer(learner, learned, tasks, episodes)
    check_tasks(tasks, batch_size, query_size, split)
    learner = learner.on(tasks.shape, tasks.outputs)
    inner = InnerLoop(steps, loss=loss, kind=tasks.kind)

    def score(outer: Mapping[str, Array], drawn: Mapping[str, Array], number: Array) -> tuple[Array, Array]:
        seeds = random.fold_in(random.seed_of(seed), 1, number)
        losses, quality, _ = inner.objective(learner, outer, drawn, start(learner, outer, drawn, seeds))
        return losses[0], quality[0]

    score = compiled(score, jit_compile=jit_compile)
    # The last block is padded, so that all have one shape.
    block = min(_BLOCK, episodes)
    stream = tasks.dataset(seed, steps=steps, batch=batch_size, query=query_size, split=split).batch(block)
    parts = []
    for number, drawn in enumerate(islice(stream, -(-episodes // block))):
        drawn = change(number, drawn) if change else drawn
        parts.append(score(outer, drawn, ops.array(number, "int32")))
    losses, quality = (
        np.concatenate([ops.convert_to_numpy(one) for one in column])[:episodes] for column in zip(*parts, strict=True)
    )
    return _summary(losses, quality, tasks.kind)


def _outer(learner: MetaLearner, learned: Any, tasks: Tasks, episodes: int) -> dict[str, Array]:
    """Checks the arguments and returns the learned outer parameters `[1, ...]`."""
    if not isinstance(tasks, Tasks):
        raise ValueError(f"`tasks` must be a task distribution. Received: tasks={tasks!r}")
    learner.check(tasks.kind, tasks.outputs)
    learner = learner.on(tasks.shape, tasks.outputs)
    if isinstance(episodes, bool) or not isinstance(episodes, int) or episodes < 2:
        raise ValueError(f"`episodes` must be an integer of at least 2. Received: episodes={episodes!r}")
    outer = learner.parameters(learned)
    members = {len(own) for own in outer.values()}
    if members != {1}:
        raise ValueError(f"`learned` must be a single result of meta-training. Received: {max(members)} members")
    return {name: ops.convert_to_tensor(own) for name, own in outer.items()}


def _summary(losses: np.ndarray, quality: np.ndarray, kind: str) -> dict[str, Any]:
    """Scores `[..., episodes]` and their means. Non-finite scores count as the worst."""
    sound = np.isfinite(losses)
    name, worst = ("r2", -np.inf) if kind == "values" else ("accuracy", 0.0)
    losses, quality = np.where(sound, losses, np.inf), np.where(sound, quality, worst)
    means = {"mean_loss": losses.mean(-1).tolist(), f"mean_{name}": quality.mean(-1).tolist()}
    return {"loss": losses, name: quality, **means}
