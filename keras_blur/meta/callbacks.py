"""Callbacks of meta-training: a growing unroll, validation on tasks that are not trained on, what was learned in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_blur import files, random
from keras_blur.compiling import compiled
from keras_blur.learners.base import MetaLearner
from keras_blur.meta.estimator import InnerLoop, check_count, start
from keras_blur.tasks.base import Tasks


class UnrollCurriculum(keras.callbacks.Callback):
    """Lengthens the unroll in stages, and at each switch copies the best member to all.

    Args:
        stages: pairs of (first epoch, number of unrolled steps), in rising order, the first at epoch 0.

    Raises:
        ValueError: if the stages are not in order.

    Source: "Meta-Learning Bidirectional Update Rules" (2021), section 4.2 and appendix C.4: 10 steps, then 5 more in each
    stage.

    Example:

    >>> UnrollCurriculum([(0, 10), (5, 15)]).steps_at(7)
    15
    """

    def __init__(self, stages: Sequence[tuple[int, int]]):
        super().__init__()
        self.stages = [(int(epoch), int(steps)) for epoch, steps in stages]
        starts = [epoch for epoch, _ in self.stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"`stages` must be (epoch, steps) pairs in rising order from epoch 0. Received: {stages!r}")
        if any(steps < 1 for _, steps in self.stages):
            raise ValueError(f"`stages` must have at least one step each. Received: {stages!r}")

    def steps_at(self, epoch: int) -> int:
        """Unrolled steps in an epoch."""
        return next(steps for start, steps in reversed(self.stages) if start <= epoch)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        fresh = int(self.model.epoch_step.numpy()) == 0  # not one that a resumed run goes on with
        if epoch and fresh and any(start == epoch for start, _ in self.stages):
            self.model.synchronize()
        if self.model.estimator.steps != self.steps_at(epoch):
            self.model.unroll_for(self.steps_at(epoch))


class MetaValidate(keras.callbacks.Callback):
    """Scores the trainer's best member on episodes of other examples, or of other tasks and networks, after each epoch.

    It adds `val_loss` and `val_accuracy` (of values, `val_r2`) to the epoch's logs, so that callbacks after it in the list
    (`CSVLogger`, `EarlyStopping`, `TensorBoard`) and the history see them. The episodes are the same each time.

    Args:
        tasks: a task distribution, or several, whose scores are averaged.
        learner: one that shares the outer parameters of the trainer's; `None` takes the trainer's first.
        steps: learning steps of an episode; `None` takes those of the trainer's estimator at the start.
        episodes: episodes of each task distribution.
        split: the examples that are used: `"validation"` to choose by, `"test"` only to report.
        path: file for what was learned with the best score so far, or `None`.
        seed: of the episodes and initial networks.

    Raises:
        ValueError: if a number is not positive.

    Example:

    >>> from keras_blur import tasks
    >>> MetaValidate(tasks.images("digits"), steps=20, episodes=4).best is None
    True
    """

    def __init__(
        self,
        tasks: Tasks | Sequence[Tasks],
        learner: MetaLearner | None = None,
        *,
        steps: int | None = None,
        episodes: int = 16,
        split: str = "validation",
        path: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        check_count("episodes", episodes)
        if steps is not None:
            check_count("steps", steps)
        self.tasks = [tasks] if isinstance(tasks, Tasks) else list(tasks)
        self.learner, self.steps, self.episodes = learner, steps, episodes
        self.split, self.path, self.seed = split, path, seed
        self.best: float | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        trainer = self.model
        learner = self.learner or trainer.learner
        if not trainer.learner.shares_outer(learner):
            raise ValueError(
                "`learner` of MetaValidate must share the outer parameters of the trainer's, as one of its rule does: it "
                f"gets them. Received: {learner!r}"
            )
        steps = self.steps or trainer.estimator.steps
        self._data, self._scores = [], []
        for tasks in self.tasks:
            inner = InnerLoop(steps, loss=trainer.estimator.loss, kind=tasks.kind)
            stream = tasks.dataset(
                self.seed, steps=steps, batch=trainer.batch_size, query=trainer.query_size, split=self.split
            )
            self._data.append(next(iter(stream.batch(self.episodes))))
            self._scores.append(compiled(self._scorer(learner, inner), jit_compile=trainer.jit_step))

        if self.path is not None and files.exists(self.path) and int(trainer.meta_step.numpy()):
            before = trainer.learner.parameters(self.path)  # of the run that this one goes on with
            self.best = self._score({name: own[0] for name, own in before.items()})[1]

    def _scorer(self, learner: MetaLearner, inner: InnerLoop) -> Callable[..., Any]:
        def score(outer: Any, episodes: Any) -> tuple[Any, Any]:
            state = start(learner, outer, episodes, random.fold_in(random.seed_of(self.seed), 1))
            loss, quality, _ = inner.objective(learner, outer, episodes, state)
            return tf.reduce_mean(loss), tf.reduce_mean(quality)

        return score

    def _score(self, parameters: Mapping[str, np.ndarray]) -> tuple[float, float]:
        outer = {name: tf.constant(own[None], tf.float32) for name, own in parameters.items()}
        found = [score(outer, data) for score, data in zip(self._scores, self._data, strict=True)]
        loss, quality = (float(np.mean([np.array(pair[place]) for pair in found])) for place in (0, 1))
        return loss, quality

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        loss, quality = self._score(self.model.parameters())
        if logs is not None:
            logs["val_loss"], logs[f"val_{self.model.quality}"] = loss, quality
        if np.isfinite(quality) and (self.best is None or quality > self.best):
            self.best = quality
            if self.path is not None and self.model.runner.writes_files:
                save(self.model, self.path)


def save(trainer: Any, path: str | os.PathLike[str]) -> None:
    """Writes what was learned, whole or not at all."""
    with files.replacing(path) as temporary:
        trainer.learned.save(temporary)


class SaveLearned(keras.callbacks.Callback):
    """Writes what the best member learned after each epoch and at the end.

    Args:
        path: the file: of genomes `.json`, of other learners `.keras`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__()
        self.path = path

    def on_train_begin(self, logs: Any = None) -> None:
        if not hasattr(self.model.learned, "save"):
            raise ValueError(f"SaveLearned needs something that has `save(path)`. What is learned: {self.model.learned!r}")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.model.runner.writes_files:
            save(self.model, self.path)

    def on_train_end(self, logs: Any = None) -> None:  # averages of `use_ema` are in place now
        if self.model.runner.writes_files:
            save(self.model, self.path)


class Checkpoint(keras.callbacks.Callback):
    """Writes everything that a resumed run needs after each epoch: `MetaTrainer.fit` adds it.

    Args:
        path: a `.weights.h5` file.
    """

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.write()

    def write(self) -> None:
        """Writes it now."""
        if self.model.runner.writes_files:
            with files.replacing(self.path) as temporary:
                self.model.save_weights(temporary, overwrite=True)
