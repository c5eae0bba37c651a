"""Odd arguments for `fuzz.py`: public functions and classes, called with one to three odd values
each."""

from __future__ import annotations

import dataclasses
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from fuzz_case import Case

import keras_blur as kb
from keras_blur import bilevel, random

NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 5, True, 0.0, 0.5, 1.0, 1.5, -0.5, 1e9, float("nan"), float("inf"), "2", None, [2], (),
    np.int64(2), np.float32(0.5), "nonsense",
)  # fmt: skip
NAMES: tuple[Any, ...] = (
    "",
    "nonsense",
    "none",
    "tanh",
    "relu",
    "linear",
    "weights",
    "mean",
    "sum",
    "both",
    None,
    3,
    True,
    ("tanh",),
)
FLAGS: tuple[Any, ...] = (True, False, np.True_, 0, 1, None, "yes", 2.5)
SEQUENCES: tuple[Any, ...] = (
    (),
    (0,),
    (3,),
    (3, 2),
    [4],
    (-1,),
    (2.5,),
    ("a",),
    (None,),
    (True,),
    3,
    "3",
    None,
    np.array([2, 3]),
    (np.int64(3),),
)
OBJECTS: tuple[Any, ...] = (None, 3, "nonsense", (), [], {}, object, np.zeros(2))

