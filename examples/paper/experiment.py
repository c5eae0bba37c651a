"""Common code of the experiments in this folder: flags, meta-training in one call, scores of a
population, files.

Each experiment is one file with a `run(setting)` that gives back an `Outcome`; `main(run)` does the
rest: it prints the table and the cost and writes `NAME.md`, `NAME.json` and `NAME.png` into
`--out`. `--quick` is a smaller run of the same code on the 8x8 digits, in a minute or less: it
shows that the file works, and nothing about the paper.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import dataclasses
import json
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from absl import app, flags
from keras import ops

import keras_blur as kb
from keras_blur import learners, meta, random
from keras_blur.backend import compiled, numbers_of
from keras_blur.files import write_text
from keras_blur.meta.estimator import InnerLoop, start
from keras_blur.report import style
from keras_blur.report.evaluation import evaluate
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.datasets import Images

_QUICK = flags.DEFINE_boolean("quick", False, "A small run on the 8x8 digits that only shows that the file works.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets; else TFDS_DATA_DIR, else tfds's default.")
_SEED = flags.DEFINE_integer("seed", 0, "Random seed.", lower_bound=0)
_OUT = flags.DEFINE_string("out", "results", "Folder for the table, the numbers and the picture.")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large a run is.

    Attributes:
        quick: whether this is `--quick`.
        data: the image set: MNIST, or the 8x8 digits of a quick run.
        data_dir: folder of prepared sets, or `None`.
        seed: random seed.
    """

    quick: bool
    data: str
    data_dir: str | None
    seed: int

    def pick(self, quick: Any, full: Any) -> Any:
        """The value for this size of run."""
        return quick if self.quick else full


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    Attributes:
        header, rows: a table.
        numbers: everything behind it, as JSON values.
        draw: writes the picture to the path that it is given.
        note: a sentence or two below the table: what was run.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Mapping[str, Any]
    draw: Callable[[str], None]
    note: str


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a meta-training gave.

    Attributes:
        population: all members, on a population axis.
        scores: each member's running query accuracy in meta-training.
        best: the member with the highest.
        skipped: fraction of meta-steps in which a member's gradient was not finite.
        seconds: how long it took.
    """

    population: kb.Genome
    scores: list[float]
    best: int
    skipped: float
    seconds: float


# What an experiment does not vary: sums normalised on both passes, synapses of unit norm (sections
# 3.4 and C.6).
RULE = kb.Rule(last_activation="linear", normalize_activations="both", normalize_synapses="stored", batch_reduction="mean")


def meta_train(
    tasks: Tasks | Sequence[Tasks],
    hidden: Sequence[tuple[int, ...]],
    rule: kb.Rule,
    *,
    steps: int,
    unroll: int | Sequence[int] = 10,
    members: int = 3,
    genome: kb.Genome | None = None,
    batch_size: int = 64,
    query_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    jit_compile: bool = True,
) -> Trained:
    """Meta-trains `members` genomes by the gradient through the unroll.

    Args:
        tasks: one or more task distributions.
        hidden: one or more networks, each the units of its hidden layers.
        rule: the rule.
        steps: meta-steps in all, shared out evenly to the stages of `unroll`.
        unroll: unrolled steps, or those of each stage of a curriculum (section 4.2).
        members: genomes side by side, from different random numbers.
        genome: genome or population to start from in place of random numbers.
        batch_size, query_size: examples of a support batch and of the query.
        learning_rate: of Adam.
        seed: random seed.
        jit_compile: whether XLA compiles the meta-gradient; for a small network that takes longer
            than it saves.

    Returns:
        A `Trained`.
    """
    stages = [unroll] if isinstance(unroll, int) else list(unroll)
    trainer = meta.MetaTrainer(
        tasks, [learners.Blur(units, rule) for units in hidden],
        meta.Unroll(stages[0], trajectory_loss_weight=1.0), members=members,
        batch_size=batch_size, query_size=query_size, clipnorm=1.0, start=genome, seed=seed,
    )  # fmt: skip
    trainer.compile(keras.optimizers.Adam(learning_rate), jit_compile=jit_compile)
    begin = time.perf_counter()
    curriculum = meta.UnrollCurriculum(list(enumerate(stages)))
    history = trainer.fit(len(stages), max(1, steps // len(stages)), callbacks=[curriculum], verbose=0).history
    scores = [float(score) for score in numbers_of(trainer.member_score)]
    return Trained(
        trainer.population, scores, trainer.best, float(np.mean(history["skipped"])),
        time.perf_counter() - begin,
    )  # fmt: skip


def accuracies(
    genome: kb.Genome, data: Images | Tasks, hidden: Sequence[int], *, steps: int, seeds: int, batch_size: int, seed: int = 0
) -> tuple[list[int], np.ndarray]:
    """Test accuracy while a genome, or each of a population, learns.

    Returns:
        The scored steps, and accuracies `[members, seeds, scored steps]`.
    """
    found = evaluate(genome, data, hidden, steps=steps, seeds=seeds, batch_size=batch_size, seed=seed)
    return found["steps"], np.array([curve["accuracy"] for curve in found["curves"].values()])


def accuracy_after(
    genome: kb.Genome,
    data: Tasks,
    hidden: Sequence[int],
    *,
    steps: int,
    seeds: int,
    batch_size: int,
    query_size: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Test accuracy of each of a population after some steps alone, where many networks or tasks
    are scored.

    `accuracies` follows the whole curve, which takes a program for each stretch between two scores;
    this takes one. Each seed is an episode of the tasks' test split.

    Returns:
        Accuracies `[members, seeds]`; 0 where the loss is not finite.
    """
    learner, inner = learners.Blur(tuple(hidden), genome.rule), InnerLoop(steps)
    stream = data.dataset(seed, steps=steps, batch=batch_size, query=query_size, split="test")
    episodes = next(iter(stream.batch(seeds)))
    outer = {name: ops.convert_to_tensor(array) for name, array in genome.by_member().items()}

    def score(outer: Mapping[str, Any], episodes: Mapping[str, Any]) -> tuple[Any, Any]:
        state = start(learner, outer, episodes, random.seed_of(seed))
        return inner.objective(learner, outer, episodes, state)[:2]

    loss, accuracy = (ops.convert_to_numpy(value) for value in compiled(score, jit_compile=False)(outer, episodes))
    return np.where(np.isfinite(loss), accuracy, 0.0)


