"""Shared style of all figures. Readable in print and without colour; no display is needed."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_blur.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish, each with its own line style
# for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
ENDINGS = (".png", ".pdf", ".svg")
DASHES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1)), (0, (5, 3)), "-")


def require_matplotlib() -> None:
    """Raises an `ImportError` with the install command if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("Pictures need matplotlib, which is not installed: pip install 'keras_blur[plot]'")


def figure(columns: int = 1, rows: int = 1, width: float = 4.5, height: float = 3.2) -> tuple[Figure, Any]:
    """Creates a figure and its axes, `[rows][columns]`.

    Raises:
        ImportError: if matplotlib is not installed; the message has the install command.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.5)
    return made, axes


def line(
    axis: Any, index: int, x: Any, y: Any, label: str, spread: Any = None, bounds: tuple[float, float] | None = None
) -> None:
    """Draws curve number `index`, with an optional band of `spread`, clipped to `bounds`."""
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    axis.plot(x, y, color=colour, linestyle=dash, linewidth=1.6, label=label)
    if spread is not None:
        low, high = (-np.inf, np.inf) if bounds is None else bounds
        band = np.clip(y - spread, low, high), np.clip(y + spread, low, high)
        axis.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0)


def backdrop(axis: Any, index: int, x: Any, y: Any, label: str) -> None:
    """Draws a broad grey curve behind the others, lighter with its number."""
    axis.plot(x, y, color=("0.45", "0.75")[index % 2], linewidth=4, zorder=0, label=label)


def legend(made: Figure, axis: Any, columns: int = 4) -> None:
    """Adds a legend below the panels, unless there is only one curve."""
    handles, labels = axis.get_legend_handles_labels()
    if len(handles) > 1:
        made.legend(
            handles, labels, loc="outside lower center", ncols=min(columns, len(handles)), fontsize=8, frameon=False,
            handlelength=3,
        )  # fmt: skip


def step_axis(axis: Any, last: float) -> None:
    """Sets a logarithmic x axis of learning steps from 0 to `last`, with ticks 0, 1, 10, 100."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(0, last)
    ticks = [0, *(factor * 10**power for power in range(7) for factor in ((1,) if last > 30 else (1, 2, 5)))]
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= last]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_locator(NullLocator())


def time_axis(axis: Any, times: Any) -> None:
    """Sets a logarithmic x axis of seconds, from the first time above 0 to the last of all curves.

    Args:
        axis: the axis.
        times: seconds of each curve, ascending.
    """
    from matplotlib.ticker import NullFormatter

    above = [time for curve in times for time in curve if time > 0]
    if above:
        axis.set_xscale("log", nonpositive="mask")  # a clipped 0 would draw a horizontal line to the next point
        axis.set_xlim(min(above), max(above))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())


def save(made: Figure, path: str | os.PathLike[str]) -> None:
    """Saves a figure atomically. The suffix determines the format; devices get PNG."""
    ending = os.path.splitext(os.fspath(path))[1].lower()
    with replacing(path) as temporary:
        made.savefig(temporary, dpi=150, format=ending[1:] if ending in ENDINGS else "png")
