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
affects a step only by rounding.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_blur import arguments
from keras_blur.backend import compiled
from keras_blur.checks.tasks import check_tasks
from keras_blur.core import random
from keras_blur.core.genome import Genome
from keras_blur.distribution import Shard, mean, shard
from keras_blur.learners.base import MetaLearner
from keras_blur.learners.blur import Blur
from keras_blur.meta.cma import CMAES, CMAState
from keras_blur.meta.estimator import NOTHING, Carried, Estimator
from keras_blur.meta.evolution import Evolution, from_vectors, to_vector
from keras_blur.meta.unroll import Unroll
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.mixture import Mixture
from keras_blur.training import settings
from keras_blur.training.loop import OuterLoop, apply_scaled, clips, parts, plain

Array = Any
_WHOLE = (keras.optimizers.Lamb, keras.optimizers.Adafactor, keras.optimizers.Muon)  # look at whole arrays of weights


@keras.saving.register_keras_serializable(package="keras_blur")
class MetaTrainer(OuterLoop):
    """Meta-trains the outer parameters of a learner on tasks.

    To use a `tf.distribute` strategy, create the trainer in its scope.

    Args:
        tasks: one or more `Tasks` of any shapes and one kind, or a weighted `tasks.mixture`.
        learner: a `learners.MetaLearner`, or several with the same outer parameters, such as
            `learners.Blur` of one rule. Each step uses one of the tasks and one of the learners.
        estimator: estimator of the outer gradient (`Unroll`, `TruncatedUnroll`, `ES`, `PES`, ...),
            or `Evolution`, which replaces gradient and optimizer by CMA-ES.
        members: number of independent sets of outer parameters, trained side by side on the same
            tasks. Must be 1 under `Evolution`, which has its own population.
        meta_batch_size: episodes per meta-step, over which gradients are averaged. Under a strategy
            it must be a multiple of the number of replicas, except for `Evolution`, which splits
            candidates instead.
        batch_size: examples of a support batch.
        query_size: examples of the query.
        clipnorm: maximum gradient norm of each member; `None` disables clipping.
        start: initial outer parameters: the `learned` of such a trainer or its file (for `Blur`, a
            genome, single or a population of `members`). `None` draws them at random. Evolution
            starts around it.
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
    >>> trainer.compile(optimizer=keras.optimizers.Adam(1e-3))
    >>> history = trainer.fit(epochs=1, steps_per_epoch=2, verbose=0)
    >>> trainer.genome.rule.states
    2
    """

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
        arguments.integer("seed", seed, 0)
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
        self._given_learners = learners
        self.families = [(one, other.on(one.shape, one.outputs)) for one in several for other in learners]
        if clipnorm is not None:
            arguments.positive("clipnorm", clipnorm)
        estimator = Unroll() if estimator is None else estimator
        arguments.instance("estimator", estimator, (Estimator, Evolution), "an estimator or Evolution")
        estimator = dataclasses.replace(estimator, kind=several[0].kind)
        if isinstance(estimator, Evolution) and members != 1:
            raise ValueError(
                f"`members` must be 1 under Evolution, which has its own `population`. Received: members={members}"
            )
        begin = self._begin(start, members, seed)
        if meta_batch_size % self.runner.replicas and not isinstance(estimator, Evolution):
            raise ValueError(
                f"`meta_batch_size` must be a multiple of the {self.runner.replicas} replicas of the strategy. Received: "
                f"meta_batch_size={meta_batch_size}"
            )
        self._given_estimator = estimator
        self._start = json.dumps(None if start is None else settings.projected(list(begin.values())))
        self.weights_of_families = None if weights is None else [w / len(learners) for w in weights for _ in learners]
        self.estimator = estimator
        self.members, self.meta_batch_size = members, meta_batch_size
        self.batch_size, self.query_size, self.clipnorm, self.seed = batch_size, query_size, clipnorm, seed
        self.outer: dict[str, keras.Variable] = {}
        self.evolution: dict[str, keras.Variable] = {}
        if isinstance(estimator, Evolution):
            centre = {name: own[0] for name, own in begin.items()}
            self.shapes = {name: own.shape for name, own in centre.items()}
            self.search = CMAES(to_vector(centre).size, estimator.population, estimator.sigma)
            for name, value in self.search.init(to_vector(centre))._asdict().items():
                self.evolution[name] = self.counter(f"evolution_{name}", np.asarray(value))
        else:
            for name, numbers in begin.items():
                own = f"outer_{name.replace('/', '.')}"  # Keras's names have no slashes
                made = self.add_weight(name=own, shape=numbers.shape, initializer="zeros")
                made.assign(numbers)
                setattr(self, own, made)  # where Keras finds what to save
                self.outer[name] = made
        self.drawn = self.counter("drawn", np.zeros(len(self.families), "int32"))
        self.member_score = self.add_weight(name="member_score", shape=(members,), initializer="zeros", trainable=False)
        self.member_mean = self.counter("member_mean", np.full(members, -np.inf, "float32"))  # nothing known yet
        self._carried = [self._carried_variables(number) for number in range(len(self.families))]
        quality = "r2" if estimator.kind == "values" else "accuracy"
        last = ("sigma", "best") if isinstance(estimator, Evolution) else ("gradient_norm",)
        self.make_counters(("loss", quality, *last, "skipped"))
        self.quality = quality
        self.built = True
        self._streams: dict[int, Any] = {}
        self._compiled_steps: dict[tuple[int, int], Any] = {}

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
        given = {name: np.asarray(own) for name, own in self.learner.parameters(start).items()}
        fits = given.keys() == drawn[0].keys() and all(
            own.shape[1:] == drawn[0][name].shape[1:] and own.shape[0] in (1, members) for name, own in given.items()
        )
        if not fits:
            raise ValueError(
                f"`start` must fit the learner and the tasks, single or one of members={members}. Received: {start!r}"
            )
        return {name: np.broadcast_to(own, drawn[0][name].shape) for name, own in given.items()}

    def _carried_variables(self, number: int) -> Any:
        """Variables for the carried state of a family: a nest, empty for most estimators."""
        if isinstance(self.estimator, Evolution) or self.estimator.windows == 1:
            return NOTHING
        of, learner = self.families[number]
        shape = (self.meta_batch_size, self.estimator.steps, self.batch_size)
        episodes = {"x": tf.zeros((*shape, of.features)), "y": tf.zeros((*shape, of.outputs))}
        outer = {name: tf.convert_to_tensor(value.value) for name, value in self.outer.items()}
        empty = self.estimator.nothing_carried(learner, outer, episodes)
        slots = [
            self.counter(f"carried_{number}_{place}", leaf.numpy()) for place, leaf in enumerate(tf.nest.flatten(empty))
        ]
        setattr(self, f"carried_{number}", slots)  # where Keras finds what to save
        return tf.nest.pack_sequence_as(empty, slots)

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
                For Reptile, use SGD; its learning rate is the interpolation factor.
            run_eagerly: whether to run meta-steps without `tf.function` and XLA, for debugging.
            steps_per_execution: meta-steps between calls of batch callbacks.
            jit_compile: whether to compile meta-steps with XLA. Compilation takes time and memory.
                Small networks and orthogonalised terms run several times as fast; wide networks on
                a CPU do not. Under a TPU strategy everything is compiled regardless.

        Raises:
            ValueError: if an optimizer clips gradients or mixes members.
        """
        arguments.count("steps_per_execution", steps_per_execution)
        self.jit_step = bool(jit_compile) and not run_eagerly and not self.runner.compiles
        options = {"run_eagerly": run_eagerly, "steps_per_execution": steps_per_execution, "jit_compile": False}
        self._compiled_steps = {}
        if isinstance(self.estimator, Evolution):
            if optimizer is not None or start_optimizer is not None:
                raise ValueError(f"`optimizer` must be None under Evolution. Received: optimizer={optimizer!r}")
            super().compile(optimizer=None, **options)
            return
        optimizer = keras.optimizers.get(optimizer or keras.optimizers.Adam(5e-4))
        self.start_optimizer = None if start_optimizer is None else keras.optimizers.get(start_optimizer)
        for one in filter(None, (optimizer, self.start_optimizer)):
            whole = [type(own).__name__ for own in parts(one) if isinstance(own, _WHOLE)]
            if self.members > 1 and whole:
                raise ValueError(f"`optimizer` must not mix members, as {whole[0]} does. Received: members={self.members}")
            if clips(one):
                raise ValueError(
                    "`optimizer` must not clip: members would share one norm. Use `clipnorm` of MetaTrainer, which clips "
                    "each member."
                )
        if self.start_optimizer is not None and plain(self.start_optimizer) is plain(optimizer):
            raise ValueError("`start_optimizer` must be another object than `optimizer`. Received: the same one twice.")
        super().compile(optimizer=optimizer, **options)
        self.build_optimizers()

    @property
    def learner(self) -> MetaLearner:
        """The learner, or the first of several. All have the same outer parameters."""
        return self._given_learners[0]

    def parameters(self, member: int | None = None) -> dict[str, np.ndarray]:
        """Outer parameters of a member, by default the best.

        Under `Evolution`, the mean of the search distribution.
        """
        if self.evolution:
            centre = from_vectors(self.shapes, self.evolution["mean"].numpy()[None])
            return {name: np.array(value)[0] for name, value in centre.items()}
        return {name: v.numpy()[self.best if member is None else member] for name, v in self.outer.items()}

    @property
    def learned(self) -> Any:
        """The result of the best member: a `Genome` for `Blur`, else a Keras model.

        Both have a `save(path)`.
        """
        return self.learner.learned(self.parameters())

    @property
    def genome(self) -> Genome:
        """The learned genome of a `Blur` learner."""
        self._of_genomes()
        return self.learned

    @property
    def population(self) -> Genome:
        """The genomes of all members of a `Blur` learner on a population axis.

        Under `Evolution`, the single genome at the mean of the search distribution.
        """
        rule = self._of_genomes().rule
        if self.evolution:
            return self.genome
        return Genome.from_members(rule, {name: variable.numpy() for name, variable in self.outer.items()})

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
        return bool(np.isfinite(self.member_score.numpy()).any())

    @property
    def best(self) -> int:
        """Index of the member with the highest running query accuracy.

        A member whose last step was not finite ranks after all others. If no member is sound, it is
        the one with the highest running accuracy before that, or 0 if none was ever sound.
        """
        return int(np.argmax((self.member_score if self.sound else self.member_mean).numpy()))

    def synchronize(self) -> None:
        """Copies the best member, with its optimizer state, to all others.

        Does nothing under `Evolution`, or if no member is sound.
        """
        if self.evolution or not self.sound:
            return
        best = self.best
        for variable in [*self.outer.values(), *self._slots(), self.member_score, self.member_mean]:
            variable.assign(np.repeat(variable.numpy()[best : best + 1], self.members, axis=0))

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

        Raises:
            ValueError: if the checkpoint is damaged or has other settings, which are named.
            OSError: if the checkpoint cannot be written, for example because the disk is full.
        """
        return self.run_epochs(epochs, steps_per_epoch, checkpoint, callbacks, verbose, initial_epoch)

    def settings(self) -> dict[str, Any]:
        tasks = list({id(of): of for of, _ in self.families}.values())
        return {
            "tasks": tasks, "weights": self.weights_of_families, "learner": self._given_learners,
            "estimator": self._given_estimator, "members": self.members, "meta_batch_size": self.meta_batch_size,
            "batch_size": self.batch_size, "query_size": self.query_size, "clipnorm": self.clipnorm, "seed": self.seed,
            "start": json.loads(self._start),
        }  # fmt: skip

    def optimizers(self) -> dict[str, tuple[keras.optimizers.Optimizer, list[keras.Variable]]]:
        if self.evolution:
            return {}
        names = ("optimizer", "start_optimizer")
        return {
            next(name for name in names if getattr(self, name) is one): (one, [self.outer[name] for name in own])
            for one, own in self._groups()
        }

    def rewind(self) -> None:
        self._streams = {}

    # One step.

    def family_of(self, step: int) -> int:
        """Index of the family used in a step."""
        rng = np.random.default_rng([self.seed, step])
        if self.weights_of_families is None:
            return int(rng.integers(len(self.families)))
        return int(rng.choice(len(self.families), p=self.weights_of_families))

    def meta_train_step(self) -> dict[str, float]:
        """Runs one meta-step: episodes, gradient, clipping, update.

        Returns the running metrics.
        """
        step = int(self.meta_step.numpy())
        family = self.family_of(step)
        window = int(self.drawn.numpy()[family]) % self.estimator.windows
        seed = random.fold_in(random.seed_of(self.seed), 1_000_000_007, step)
        logs = self._step_of(family)(self._episodes(family, window), seed, tf.constant(window))
        return {name: float(value) for name, value in logs.items()}

    def _episodes(self, family: int, window: int) -> Any:
        """The episodes of a step, split over the replicas."""
        if family not in self._streams:
            self._streams[family] = [self.runner.deal(lambda index, count: self._shard(family, index, count)), None]
        if window == 0 or self._streams[family][1] is None:
            self._streams[family][1] = next(self._streams[family][0])
        return self._streams[family][1]

    def _shard(self, family: int, index: int, count: int) -> tf.data.Dataset:
        """The episodes of one replica.

        These are its shard of each step's tasks, or all tasks if candidates are split instead.
        """
        if self.evolution:
            index, count = 0, 1
        done = int(self.drawn.numpy()[family]) // self.estimator.windows * self.meta_batch_size
        stream = self.families[family][0].dataset(
            self.seed + 7919 * family, steps=self.estimator.horizon, batch=self.batch_size, query=self.query_size,
            start=done + index, stride=count,
        )  # fmt: skip
        return stream.batch(self.meta_batch_size // count, drop_remainder=True)

    def unroll_for(self, steps: int) -> None:
        """Changes the number of unrolled steps. Used by curricula.

        Raises:
            ValueError: if the estimator uses truncation windows.
        """
        if self.estimator.windows > 1:
            raise ValueError(
                f"The unroll of {type(self.estimator).__name__} cannot change during meta-training: its learners are in "
                "the middle of an episode."
            )
        self.estimator = dataclasses.replace(self.estimator, steps=steps)
        self._streams = {}

    def _step_of(self, family: int) -> Any:
        key = (family, self.estimator.steps)
        if key not in self._compiled_steps:
            estimator = self.estimator
            if isinstance(estimator, Evolution):
                program = self._generation(family, estimator)
            else:
                program = self._descent(family, estimator)
            number = tf.one_hot(family, len(self.families), dtype="int32")

            def step(episodes: Mapping[str, Array], seed: Array, window: Array) -> dict[str, Array]:
                found = program(episodes, seed, window)
                self.drawn.assign(self.drawn + number)
                return self.count_step(found)

            def meta_step(*arguments: Any) -> dict[str, Array]:
                return self.runner.run(step, *arguments)

            self._compiled_steps[key] = meta_step if self.run_eagerly else tf.function(meta_step, autograph=False)
        return self._compiled_steps[key]

    def _follow(self, accuracy: Array, sound: Array) -> None:
        """Updates the running accuracy of each member: a plain mean at first, exponential later.

        An unsound step counts as 0 but never raises a score, since R squared has no lower bound.
        The score of the member is minus infinity until its next sound step.
        """
        rate = tf.maximum(0.01, 1.0 / (tf.cast(self.meta_step.value, tf.float32) + 1.0))
        before = tf.convert_to_tensor(self.member_mean.value)
        known, told = before > -np.inf, sound & tf.math.is_finite(accuracy)
        old = tf.where(known, before, 0.0)
        new = tf.where(told, accuracy, tf.where(sound, old, tf.minimum(old, 0.0)))
        new = (1.0 - tf.where(known, rate, 1.0)) * old + tf.where(known, rate, 1.0) * new
        mean_of_all = tf.where(known | told, new, before)
        self.member_mean.assign(mean_of_all)
        self.member_score.assign(tf.where(sound, mean_of_all, -np.inf))

    def _descent(self, family: int, estimator: Estimator) -> Callable[..., Any]:
        """The replica program of a family: a gradient step of each member, clipped separately."""
        learner, clipnorm = self.families[family][1], self.clipnorm
        slots = self._carried[family]

        def local_estimate(
            outer: Mapping[str, Array], episodes: Mapping[str, Array], seed: Array, carried: Any, first: Array, index: Array
        ) -> Any:
            shard = Shard(index, self.runner.replicas)
            return estimator.local_estimate(learner, outer, episodes, seed, carried, first, shard)

        local_estimate = local_estimate if self.run_eagerly else compiled(local_estimate, jit_compile=self.jit_step)

        def descent(episodes: Mapping[str, Array], seed: Array, window: Array) -> dict[str, tuple[Array, Array]]:
            outer = {name: tf.convert_to_tensor(variable.value) for name, variable in self.outer.items()}
            first = tf.equal(window, 0)
            episodes = estimator.part(episodes, window)
            mine = shard()
            carried = tf.nest.map_structure(lambda slot: tf.convert_to_tensor(slot.value), slots)
            own = carried._replace(learners=mine.part(carried.learners, axis=1))
            measured, learners = local_estimate(outer, episodes, seed, own, first, tf.convert_to_tensor(mine.index))
            found, directions = estimator.combine(outer, mean(measured), seed, carried, first)
            kept = Carried(mine.whole(learners, axis=1), directions)
            for slot, value in zip(tf.nest.flatten(slots), tf.nest.flatten(kept), strict=True):
                slot.assign(value)
            squares = {n: tf.reduce_sum(tf.square(g), axis=list(range(1, g.shape.rank))) for n, g in found.gradients.items()}
            norm = tf.sqrt(tf.add_n(list(squares.values())))
            sound = tf.math.is_finite(found.loss) & tf.math.is_finite(norm)
            clipped: dict[str, Array] = {}
            for _, names in self._groups():
                own = tf.sqrt(tf.add_n([squares[name] for name in names]))
                scale = tf.ones_like(own) if clipnorm is None else tf.minimum(1.0, clipnorm / tf.maximum(own, 1e-12))
                clipped |= {name: of_members(scale, found.gradients[name]) * found.gradients[name] for name in names}
            self._apply(clipped, sound)
            usable = tf.cast(sound, found.loss.dtype)
            self._follow(found.accuracy, sound)
            means = {"loss": found.loss, self.quality: found.accuracy, "gradient_norm": norm}
            values = {name: _counted(value, sound) for name, value in means.items()}
            return {**values, "skipped": (1.0 - usable, tf.ones_like(usable))}

        return descent

    def _groups(self) -> list[tuple[keras.optimizers.Optimizer, list[str]]]:
        """The optimizers with the names of the outer parameters they update."""
        if self.start_optimizer is None:
            return [(self.optimizer, list(self.outer))]
        starts = [name for name in self.outer if name.startswith("start_")]
        others = [name for name in self.outer if not name.startswith("start_")]
        if not starts:
            raise ValueError("`start_optimizer` must be None: the learner's start is not learned.")
        return [(one, names) for one, names in ((self.optimizer, others), (self.start_optimizer, starts)) if names]

    def _slots(self) -> list[keras.Variable]:
        """The optimizer variables that have a value for each member."""
        shapes = {tuple(value.shape) for value in self.outer.values()}
        return [v for optimizer, _ in self._groups() for v in optimizer.variables if tuple(v.shape) in shapes]

    def _apply(self, gradients: Mapping[str, Array], sound: Array) -> None:
        """Updates the sound members. The others keep their parameters and optimizer state.

        A step without a sound member does not count, not even in the optimizers' counters. Every
        replica already has the full gradient, but Keras optimizers sum over replicas. Each replica
        therefore contributes the gradient divided by the number of replicas.
        """
        own = {id(variable) for variable in [*self.outer.values(), *self._slots()]}
        touched = [*self.outer.values(), *(v for optimizer, _ in self._groups() for v in optimizer.variables)]
        before = [tf.identity(variable.value) for variable in touched]
        parts = {name: tf.where(of_members(sound, g), g, 0.0) / self.runner.replicas for name, g in gradients.items()}
        for optimizer, names in self._groups():
            apply_scaled(optimizer, [parts[name] for name in names], [self.outer[name] for name in names])
        for variable, old in zip(touched, before, strict=True):
            changed = of_members(sound, old) if id(variable) in own else tf.reduce_any(sound)
            variable.assign(tf.where(changed, variable.value, old))

    def _generation(self, family: int, estimator: Evolution) -> Callable[..., Any]:
        """The replica program of a family under `Evolution`: ask, score, tell."""
        learner, shapes = self.families[family][1], self.shapes

        def score(candidates: Array, episodes: Mapping[str, Array], seed: Array) -> Any:
            return estimator.score(learner, from_vectors(shapes, candidates), episodes, seed)

        ask, tell = self.search.ask, self.search.tell
        if not self.run_eagerly:
            score, ask, tell = (compiled(one, jit_compile=self.jit_step) for one in (score, ask, tell))

        def generation(episodes: Mapping[str, Array], seed: Array, window: Array) -> dict[str, tuple[Array, Array]]:
            del window
            state = CMAState(**{name: tf.convert_to_tensor(v.value) for name, v in self.evolution.items()})
            candidates = ask(state, random.fold_in(seed, 2))
            mine = shard()
            dealt = tf.range(-(-estimator.population // mine.count) * mine.count) % estimator.population  # some twice
            scores = score(mine.part(tf.gather(candidates, dealt), axis=0), episodes, seed)
            fitness, loss, accuracy = (value[: estimator.population] for value in mine.whole(scores, axis=0))
            new = tell(state, candidates, fitness)
            for name, value in new._asdict().items():
                self.evolution[name].assign(value)
            sound = tf.math.is_finite(fitness)
            usable, sigma = tf.cast(sound, loss.dtype), tf.cast(new.sigma, loss.dtype)
            means = {"loss": _counted(loss, sound), self.quality: _counted(accuracy, sound)}
            total, count = (tf.reduce_sum(one) for one in means[self.quality])
            self._follow(tf.reshape(total / count, (1,)), tf.reshape(tf.reduce_any(sound), (1,)))
            best = tf.reduce_max(tf.where(sound & tf.math.is_finite(accuracy), accuracy, -np.inf))
            return {
                **means,
                "best": _counted(best, tf.math.is_finite(best)),
                "sigma": (sigma, tf.ones_like(sigma)),
                "skipped": (1.0 - usable, tf.ones_like(usable)),
            }

        return generation


def _counted(value: Array, sound: Array) -> tuple[Array, Array]:
    """Values and their weights in a running mean; unsound and non-finite values have weight 0."""
    counts = sound & tf.math.is_finite(value)
    return tf.where(counts, value, 0.0), tf.cast(counts, value.dtype)


def of_members(value: Array, like: Array) -> Array:
    """Reshapes one number per member to broadcast with arrays `[members, ...]`."""
    return tf.reshape(value, (-1,) + (1,) * (like.shape.rank - 1))
