"""One look for all pictures: readable in print and without colour, no display needed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from keras_blur.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; each with a line style of its own for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1)), (0, (5, 3)), "-")


def figure(columns: int = 1, rows: int = 1, width: float = 4.5, height: float = 3.2) -> tuple[Figure, Any]:
    """A figure and its axes, `[rows][columns]`.

    Raises:
        ImportError: if matplotlib is not installed; it names the install command.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib, which is not installed: pip install 'keras_blur[plot]'") from error
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.5)
    return made, axes


def line(axis: Any, index: int, x: Any, y: Any, label: str, spread: Any = None) -> None:
    """Draws curve number `index`, with a band of `spread` around it where there is one."""
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    axis.plot(x, y, color=colour, linestyle=dash, linewidth=1.6, label=label)
    if spread is not None:
        axis.fill_between(x, y - spread, y + spread, color=colour, alpha=0.15, linewidth=0)


def save(made: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a picture, to a temporary name first, then renamed; the format is that of the ending."""
    path = os.fspath(path)
    with replacing(path if os.path.splitext(path)[1] else path + ".png") as temporary:
        made.savefig(temporary, dpi=150)
