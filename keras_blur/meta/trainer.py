"""`MetaTrainer`: the outer loop of meta-learning as a Keras model.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), sections 3.3 and
4.2, Table C.1: Adam on the clipped gradient through the unroll; several genomes at once, and the
best one is copied to all when the unroll grows.

As a Keras model, the trainer gets Keras's progress bar, callbacks, logging and checkpoints
(`training/loop.py`). The outer parameters, the optimizer state and the counters of the task streams
are its variables. All random numbers follow from the seed and these counters.

Tasks and networks differ in shape, but compiled code has fixed shapes. Each combination of a task
distribution and a learner is a *family* with its own compiled step and task stream. The seed and
the step number determine the family of a step. Estimators with truncation windows keep the carried
learners in variables, separately for each family.

Under `tf.distribute`, tasks (or the candidates of evolution) are split over replicas. Each replica
runs the inner loop on its shard. Statistics are reduced once per step, after the inner loop, and
every replica updates its own copy of the variables with the same numbers. The number of replicas
affects a step only by rounding. The same holds on JAX, where one program sees the tasks of all
devices. There, members are split if the devices do not divide the tasks.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.backend import numbers_of, value_of
from keras_blur.checks.tasks import check_tasks
from keras_blur.core import random
from keras_blur.core.genome import Genome
from keras_blur.learners.base import MetaLearner
from keras_blur.learners.blur import Blur
from keras_blur.meta.estimator import Estimator
from keras_blur.meta.evolution import Evolution
from keras_blur.meta.strategy import Descent, Search, Strategy
from keras_blur.meta.unroll import Unroll
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.mixture import Mixture
from keras_blur.training import settings
from keras_blur.training.loop import Absent, OuterLoop

Array = Any
_SCORED = "its tasks are scored by `report.score_episodes` and by the callback `meta.MetaValidate`."
_STEP = 1_000_000_007  # folded into the seed for the networks and the noise of a step


@keras.saving.register_keras_serializable(package="keras_blur")
class MetaTrainer(OuterLoop):
    """Meta-trains the outer parameters of a learner on tasks.

    To use a `tf.distribute` strategy, create the trainer in its scope.

    Args:
        tasks: one or more `Tasks` of any shapes and one kind, or a weighted `tasks.mixture`.
        learner: a `learners.MetaLearner`, or several with the same outer parameters, such as
            `learners.Blur` of one rule. Each step uses one of the tasks and one of the learners.
        estimator: estimator of the outer gradient (`Unroll`, `TruncatedUnroll`, `ES`, `PES`, ...),
            or `Evolution`, which replaces gradient and optimizer with CMA-ES. `None` is `Unroll()`.
        members: number of independent sets of outer parameters, trained side by side on the same
            tasks and initial networks. Members that are copies, from one `start` or after
            `synchronize`, get different initial networks instead, if the learner draws networks;
            `ES` and `PES` perturb members differently anyway. Must be 1 under `Evolution`, which
            has its own population.
        meta_batch_size: episodes per meta-step, over which gradients are averaged. Under a strategy
            it must be a multiple of the number of replicas, except for `Evolution`, which splits
            candidates instead. On several JAX devices, it or `members` must be a multiple of their
            number.
        batch_size: examples of a support batch.
        query_size: examples of the query.
        clipnorm: maximum gradient norm of each member; `None` disables clipping.
        start: initial outer parameters: the `learned` result of such a trainer, or its file (for
            `Blur`, a genome, single or a population of `members`). `None` draws them at random.
            Evolution starts around it.
        seed: random seed.

    Raises:
        ValueError: if an argument is invalid or arguments do not match.

    Example:

    >>> from keras_blur import Rule, learners, tasks
    >>> trainer = MetaTrainer(
    ...     tasks=tasks.images("digits"),
    ...     learner=learners.Blur((16,), Rule(batch_reduction="mean", last_activation="linear")),
    ...     estimator=Unroll(steps=3), batch_size=16, query_size=32,
    ... )
    >>> trainer.compile(optimizer=keras.optimizers.Adam(1e-3), jit_compile=False)  # starts at once
    >>> history = trainer.fit(epochs=1, steps_per_epoch=2, verbose=0)
    >>> trainer.genome.rule.states
    2

    Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), sections 3.3 and
    4.2, Table C.1.
    """

    descent = Descent  # the strategy by which a gradient is followed

    # What a `keras.Model` does with examples, and a trainer of outer parameters cannot.
    predict = Absent(_SCORED)
    evaluate = Absent(_SCORED)
    predict_on_batch = Absent(_SCORED)
    test_on_batch = Absent(_SCORED)
    train_on_batch = Absent(_SCORED)

    def __init__(
        self,
        tasks: Tasks | Sequence[Tasks] | Mixture,
        learner: MetaLearner | Sequence[MetaLearner],
        estimator: Estimator | Evolution | None = None,
        *,
        members: int = 1,
        meta_batch_size: int = 1,
        batch_size: int = 64,
        query_size: int = 128,
        clipnorm: float | None = 10.0,
        start: Any = None,
        seed: int = 0,
    ):
        super().__init__(name="meta_trainer")
        weights: Sequence[float] | None = None
        if isinstance(tasks, Mixture):
            weights, tasks = tasks.weights, tasks.parts
        several: list[Any] = list(tasks) if isinstance(tasks, (list, tuple)) else [tasks]
        learners: list[Any] = list(learner) if isinstance(learner, (list, tuple)) else [learner]
        for name, value in (
            ("members", members), ("meta_batch_size", meta_batch_size),
            ("batch_size", batch_size), ("query_size", query_size),
        ):  # fmt: skip
            arguments.count(name, value)
        arguments.seed(seed)
        if not several or not all(isinstance(one, Tasks) for one in several):
            raise ValueError(f"`tasks` must be one or more task distributions, or a mixture. Received: tasks={tasks!r}")
        if any(one.kind != several[0].kind for one in several):
            raise ValueError(
                "`tasks` must be one or more task distributions of one kind, classes or values. "
                f"Received: {', '.join(f'{one.name} ({one.kind})' for one in several)}"
            )
        if not learners or not all(isinstance(one, MetaLearner) and learners[0].shares_outer(one) for one in learners):
            raise ValueError(
                "`learner` must be one or more learners that share outer parameters, such as learners of one rule. "
                f"Received: {learner!r}"
            )
        for one in several:
            check_tasks(one, batch_size, query_size)
            for other in learners:
                other.check(one.kind, one.outputs)
                other.check_batch(batch_size, query_size)
        self._given_learners = learners
        self.families = [(one, other.on(one.shape, one.outputs)) for one in several for other in learners]
        if clipnorm is not None:
            arguments.positive("clipnorm", clipnorm)
        estimator = Unroll() if estimator is None else estimator
        arguments.instance("estimator", estimator, (Estimator, Evolution), "an estimator or Evolution")
        estimator = estimator.on(several, batch_size, query_size)
        if isinstance(estimator, Evolution) and members != 1:
            raise ValueError(
                f"`members` must be 1 under Evolution, which has its own `population`. Received: members={members}"
            )
        begin = self._begin(start, members, seed)
        shares, whose, split = self.runner.shares, "replicas of the strategy", {"meta_batch_size": meta_batch_size}
        if self.runner.splits_members:
            whose, split = "devices", {**split, "members": members}
        if all(count % shares for count in split.values()) and not isinstance(estimator, Evolution):
            raise ValueError(
                f"{' or '.join(f'`{name}`' for name in split)} must be a multiple of the {shares} {whose}. "
                f"Received: {', '.join(f'{name}={count}' for name, count in split.items())}"
            )
        self.given_estimator = estimator
        self._start = json.dumps(None if start is None else settings.projected(list(begin.values())))
        self.weights_of_families = None if weights is None else [w / len(learners) for w in weights for _ in learners]
        self.estimator = estimator
        self.members, self.meta_batch_size = members, meta_batch_size
        self.batch_size, self.query_size, self.clipnorm, self.seed = batch_size, query_size, clipnorm, seed
        self.quality = "r2" if estimator.kind == "values" else "accuracy"
        self.strategy: Strategy
        if isinstance(estimator, Evolution):
            self.strategy = Search(self.families, self.runner, estimator, self.quality)
        else:
            self.strategy = self.descent(self.families, members, self.runner, clipnorm, self.quality)
        self.strategy.init(self, begin)
        self.drawn = self.counter("drawn", np.zeros(len(self.families), "int32"))
        self.member_score = self.add_weight(name="member_score", shape=(members,), initializer="zeros", trainable=False)
        self.member_mean = self.counter("member_mean", np.full(members, -np.inf, "float32"))  # nothing known yet
        self.make_counters(("loss", self.quality, *self.strategy.logged, "skipped"))
        self.built = True
        self._streams: dict[int, Any] = {}
        self._programs: dict[tuple[int, int, bool], Any] = {}

    def _begin(self, start: Any, members: int, seed: int) -> dict[str, np.ndarray]:
        """The initial outer parameters `[members, ...]`, checked against every family."""
        drawn = [learner.draw(seed, members, tasks.features, tasks.outputs) for tasks, learner in self.families]
        if any({name: own.shape for name, own in one.items()} != {n: o.shape for n, o in drawn[0].items()} for one in drawn):
            raise ValueError(
                "`tasks` must have one number of features and of outputs, as the outer parameters of this learner depend on "
                f"them. Received: {'; '.join(f'{of.name}: {of.features}, {of.outputs}' for of, _ in self.families)}"
            )
        if start is None:
            return drawn[0]
        given = {name: np.asarray(own) for name, own in self.families[0][1].parameters(start).items()}
        fits = given.keys() == drawn[0].keys() and all(
            own.shape[1:] == drawn[0][name].shape[1:] and own.shape[0] in (1, members) for name, own in given.items()
        )
        if not fits:
            raise ValueError(
                f"`start` must fit the learner and the tasks, single or one of members={members}. Received: {start!r}"
            )
        return {name: np.broadcast_to(own, drawn[0][name].shape) for name, own in given.items()}

    # Public interface.

    def compile(
        self,
        optimizer: Any = None,
        *,
        start_optimizer: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool = True,
    ) -> None:
        """Configures meta-training.

        Args:
            optimizer: Keras optimizer of the outer parameters; Adam with 5e-4 by default, as in
                Table C.1 of the paper. Must be `None` under `Evolution`.
            start_optimizer: separate optimizer of the initial weights (outer parameters named
                `start_...`), whose gradient is then clipped separately. `None` uses `optimizer`.
                For Reptile, use SGD; its learning rate is the interpolation factor. Callbacks
                change only the learning rate of `optimizer`.
            run_eagerly: whether to run meta-steps uncompiled, for debugging.
            steps_per_execution: meta-steps between calls of batch callbacks.
            jit_compile: whether to compile meta-steps with XLA. Compilation takes time and memory.
                Small networks and orthogonalised terms run several times as fast; wide networks on
                a CPU do not. On JAX and under a TPU strategy everything is compiled regardless.

        Raises:
            ValueError: if an optimizer clips gradients or mixes members, there is one under
                `Evolution`, or `start_optimizer` has no initial weights to update.
        """
        arguments.count("steps_per_execution", steps_per_execution)
        jit = bool(jit_compile) and not run_eagerly and not self.runner.compiles
        optimizer, self.start_optimizer = self.strategy.compile(optimizer, start_optimizer, jit=jit, eager=bool(run_eagerly))
        self.jit_step = jit
        self._programs = {}
        super().compile(
            optimizer=optimizer, run_eagerly=run_eagerly, steps_per_execution=steps_per_execution, jit_compile=False
        )
        self.build_optimizers()

    @property
    def learner(self) -> MetaLearner:
        """The learner, or the first of several. All have the same outer parameters."""
        return self._given_learners[0]

    @property
    def outer(self) -> dict[str, keras.Variable]:
        """The variables of the outer parameters, `[members, ...]`, by name; none under
        `Evolution`."""
        return self.strategy.outer

    def parameters(self, member: int | None = None) -> dict[str, np.ndarray]:
        """Outer parameters of a member. Under `Evolution`, the mean of the search distribution.

        Args:
            member: index of the member; `None` for the best.

        Returns:
            Arrays by name.
        """
        return self.strategy.parameters(self.best if member is None else member)

    @property
    def learned(self) -> Any:
        """The result of the best member: a `Genome` for `Blur`, else a Keras model.

        Both have a `save(path)`.
        """
        return self.families[0][1].learned(self.parameters())

    @property
    def genome(self) -> Genome:
        """The learned genome of a `Blur` learner: that of the best member.

        Raises:
            ValueError: if the learner has no genome.
        """
        self._of_genomes()
        return self.learned

    @property
    def population(self) -> Genome:
        """The genomes of all members of a `Blur` learner on a population axis.

        Under `Evolution`, the single genome at the mean of the search distribution.

        Raises:
            ValueError: if the learner has no genome.
        """
        learner = self._of_genomes()
        if isinstance(self.estimator, Evolution):
            return self.genome
        return Genome.stack([learner.learned(self.parameters(member)) for member in range(self.members)])

    def _of_genomes(self) -> Blur:
        """The learner, if it is a `Blur`."""
        if not isinstance(self.learner, Blur):
            raise ValueError(f"{type(self.learner).__name__} has no genome; use `learned`.")
        return self.learner

    @property
    def sound(self) -> bool:
        """Whether any member had a finite loss and gradient in the last step.

        Under `Evolution`, whether any candidate had a finite score.
        """
        return bool(np.isfinite(numbers_of(self.member_score)).any())

    @property
    def best(self) -> int:
        """Index of the member with the highest running query accuracy.

        A member whose last step was not finite ranks after all others. If no member is sound, it is
        the one with the highest running accuracy before that, or 0 if none was ever sound.
        """
        return int(np.argmax(numbers_of(self.member_score if self.sound else self.member_mean)))

    def synchronize(self) -> None:
        """Copies the best member, with its optimizer state, to all others.

        From then on, members have different initial networks, so that they learn apart. Without
        random networks, as in `MAML`, they stay equal, except under `ES` and `PES`. The next step
        begins new episodes, because carried learners belong to the members that were overwritten.
        Does nothing under `Evolution`, or if no member is sound.
        """
        if not self.sound:
            return
        best = self.best
        self.strategy.synchronize(best)
        windows = self.estimator.windows
        self.drawn.assign(-(-numbers_of(self.drawn) // windows) * windows)
        for variable in (self.member_score, self.member_mean):
            variable.assign(np.repeat(numbers_of(variable)[best : best + 1], self.members, axis=0))

    def fit(
        self,
        epochs: int = 1,
        steps_per_epoch: int = 100,
        *,
        initial_epoch: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        verbose: int | str = "auto",
    ) -> keras.callbacks.History:
        """Meta-trains with the progress bar and the callbacks of Keras.

        Logs are means over the epoch: loss, query accuracy (R squared for values), gradient norm
        before clipping, and the fraction of skipped members. Under `Evolution`: loss and accuracy
        of the population, accuracy of its best genome, and sigma. Steps skipped by a member are
        left out of its means. If all are skipped, the mean is NaN.

        Args:
            epochs: number of epochs, including those before an interruption.
            steps_per_epoch: meta-steps per epoch.
            initial_epoch: index of the first epoch, unless a checkpoint says otherwise.
            checkpoint: a `.weights.h5` file, local or in a bucket (`gs://...`), written after each
                epoch. If it exists, training resumes from it and gives the same result as an
                uninterrupted run. The file holds the settings of its run. Other settings raise an
                error. Another learning rate, constant or schedule, is accepted with a warning. A
                learning rate set by a callback is restored; all other callback state starts anew.
                On SIGTERM the checkpoint is written after the current step and the process exits
                with status 143. Under several workers, which do not receive SIGTERM at the same
                step, the process exits at once.
            callbacks: Keras callbacks.
            verbose: 0 for silence, 1 or `"auto"` for a progress bar, 2 for one line per epoch.

        Returns:
            The `History`, with the logs of each epoch by name.

        Raises:
            ValueError: if the checkpoint is damaged or has other settings, which are named.
            OSError: if the checkpoint cannot be written, for example because the disk is full.
        """
        return self.run_epochs(epochs, steps_per_epoch, checkpoint, callbacks, verbose, initial_epoch)

    def settings(self) -> dict[str, Any]:
        tasks = list({id(of): of for of, _ in self.families}.values())
        made = [one.network(of.shape, of.outputs) for of, one in self.families if callable(getattr(one, "network", None))]
        return {
            "tasks": tasks, "weights": self.weights_of_families, "learner": self._given_learners,
            "estimator": self.given_estimator, "members": self.members, "meta_batch_size": self.meta_batch_size,
            "batch_size": self.batch_size, "query_size": self.query_size, "clipnorm": self.clipnorm, "seed": self.seed,
            "start": json.loads(self._start), **({"networks": made} if made else {}),
        }  # fmt: skip

    def optimizers(self) -> dict[str, tuple[keras.optimizers.Optimizer, list[keras.Variable]]]:
        return self.strategy.optimizers()

    def rewind(self) -> None:
        self._streams = {}

    # One step.

    def family_of(self, step: int) -> int:
        """Index of the family used in a step.

        Args:
            step: number of the meta-step, from 0.
        """
        rng = np.random.default_rng([self.seed, step])
        if self.weights_of_families is None:
            return int(rng.integers(len(self.families)))
        return int(rng.choice(len(self.families), p=self.weights_of_families))

    def meta_train_step(self) -> dict[str, float]:
        """Runs one meta-step: episodes, gradient, clipping, update.

        Returns:
            The running metrics by name.
        """
        step = int(numbers_of(self.meta_step))
        family = self.family_of(step)
        window = int(numbers_of(self.drawn)[family]) % self.estimator.windows
        logs = self._program(family)(self._episodes(family, window), ops.convert_to_tensor(window, "int32"))
        return {name: float(value) for name, value in logs.items()}

    def _episodes(self, family: int, window: int) -> Any:
        """The episodes of a step, split over the replicas."""
        if family not in self._streams:
            self._streams[family] = [self.runner.deal(lambda index, count: self._shard(family, index, count)), None]
        if window == 0 or self._streams[family][1] is None:
            self._streams[family][1] = next(self._streams[family][0])
        return self._streams[family][1]

    def _shard(self, family: int, index: int, count: int) -> Any:
        """The stream of episodes of one replica."""
        if not self.strategy.deals_tasks:
            index, count = 0, 1
        done = int(numbers_of(self.drawn)[family]) // self.estimator.windows * self.meta_batch_size
        stream = self.families[family][0].dataset(
            (self.seed + 7919 * family) % 2**31, steps=self.estimator.horizon, batch=self.batch_size, query=self.query_size,
            start=done + index, stride=count,
        )  # fmt: skip
        return stream.batch(self.meta_batch_size // count, drop_remainder=True)

    def unroll_for(self, steps: int) -> None:
        """Changes the number of unrolled steps. Used by curricula.

        Args:
            steps: number of learning steps of an episode from now on.

        Raises:
            ValueError: if the estimator carries learners from one meta-step to the next.
        """
        self.check_unroll()
        self.estimator = dataclasses.replace(self.estimator, steps=steps)
        self._streams = {}

    def check_unroll(self) -> None:
        """Checks that the number of unrolled steps can change.

        Raises:
            ValueError: if the estimator carries learners from one meta-step to the next.
        """
        if isinstance(self.estimator, Estimator) and self.estimator.carries:
            raise ValueError(
                f"The unroll of {type(self.estimator).__name__} cannot change during meta-training: it carries learners "
                "from one meta-step to the next."
            )

    def _program(self, family: int) -> Any:
        """The program of a step of a family, with the current number of unrolled steps."""
        copies = self.strategy.copies
        key = (family, self.estimator.steps, copies)
        if key not in self._programs:
            estimator = self.estimator
            number = (np.arange(len(self.families)) == family).astype("int32")

            def step(episodes: Mapping[str, Array], window: Array) -> dict[str, Array]:
                seed = random.fold_in(random.seed_of(self.seed), _STEP, value_of(self.meta_step))
                found = self.strategy.step(family, estimator, episodes, seed, window, copies)
                self._follow(found.quality, found.sound)
                self.drawn.assign(value_of(self.drawn) + number)
                return self.count_step(found.logs)

            self._programs[key] = self.runner.program(step, self._all_variables, eager=self.run_eagerly)
        return self._programs[key]

    def _all_variables(self) -> list[keras.Variable]:
        """What a step may read or assign."""
        return [*self.variables, *(one for optimizer, _ in self.optimizers().values() for one in optimizer.variables)]

    def _follow(self, accuracy: Array, sound: Array) -> None:
        """Updates the running accuracy of each member: a plain mean at first, exponential later.

        An unsound step counts as 0 but never raises a score, since R squared has no lower bound.
        The score of the member is minus infinity until its next sound step.
        """
        rate = ops.maximum(0.01, 1.0 / (ops.cast(value_of(self.meta_step), "float32") + 1.0))
        before = value_of(self.member_mean)
        known, told = before > -np.inf, ops.logical_and(sound, ops.isfinite(accuracy))
        old = ops.where(known, before, 0.0)
        new = ops.where(told, accuracy, ops.where(sound, old, ops.minimum(old, 0.0)))
        rate = ops.where(known, rate, 1.0)
        new = (1.0 - rate) * old + rate * new
        mean_of_all = ops.where(ops.logical_or(known, told), new, before)
        self.member_mean.assign(mean_of_all)
        self.member_score.assign(ops.where(sound, mean_of_all, -np.inf))
