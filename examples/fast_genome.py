"""
Title: A genome with nothing to tune
Description: A search by CMA-ES for better numbers of the genome `fast`, over networks, batches,
horizons and tasks of many kinds. The genome in the package has the numbers that the search begins
with.
Source: "The CMA Evolution Strategy: A Tutorial" (Hansen, 2016) on the numbers of a rule of
`keras_blur.core.terms`; variety after "Training Learned Optimizers with Randomly Initialized
Learned Optimizers" (Metz et al., 2021), which also standardises a score by that of a reference on
the same task.

    python examples/fast_genome.py [--quick] [--data_dir DIR] [--seed 0] [--generations 36]
        [--population 10] [--seeds 3] [--state FILE.json] [--genome FILE.json] [--ablations]
"""

import dataclasses
import functools
import json
import math
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags
from keras import ops

from keras_blur import files, genomes, layers, meta, random, tasks
from keras_blur.backend import compiled, tree_map
from keras_blur.core import feedback, network
from keras_blur.core.genome import Genome
from keras_blur.models.reading import read
from keras_blur.tasks.datasets import load_images
from keras_blur.tasks.images import resized

_QUICK = flags.DEFINE_boolean("quick", False, "Small numbers everywhere, and no images.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets, with omniglot.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the search; settings and validation draw from others.", lower_bound=0)
_GENERATIONS = flags.DEFINE_integer("generations", 36, "Generations in all.", lower_bound=1)
_POPULATION = flags.DEFINE_integer("population", 10, "Candidates of a generation.", lower_bound=4)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Fresh seeds of each setting of the report.", lower_bound=2)
_STATE = flags.DEFINE_string("state", None, "File that the search is saved to and goes on from.")
_GENOME = flags.DEFINE_string("genome", None, "File for the genome.")
_ABLATIONS = flags.DEFINE_boolean("ablations", False, "Also score variants of what was found.")

"""
## The question

If a rule uses only the direction of a whitened, normalised Hebbian term, a handful of numbers
remain to be chosen: gate, the power and the beginning of the gate's decay, damping of the
whitening, breadth of the average that predicts. Set by hand on one kind of task they may suit that
one. Here they are evolved on many settings at once: images, tables and functions; 1 to 8 hidden
layers of 8 to 256, convolutions, batch normalisation, residual sums; batches of 16 to 512; 100 to
1,000 steps. In each generation every candidate learns the same tasks from the same synapses with
the same batches.

A candidate's score in a setting is its gain: the relative reduction of the mean error over the
steps 1, 2, 5, 10, ... against the numbers set by hand. So no setting dominates, and early steps
count as much as late ones. The mean of the distribution is scored on other settings, of other
alphabets, functions, tables and networks, and the best is kept; the report has fresh seeds of
these. No image set but Omniglot chooses anything.

The package keeps the numbers set by hand. Those of 35 generations are better in six of the report's
nine groups, by 3 % of the error in all, but worse on functions, in deep networks, and where a small
set is learned for very long, which no setting of the search does.
"""

MARKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)
# Which numbers of the genome are searched: the value set by hand, and what one unit of the search
# is worth.
SEARCHED = {
    "log_gate": (math.log(0.2), 0.5),
    "decay_power": (0.5, 0.15),
    "log_decay_steps": (math.log(4.0), 1.0),
    "log_damping": (math.log(0.3), 0.8),
    "log_averaging": (math.log(8.0), 0.7),
}
KINDS = ("convolution", "scale", "last", "hidden")  # kinds of layers, for the ablations


