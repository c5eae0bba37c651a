"""Learning curves of `fit` for several learners."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from keras_blur.files import check_output
from keras_blur.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_fits(curves: Mapping[str, Mapping[str, Sequence[float]]], path: str | os.PathLike[str], title: str) -> Figure:
    """Draws test accuracy by learning step and by seconds.

    Args:
        curves: by learner, `steps` from 0, `seconds` of learning, and `accuracy` on test examples.
        path: output file: .png, .pdf or .svg.
        title: title of the figure.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the file has another suffix or cannot be written.

    Example:

    >>> import tempfile
    >>> curve = {"steps": [0, 1, 2], "seconds": [0.0, 0.1, 0.2], "accuracy": [0.1, 0.6, 0.7]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     figure = plot_fits({"mine": curve, "SGD": curve}, f"{folder}/fit.png", "digits")
    >>> [text.get_text() for text in figure.legends[0].texts]
    ['mine', 'SGD']
    """
    check_output("path", path, style.ENDINGS)
    made, axes = style.figure(columns=2)
    for axis, key in zip(axes[0], ("steps", "seconds"), strict=True):
        for index, (name, curve) in enumerate(curves.items()):
            style.line(axis, index, curve[key], curve["accuracy"], name)
            if len(curve[key]) == 1:  # a line of one point is not seen
                axis.lines[-1].set(marker="o", markersize=4)
        axis.set_ylabel("test accuracy")
    style.step_axis(axes[0][0], max((*(curve["steps"][-1] for curve in curves.values()), 1)))
    axes[0][0].set_xlabel("learning step")
    style.time_axis(axes[0][1], [curve["seconds"] for curve in curves.values()])
    axes[0][1].set_xlabel("time to learn (s)")
    style.legend(made, axes[0][0])
    made.suptitle(title, fontsize=10)
    style.save(made, path)
    return made
