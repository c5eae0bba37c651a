"""Trains a genome on tasks: the outer loop as a Keras model.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), sections 3.3 and 4.2, Table C.1: Adam on the
gradient through the unroll, clipped; several genomes at once, the best copied to all when the unroll grows.

Why a Keras model: progress bar, callbacks, logging and checkpoints are Keras's own. The genomes, the optimizer's state and
the counters of the task streams are its variables, and every random number follows from the seed and those counters; so a
run that is killed and started again from a checkpoint gives, bit for bit, what the unbroken run gives.

Shapes differ between tasks and networks while compiled code has one shape: each combination is a *family* with a compiled
step and a task stream of its own, and which family a step takes follows from the seed and the step's number. An estimator
that carries learners from piece to piece of an episode has them in variables too, for each family its own.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_blur import random
from keras_blur.compiling import compiled
from keras_blur.feedback import target_kind
from keras_blur.genome import Genome
from keras_blur.learners.blur import Blur, loss_of
from keras_blur.meta.cma import CMAES, CMAState
from keras_blur.meta.estimator import Estimator
from keras_blur.meta.evolution import Evolution, from_vectors, to_vector
from keras_blur.meta.unroll import Unroll
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.mixture import Mixture

Array = Any


@keras.saving.register_keras_serializable(package="keras_blur")
class MetaTrainer(keras.Model):
    """Meta-trains genomes on tasks.

    Args:
        tasks: a `Tasks`, or several, of any shapes and one kind, or a `tasks.mixture` with weights.
        learner: a `learners.Blur`, or several of one rule; each step takes one of the tasks and one of the learners.
        estimator: how the outer gradient is found, `Unroll`, `TruncatedUnroll`, `ES`, `PES`; or `Evolution`, CMA-ES in the
            place of gradient and optimizer.
        members: number of genomes that are trained side by side, from different starts, on the same tasks. Evolution has
            its population instead.
        tasks_per_step: episodes whose gradients are averaged in one step.
        batch_size: examples of a support batch.
        query_size: examples of the query.
        clipnorm: largest norm of a member's gradient; `None` does not clip.
        genome: where to start, a single genome or a population of `members`; `None` draws at random. Evolution starts
            around it.
        std: standard deviation of a random start.
        seed: of everything.

    Raises:
        ValueError: if arguments do not fit together.

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
        learner: Blur | Sequence[Blur],
        estimator: Estimator | Evolution | None = None,
        *,
        members: int = 1,
        tasks_per_step: int = 1,
        batch_size: int = 64,
        query_size: int = 128,
        clipnorm: float | None = 10.0,
        genome: Genome | None = None,
        std: float = 0.5,
        seed: int = 0,
    ):
        super().__init__(name="meta_trainer")
        weights: Sequence[float] | None = None
        if isinstance(tasks, Mixture):
            weights, tasks = tasks.weights, tasks.parts
        several = [tasks] if isinstance(tasks, Tasks) else list(tasks)
        learners = [learner] if isinstance(learner, Blur) else list(learner)
        for name, value in (
            ("members", members), ("tasks_per_step", tasks_per_step), ("batch_size", batch_size), ("query_size", query_size),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
        if not several or any(one.kind != several[0].kind for one in several):
            raise ValueError(
                "`tasks` must be one or more task distributions of one kind, classes or values. "
                f"Received: {', '.join(f'{one.name} ({one.kind})' for one in several)}"
            )
        if not learners or any(one.rule != learners[0].rule for one in learners):
            raise ValueError("`learner` must be one or more learners of the same rule: they share a genome.")
        rule = learners[0].rule
        if rule.feedback == "error" and several[0].kind == "values" and target_kind(loss_of(rule)) != "values":
            raise ValueError(
                "`learner` must have a rule whose loss is of values, such as the mean squared error, where the tasks are of "
                f"values. Received: loss={rule.loss!r}"
            )
        if rule.layers is not None and any(len(one.hidden) + 1 != rule.layers for one in learners):
            raise ValueError(f"`learner` must have {rule.layers} layers, as its rule has a genome for each of that many.")
        if clipnorm is not None and not clipnorm > 0:
            raise ValueError(f"`clipnorm` must be positive or None. Received: clipnorm={clipnorm!r}")
        if genome is not None and (genome.rule != rule or genome.population not in ((), (members,))):
            raise ValueError(
                f"`genome` must be of the learner's rule, single or a population of {members}. Received: {genome!r}"
            )
        estimator = dataclasses.replace(estimator or Unroll(), kind=several[0].kind)
        if isinstance(estimator, Evolution) and (members != 1 or (genome is not None and genome.population)):
            raise ValueError(
                "`members` must be 1 and `genome` a single one under Evolution, whose population is an argument of it. "
                f"Received: members={members}, genome={genome!r}"
            )
        self.families = [(one, other) for one in several for other in learners]
        self.weights_of_families = None if weights is None else [w / len(learners) for w in weights for _ in learners]
        self.estimator = estimator
        self.rule, self.members, self.tasks_per_step = rule, members, tasks_per_step
        self.batch_size, self.query_size, self.clipnorm, self.seed = batch_size, query_size, clipnorm, seed
        start = genome or Genome.random(
            rule, seed, std=std, synapse_update=-0.01, population=() if isinstance(estimator, Evolution) else (members,)
        )
        self.outer: dict[str, keras.Variable] = {}
        self.evolution: dict[str, keras.Variable] = {}
        if isinstance(estimator, Evolution):
            self.strategy = CMAES(to_vector(start).size, estimator.population, estimator.sigma)
            for name, value in self.strategy.init(to_vector(start))._asdict().items():
                self.evolution[name] = self._counter(f"evolution_{name}", np.asarray(value))
        else:
            for name, own in start.by_member().items():
                numbers = np.broadcast_to(own, (members, *own.shape[1:]))
                setattr(self, f"genome_{name}", self.add_weight(name=name, shape=numbers.shape, initializer="zeros"))
                self.outer[name] = getattr(self, f"genome_{name}")
                self.outer[name].assign(numbers)
        self.meta_step = self._counter("meta_step", np.zeros((), "int32"))
        self.drawn = self._counter("drawn", np.zeros(len(self.families), "int32"))
        self.member_score = self.add_weight(name="member_score", shape=(members,), initializer="zeros", trainable=False)
        self._carried = [self._room_to_carry(number) for number in range(len(self.families))]
        quality = "accuracy" if estimator.kind == "classes" else "r2"
        last = ("sigma", "best") if isinstance(estimator, Evolution) else ("gradient_norm",)
        self.trackers = {name: keras.metrics.Mean(name=name) for name in ("loss", quality, *last, "skipped")}
        self.quality = quality
        self.built = True
        self._streams: dict[int, Any] = {}
        self._compiled_steps: dict[tuple[int, int], Callable[..., Any]] = {}

    def _counter(self, name: str, value: np.ndarray) -> keras.Variable:
        """A variable that is saved and not trained."""
        made = self.add_weight(
            name=name, shape=value.shape, dtype=value.dtype.name, initializer="zeros", trainable=False,
            aggregation="only_first_replica",
        )  # fmt: skip
        made.assign(value)
        return made

    def _room_to_carry(self, number: int) -> Any:
        """Variables for what a family's estimates carry on: a nest, empty for most estimators."""
        if isinstance(self.estimator, Evolution) or self.estimator.horizon == self.estimator.steps:
            return ()
        of, learner = self.families[number]
        shape = (self.tasks_per_step, self.estimator.steps, self.batch_size)
        episodes = {"x": tf.zeros((*shape, of.features)), "y": tf.zeros((*shape, of.outputs))}
        outer = {name: tf.convert_to_tensor(value.value) for name, value in self.outer.items()}
        empty = self.estimator.nothing_carried(learner, outer, episodes)
        rooms = [
            self._counter(f"carried_{number}_{place}", leaf.numpy()) for place, leaf in enumerate(tf.nest.flatten(empty))
        ]
        setattr(self, f"carried_{number}", rooms)  # where Keras finds what to save
        return tf.nest.pack_sequence_as(empty, rooms)

    # What a person asks of it.

    def compile(self, optimizer: Any = None, *, jit_compile: bool = True, **kwargs: Any) -> None:
        """Configures meta-training.

        Args:
            optimizer: a Keras optimizer of the genome; Adam at 5e-4 by default, as in the paper's Table C.1. Evolution
                has none.
            jit_compile: whether XLA compiles a meta-step. It starts later and takes more memory; small networks and
                orthogonalised terms are several times as fast with it, wide ones on a CPU are not.
            **kwargs: `run_eagerly` and `steps_per_execution` are not used and refused.
        """
        if kwargs:
            raise ValueError(f"`compile` takes `optimizer` and `jit_compile` only. Received: {', '.join(kwargs)}")
        self.jit_step = bool(jit_compile)
        self._compiled_steps = {}
        if isinstance(self.estimator, Evolution):
            if optimizer is not None:
                raise ValueError(f"`optimizer` must be None under Evolution. Received: optimizer={optimizer!r}")
            super().compile(jit_compile=False)
            return
        optimizer = keras.optimizers.get(optimizer or keras.optimizers.Adam(5e-4))
        if optimizer.clipnorm or optimizer.clipvalue or optimizer.global_clipnorm:
            raise ValueError(
                "`optimizer` must not clip: members would share one norm. Use `clipnorm` of MetaTrainer, which clips each."
            )
        super().compile(optimizer=optimizer, jit_compile=False)
        optimizer.build(list(self.outer.values()))

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Mean over the epoch: loss, query accuracy (of values, R squared), gradient norm before clipping, share of members
        skipped; of evolution, loss and accuracy of the population, its best genome's accuracy, and sigma."""
        return list(self.trackers.values())

    @property
    def population(self) -> Genome:
        """All members, on a population axis; of evolution, the one genome at the centre."""
        if self.evolution:
            return self.genome
        return Genome.from_members(self.rule, {name: variable.numpy() for name, variable in self.outer.items()})

    @property
    def best(self) -> int:
        """The member with the highest running query accuracy in meta-training."""
        return int(np.argmax(self.member_score.numpy()))

    @property
    def genome(self) -> Genome:
        """The best member; of evolution, the mean of the distribution, its best guess."""
        if self.evolution:
            centre = from_vectors(self.rule, self.evolution["mean"].numpy()[None])
            return Genome(self.rule, {name: np.array(value)[0] for name, value in centre.items()})
        return self.population.member(self.best)

    def synchronize(self) -> None:
        """Copies the best member, with its optimizer state, over all others; of evolution, does nothing."""
        if self.evolution:
            return
        best = self.best
        for variable in [*self.outer.values(), *self._slots(), self.member_score]:
            variable.assign(np.repeat(variable.numpy()[best : best + 1], self.members, axis=0))

    def fit(
        self,
        epochs: int = 1,
        steps_per_epoch: int = 100,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Meta-trains; progress bar, callbacks and `verbose` as in Keras.

        Args:
            epochs: number of epochs, those before an interruption included.
            steps_per_epoch: meta-steps of each.
            checkpoint: a `.weights.h5` file that is written after each epoch; where it exists, meta-training goes on from
                it, to the same result as if it had never stopped.
            callbacks: Keras callbacks.
            **kwargs: for `keras.Model.fit`. Data are not among them: they are the tasks.

        Raises:
            ValueError: if the checkpoint is of another trainer, or was written within other epochs.
        """
        if not self.compiled:
            raise ValueError("The trainer must be compiled first: call `compile(optimizer=...)`.")
        callbacks = list(callbacks)
        if checkpoint is not None:
            path = os.fspath(checkpoint)
            if not path.endswith(".weights.h5"):
                raise ValueError(f"`checkpoint` must end with .weights.h5. Received: checkpoint={path!r}")
            if os.path.exists(path):
                self._restore(path)
            callbacks.append(_Checkpoint(path))
        done, rest = divmod(int(self.meta_step.numpy()), steps_per_epoch)
        if rest and checkpoint is not None:
            raise ValueError(
                f"`steps_per_epoch` must be what it was before: {int(self.meta_step.numpy())} meta-steps are done, no "
                f"whole number of epochs of {steps_per_epoch}."
            )
        self._streams = {}  # they start where the counters stand
        data = tf.data.Dataset.range(steps_per_epoch).repeat()
        kwargs = {"initial_epoch": done if checkpoint is not None else 0, **kwargs}
        return super().fit(
            data, epochs=epochs, steps_per_epoch=steps_per_epoch, shuffle=False, callbacks=callbacks, **kwargs
        )

    def _restore(self, path: str) -> None:
        try:
            self.load_weights(path)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"Checkpoint {path!r} does not fit this trainer, or is damaged: {error}") from error

    # One step.

    def make_train_function(self, force: bool = False) -> Callable[[Any], Any]:
        """Keras's hook: the function that `fit` calls for each step."""
        self.train_function = lambda iterator: self.meta_train_step()
        return self.train_function

    def family_of(self, step: int) -> int:
        """Which family the step of this number takes."""
        rng = np.random.default_rng([self.seed, step])
        if self.weights_of_families is None:
            return int(rng.integers(len(self.families)))
        return int(rng.choice(len(self.families), p=self.weights_of_families))

    def meta_train_step(self) -> dict[str, Array]:
        """One meta-step: episodes, gradient, clipping, update; returns the running metrics."""
        step = int(self.meta_step.numpy())
        family = self.family_of(step)
        seed = random.fold_in(random.seed_of(self.seed), 1_000_000_007, step)
        piece = int(self.drawn.numpy()[family]) % self._pieces
        episodes = self._episodes(family, piece)
        values = self._evolve(family, episodes, seed) if self.evolution else self._descend(family, episodes, seed, piece)
        for name, (value, weight) in values.items():
            self.trackers[name].update_state(value, weight)
        self.meta_step.assign(step + 1)
        self.drawn.assign(self.drawn + tf.one_hot(family, len(self.families), dtype="int32"))
        return {name: tracker.result() for name, tracker in self.trackers.items()}

    @property
    def _pieces(self) -> int:
        """Estimates that an episode is cut into."""
        return self.estimator.horizon // self.estimator.steps

    def _episodes(self, family: int, piece: int) -> Mapping[str, Array]:
        steps = self.estimator.steps
        if family not in self._streams or piece == 0:
            if family not in self._streams:
                stream = self.families[family][0].dataset(
                    self.seed + 7919 * family, steps=self.estimator.horizon, batch=self.batch_size, query=self.query_size,
                    start=int(self.drawn.numpy()[family]) // self._pieces * self.tasks_per_step,
                )  # fmt: skip
                self._streams[family] = [iter(stream.batch(self.tasks_per_step, drop_remainder=True)), None]
            self._streams[family][1] = next(self._streams[family][0])
        episodes = self._streams[family][1]
        if self._pieces == 1:
            return episodes
        cut = {name: episodes[name][:, piece * steps : (piece + 1) * steps] for name in ("x", "y")}
        return {**episodes, **cut}

    def _descend(
        self, family: int, episodes: Mapping[str, Array], seed: Array, piece: int
    ) -> dict[str, tuple[Array, Array]]:
        """A step of each member against its gradient."""
        gradients, loss, accuracy, norm, sound = self._step_of(family)(episodes, seed, tf.constant(piece == 0))
        self._apply(gradients, sound)
        usable = tf.cast(sound, loss.dtype)
        scored = tf.where(sound, accuracy, tf.zeros_like(accuracy))  # a member that diverged has the worst score
        rate = max(0.01, 1.0 / (int(self.meta_step.numpy()) + 1.0))
        self.member_score.assign((1.0 - rate) * self.member_score + rate * scored)
        means = {"loss": loss, self.quality: accuracy, "gradient_norm": norm}
        values = {name: (tf.where(sound, value, tf.zeros_like(value)), usable) for name, value in means.items()}
        return {**values, "skipped": (1.0 - usable, tf.ones_like(usable))}

    def _evolve(self, family: int, episodes: Mapping[str, Array], seed: Array) -> dict[str, tuple[Array, Array]]:
        """A generation."""
        state = CMAState(**{name: variable.value for name, variable in self.evolution.items()})
        new, fitness, loss, accuracy = self._step_of(family)(state, episodes, seed)
        for name, value in new._asdict().items():
            self.evolution[name].assign(value)
        usable = tf.cast(tf.math.is_finite(fitness), loss.dtype)
        rate = max(0.01, 1.0 / (int(self.meta_step.numpy()) + 1.0))
        means = {"loss": loss, self.quality: accuracy}
        sound = {name: (tf.where(usable > 0, value, tf.zeros_like(value)), usable) for name, value in means.items()}
        average = tf.math.divide_no_nan(tf.reduce_sum(sound[self.quality][0]), tf.reduce_sum(usable))
        self.member_score.assign((1.0 - rate) * self.member_score + rate * average)
        best = tf.reduce_max(tf.where(usable > 0, accuracy, tf.constant(-np.inf, accuracy.dtype)))
        some = tf.reduce_max(usable)
        sigma = tf.cast(new.sigma, loss.dtype)
        return {
            **sound,
            "best": (tf.where(some > 0, best, tf.zeros_like(best)), some),
            "sigma": (sigma, tf.ones_like(sigma)),
            "skipped": (1.0 - usable, tf.ones_like(usable)),
        }

    def unroll_for(self, steps: int) -> None:
        """Changes the number of unrolled steps, for a curriculum.

        Raises:
            ValueError: if the estimator cuts episodes into pieces.
        """
        if self._pieces > 1:
            raise ValueError(
                f"The unroll of {type(self.estimator).__name__} cannot change in meta-training: its learners are inside an "
                "episode."
            )
        self.estimator = dataclasses.replace(self.estimator, steps=steps)
        self._streams = {}

    def _step_of(self, family: int) -> Callable[..., Any]:
        key = (family, self.estimator.steps)
        if key not in self._compiled_steps:
            estimator = self.estimator
            if isinstance(estimator, Evolution):
                self._compiled_steps[key] = self._generation(family, estimator)
            else:
                self._compiled_steps[key] = self._gradient(family, estimator)
        return self._compiled_steps[key]

    def _generation(self, family: int, estimator: Evolution) -> Callable[..., Any]:
        """The compiled generation of a family: candidates, their scores, the new distribution."""
        learner, strategy, rule = self.families[family][1], self.strategy, self.rule

        def generation(state: CMAState, episodes: Mapping[str, Array], seed: Array) -> tuple[Any, ...]:
            candidates = strategy.ask(state, random.fold_in(seed, 2))
            fitness, loss, accuracy = estimator.score(learner, from_vectors(rule, candidates), episodes, seed)
            return strategy.tell(state, candidates, fitness), fitness, loss, accuracy

        return compiled(generation, jit_compile=self.jit_step)

    def _gradient(self, family: int, estimator: Estimator) -> Callable[..., Any]:
        """The compiled gradient of a family, each member's clipped on its own; writes what is carried."""
        learner, clipnorm = self.families[family][1], self.clipnorm
        rooms = self._carried[family]

        def gradient(
            outer: Mapping[str, Array], episodes: Mapping[str, Array], seed: Array, carried: Any, first: Array
        ) -> tuple[Any, ...]:
            found, carried = estimator(learner, outer, episodes, seed, carried, first)
            squares = [tf.reduce_sum(tf.square(g), axis=list(range(1, g.shape.rank))) for g in found.gradients.values()]
            norm = tf.sqrt(tf.add_n(squares))
            sound = tf.math.is_finite(found.loss) & tf.math.is_finite(norm)
            scale = tf.ones_like(norm) if clipnorm is None else tf.minimum(1.0, clipnorm / tf.maximum(norm, 1e-12))
            gradients = {}
            for name, g in found.gradients.items():
                shape = (self.members,) + (1,) * (g.shape.rank - 1)
                gradients[name] = tf.where(tf.reshape(sound, shape), g * tf.reshape(scale, shape), tf.zeros_like(g))
            return (gradients, found.loss, found.accuracy, norm, sound), tf.nest.flatten(carried)

        step = compiled(gradient, jit_compile=self.jit_step)

        def call(episodes: Mapping[str, Array], seed: Array, first: Array) -> tuple[Any, ...]:
            outer = {name: v.value for name, v in self.outer.items()}
            carried = tf.nest.map_structure(lambda room: tf.convert_to_tensor(room.value), rooms)
            found, kept = step(outer, episodes, seed, carried, first)
            for room, value in zip(tf.nest.flatten(rooms), kept, strict=True):
                room.assign(value)
            return found

        return call

    def _slots(self) -> list[keras.Variable]:
        """The optimizer's variables that have a value for each member."""
        shapes = {tuple(value.shape) for value in self.outer.values()}
        return [v for v in self.optimizer.variables if tuple(v.shape) in shapes]

    def _apply(self, gradients: Mapping[str, Array], sound: Array) -> None:
        """Updates each sound member; the others keep their numbers and their optimizer state."""
        touched = [*self.outer.values(), *self._slots()]
        whole = bool(tf.reduce_all(sound))
        before = [] if whole else [tf.identity(variable.value) for variable in touched]
        self.optimizer.apply([gradients[name] for name in self.outer], list(self.outer.values()))
        for variable, old in zip(touched, before, strict=not whole):
            mask = tf.reshape(sound, (self.members,) + (1,) * (old.shape.rank - 1))
            variable.assign(tf.where(mask, variable.value, old))


class _Checkpoint(keras.callbacks.Callback):
    """Writes everything that a resumed run needs after each epoch, to a temporary name first."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        temporary = self._path.removesuffix(".weights.h5") + ".tmp.weights.h5"
        self.model.save_weights(temporary, overwrite=True)
        os.replace(temporary, self._path)