def rule():
    """Backpropagation with relu, whitened terms of lifted singular values, a gate that falls, slow
    synapses."""
    start = genomes.backprop(1.0, "relu", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    added = {"whitening": True, "whitening_positions": 16, "whitening_rows": 128}
    added |= {"normalize_term": "orthogonal", "orthogonal_iterations": 2, "term_rank": 256}
    return start.with_rule(start.rule.replace(**added, update_decay="power", slow_synapses=True))


def genome_of(vector):
    """The genome at a point of the search; the origin is set by hand."""
    found = {name: at + unit * z for (name, (at, unit)), z in zip(SEARCHED.items(), vector, strict=True)}
    found["synapse_update"] = -math.exp(found.pop("log_gate"))
    return rule().replace(**{name: np.float32(value) for name, value in found.items()})


def by_kind(genome, **changes):
    """The numbers that vary, `[kinds]`; a change maps a kind to a factor, or gives one for all."""
    numbers = {name: np.full(len(KINDS), genome.arrays[name], np.float32) for name in NUMBERS}
    numbers["damping"] = np.exp(numbers.pop("log_damping"))
    for name, change in changes.items():
        factors = change if isinstance(change, dict) else dict.fromkeys(KINDS, change)
        for kind, factor in factors.items():
            numbers[name][KINDS.index(kind)] *= factor
    numbers["log_damping"] = np.log(numbers.pop("damping"))
    return numbers


NUMBERS = ("synapse_keep", "synapse_update", "decay_power", "log_decay_steps", "log_damping", "log_averaging")

"""
## Tasks

Each is a function of a random generator that gives training and test arrays of fixed sizes.
"""


@functools.cache
def omniglot(data_dir):
    """Omniglot at 28x28, ink 1 on 0: images `[n, 28, 28, 1]`, their character and their
    alphabet."""

    def convert(x):
        return (255.0 - 255.0 * resized(x[..., :1], 28, 255.0)).astype(np.uint8)

    images = load_images("omniglot", data_dir, group="alphabet", convert=convert)
    x, y = np.concatenate([images.x_train, images.x_test]), np.concatenate([images.y_train, images.y_test])
    return x, y, images.groups[y]


def shown(x, size, flat):
    """Images of a size, as rows or not."""
    x = resized(x, size, 255.0)
    return x.reshape(len(x), -1) if flat else x


def characters(held, size, classes, flat, *, rng):
    """Characters of all alphabets, 15 images of each to learn from and 5 to be tested on."""
    x, y, alphabet = omniglot(_DATA_DIR.value)
    known = np.unique(y[(alphabet % 3 == 2) == held])
    chosen = [rng.permutation(np.flatnonzero(y == one)) for one in rng.choice(known, classes, replace=False)]
    train, test = (np.concatenate([one[part] for one in chosen]) for part in (slice(15), slice(15, 20)))
    label = np.arange(classes)
    return (shown(x[train], size, flat), label.repeat(15)), (shown(x[test], size, flat), label.repeat(5))


def alphabets(held, size, classes, each, flat, *, rng):
    """Which alphabet an image is of: `each` images of each to learn from and 80 to be tested on."""
    x, _, alphabet = omniglot(_DATA_DIR.value)
    known, count = np.unique(alphabet, return_counts=True)
    of = rng.choice(known[((known % 3 == 2) == held) & (count >= each + 80)], classes, replace=False)
    chosen = [rng.permutation(np.flatnonzero(alphabet == one)) for one in of]
    train, test = (np.concatenate([one[part] for one in chosen]) for part in (slice(each), slice(-80, None)))
    label = np.arange(classes)
    return (shown(x[train], size, flat), label.repeat(each)), (shown(x[test], size, flat), label.repeat(80))


def function(name, count=1000, *, rng):
    """A function of the plane."""
    seed, family = random.seed_of(int(rng.integers(2**31))), tasks.functions(name)
    pairs = [family.examples(seed, n, split) for n, split in ((count, "train"), (1000, "test"))]
    return tuple((ops.convert_to_numpy(x), np.argmax(ops.convert_to_numpy(y), axis=1)) for x, y in pairs)


def split_of(rng, x, y, classes, count, wrong):
    """The first `count` examples, of which a share has wrong labels, and the others."""
    label = y[:count].copy()
    changed = rng.random(count) < wrong
    label[changed] = rng.integers(0, classes, changed.sum())
    return (x[:count], label), (x[count:], y[count:])


def table(features, classes, clouds, spread, count=1000, wrong=0.0, scales=0.0, held=1000, *, rng):
    """Gaussian clouds, several of a class, in columns of different scales."""
    centres = rng.standard_normal((classes * clouds, features))
    which = rng.integers(0, classes * clouds, count + held)
    x = centres[which] + spread * rng.standard_normal((count + held, features))
    x = x * np.exp(scales * rng.standard_normal(features)) + scales * rng.standard_normal(features)
    return split_of(rng, x.astype(np.float32), which % classes, classes, count, wrong)


def teacher(features, classes, hidden, count=1000, wrong=0.0, scales=0.0, held=1000, *, rng):
    """The labels that a random network gives."""
    value = x = rng.standard_normal((count + held, features))
    for units in (*hidden, classes):
        value = np.maximum(value, -0.5) @ rng.standard_normal((value.shape[1], units)) * (2.0 / value.shape[1]) ** 0.5
    y = np.argmax((value - value.mean(axis=0)) / value.std(axis=0), axis=1)
    x = x * np.exp(scales * rng.standard_normal(features))
    return split_of(rng, x.astype(np.float32), y, classes, count, wrong)


"""
## Settings
"""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A family of tasks, and how it is learned.

    Attributes:
        group: a name for the report; a generation has one setting of each group.
        task: gives the arrays of a task.
        body: units of hidden layers, or a kind of network and its filters.
        batch: examples of a batch.
        steps: learning steps.
    """

    group: str
    task: functools.partial
    body: tuple
    batch: int
    steps: int

    @property
    def name(self):
        parts = [*self.task.args, *(f"{key}={value}" for key, value in self.task.keywords.items())]
        task = f"{self.task.func.__name__}({', '.join(map(str, parts))})"
        return f"{task}, {'-'.join(map(str, self.body))}, batch {self.batch}, {self.steps} steps"


def settings(held, quick):
    """The settings of the search, or those held out."""
    of = functools.partial

    def row(group, body, batch, steps, task, *args, **options):
        if task in (characters, alphabets):
            options = {"held": held, "flat": body[0] not in ("conv", "norm", "residual"), **options}
        return Setting(group, of(task, *args, **options), body, batch, steps)

    if quick:
        return [
            row("functions", (8,), 16, 20, function, "circle" if held else "xor", count=100),
            row("tables", (16, 8), 32, 20, table, 6, 3, 2, 0.5, count=200, held=200),
        ]
    if held:
        return [
            row("characters", (96,), 32, 200, characters, size=12, classes=15),
            row("characters", (160, 96), 64, 200, characters, size=24, classes=30),
            row("alphabets", (128, 64), 128, 200, alphabets, size=16, classes=8, each=400),
            row("alphabets", (256, 128), 64, 200, alphabets, size=28, classes=5, each=400),
            row("functions", (24,), 32, 200, function, "cross"),
            row("functions", (48, 48), 64, 200, function, "random_xor"),
            row("functions", (32, 16), 128, 100, function, "triangle"),
            row("tables", (80,), 48, 200, table, 24, 12, 2, 1.0),
            row("tables", (128, 64), 256, 200, table, 80, 8, 4, 1.5, count=4000, scales=1.0),
            row("teachers", (64, 64), 128, 500, teacher, 16, 4, (24,), count=5000),
            row("teachers", (96,), 64, 200, teacher, 40, 10, (30,), count=3000, wrong=0.2, scales=1.5),
            row("deep", (48,) * 5, 64, 200, alphabets, size=12, classes=6, each=300),
            row("deep", (64,) * 7, 96, 200, table, 30, 8, 3, 0.8, count=3000),
            row("convolutions", ("conv", 8, 16, 32), 32, 200, characters, size=16, classes=20),
            row("convolutions", ("norm", 8, 16), 48, 200, alphabets, size=14, classes=6, each=300),
            row("convolutions", ("residual", 12, 12), 32, 100, characters, size=14, classes=15),
            row("long", (64, 48), 32, 1000, characters, size=14, classes=25),
            row("long", (128,), 64, 1000, table, 32, 10, 3, 1.2, count=800, wrong=0.1),
            row("long", (96, 64), 100, 1000, alphabets, size=14, classes=8, each=400),
        ]  # fmt: skip
    return [
        row("characters", (64,), 16, 200, characters, size=10, classes=20),
        row("characters", (128, 64), 32, 200, characters, size=14, classes=20),
        row("characters", (256,), 64, 200, characters, size=20, classes=40),
        row("characters", (256, 128), 128, 100, characters, size=28, classes=30),
        row("alphabets", (128,), 64, 200, alphabets, size=10, classes=10, each=400),
        row("alphabets", (128, 64), 512, 100, alphabets, size=14, classes=6, each=400),
        row("alphabets", (256, 128), 128, 200, alphabets, size=20, classes=10, each=400),
        row("alphabets", (64, 32), 16, 500, alphabets, size=7, classes=4, each=200),
        row("functions", (32,), 16, 200, function, "xor"),
        row("functions", (32, 32), 64, 200, function, "concentric_circles"),
        row("functions", (16, 16, 16), 32, 500, function, "rotated_moons"),
        row("functions", (64,), 128, 200, function, "blobs9"),
        row("functions", (64, 32), 64, 500, function, "angular_slice", count=300),
        row("tables", (64,), 32, 200, table, 10, 5, 3, 0.7),
        row("tables", (128, 64), 128, 200, table, 60, 20, 2, 1.5, count=4000),
        row("tables", (32, 32), 16, 200, table, 20, 6, 4, 0.8, scales=1.5),
        row("tables", (256,), 512, 100, table, 120, 10, 3, 2.0, count=4000, wrong=0.1),
        row("teachers", (64, 32), 64, 200, teacher, 20, 5, (16,), count=4000),
        row("teachers", (128, 64), 128, 500, teacher, 30, 8, (20,), count=8000),
        row("teachers", (64,), 32, 200, teacher, 50, 3, (20, 20), count=2000, scales=1.5),
        row("teachers", (128, 128), 256, 200, teacher, 12, 10, (32,), count=8000, wrong=0.2),
        row("deep", (64,) * 4, 64, 200, alphabets, size=10, classes=8, each=400),
        row("deep", (32,) * 8, 32, 200, table, 16, 6, 3, 0.6),
        row("deep", (96,) * 6, 128, 200, characters, size=14, classes=30),
        row("deep", (64,) * 5, 64, 500, teacher, 24, 6, (20,), count=5000),
        row("convolutions", ("conv", 8, 16), 32, 100, characters, size=14, classes=20),
        row("convolutions", ("norm", 8, 16), 32, 100, characters, size=14, classes=20),
        row("convolutions", ("conv", 6, 12), 64, 100, alphabets, size=14, classes=8, each=300),
        row("convolutions", ("residual", 8, 8), 32, 100, alphabets, size=10, classes=6, each=300),
        row("convolutions", ("norm", 12, 12), 16, 200, characters, size=10, classes=10),
        row("long", (64,), 32, 1000, table, 24, 6, 4, 1.0, count=400),
        row("long", (96, 48), 64, 1000, characters, size=12, classes=40),
        row("long", (64, 64), 50, 1000, teacher, 20, 5, (16,), count=1000, wrong=0.1),
        row("long", (128, 64), 128, 500, alphabets, size=14, classes=10, each=400),
    ]  # fmt: skip


def lasting(quick):
    """Small sets that are learned for very long."""
    steps = 100 if quick else 20000
    return [
        Setting("lasting", functools.partial(table, 16, 5, 3, 1.0, count=500), (48, 32), 32, steps),
        Setting("lasting", functools.partial(function, "random_xor", count=300), (32,), 32, steps),
    ]


"""
## Learning, compiled once for a setting

The numbers of a genome are arguments, so that candidates share the program; the transforms are
known to it.
"""


def reading(shape, body, outputs, learned):
    """The network, as the models of `keras_blur` read it."""
    first = value = keras.Input(shape)
    if body[0] in ("conv", "norm", "residual"):
        for place, filters in enumerate(body[1:]):
            before = value
            value = layers.Conv2D(filters, 3, padding="same")(value)
            if body[0] != "conv":
                value = layers.BatchNormalization()(value)
            if body[0] == "residual" and place:
                value = keras.layers.Add()([value, before])
            value = keras.layers.ReLU()(value)
            if body[0] != "residual":
                value = keras.layers.MaxPooling2D()(value)
        value = keras.layers.GlobalAveragePooling2D()(value) if body[0] == "residual" else keras.layers.Flatten()(value)
    else:
        for units in body:
            value = layers.Dense(units)(value)

    def kind(layer):
        if layer.name == "head":
            return "last"
        known = {layers.Conv2D: "convolution", layers.BatchNormalization: "scale"}
        return known.get(type(layer), "hidden")

    model = keras.Model(first, layers.Dense(outputs, name="head")(value))
    return read(model, learned, lambda every: [KINDS.index(kind(layer)) for layer in every])


class Learning:
    """Runs of one setting.

    Args:
        setting: the setting.
    """

    def __init__(self, setting):
        self.setting = setting
        self.marks = [mark for mark in MARKS if mark <= setting.steps]
        self._start = rule()
        self._transforms = {
            name: np.stack([array] * len(KINDS)) for name, array in self._start.arrays.items() if name not in NUMBERS
        }
        self._rule = self._start.rule.replace(layers=KINDS)
        self._reading, self._program = None, compiled(self._learn, jit_compile=False)

    def _learn(self, numbers, synapses, train, test, order):
        """Test accuracy at the marks, NaN where a prediction is not finite."""
        genome = Genome.unchecked(self._rule, {**self._transforms, **numbers})
        graph, loss = self._reading.graph, self._rule.keras_loss

        def step(time, synapses):
            x, y = (ops.take(one, order[time], axis=0) for one in train)
            state = network.NetworkState(synapses, time)
            result = network.step(genome, graph, state, x, lambda output: feedback.error(loss, y, output))
            return time + 1, result.state.synapses

        def score(time, synapses):
            read = network.predicting(genome, graph, network.NetworkState(synapses, time))
            # Batch normalisation takes the statistics of the test examples, as one batch.
            output = network.output(genome, graph, network.forward(genome, graph, read, test[0], training=True).values)
            correct = ops.cast(ops.equal(ops.argmax(output, -1), test[1]), "float32")
            return ops.where(ops.all(ops.isfinite(output)), ops.mean(correct), math.nan)

        def stretch(place, time, synapses, found):
            mark = ops.take(ops.convert_to_tensor(self.marks, "int32"), place)
            time, synapses = ops.while_loop(lambda time, _: time < mark, step, (time, synapses))
            here = ops.equal(ops.arange(len(self.marks), dtype="int32"), place)
            return place + 1, time, synapses, ops.where(here, score(time, synapses), found)

        zero = ops.zeros((), "int32")
        start = (zero, zero, synapses, ops.zeros(len(self.marks)))
        return ops.while_loop(lambda place, *_: place < len(self.marks), stretch, start)[3]

    def draw(self, *seed):
        """Synapses, data and batches of a seed."""
        rng = np.random.default_rng(seed)
        train, test = ((x, y.astype(np.int32)) for x, y in self.setting.task(rng=rng))
        if self._reading is None:
            self._reading = reading(train[0].shape[1:], self.setting.body, int(test[1].max()) + 1, self._rule)
        batch, steps, count = self.setting.batch, self.setting.steps, len(train[1])
        batches = max(1, count // batch)  # of an epoch, in which each example comes once
        epochs = [rng.permutation(count)[: batches * batch] for _ in range(1 + steps // batches)]
        order = np.resize(np.concatenate(epochs), (steps, batch)).astype(np.int32)
        glorot = keras.initializers.GlorotUniform(int(rng.integers(2**31)))
        synapses = []
        for layer in self._reading.layers:
            own = {name: ops.convert_to_tensor(variable) for name, variable in layer.synapses.items()}
            if len(own["kernel"].shape) > 2:  # a scale stays at 1
                own["kernel"] = glorot(own["kernel"].shape[1:])[None]
                own["kernel_average"] = own["kernel"]
            synapses.append(own)
        return tree_map(ops.convert_to_tensor, (tuple(synapses), train, test, order))

    def curve(self, numbers, drawn):
        """Test accuracy at the marks."""
        return ops.convert_to_numpy(self._program(tree_map(ops.convert_to_tensor, numbers), *drawn)).astype(float)


@functools.cache
def learning(setting):
    """The runs of a setting, so that it is compiled once."""
    return Learning(setting)


@functools.lru_cache(64)
def reference(setting, seed):
    """What a seed draws in a setting, and how the numbers set by hand learn it."""
    runs = learning(setting)
    drawn = runs.draw(*seed)
    return drawn, runs.curve(by_kind(genome_of(np.zeros(len(SEARCHED)))), drawn)


def gains(setting, seed, candidates):
    """By how much of its error each candidate is better than the numbers set by hand, and all
    curves, theirs first."""
    drawn, hand = reference(setting, seed)
    curves = np.array([hand, *(learning(setting).curve(one, drawn) for one in candidates)])
    error = 1.0 - curves.mean(axis=1)
    return np.maximum((error[0] - error[1:]) / (error[0] + 0.02), -1.0), curves


"""
## The search
"""

SEARCH, VALIDATION, REPORT = range(3)  # what seeds begin with


def search_state(text, search, setting):
    """The state in a text, or a fresh one."""
    if text is None:
        best = {"generation": -1, "mean": [0.0] * search.size, "validation": 0.0}  # the numbers set by hand
        return search.init(np.zeros(search.size)), {"setting": setting, "best": best, "history": []}
    saved = json.loads(text)
    if saved["setting"] != setting:
        raise app.UsageError(f"--state is of another search, {saved['setting']}; this one is {setting}")
    fresh, numbers = search.init(np.zeros(search.size)), saved.pop("search")
    state = {name: ops.convert_to_tensor(numbers[name], like.dtype) for name, like in fresh._asdict().items()}
    return fresh._replace(**state), saved


def evolve(train, valid, generations, population, seed, path):
    """The best mean on the held-out settings, and all that was saved."""
    search = meta.CMAES(len(SEARCHED), population=population, sigma=0.5)
    asked = {"seed": seed, "population": population, "searched": list(SEARCHED), "settings": [one.name for one in train]}
    text = files.read_text(path) if path and files.exists(path) else None
    state, saved = search_state(text, search, asked)
    groups = list(dict.fromkeys(one.group for one in train))
    for generation in range(int(state.generation), generations):
        begin = time.perf_counter()
        candidates = search.ask(state, random.seed_of(seed))
        numbers = [by_kind(genome_of(vector)) for vector in ops.convert_to_numpy(candidates)]
        found = []
        for place, group in enumerate(groups):
            own = [one for one in train if one.group == group]
            turn = np.random.default_rng([seed, place, generation // len(own)]).permutation(len(own))
            found.append(gains(own[turn[generation % len(own)]], (SEARCH, seed, generation, place), numbers)[0])
        scores = np.mean(found, axis=0)
        state = search.tell(state, candidates, -scores)
        row = {"generation": generation, "mean": ops.convert_to_numpy(state.mean).tolist(), "sigma": float(state.sigma)}
        row |= {"gain": float(np.nanmean(scores)), "best": float(np.nanmax(scores))}
        if generation % 3 == 2 or generation == generations - 1:
            own = [by_kind(genome_of(row["mean"]))]
            row["validation"] = float(
                np.mean([gains(one, (VALIDATION, seed, place), own)[0] for place, one in enumerate(valid)])
            )
            if row["validation"] > saved["best"]["validation"]:
                saved["best"] = row
        row["seconds"] = time.perf_counter() - begin
        saved["history"].append(row)
        if path:
            state_now = {name: ops.convert_to_numpy(value).tolist() for name, value in state._asdict().items()}
            files.write_text(path, json.dumps({**saved, "search": state_now}, indent=1) + "\n")
        known = f", held-out settings {row['validation']:+.4f}" if "validation" in row else ""
        print(
            f"generation {generation + 1}: gain {row['gain']:+.4f}, sigma {row['sigma']:.3f}{known}, "
            f"{row['seconds']:.0f} s; {described(genome_of(row['mean']))}",
            flush=True,
        )
    return saved


def described(genome):
    """The searched numbers, readable."""
    a = {name: float(array) for name, array in genome.arrays.items() if not array.shape}
    return (
        f"gate {-a['synapse_update']:.3f}, power {a['decay_power']:.3f}, decay steps "
        f"{math.exp(a['log_decay_steps']):.1f}, damping {math.exp(a['log_damping']):.3f}, averaging "
        f"{math.exp(a['log_averaging']):.1f}"
    )


VARIANTS = {
    **{f"gate of {kind} x {factor}": {"synapse_update": {kind: factor}} for kind in KINDS[:3] for factor in (0.5, 2.0)},
    **{f"damping of {kind} x {factor}": {"damping": {kind: factor}} for kind in KINDS[::2] for factor in (0.3, 3.0)},
    **{f"weights decay by {rate}": {"synapse_keep": 1.0 - rate} for rate in (1e-4, 1e-3)},
}  # fmt: skip


def suits(name, setting):
    """Whether a variant is scored in a setting: it has such layers, and is not learned for very
    long."""
    has = {"convolution": {"conv", "norm", "residual"}, "scale": {"norm", "residual"}}
    return setting.group != "lasting" and all(setting.body[0] in bodies for kind, bodies in has.items() if kind in name)


def report(valid, genome, seeds, seed, ablations):
    """Gains on fresh seeds of the held-out settings, and how the settings are learned.

    Returns:
        Gains of the genome over the numbers set by hand, and of variants over the genome, by
        variant (`""` is the genome), group and setting, one for each seed; and by setting the
        curves `[seeds, 2, marks]` by hand and evolved.
    """
    own = by_kind(genome)
    found, curves = {}, {}
    for place, setting in enumerate(valid):
        fitting = [name for name in VARIANTS if ablations and suits(name, setting)]
        variants = {name: by_kind(genome, **VARIANTS[name]) for name in fitting}
        for number in range(seeds):
            gain, curve = gains(setting, (REPORT, seed, place, number), [own, *variants.values()])
            error = 1.0 - curve.mean(axis=1)
            over = (error[1] - error[2:]) / (error[1] + 0.02)
            for name, value in zip(["", *variants], [gain[0], *over], strict=True):
                found.setdefault(name, {}).setdefault(setting.group, {}).setdefault(setting.name, []).append(float(value))
            curves.setdefault(setting.name, []).append(curve[:2])
    return found, curves


def table_of(found):
    """Rows of groups: the mean gain, and its deviation from seed to seed."""
    groups = {group: np.array(list(rows.values())) for group, rows in found.items()}  # [settings, seeds]
    together = [rows for group, rows in groups.items() if group != "lasting"]
    groups["all but lasting"] = np.concatenate(together)
    return {group: (rows.mean(), rows.mean(axis=0).std(ddof=1)) for group, rows in groups.items()}


def main(argv):
    del argv
    if keras.backend.backend() == "tensorflow":  # networks are small, and numbers do not depend on the machine
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    quick = _QUICK.value
    generations, population, seeds = (2, 4, 2) if quick else (_GENERATIONS.value, _POPULATION.value, _SEEDS.value)
    train, valid = settings(False, quick), settings(True, quick)
    saved = evolve(train, valid, generations, population, _SEED.value, _STATE.value)
    genome = genome_of(saved["best"]["mean"])
    if _GENOME.value:
        genome.save(_GENOME.value)
    print(f"\nbest: {described(genome)}, of generation {saved['best']['generation'] + 1}\n", flush=True)
    found, curves = report([*valid, *lasting(quick)], genome, seeds, _SEED.value, _ABLATIONS.value)
    for name, every in curves.items():
        hand, own = np.mean(every, axis=0)
        print(f"{name}\n  by hand {' '.join(f'{v:.3f}' for v in hand)}\n  evolved {' '.join(f'{v:.3f}' for v in own)}")
    print("\n| group | gain, mean over settings and seeds | deviation from seed to seed |\n|---|---|---|")
    for group, (mean, deviation) in table_of(found.pop("")).items():
        print(f"| {group} | {mean:+.3f} | {deviation:.3f} |")
    for name, rows in found.items():
        cells = [f"{group} {mean:+.3f} ({deviation:.3f})" for group, (mean, deviation) in table_of(rows).items()]
        print(f"{name}: {', '.join(cells)}")


if __name__ == "__main__":
    app.run(main)
