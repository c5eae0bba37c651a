"""Learning curves of `fit`, of several learners side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from keras_blur.report import style


def plot_fits(histories: Mapping[str, Mapping[str, Sequence[float]]], path: str | os.PathLike[str], title: str) -> None:
    """Draws loss and accuracy by epoch, of training (as it goes) and of the test set.

    Args:
        histories: by learner, the `history` of its `fit`, with `loss`, `accuracy`, `val_loss`, `val_accuracy`.
        path: picture file.
        title: what was learned.
    """
    made, axes = style.figure(columns=2)
    for axis, key, label in zip(axes[0], ("loss", "accuracy"), ("cross-entropy", "accuracy"), strict=True):
        for index, (name, history) in enumerate(histories.items()):
            epochs = np.arange(1, len(history[key]) + 1)
            style.line(axis, 2 * index, epochs, np.asarray(history["val_" + key]), f"{name}, test")
            style.line(axis, 2 * index + 1, epochs, np.asarray(history[key]), f"{name}, training")
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].legend(fontsize=8)
    made.suptitle(title, fontsize=10)
    style.save(made, path)