def cell(values: Any) -> str:
    """Mean and, of several values, standard deviation, as a table has them."""
    values = np.asarray(values, float).ravel()
    return f"{values.mean():.3f}" + (f" +- {values.std(ddof=1):.3f}" if values.size > 1 else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def step_axis(axis: Any, at: Sequence[int]) -> None:
    """Learning steps on a logarithmic axis that begins at 0."""
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xticks([step for step in at if step], [str(step) for step in at if step])
    axis.set_xlim(0, at[-1])
    axis.set_xlabel("learning step")


def save(figure: Any, legend: Any, path: str) -> None:
    """Writes a picture, with the lines of the axis `legend` named above all of it."""
    handles, labels = legend.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
    style.save(figure, path)


def main(run: Callable[[Setting], Outcome]) -> None:
    """Runs an experiment from the command line."""
    name = os.path.splitext(os.path.basename(sys.argv[0]))[0]

    def body(argv: Sequence[str]) -> None:
        del argv
        setting = Setting(_QUICK.value, "digits" if _QUICK.value else "mnist", _DATA_DIR.value, _SEED.value)
        os.makedirs(_OUT.value, exist_ok=True)
        begin = time.perf_counter()
        outcome = run(setting)
        seconds = time.perf_counter() - begin
        command = f"python examples/paper/{name}.py" + (" --quick" if setting.quick else "") + f" --seed {setting.seed}"
        note = textwrap.fill(outcome.note, 100, break_on_hyphens=False)
        text = f"{table(outcome.header, outcome.rows)}\n\n{note}\n\n`{command}`, {seconds:.0f} s.\n"
        print(text)
        path = os.path.join(_OUT.value, name + ("-quick" if setting.quick else ""))
        write_text(path + ".md", text)
        document = {"command": command, "seconds": seconds, "header": list(outcome.header),
                    "rows": [list(row) for row in outcome.rows], **outcome.numbers}  # fmt: skip
        write_text(path + ".json", json.dumps(document, indent=1) + "\n")
        outcome.draw(path + ".png")

    app.run(body)
