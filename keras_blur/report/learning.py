"""Learning curves of `fit` for several learners."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from keras_blur.files import check_output
from keras_blur.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_fits(histories: Mapping[str, Mapping[str, Sequence[float]]], path: str | os.PathLike[str], title: str) -> Figure:
    """Draws training and test loss and accuracy by epoch.

    Args:
        histories: `history` of `fit` by learner, with `loss`, `accuracy`, `val_loss` and
            `val_accuracy`.
        path: output file: .png, .pdf or .svg.
        title: title of the figure.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the file has another suffix or cannot be written.

    Example:

    >>> import tempfile
    >>> history = {"loss": [1.0, 0.5], "accuracy": [0.6, 0.8], "val_loss": [1.1, 0.7], "val_accuracy": [0.5, 0.7]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     figure = plot_fits({"mine": history}, f"{folder}/fit.png", "digits")
    >>> [text.get_text() for text in figure.legends[0].texts]
    ['mine, test', 'mine, training']
    """
    check_output("path", path, style.ENDINGS)
    made, axes = style.figure(columns=2)
    for axis, key, label in zip(axes[0], ("loss", "accuracy"), ("cross-entropy (nats)", "accuracy"), strict=True):
        for index, (name, history) in enumerate(histories.items()):
            epochs = np.arange(1, len(history[key]) + 1)
            style.line(axis, 2 * index, epochs, np.asarray(history["val_" + key]), f"{name}, test")
            style.line(axis, 2 * index + 1, epochs, np.asarray(history[key]), f"{name}, training")
            if len(epochs) == 1:  # a line of one point is not seen
                for drawn in axis.lines[-2:]:
                    drawn.set(marker="o", markersize=4)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    style.legend(made, axes[0][0], columns=2)
    made.suptitle(title, fontsize=10)
    style.save(made, path)
    return made
