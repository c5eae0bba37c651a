"""Outer strategies: how a meta-step updates the outer parameters.

A strategy holds the outer parameters of all members as variables. `init` creates them, and `step`
updates them on the episodes of one family. `Descent` applies an estimated gradient with a Keras
optimizer. `Search` draws candidates from a normal distribution and adapts it to their scores
(CMA-ES). `MetaTrainer` uses only the interface `Strategy`.

A step is the program of one replica (`distribution`). It may read and assign variables, and it is
compiled as a whole.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.backend import Runner, compiled, leaves, numbers_of, pack, tree_map, value_of
from keras_blur.core import random
from keras_blur.distribution import Shard, mean, shard
from keras_blur.learners.base import MetaLearner
from keras_blur.meta.cma import CMAES, CMAState
from keras_blur.meta.estimator import NOTHING, Carried, Episodes, Estimator
from keras_blur.meta.evolution import Evolution, from_vectors, to_vector
from keras_blur.tasks.base import Tasks
from keras_blur.training.loop import apply_scaled, clips, parts, plain

if TYPE_CHECKING:
    from keras_blur.meta.trainer import MetaTrainer

Array = Any
Family = tuple[Tasks, MetaLearner]

_WHOLE = (keras.optimizers.Lamb, keras.optimizers.Adafactor, keras.optimizers.Muon)  # their updates depend on whole arrays
_CANDIDATES = 2  # folded into a step's seed to draw a generation's candidates


class Outcome(NamedTuple):
    """What a step reports.

    Attributes:
        logs: by name, values and their weights in the running mean.
        quality: query accuracy of each member, or R squared for tasks of values, `[members]`.
        sound: whether each member's loss and gradient were finite, boolean `[members]`.
    """

    logs: dict[str, tuple[Array, Array]]
    quality: Array
    sound: Array


class Strategy(abc.ABC):
    """A way to update outer parameters.

    Attributes:
        outer: by name, the variables of the outer parameters, `[members, ...]`; empty if the
            strategy keeps a distribution instead.
        logged: names of the logged values besides `loss`, the quality and `skipped`.
        deals_tasks: whether replicas share the tasks of a step. If not, each gets all of them.
    """

    logged: tuple[str, ...]
    deals_tasks = True

    def __init__(self, families: Sequence[Family], members: int, runner: Runner):
        self.families, self.members, self.runner = list(families), members, runner
        self.outer: dict[str, keras.Variable] = {}
        self._jit, self._eager = False, False

    @abc.abstractmethod
    def init(self, owner: MetaTrainer, start: Mapping[str, np.ndarray]) -> None:
        """Creates the variables.

        Args:
            owner: the trainer, which saves them.
            start: the initial outer parameters, `[members, ...]`.
        """

    def compile(self, optimizer: Any, start_optimizer: Any, *, jit: bool, eager: bool) -> tuple[Any, Any]:
        """Checks the optimizers of `MetaTrainer.compile` and returns them as objects.

        Args:
            optimizer: Keras optimizer of the outer parameters, or `None` for the default.
            start_optimizer: Keras optimizer of the initial weights, or `None`.
            jit: whether steps are compiled with XLA.
            eager: whether steps run uncompiled.
        """
        found = self._checked_optimizers(optimizer, start_optimizer)
        self._jit, self._eager = jit, eager
        return found

    @abc.abstractmethod
    def _checked_optimizers(self, optimizer: Any, start_optimizer: Any) -> tuple[Any, Any]:
        """The optimizers as objects. Raises a `ValueError` if one does not suit the strategy."""

    @property
    def copies(self) -> bool:
        """Whether some members began as copies of others, and get networks of their own."""
        return False

    @abc.abstractmethod
    def step(self, family: int, estimator: Any, episodes: Episodes, seed: Array, window: Array, copies: bool) -> Outcome:
        """One meta-step, the program of a replica.

        Args:
            family: index of the family.
            estimator: the estimator, with the current number of unrolled steps.
            episodes: the episodes of this replica.
            seed: seed of the step.
            window: index of the truncation window, an int32 scalar.
            copies: the property `copies` when the program was made.
        """

    @abc.abstractmethod
    def parameters(self, member: int) -> dict[str, np.ndarray]:
        """The outer parameters of a member."""

    @abc.abstractmethod
    def population(self) -> dict[str, np.ndarray]:
        """The outer parameters of all members, `[members, ...]`."""

    @abc.abstractmethod
    def synchronize(self, best: int) -> None:
        """Copies the best member, with its optimizer state, over all others.

        From then on, each member has initial networks of its own, so that copies learn apart.
        """

    @abc.abstractmethod
    def optimizers(self) -> dict[str, tuple[keras.optimizers.Optimizer, list[keras.Variable]]]:
        """The optimizers by name, with the variables that each one updates."""


class Descent(Strategy):
    """Gradient descent with an estimated gradient, independently for each member.

    Args:
        families: the tasks and the learner of each family.
        members: number of independent sets of outer parameters.
        runner: the trainer's runner.
        clipnorm: maximum norm of a member's gradient; `None` for no clipping.
        quality: name of the logged quality.
    """

    logged = ("gradient_norm",)

    def __init__(self, families: Sequence[Family], members: int, runner: Runner, clipnorm: float | None, quality: str):
        super().__init__(families, members, runner)
        self.clipnorm, self.quality = clipnorm, quality
        self._carried: list[Any] = []
        self._given: dict[str, keras.optimizers.Optimizer] = {}

    def init(self, owner: MetaTrainer, start: Mapping[str, np.ndarray]) -> None:
        for name, numbers in start.items():
            own = f"outer_{name.replace('/', '.')}"  # Keras's names have no slashes
            made = owner.add_weight(name=own, shape=numbers.shape, initializer="zeros")
            made.assign(numbers)
            self.outer[name] = made
        self.networks = owner.counter("networks", _copies_before(start))
        self._carried = [self._carried_variables(owner, number) for number in range(len(self.families))]

    def _carried_variables(self, owner: MetaTrainer, number: int) -> Any:
        """The tree of variables for the carried state of a family, empty for most estimators."""
        estimator = owner.estimator
        if not isinstance(estimator, Estimator) or not estimator.carries:
            return NOTHING
        of, learner = self.families[number]
        shape = (owner.meta_batch_size, estimator.steps, owner.batch_size)
        episodes = {name: ops.zeros((*shape, size), "float32") for name, size in (("x", of.features), ("y", of.outputs))}
        outer = {name: value_of(variable) for name, variable in self.outer.items()}
        empty = estimator.nothing_carried(learner, outer, episodes)
        slots = [
            owner.counter(f"carried_{number}_{place}", ops.convert_to_numpy(leaf))
            for place, leaf in enumerate(leaves(empty))
        ]
        return pack(empty, slots)

    def _checked_optimizers(self, optimizer: Any, start_optimizer: Any) -> tuple[Any, Any]:
        """The optimizers as objects; by default Adam with a learning rate of 5e-4.

        Raises:
            ValueError: if an optimizer clips gradients or mixes members, both arguments are the
                same object, or there is a `start_optimizer` and no start is learned.
        """
        optimizer = keras.optimizers.get(optimizer or keras.optimizers.Adam(5e-4))
        start_optimizer = None if start_optimizer is None else keras.optimizers.get(start_optimizer)
        for one in filter(None, (optimizer, start_optimizer)):
            whole = [type(own).__name__ for own in parts(one) if isinstance(own, _WHOLE)]
            if self.members > 1 and whole:
                raise ValueError(f"`optimizer` must not mix members, as {whole[0]} does. Received: members={self.members}")
            if clips(one):
                raise ValueError(
                    "`optimizer` must not clip: members would share one norm. Use `clipnorm` of MetaTrainer, which clips "
                    "each member."
                )
        if start_optimizer is not None and plain(start_optimizer) is plain(optimizer):
            raise ValueError("`start_optimizer` must be a different object from `optimizer`. Received: the same one twice.")
        starts = [name for name in self.outer if name.startswith("start_")]
        if start_optimizer is not None and not starts:
            raise ValueError("`start_optimizer` must be None: the learner's start is not learned.")
        given = {"optimizer": optimizer, "start_optimizer": start_optimizer}
        self._given = {name: one for name, one in given.items() if one is not None}
        return optimizer, start_optimizer

    def _groups(self) -> list[tuple[str, keras.optimizers.Optimizer, list[str]]]:
        """Each optimizer with its name and the names of the outer parameters that it updates."""
        apart = "start_optimizer" in self._given
        starts = [name for name in self.outer if apart and name.startswith("start_")]
        names = {"optimizer": [name for name in self.outer if name not in starts], "start_optimizer": starts}
        return [(name, one, names[name]) for name, one in self._given.items() if names[name]]

    def optimizers(self) -> dict[str, tuple[keras.optimizers.Optimizer, list[keras.Variable]]]:
        return {name: (one, [self.outer[own] for own in names]) for name, one, names in self._groups()}

    def parameters(self, member: int) -> dict[str, np.ndarray]:
        return {name: value[member] for name, value in self.population().items()}

    def population(self) -> dict[str, np.ndarray]:
        return {name: numbers_of(variable) for name, variable in self.outer.items()}

    def synchronize(self, best: int) -> None:
        for variable in [*self.outer.values(), *self.slots()]:
            variable.assign(np.repeat(numbers_of(variable)[best : best + 1], self.members, axis=0))
        self.networks.assign(np.arange(self.members, dtype="int32"))

    @property
    def copies(self) -> bool:
        return bool(numbers_of(self.networks).any())

    def slots(self) -> list[keras.Variable]:
        """The optimizer variables that have a value for each member."""
        shapes = {tuple(value.shape) for value in self.outer.values()}
        return [v for _, optimizer, _ in self._groups() for v in optimizer.variables if tuple(v.shape) in shapes]

    def step(
        self, family: int, estimator: Estimator, episodes: Episodes, seed: Array, window: Array, copies: bool
    ) -> Outcome:
        outer = {name: value_of(variable) for name, variable in self.outer.items()}
        first = ops.equal(window, 0)
        episodes = estimator.part(episodes, window)
        mine, slots = shard(), self._carried[family]
        carried = tree_map(value_of, slots)
        common, learners = (seed, carried.directions, first), mine.part(carried.learners, axis=1)
        numbered = (outer, [value_of(self.networks)] if copies else [])
        measured, learners = self.runner.split(self._of_part(family, estimator), common, numbered, episodes, learners)
        found, directions = estimator.combine(outer, mean(measured), seed, carried, first)
        kept = Carried(mine.whole(learners, axis=1), directions)
        for slot, value in zip(leaves(slots), leaves(kept), strict=True):
            slot.assign(value)
        squares = {n: ops.sum(ops.square(g), axis=tuple(range(1, len(g.shape)))) for n, g in found.gradients.items()}
        norm = ops.sqrt(sum(squares.values()))
        sound = ops.logical_and(ops.isfinite(found.loss), ops.isfinite(norm))
        clipped: dict[str, Array] = {}
        for _, _, names in self._groups():
            length = ops.sqrt(sum(squares[name] for name in names))
            scale = ops.ones_like(length)
            if self.clipnorm is not None:
                scale = ops.minimum(scale, self.clipnorm / ops.maximum(length, 1e-12))
            clipped |= {name: of_members(scale, found.gradients[name]) * found.gradients[name] for name in names}
        self.apply(clipped, sound)
        means = {"loss": found.loss, self.quality: found.accuracy, "gradient_norm": norm}
        logs = {name: counted(value, sound) for name, value in means.items()}
        return Outcome({**logs, "skipped": skipped(sound, norm)}, found.accuracy, sound)

    def _of_part(self, family: int, estimator: Estimator) -> Any:
        """A function for `Runner.split`: the statistics of some tasks and members, compiled."""

        def of_part(tasks: tuple[Array, int], members: tuple[Array, int], *trees: Any) -> Any:
            def local(task: Array, member: Array, common: Any, numbered: Any, episodes: Episodes, learners: Any) -> Any:
                (seed, directions, first), in_blocks = common, self.runner.in_blocks
                outer, networks = numbered
                own = Shard(member, members[1], in_blocks) if members[1] > 1 else None
                mine = Shard(task, tasks[1], in_blocks, own, networks[0] if networks else None)
                carried = Carried(learners, directions)
                return estimator.local_estimate(self.families[family][1], outer, episodes, seed, carried, first, mine)

            return (local if self._eager else compiled(local, jit_compile=self._jit))(tasks[0], members[0], *trees)

        return of_part

    def apply(self, gradients: Mapping[str, Array], sound: Array) -> None:
        """Updates the sound members. The others keep their parameters and optimizer state.

        A step without a sound member does not advance the optimizers' counters either. Every
        replica already has the full gradient, but Keras optimizers sum over replicas. Each replica
        therefore contributes the gradient divided by the number of replicas.
        """
        own = {id(variable) for variable in [*self.outer.values(), *self.slots()]}
        touched = [*self.outer.values(), *(v for _, optimizer, _ in self._groups() for v in optimizer.variables)]
        before = [value_of(variable) for variable in touched]
        shares = {name: ops.where(of_members(sound, g), g, 0.0) / self.runner.replicas for name, g in gradients.items()}
        for _, optimizer, names in self._groups():
            apply_scaled(optimizer, [shares[name] for name in names], [self.outer[name] for name in names])
        for variable, old in zip(touched, before, strict=True):
            changed = of_members(sound, old) if id(variable) in own else ops.any(sound)
            variable.assign(ops.where(changed, value_of(variable), old))


class Search(Strategy):
    """CMA-ES on the vector of all outer parameters.

    Args:
        families: the tasks and the learner of each family.
        runner: the trainer's runner.
        options: population size and initial standard deviation.
        quality: name of the logged quality.
    """

    logged = ("sigma", "best")
    deals_tasks = False

    def __init__(self, families: Sequence[Family], runner: Runner, options: Evolution, quality: str):
        super().__init__(families, 1, runner)
        self.options, self.quality = options, quality
        self.state: dict[str, keras.Variable] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def init(self, owner: MetaTrainer, start: Mapping[str, np.ndarray]) -> None:
        centre = {name: own[0] for name, own in start.items()}
        self.shapes = {name: own.shape for name, own in centre.items()}
        self.search = CMAES(to_vector(centre).size, self.options.population, self.options.sigma)
        for name, value in self.search.init(to_vector(centre))._asdict().items():
            self.state[name] = owner.counter(f"evolution_{name}", ops.convert_to_numpy(value))

    def _checked_optimizers(self, optimizer: Any, start_optimizer: Any) -> tuple[Any, Any]:
        """None, since CMA-ES uses no optimizer. Raises a `ValueError` if one is given."""
        if optimizer is not None or start_optimizer is not None:
            raise ValueError(f"`optimizer` must be None under Evolution. {arguments.received('optimizer', optimizer)}")
        return None, None

    def synchronize(self, best: int) -> None:
        """Does nothing, since there is only one distribution."""

    def optimizers(self) -> dict[str, tuple[keras.optimizers.Optimizer, list[keras.Variable]]]:
        return {}

    def parameters(self, member: int) -> dict[str, np.ndarray]:
        """The mean of the search distribution."""
        return {name: value[0] for name, value in self.population().items()}

    def population(self) -> dict[str, np.ndarray]:
        centre = from_vectors(self.shapes, numbers_of(self.state["mean"])[None])
        return {name: ops.convert_to_numpy(value) for name, value in centre.items()}

    def step(
        self, family: int, estimator: Evolution, episodes: Episodes, seed: Array, window: Array, copies: bool
    ) -> Outcome:
        """Draws candidates, scores them and updates the distribution."""
        del window, copies
        learner = self.families[family][1]

        def score(common: tuple[Episodes, Array], candidates: Array) -> Any:
            return estimator.score(learner, from_vectors(self.shapes, candidates), *common)

        ask, tell = self.search.ask, self.search.tell
        if not self._eager:
            score, ask, tell = (compiled(one, jit_compile=self._jit) for one in (score, ask, tell))
        state = CMAState(**{name: value_of(variable) for name, variable in self.state.items()})
        candidates = ask(state, random.fold_in(seed, _CANDIDATES))
        mine, population = shard(), estimator.population
        shares = self.runner.shares
        dealt = np.arange(-(-population // shares) * shares) % population  # repeats some to fill the shards
        own = mine.part(ops.take(candidates, dealt, axis=0), axis=0)
        scores = self.runner.each(score, (episodes, seed), own)
        fitness, loss, quality = (value[:population] for value in mine.whole(scores, axis=0))
        new = tell(state, candidates, fitness)
        for name, value in new._asdict().items():
            self.state[name].assign(value)
        sound = ops.isfinite(fitness)
        sigma = ops.cast(new.sigma, loss.dtype)
        logs = {"loss": counted(loss, sound), self.quality: counted(quality, sound)}
        total, count = (ops.sum(one) for one in logs[self.quality])
        best = ops.max(ops.where(ops.logical_and(sound, ops.isfinite(quality)), quality, -np.inf))
        logs |= {"best": counted(best, ops.isfinite(best)), "sigma": (sigma, ops.ones_like(sigma))}
        logs["skipped"] = skipped(sound, loss)
        return Outcome(logs, ops.reshape(total / count, (1,)), ops.reshape(ops.any(sound), (1,)))


def _copies_before(outer: Mapping[str, np.ndarray]) -> np.ndarray:
    """For each member, how many members before it are equal to it, int32 `[members]`."""
    members = range(len(next(iter(outer.values()))))

    def equal(one: int, other: int) -> bool:
        return all(np.array_equal(value[one], value[other]) for value in outer.values())

    return np.array([sum(equal(one, other) for other in range(one)) for one in members], "int32")


def counted(value: Array, sound: Array) -> tuple[Array, Array]:
    """Values and their weights in a running mean. Unsound or non-finite values have weight 0."""
    counts = ops.logical_and(sound, ops.isfinite(value))
    return ops.where(counts, value, 0.0), ops.cast(counts, value.dtype)


def skipped(sound: Array, like: Array) -> tuple[Array, Array]:
    """The unsound entries as 1 and the others as 0, in the dtype of `like`, and weights of 1."""
    return ops.cast(ops.logical_not(sound), like.dtype), ops.ones_like(ops.cast(sound, like.dtype))


def of_members(value: Array, like: Array) -> Array:
    """Reshapes `[members]` so that it broadcasts with `like`, `[members, ...]`."""
    return ops.reshape(value, (-1,) + (1,) * (len(like.shape) - 1))
