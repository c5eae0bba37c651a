"""Callbacks of meta-training: unroll curriculum, validation on other tasks, saving."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import arguments, files
from keras_blur.backend import compiled, numbers_of
from keras_blur.core import random
from keras_blur.files import check_output
from keras_blur.learners.base import MetaLearner
from keras_blur.meta.estimator import InnerLoop, Truncated, start
from keras_blur.tasks.base import Tasks, check_split


class UnrollCurriculum(keras.callbacks.Callback):
    """Lengthens the unroll in stages and copies the best member to all members at each switch.

    After a switch, members learn apart on different initial networks (`MetaTrainer.synchronize`).

    Source: "Meta-Learning Bidirectional Update Rules" (2021), section 4.2 and appendix C.4: 10
    steps, then 5 more in each stage.

    Args:
        stages: pairs of (first epoch, number of unrolled steps) in ascending order, starting at
            epoch 0.

    Raises:
        ValueError: if the stages are not in order; at the start of training, if the number of
            steps changes and the estimator uses truncation windows.

    Example:

    >>> UnrollCurriculum([(0, 10), (5, 15)]).steps_at(7)
    15
    """

    def __init__(self, stages: Sequence[tuple[int, int]]):
        super().__init__()
        pairs = stages if isinstance(stages, (tuple, list)) else ()
        if not pairs or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise ValueError(f"`stages` must be a list of (epoch, steps) pairs. {arguments.received('stages', stages)}")
        for epoch, steps in pairs:
            arguments.integer("stages", epoch, 0)
            arguments.count("stages", steps)
        self.stages = [(int(epoch), int(steps)) for epoch, steps in pairs]
        starts = [epoch for epoch, _ in self.stages]
        if starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(
                f"`stages` must start at epoch 0 and be in ascending order. {arguments.received('stages', stages)}"
            )

    def steps_at(self, epoch: int) -> int:
        """The number of unrolled steps in an epoch.

        Args:
            epoch: number of the epoch, from 0.
        """
        return next(steps for start, steps in reversed(self.stages) if start <= epoch)

    def get_config(self) -> dict[str, Any]:
        """The stages, which are stored in checkpoints."""
        return {"stages": [list(stage) for stage in self.stages]}

    def on_train_begin(self, logs: Any = None) -> None:
        if any(steps != self.model.estimator.steps for _, steps in self.stages):
            self.model.check_unroll()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        fresh = int(numbers_of(self.model.epoch_step)) == 0  # not one that a resumed run continues
        if epoch and fresh and any(start == epoch for start, _ in self.stages):
            self.model.synchronize()
        if self.model.estimator.steps != self.steps_at(epoch):
            self.model.unroll_for(self.steps_at(epoch))


class MetaValidate(keras.callbacks.Callback):
    """Scores the best member on validation episodes after each epoch.

    The callback adds `val_loss` and `val_accuracy` (`val_r2` for values) to the logs of the epoch,
    so later callbacks in the list (`CSVLogger`, `EarlyStopping`, `TensorBoard`) and the history see
    them. The episodes are the same in every epoch.

    Args:
        tasks: one or more task distributions. Scores are averaged.
        learner: a learner with the same outer parameters as the trainer's; `None` uses the first
            learner of the trainer.
        steps: learning steps of an episode; `None` uses the initial value of the trainer's
            estimator, under truncation windows all steps of an episode.
        episodes: episodes per task distribution.
        split: `"validation"` for model selection, `"test"` for reporting only.
        path: file for the best parameters so far, or `None`. An existing file is replaced. A
            resumed run reads it first and only replaces it with better parameters.
        seed: seed of the episodes and initial networks.

    Raises:
        ValueError: if an argument is out of range; at the start of training, if the learner has
            other outer parameters, a batch and a query do not fit into the split, `path` cannot be
            written, or a resumed run finds parameters of another learner there.

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
        arguments.count("episodes", episodes)
        if steps is not None:
            arguments.count("steps", steps)
        self.tasks = [tasks] if isinstance(tasks, Tasks) else tasks
        if not isinstance(self.tasks, (tuple, list)) or not all(isinstance(one, Tasks) for one in self.tasks):
            raise ValueError(f"`tasks` must be a task distribution or a list of them. {arguments.received('tasks', tasks)}")
        check_split(split)
        arguments.seed(seed)
        self.learner, self.steps, self.episodes = learner, steps, episodes
        self.split, self.path, self.seed = split, path, seed
        self.best: float | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        trainer = self.model
        if self.path is not None:
            _check_learned_path(trainer.learned, self.path)
        learner = self.learner or trainer.learner
        if not trainer.learner.shares_outer(learner):
            raise ValueError(
                f"`learner` of MetaValidate must share the outer parameters of the trainer's learner. Received: {learner!r}"
            )
        of = trainer.given_estimator
        steps = self.steps or (of.episode_steps if isinstance(of, Truncated) else of.steps)
        self._data, self._scores = [], []
        for tasks in self.tasks:
            inner = InnerLoop(steps, loss=of.loss, kind=tasks.kind)
            stream = tasks.dataset(
                self.seed, steps=steps, batch=trainer.batch_size, query=trainer.query_size, split=self.split
            )
            self._data.append(next(iter(stream.batch(self.episodes))))
            scorer = self._scorer(learner.on(tasks.shape, tasks.outputs), inner)
            self._scores.append(compiled(scorer, jit_compile=trainer.jit_step))

        if self.path is not None and files.exists(self.path) and int(numbers_of(trainer.meta_step)):
            quality = self._score(self._before())[1]
            self.best = quality if np.isfinite(quality) else None

    def _before(self) -> dict[str, np.ndarray]:
        """The parameters in the file, of the run that this one continues."""
        now, before = self.model.parameters(), {}
        with contextlib.suppress(ValueError):
            found = self.model.families[0][1].parameters(self.path)
            before = {name: own[0] for name, own in found.items() if len(own) == 1}
        if {name: own.shape for name, own in before.items()} != {name: own.shape for name, own in now.items()}:
            raise ValueError(
                "`path` of MetaValidate must be a new file, or one with parameters of the learner that the resumed run "
                f"trains. {arguments.received('path', self.path)}"
            )
        return before

    def _scorer(self, learner: MetaLearner, inner: InnerLoop) -> Callable[..., Any]:
        def score(outer: Any, episodes: Any) -> tuple[Any, Any]:
            state = start(learner, outer, episodes, random.fold_in(random.seed_of(self.seed), 1))
            loss, quality, _ = inner.objective(learner, outer, episodes, state)
            sound = ops.isfinite(loss)
            worst = -np.inf if inner.kind == "values" else 0.0
            quality = ops.mean(ops.where(sound, quality, worst))
            quality = ops.where(ops.logical_and(ops.any(sound), ops.isfinite(quality)), quality, np.nan)
            return ops.mean(loss), quality

        return score

    def _score(self, parameters: Mapping[str, np.ndarray]) -> tuple[float, float]:
        outer = {name: ops.convert_to_tensor(own[None], "float32") for name, own in parameters.items()}
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
                files.save(self.model.learned, self.path)