# What two members of a choice may be, beside what stands in `NAMES`.
CHOICES = (
    "additive", "multiplicative", "multiplicative_after_first", "untied", "tied", "tied_updates", "fixed", "signs", "own",
    "forward", "backward", "batch", "units", "activations", "exp_update", "stored", "effective", "power", "labels",
    "error", "mse", "sigmoid", "cross_entropy", "squared", "binary", "auto", "classes", "values", "bits", "exact",
    "first", "reptile", "leap", "maml", "uniform", "flip", "meta", "model", "normal", "rademacher", "xor", "circles",
    "digits", "float32", "bfloat16",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that is called.

    Attributes:
        name: what a person calls it.
        call: the function or class.
        base: valid arguments.
        use: uses the result, and raises where it does not work.
        pools: values for arguments that the default's type does not tell.
    """

    name: str
    call: Callable[..., Any]
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    use: Callable[[Any], Any] = lambda made: None
    pools: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    def arguments(self) -> dict[str, Sequence[Any]]:
        """The arguments by name, with the values that each may get."""
        found = {}
        for name, parameter in inspect.signature(self.call).parameters.items():
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name == "data_dir":
                continue
            default = self.base.get(name, parameter.default)
            found[name] = self.pools.get(name) or _pool(default, str(parameter.annotation))
        return found


def _pool(default: Any, annotation: str) -> Sequence[Any]:
    if isinstance(default, bool):
        return FLAGS
    if isinstance(default, (int, float)) or annotation.startswith(("int", "float")):
        return NUMBERS
    if isinstance(default, str) or annotation.startswith("str"):
        return (*NAMES, *CHOICES)
    if isinstance(default, (tuple, list)) or "tuple" in annotation or "Sequence" in annotation:
        return SEQUENCES
    return OBJECTS


def cases(number: int, seed: int) -> Iterator[Case]:
    """Combinations of arguments, the targets in turn.

    Args:
        number: how many.
        seed: random seed; case i of a seed is always the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        chosen = targets(folder)
        for place in range(number):
            yield _case(chosen[place % len(chosen)], np.random.default_rng([seed, place]))


def _case(target: Target, rng: np.random.Generator) -> Case:
    pools = target.arguments()
    count = min(len(pools), int(rng.integers(1, 4)))
    changed = {}
    for name in rng.choice(list(pools), count, replace=False):
        pool = pools[name]
        changed[str(name)] = pool[int(rng.integers(len(pool)))]

    def run() -> None:
        target.use(target.call(**{**target.base, **changed}))

    shown = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    # A message names an argument, or what the user knows it by.
    return Case(target.name, f"{target.name}({shown})", run, tuple(f"`{name}`" for name in pools))


def targets(folder: str) -> list[Target]:
    """What is called; files go into a folder."""
    tasks, learners, meta, genomes = kb.tasks, kb.learners, kb.meta, kb.genomes
    sgd = keras.optimizers.SGD(0.01)
    xor, sines = tasks.functions("xor"), tasks.sines()
    labels = np.arange(12) % 3
    rates = {"optimizer": (sgd, keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1, momentum=0.9), *OBJECTS)}

    def dense() -> keras.Sequential:
        return keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])

    def learn(learner: Any) -> None:
        """One step on a task of classes or values."""
        kind, outputs = ("values", 1) if getattr(learner, "loss", "") == "squared" else ("classes", 2)
        learner.check(kind, outputs)
        outer = {name: tf.constant(value[:, None]) for name, value in learner.draw(0, 1, 2, outputs).items()}
        state = learner.init(outer, random.seed_of(0), 2, outputs, (1, 1))
        x, y = tf.ones((1, 1, 4, 2)), tf.tile(tf.constant([[1.0, -1.0][:outputs]]), (4, 1))[None, None]
        state, _ = learner.step(outer, state, x, y)
        assert learner.predict(outer, state, x).shape == (1, 1, 4, outputs), "a wrong shape"

    def plain(learner: Any) -> None:
        """One step of a learner without outer parameters."""
        state = learner.init({}, random.seed_of(0), 2, 2, (1, 1))
        learner.step({}, state, tf.ones((1, 1, 4, 2)), tf.constant([[[[1.0, -1.0]] * 4]]))

    def online(learner: Any) -> None:
        outer = {name: tf.constant(value[:, None]) for name, value in learner.draw(0, 1, 8, 4).items()}
        state = learner.init(outer, random.seed_of(0), 8, 4, (1, 1))
        assert learner.predict(outer, state, tf.ones((1, 1, 3, 8))).shape == (1, 1, 3, 4), "a wrong shape"

    def rule(made: Any) -> None:
        genome = kb.Genome.random(made, 0)
        assert kb.Genome.from_json(genome.to_json()) == genome, "another genome"
        if made.layers is None and not made.keep_neurons:
            learn(learners.Blur((3,), made))

    def genome(made: Any) -> None:
        assert kb.Genome.from_json(made.to_json()) == made, "another genome"

    def episode(made: Any) -> None:
        found = made.episode(random.seed_of(0), steps=1, batch=2, query=2)
        assert all(np.isfinite(np.array(value)).all() for value in found.values()), "not finite"

    def estimator(made: Any) -> None:
        assert dataclasses.replace(made) == made, "another estimator"

    def meta_train(trainer: Any) -> None:
        trainer.compile(keras.optimizers.Adam(1e-3), jit_compile=False)
        trainer.fit(1, 1, verbose=0)

    def bilevel_train(trainer: Any) -> None:
        own = keras.optimizers.SGD(0.01), keras.optimizers.SGD(0.01)
        trainer.compile(*own, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
        x, y = np.ones((12, 2), "float32"), labels
        trainer.fit(x, y, meta_data=(x, y), batch_size=4, verbose=0)

    def layer(made: Any) -> None:
        assert made(np.ones((2, 5), "float32")).shape == (2, made.units), "a wrong shape"

    def fit(model: Any) -> None:
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(np.ones((4, 2), "float32"), np.zeros(4, int), verbose=0)

    def chain(layers: Any, genome: Any) -> Any:
        return kb.Sequential(layers, genome=genome)

    two = [keras.Input((2,)), kb.layers.Dense(3)]
    stages: dict[str, Any] = {
        "stages": ([(0, 1)], [(0, 1), (2, 3)], [(1, 1)], [], [(0, 0)], [(0, 1), (0, 2)], [(0,)], 3, None, "ab", [(0, 1.5)])
    }
    both = {"steps": 2, "episode_steps": 4}
    small = {"batch_size": 4, "query_size": 4, "estimator": meta.Unroll(1)}
    saved = os.path.join(folder, "learned.json")
    return [
        Target("Rule", kb.Rule, {}, rule, {"loss": ("mse", "nonsense", "kl_divergence", None, 3)}),
        Target("Genome.random", kb.Genome.random, {"rule": kb.Rule(), "seed": 0}, genome),
        Target("genomes.backprop", genomes.backprop, {}, genome, {"loss": ("mse", "nonsense", None, 3)}),
        Target(
            "genomes.load",
            genomes.load,
            {"name": "backprop"},
            genome,
            {"name": ("functions", "nonsense", "", 3, None, folder, ())},
        ),
        Target("layers.Dense", kb.layers.Dense, {"units": 3}, layer),
        Target("Sequential", chain, {"layers": two, "genome": genomes.backprop()}, lambda made: None),
        Target("convert", kb.convert, {"model": dense(), "genome": genomes.backprop()}, fit),
        Target(
            "tasks.functions",
            tasks.functions,
            {"names": "xor"},
            episode,
            {"names": ("xor", "circles", ("xor",), (), "no", 3, None)},
        ),
        Target("tasks.images", tasks.images, {"name": "digits"}, episode),
        Target("tasks.episodes", tasks.episodes, {"name": "digits", "ways": 3}, episode),
        Target("tasks.classes", tasks.classes, {}, episode),
        Target("tasks.pose", tasks.pose, {}, episode),
        Target("tasks.sines", tasks.sines, {}, episode),
        Target("tasks.remember", tasks.remember, {"units": 4}, episode),
        Target("tasks.noisy_labels", tasks.noisy_labels, {"y": labels, "classes": 3, "share": 0.5}),
        Target("learners.Blur", learners.Blur, {"network": (3,)}, learn, {"rule": (kb.Rule(), None, 3, "x")}),
        Target("learners.MAML", learners.MAML, {"optimizer": sgd, "network": (3,)}, learn, rates),
        Target("learners.BaselineLearner", learners.BaselineLearner, {"optimizer": sgd, "network": (3,)}, plain, rates),
        Target("learners.Prototypes", learners.Prototypes, {"network": (3,), "dimensions": 2}, learn),
        Target("learners.NeuralProcess", learners.NeuralProcess, {"network": (3,), "representation": 2}, learn),
        Target("learners.OnlineRule", learners.OnlineRule, {"hidden": 3}, online),
        Target("learners.warped", learners.warped, {"features": 2, "hidden": (3,), "outputs": 2}),
        *(
            Target(
                f"meta.{one.__name__}",
                one,
                both if "episode_steps" in inspect.signature(one).parameters else {"steps": 2},
                estimator,
            )
            for one in (
                meta.Unroll,
                meta.TruncatedUnroll,
                meta.ES,
                meta.PES,
                meta.WarpGrad,
                meta.OfflineWarpGrad,
                meta.Evolution,
            )
        ),
        *(
            Target(f"bilevel.{one.__name__}", one, {}, estimator)
            for one in (
                bilevel.OneStep,
                bilevel.FiniteDifference,
                bilevel.EvoGrad,
                bilevel.LayerwiseMetaGradient,
                bilevel.GradientSampler,
                bilevel.PseudoCleanSplit,
            )
        ),
        Target("bilevel.SampleWeightNet", bilevel.SampleWeightNet),
        Target("bilevel.LearnedRotation", bilevel.LearnedRotation),
        Target("bilevel.Hyperparameters", bilevel.Hyperparameters, {"weight_decay": 1e-3}),
        Target("meta.UnrollCurriculum", meta.UnrollCurriculum, {"stages": [(0, 1)]}, pools=stages),
        Target(
            "meta.MetaValidate",
            meta.MetaValidate,
            {"tasks": xor},
            pools={"path": (saved, None, 3, "/no/such/folder/a.json")},
        ),
        Target(
            "meta.MetaTrainer",
            meta.MetaTrainer,
            {"tasks": xor, "learner": learners.Blur((3,)), **small},
            meta_train,
            {
                "tasks": (xor, sines, [xor, xor], [xor, sines], *OBJECTS),
                "learner": (learners.Blur((2,)), [learners.Blur((2,)), learners.Blur((4,))], *OBJECTS),
                "estimator": (meta.ES(1, antithetic_pairs=2), meta.TruncatedUnroll(1, episode_steps=2), *OBJECTS),
            },
        ),
        Target(
            "bilevel.BilevelTrainer",
            bilevel.BilevelTrainer,
            {"model": dense(), "meta_model": bilevel.SampleWeightNet(3)},
            bilevel_train,
            {"estimator": (bilevel.OneStep(), bilevel.EvoGrad(), *OBJECTS)},
        ),
    ]
