"""Norms and spectra of synapses while a network learns with a genome.

A Hebbian rule does not bound its synapses. It can lose what it learned in two ways: a norm that
grows without bound, or a spectrum dominated by one direction. Oja's term, normalised synapses and
the decay of the update gate counteract this ("Meta-Learning Bidirectional Update Rules", Sandler et
al., ICML 2021, sections 3.4 and C.6). The figure shows whether they succeed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

from keras_blur.backend import compiled
from keras_blur.checks.tasks import check_tasks
from keras_blur.core import network, random
from keras_blur.core.genome import Genome
from keras_blur.files import check_output
from keras_blur.learners import Blur
from keras_blur.learners.blur import check_genome
from keras_blur.report import style
from keras_blur.tasks.base import Tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = Any

_ROUNDING = 1e-7  # singular values below this fraction of the largest are float32 rounding


def learner_of(genome: Genome, hidden: Sequence[int]) -> tuple[Blur, dict[str, Array]]:
    """A learner for a single network without leading axes, with its outer parameters.

    Args:
        genome: a single genome.
        hidden: units of the hidden layers.

    Returns:
        The learner, and the arrays of the genome.

    Raises:
        ValueError: if the genome is a population or does not fit the number of layers.

    Example:

    >>> from keras_blur import genomes
    >>> learner, outer = learner_of(genomes.backprop(), (8,))
    >>> learner.units(2), sorted(outer)[0]
    ((8, 2), 'mu')
    """
    check_genome(genome, hidden)
    outer = {name: ops.convert_to_tensor(np.asarray(array), "float32") for name, array in genome.arrays.items()}
    return Blur(tuple(hidden), genome.rule), outer


def trace_synapses(
    genome: Genome,
    tasks: Tasks,
    hidden: Sequence[int],
    steps: int = 100,
    seed: int = 0,
    *,
    batch_size: int = 64,
    split: str = "test",
) -> dict[str, np.ndarray]:
    """Trains a network on one episode and records its synapses, initially and after each step.

    The recorded arrays are forward kernels without biases, as stored after a step. With
    `Rule.normalize_synapses`, the effective kernels are normalised after that.

    Args:
        genome: a single genome.
        tasks: the task distribution, from which one episode is drawn.
        hidden: units of the hidden layers.
        steps: learning steps.
        seed: random seed of the initial network and the episode.
        batch_size: batch size.
        split: split of the tasks.

    Returns:
        Arrays by name with axes `[layer, channel, step]`. Non-finite kernels give NaN:

        - `steps`: 0 to `steps`.
        - `norm`: Frobenius norm.
        - `largest`, `smallest`: singular values.
        - `stable_rank`: squared norm divided by the squared largest singular value.
        - `singular_values`: all singular values in descending order on an additional axis, padded
          with NaN for smaller kernels.

    Raises:
        ValueError: if the genome is a population or does not fit the network, `steps` is below 1,
            or the split has too few examples.

    Example:

    >>> from keras_blur import Rule, tasks
    >>> genome = Genome.random(Rule(batch_reduction="mean"), seed=0)
    >>> trace = trace_synapses(genome, tasks.functions("xor"), (8,), steps=3, batch_size=16)
    >>> trace["norm"].shape, trace["singular_values"].shape
    ((2, 2, 4), (2, 2, 4, 2))
    """
    learner, outer = learner_of(genome, hidden)
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1. Received: steps={steps!r}")
    check_tasks(tasks, batch_size, 1, split)
    episode = next(iter(tasks.dataset(seed, steps=steps, batch=batch_size, query=1, split=split)))
    state = learner.init(outer, random.seed_of(seed), tasks.features, tasks.outputs)

    def spectra(state: network.NetworkState) -> list[Array]:
        """Singular values of each layer, `[channel, rank]`."""
        found = []
        for own in state.synapses:
            kernel = own["kernel"]
            finite = ops.all(ops.isfinite(kernel), axis=(-2, -1), keepdims=True)
            values = ops.svd(ops.where(finite, kernel, 0.0), compute_uv=False)
            found.append(ops.where(finite[..., 0], values, float("nan")))
        return found

    def learn(
        outer: Mapping[str, Array], state: network.NetworkState, x: Array, y: Array
    ) -> tuple[network.NetworkState, list[Array]]:
        state, _ = learner.step(outer, state, x, y)
        return state, spectra(state)

    # Without XLA, whose singular values are slow and less exact.
    look, learn = compiled(spectra, jit_compile=False), compiled(learn, jit_compile=False)
    found = [look(state)]
    for x, y in zip(episode["x"], episode["y"], strict=True):
        state, now = learn(outer, state, x, y)
        found.append(now)
    layers = [
        np.stack([ops.convert_to_numpy(one) for one in own], axis=1).astype(np.float64) for own in zip(*found, strict=True)
    ]
    most = max(one.shape[-1] for one in layers)
    values = np.stack([np.pad(one, [(0, 0), (0, 0), (0, most - one.shape[-1])], constant_values=np.nan) for one in layers])
    norm = np.stack([np.sqrt(np.sum(one * one, axis=-1)) for one in layers])
    largest = values[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        rank = (norm / largest) ** 2
    smallest = np.stack([one[..., -1] for one in layers])
    return {"steps": np.arange(steps + 1), "norm": norm, "largest": largest, "smallest": smallest, "stable_rank": rank,
            "singular_values": values}  # fmt: skip


def draw_synapses(trace: Mapping[str, np.ndarray], path: str | os.PathLike[str], title: str = "") -> Figure:
    """Draws one row per layer: the norm over steps and three spectra.

    The spectra are those at the first, middle and last step.

    Args:
        trace: result of `trace_synapses`.
        path: output file: .png, .pdf or .svg.
        title: title of the figure.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the file has another suffix or cannot be written.

    Example:

    >>> import tempfile
    >>> from keras_blur import Rule, tasks
    >>> genome = Genome.random(Rule(batch_reduction="mean"), seed=0)
    >>> trace = trace_synapses(genome, tasks.functions("xor"), (8,), steps=4, batch_size=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     figure = draw_synapses(trace, f"{folder}/synapses.png")
    >>> [axis.get_title() for axis in figure.axes[:4]]
    ['Frobenius norm', 'spectrum, step 0', 'spectrum, step 2', 'spectrum, step 4']
    """
    check_output("path", path, style.ENDINGS)
    steps, norm, values = trace["steps"], trace["norm"], trace["singular_values"]
    layers, channels = norm.shape[:2]
    places = [0, len(steps) // 2, len(steps) - 1]
    made, axes = style.figure(columns=1 + len(places), rows=layers, width=2.3, height=2.0)
    width, height = made.get_size_inches()
    made.set_size_inches(width, height + 0.6)
    for layer, row in enumerate(axes):
        for channel in range(channels):
            style.line(row[0], channel, steps, _positive(norm[layer, channel]), f"channel {channel + 1}")
            for axis, place in zip(row[1:], places, strict=True):
                spectrum = values[layer, channel, place]
                spectrum = spectrum[: np.count_nonzero(np.isfinite(values[layer]).any(axis=(0, 1)))]
                floor = _ROUNDING * spectrum[0]
                spectrum = np.where(spectrum > floor, _positive(spectrum), np.nan)
                style.line(axis, channel, np.arange(1, len(spectrum) + 1), spectrum, f"channel {channel + 1}")
                axis.lines[-1].set(marker="o", markersize=2.5)
        style.step_axis(row[0], steps[-1])
        said = f"layer {layer + 1}" + (" (output)" if layer == layers - 1 else "")
        row[0].set_ylabel(said, fontsize=9)
        _decades(row[:1])
        _decades(row[1:])
        for axis, place in zip(row[1:], places, strict=True):
            _numbers_of_values(axis)
            if not np.isfinite(norm[layer, :, place]).all():
                axis.text(0.5, 0.5, "not finite", transform=axis.transAxes, ha="center", fontsize=8)
        for axis in row[2:]:
            axis.tick_params(labelleft=False)
        for axis in row:
            axis.tick_params(labelsize=7)
    axes[0][0].set_title("Frobenius norm", fontsize=9)
    for axis, place in zip(axes[0][1:], places, strict=True):
        axis.set_title(f"spectrum, step {steps[place]}", fontsize=9)
    axes[-1][0].set_xlabel("learning step", fontsize=8)
    for axis in axes[-1][1:]:
        axis.set_xlabel("number of the singular value", fontsize=8)
    style.legend(made, axes[0][0], columns=8)
    made.suptitle("Forward synapses" + (f": {title}" if title else ""), fontsize=10)
    style.save(made, path)
    return made


def _positive(values: np.ndarray) -> np.ndarray:
    """Replaces values that have no logarithm with NaN."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _decades(axes: Sequence[Any]) -> None:
    """Sets a common logarithmic scale, spanning at least a factor of four, with readable ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    seen = np.concatenate([np.asarray(line.get_ydata(), float) for axis in axes for line in axis.lines])
    seen = seen[np.isfinite(seen)]
    low, high = (seen.min(), seen.max()) if len(seen) else (1.0, 1.0)
    grow = max(1.15, np.sqrt(max(1.0, 4.0 * low / high)))
    low, high = low / grow, high * grow
    for axis in axes:
        axis.set_yscale("log")
        axis.set_ylim(low, high)
        if high / low < 300:
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())


def _numbers_of_values(axis: Any) -> None:
    """Sets a logarithmic axis of singular value indices, which may be few."""
    from matplotlib.ticker import LogLocator, NullLocator

    most = max((len(line.get_xdata()) for line in axis.lines), default=1)
    axis.set_xscale("log")
    axis.set_xlim(0.9, max(2.0, most) * 1.1)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if most > 3 else (1.0, 2.0, 3.0)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_locator(NullLocator())