def _check_learned_path(learned: Any, path: str | os.PathLike[str]) -> None:
    """Raises before training if saving would fail after it."""
    check_output("path", path, (".keras",) if isinstance(learned, keras.Model) else (".json",))


class SaveLearned(keras.callbacks.Callback):
    """Saves the outer parameters of the best member after each epoch and at the end of training.

    An existing file is replaced, even one of another run. Writes are atomic. After an epoch with a
    NaN loss, or whose last step has no sound member, the file is left unchanged.

    Args:
        path: `.json` for a genome, `.keras` for any other learner.

    Raises:
        ValueError: at the start of training, if the result has no `save`, the file has another
            suffix, or the file cannot be written.
        OSError: during training, if the disk is full.

    Example:

    >>> SaveLearned("genome.json").path
    'genome.json'
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__()
        self.path = path

    def on_train_begin(self, logs: Any = None) -> None:
        learned = self.model.learned
        if not hasattr(learned, "save"):
            raise ValueError(f"SaveLearned needs a result with `save(path)`. Received: {learned!r}")
        _check_learned_path(learned, self.path)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._write(logs)

    def on_train_end(self, logs: Any = None) -> None:  # averages of `use_ema` are in place now
        self._write(logs)

    def _write(self, logs: Any) -> None:
        if self.model.sound and not np.isnan((logs or {}).get("loss", 0.0)) and self.model.runner.writes_files:
            files.save(self.model.learned, self.path)
