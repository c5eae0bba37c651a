"""How what was meta-learned does on many episodes, and how much of it reads the support.

Source of the gap: "Meta-Learning Requires Meta-Augmentation" (Rajendran, Irpan and Jang, NeurIPS 2020): a learner that
memorised its tasks predicts the query as well from another episode's support as from its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_blur import random
from keras_blur.compiling import compiled
from keras_blur.learners.base import Array, MetaLearner
from keras_blur.meta.estimator import InnerLoop, start
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
) -> dict[str, Any]:
    """Loss and quality on the query of episodes, after learning from the support.

    Args:
        learner: how it learns.
        learned: what meta-training gave (`MetaTrainer.learned`), or its file.
        tasks: the tasks.
        steps, batch_size: support batches of an episode, and examples in each.
        query_size: examples of the query.
        episodes: how many.
        split: `"test"` to report, `"validation"` to choose by, `"train"` for the tasks of meta-training.
        loss: as of `meta.Unroll`.
        seed: of the episodes and of initial networks.

    Returns:
        `loss` and `accuracy` (of values `r2`), `[episodes]`; where a loss is not finite it is infinite, and the accuracy 0
        (r2 minus infinity). `mean_loss` and the quality's mean as `mean_accuracy` or `mean_r2`.

    Raises:
        ValueError: if the tasks are not the learner's, or too small.
    """
    return _scored(learner, learned, tasks, _own, steps, batch_size, query_size, episodes, split, loss, seed)


def memorization_gap(
    learner: MetaLearner,
    learned: Any,
    tasks: Tasks,
    *,
    steps: int = 1,
    batch_size: int = 5,
    query_size: int = 10,
    episodes: int = 200,
    split: str = "train",
    loss: str = "auto",
    seed: int = 0,
) -> dict[str, float]:
    """What the support is worth: the query's loss without it, less the loss with it.

    Args:
        learner, learned, tasks, steps, batch_size, query_size, episodes, split, loss, seed: as of `score_episodes`.

    Returns:
        Mean losses: `own` with the episode's support, `other` with that of another episode, `shuffled` with its labels in
        another order, `zeroed` with zeros for it; and `gap`, `other` less `own`. A learner that memorised has a gap near 0.

    Example:

    >>> from keras_blur import learners, tasks
    >>> learner = learners.NeuralProcess(hidden=(8,), representation=4)
    >>> start = {name: own[0] for name, own in learner.draw(0, 1, 10, 2).items()}
    >>> found = memorization_gap(learner, learner.learned(start), tasks.pose(), episodes=4)
    >>> sorted(found)
    ['gap', 'other', 'own', 'shuffled', 'zeroed']
    """
    supports = {"own": _own, "other": _other, "shuffled": _shuffled, "zeroed": _zeroed}
    found = {
        name: _scored(learner, learned, tasks, change, steps, batch_size, query_size, episodes, split, loss, seed)[
            "mean_loss"
        ]
        for name, change in supports.items()
    }
    return {**found, "gap": found["other"] - found["own"]}


def _own(episodes: Mapping[str, Array]) -> dict[str, Array]:
    return dict(episodes)


def _other(episodes: Mapping[str, Array]) -> dict[str, Array]:
    return {**episodes, "x": tf.roll(episodes["x"], 1, axis=0), "y": tf.roll(episodes["y"], 1, axis=0)}


def _shuffled(episodes: Mapping[str, Array]) -> dict[str, Array]:
    y = episodes["y"]
    flat = tf.reshape(y, (y.shape[0], y.shape[1] * y.shape[2], y.shape[3]))
    order = random.permutation(random.seed_of(0), int(flat.shape[1]))
    return {**episodes, "y": tf.reshape(tf.gather(flat, order, axis=1), y.shape)}


def _zeroed(episodes: Mapping[str, Array]) -> dict[str, Array]:
    return {**episodes, "x": tf.zeros_like(episodes["x"]), "y": tf.zeros_like(episodes["y"])}


def _scored(
    learner: MetaLearner, learned: Any, tasks: Tasks, change: Any, steps: int, batch_size: int, query_size: int,
    episodes: int, split: str, loss: str, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Scores with supports that are changed."""
    learner.check(tasks.kind, tasks.outputs)
    if isinstance(episodes, bool) or not isinstance(episodes, int) or episodes < 2:
        raise ValueError(f"`episodes` must be an integer from 2. Received: episodes={episodes!r}")
    outer = {name: tf.constant(own[:1]) for name, own in learner.parameters(learned).items()}
    inner = InnerLoop(steps, loss=loss, kind=tasks.kind)

    @compiled
    def score(outer: Mapping[str, Array], drawn: Mapping[str, Array], number: Array) -> tuple[Array, Array]:
        seeds = random.fold_in(random.seed_of(seed), 1, number)
        losses, quality, _ = inner.objective(learner, outer, drawn, start(learner, outer, drawn, seeds))
        return losses[0], quality[0]

    # A last block is filled up, so that there is one shape.
    block = min(_BLOCK, episodes)
    stream = tasks.dataset(seed, steps=steps, batch=batch_size, query=query_size, split=split).batch(block)
    parts = [score(outer, change(drawn), tf.constant(n)) for n, drawn in enumerate(stream.take(-(-episodes // block)))]
    losses, quality = (np.concatenate([part[place].numpy() for part in parts])[:episodes] for place in (0, 1))
    sound = np.isfinite(losses)
    name, worst = ("accuracy", 0.0) if tasks.kind == "classes" else ("r2", -np.inf)
    losses, quality = np.where(sound, losses, np.inf), np.where(sound, quality, worst)
    return {"loss": losses, name: quality, "mean_loss": float(losses.mean()), f"mean_{name}": float(quality.mean())}
