"""Decision regions of learners on tasks in the plane, step by step.

An accuracy curve shows how much of a task was learned. The regions show what was learned: a
half-plane instead of a corner, a filled hole, a map inverted by one step. Several learners are
shown on the same batches and initial networks, as in `keras_blur.report.comparison`.

Source: the toy functions of "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021),
section 4.1.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

from keras_blur.backend import compiled
from keras_blur.core import network, random
from keras_blur.core.genome import Genome
from keras_blur.files import check_output
from keras_blur.learners import Blur, Learner
from keras_blur.meta.estimator import at as batch_of
from keras_blur.meta.estimator import classes_of
from keras_blur.report import style
from keras_blur.report.synapses import learner_of
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.functions import FunctionTasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = Any

_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">")
_SHOWN = 90  # maximum number of points drawn


def trace_decisions(
    learners: Genome | Learner | Mapping[str, Genome | Learner],
    tasks: FunctionTasks | Sequence[FunctionTasks],
    hidden: Sequence[int] = (20,),
    steps: Sequence[int] = (0, 1, 2, 5, 10, 20),
    seed: int = 0,
    resolution: int = 101,
    *,
    batch_size: int = 64,
    query: int = 500,
    split: str = "test",
) -> dict[str, Any]:
    """Trains each learner on one episode of each task and records its decisions on a square.

    A rule that normalises over the batch uses the statistics of the query, both on the square and
    for the accuracy.

    Args:
        learners: a genome, a `learners.BaselineLearner`, or several by name. A genome that learns
            from errors descends its loss, or the softmax cross-entropy if it has none.
        tasks: 2-D classification tasks. Each function of a task is a separate task.
        hidden: units of the hidden layers for genomes. A `BaselineLearner` has its own.
        steps: learning steps at which to record, ascending, from 0.
        seed: random seed of initial networks and episodes.
        resolution: number of points on each side of the square.
        batch_size: batch size.
        query: number of examples for the accuracy.
        split: split of the tasks.

    Returns:
        `steps`; `axis` `[resolution]`, the coordinates along each side of the square; and `rows`,
        for each task and each learner:

        - `task`, `learner`: names; `classes`: number of classes.
        - `regions` `[steps, resolution, resolution]`: the class at `[y, x]`, or -1 where the output
          is not finite.
        - `accuracy` `[steps]`: accuracy on the query.
        - `query_x` `[query, 2]`, `query_y` `[query]`: the points and their classes.

    Raises:
        ValueError: if `steps` are not ascending, a number is too small, a task does not classify
            2-D points, two tasks have the same name, or a genome does not fit the network.

    Example:

    >>> from keras_blur import Rule, tasks
    >>> genome = Genome.random(Rule(batch_reduction="mean"), seed=0)
    >>> trace = trace_decisions(genome, tasks.functions(["xor", "circle"]), (8,), steps=(0, 2), resolution=11)
    >>> [(row["task"], row["learner"], row["regions"].shape) for row in trace["rows"]]
    [('xor', 'genome', (2, 11, 11)), ('circle', 'genome', (2, 11, 11))]
    """
    at = [int(step) for step in steps]
    if not at or at[0] < 0 or any(later <= step for step, later in itertools.pairwise(at)):
        raise ValueError(f"`steps` must be one or more increasing numbers, from 0 on. Received: steps={tuple(steps)!r}")
    for name, value, least in (("resolution", resolution, 2), ("batch_size", batch_size, 1), ("query", query, 1)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}. Received: {name}={value!r}")
    apart = _taken_apart(tasks)
    named = _named(learners, hidden)
    programs = {
        (name, outputs): _programs(learner.on((2,), outputs), outer)
        for name, (learner, outer) in named.items()
        for outputs in {task.outputs for task in apart}
    }
    episodes = []
    for task in apart:
        stream = task.dataset(seed, steps=max(1, at[-1]), batch=batch_size, query=query, split=split)
        episodes.append(next(iter(stream)))
    reach = 1.05 * max(1.0, *(float(ops.max(ops.abs(episode["query_x"]))) for episode in episodes))
    axis = np.linspace(-reach, reach, resolution).astype(np.float32)
    square = ops.convert_to_tensor(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2))
    rows = []
    for task, episode in zip(apart, episodes, strict=True):
        classes = ops.convert_to_numpy(classes_of(episode["query_y"]))
        for name in named:
            begin, learn, decide = programs[name, task.outputs]
            state = begin(random.seed_of(seed), task.features, task.outputs)
            regions, accuracy, done = [], [], 0
            for step in at:
                state = learn(state, episode["x"], episode["y"], ops.array(done, "int32"), ops.array(step, "int32"))
                done = step
                told, region = map(ops.convert_to_numpy, decide(state, episode["query_x"], square))
                regions.append(region.reshape(resolution, resolution))
                accuracy.append(float(np.mean(told == classes)))
            rows.append(
                {
                    "task": task.name, "learner": name, "classes": task.outputs, "regions": np.stack(regions),
                    "accuracy": np.array(accuracy), "query_x": ops.convert_to_numpy(episode["query_x"]), "query_y": classes,
                }
            )  # fmt: skip
    return {"steps": np.array(at), "axis": axis, "rows": rows}


def _taken_apart(tasks: FunctionTasks | Sequence[FunctionTasks]) -> list[FunctionTasks]:
    """Splits tasks into tasks of one function each."""
    several = [tasks] if isinstance(tasks, Tasks) else list(tasks)
    for task in several:
        if not isinstance(task, FunctionTasks) or task.features != 2 or task.kind != "classes":
            raise ValueError(
                f"`tasks` must be 2-D tasks of classes, as `tasks.functions` gives them. Received: "
                f"{getattr(task, 'name', task)!r}"
            )
    apart = [FunctionTasks([name], noise=task.noise, relabel=task.relabel) for task in several for name in task.names]
    names = [task.name for task in apart]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"`tasks` must be one or more different functions. Received: {', '.join(names) or 'none'}")
    return apart


def _named(learners: Any, hidden: Sequence[int]) -> dict[str, tuple[Learner, dict[str, Array]]]:
    """Learners and their outer parameters by name."""
    if isinstance(learners, Genome):
        learners = {"genome": learners}
    elif isinstance(learners, Learner):
        learners = {type(getattr(learners, "optimizer", learners)).__name__: learners}
    if not isinstance(learners, Mapping) or not learners:
        raise ValueError(f"`learners` must be a genome, a BaselineLearner, or several by name. Received: {learners!r}")
    found: dict[str, tuple[Learner, dict[str, Array]]] = {}
    for name, learner in learners.items():
        if isinstance(learner, Genome):
            found[name] = learner_of(learner, hidden)
        elif isinstance(learner, Learner) and not isinstance(learner, Blur):
            found[name] = (learner, {})
        else:
            raise ValueError(
                f"`learners` must be genomes and BaselineLearners; pass the genome of a Blur. Received: "
                f"{name!r}: {learner!r}"
            )
    return found


def _programs(learner: Learner, outer: Mapping[str, Array]) -> tuple[Callable[..., Any], ...]:
    """Functions that initialise a learner, train it, and classify a query and the square."""

    def learn(state: Any, x: Array, y: Array, start: Array, stop: Array) -> Any:
        def body(time: Array, state: Any) -> tuple[Array, Any]:
            return time + 1, learner.step(outer, state, batch_of(x, time, axis=0), batch_of(y, time, axis=0))[0]

        return ops.while_loop(lambda time, _: time < stop, body, (start, state))[1]

    def decide(state: Any, query: Array, square: Array) -> tuple[Array, Array]:
        if isinstance(learner, Blur) and learner.rule.normalization_axis == "batch":
            genome = learner.genome(outer)
            graph = learner.plan(int(query.shape[-1]), int(state.synapses[-1]["kernel"].shape[-1])).graph
            synapses = network.predicting(genome, graph, state)
            known = network.forward(genome, graph, synapses, query)
            there = network.forward(genome, graph, synapses, square, statistics=known.statistics)
            return _class(network.output(genome, graph, known.values)), _class(network.output(genome, graph, there.values))
        return _class(learner.predict(outer, state, query)), _class(learner.predict(outer, state, square))

    # Without XLA, since compilation would take longer than training these small networks.
    return functools.partial(learner.init, outer), compiled(learn, jit_compile=False), compiled(decide, jit_compile=False)


def _class(output: Array) -> Array:
    """The predicted class, or -1 if the output is not finite."""
    return ops.where(ops.all(ops.isfinite(output), axis=-1), classes_of(output), -1)


def draw_decisions(trace: Mapping[str, Any], path: str | os.PathLike[str]) -> Figure:
    """Draws regions, query points and accuracy: one row per task and learner, one column per step.

    Each class has a light fill, darker from class to class, and a marker. Where fill and marker
    disagree, the learner is wrong. Regions with non-finite outputs are hatched.

    Args:
        trace: result of `trace_decisions`.
        path: output file: .png, .pdf or .svg.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the file has another suffix or cannot be written.

    Example:

    >>> import tempfile
    >>> from keras_blur import Rule, tasks
    >>> genome = Genome.random(Rule(batch_reduction="mean"), seed=0)
    >>> trace = trace_decisions(genome, tasks.functions("xor"), (8,), steps=(0, 2), resolution=11)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     figure = draw_decisions(trace, f"{folder}/decisions.png")
    >>> [axis.get_title().splitlines()[0] for axis in figure.axes]
    ['step 0', 'step 2']
    """
    check_output("path", path, style.ENDINGS)
    rows, steps, coordinates = trace["rows"], trace["steps"], trace["axis"]
    made, axes = style.figure(columns=len(steps), rows=len(rows), width=1.5, height=1.62)
    width, height = made.get_size_inches()
    made.set_size_inches(width + 0.5, height + 0.95 + 0.18 * (max(row["classes"] for row in rows) > 5))
    engine: Any = made.get_layout_engine()
    engine.set(h_pad=0.06)
    several = len({row["learner"] for row in rows}) > 1
    handles: dict[str, Any] = {}
    for number, (row, panels) in enumerate(zip(rows, axes, strict=True)):
        for place, axis in enumerate(panels):
            _panel(axis, row, place, coordinates, handles)
            title = f"{row['accuracy'][place]:.2f}"
            axis.set_title(f"step {steps[place]}\n{title}" if number == 0 else title, fontsize=8.5)
            axis.set_xticks([-1, 0, 1])
            axis.set_yticks([-1, 0, 1])
            axis.tick_params(labelsize=6.5, length=2, labelbottom=number == len(rows) - 1, labelleft=place == 0)
        panels[0].set_ylabel(f"{row['task']}\n{row['learner']}" if several else row["task"], fontsize=8.5)
    made.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False,
        title="query points; accuracy above each panel", title_fontsize=8,
    )  # fmt: skip
    style.save(made, path)
    return made


def _panel(axis: Any, row: Mapping[str, Any], place: int, coordinates: np.ndarray, handles: dict[str, Any]) -> None:
    """Draws the regions and points of one row at one step."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    region, classes = row["regions"][place], row["classes"]
    reach = float(coordinates[-1])
    half = reach / (len(coordinates) - 1)  # half a pixel: each recorded point is the centre of a pixel
    fills = ListedColormap(["white", *(_tint(number, classes) for number in range(classes))])
    axis.imshow(
        region, origin="lower", extent=(-reach - half, reach + half) * 2, cmap=fills,
        norm=BoundaryNorm(np.arange(-1.5, classes), classes + 1), interpolation="nearest",
    )  # fmt: skip
    for number in range(-1, classes):
        inside = (region == number).astype(float)
        if 0 < inside.mean() < 1:
            axis.contour(coordinates, coordinates, inside, levels=[0.5], colors="0.25", linewidths=0.6)
        if number < 0 and inside.any():
            axis.contourf(coordinates, coordinates, inside, levels=[0.5, 1.5], colors="none", hatches=["////"])
    for number in range(classes):
        chosen = np.flatnonzero(row["query_y"][:_SHOWN] == number)
        points = row["query_x"][chosen]
        drawn = axis.scatter(
            points[:, 0], points[:, 1], s=9, marker=_MARKERS[number], color=style.COLOURS[number % len(style.COLOURS)],
            edgecolors="k", linewidths=0.3, zorder=3,
        )  # fmt: skip
        handles.setdefault(f"class {number + 1}", drawn)
    axis.set_xlim(-reach, reach)
    axis.set_ylim(-reach, reach)
    axis.set_aspect("equal")
    axis.spines[:].set_visible(True)
    axis.spines[:].set_linewidth(0.5)
    axis.grid(visible=False)


def _tint(number: int, classes: int) -> tuple[float, ...]:
    """A light shade of the colour of a class. Its grey value darkens from class to class."""
    from matplotlib.colors import to_rgb

    colour = np.array(to_rgb(style.COLOURS[number % len(style.COLOURS)]))
    grey = float(colour @ (0.299, 0.587, 0.114))
    wanted = 0.95 - 0.15 * number / max(1, classes - 1)
    return tuple(1.0 - min(1.0, (1.0 - wanted) / (1.0 - grey)) * (1.0 - colour))
