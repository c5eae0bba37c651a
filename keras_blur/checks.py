"""Data that a network is to learn from, checked before they do harm: numbers that are not finite, labels out of range.

Keras would train on them, and the first sign would be a score that is NaN, hours later.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf

from keras_blur.files import exists, is_remote

Classes = Callable[[], int | None]


def checked(x: Any, y: Any, sample_weight: Any, classes: Classes) -> Any:
    """What `fit` is given as x, checked: arrays at once, batches of other kinds as they come.

    Args:
        x: arrays, a `tf.data.Dataset`, a `PyDataset`, a generator, or `None`.
        y: labels or targets that go with arrays.
        sample_weight: weights that go with arrays, or `None`.
        classes: gives the number of classes where labels are integers, else `None`; asked at each check, since a network
            may be built by its first batch.

    Returns:
        x, or what gives its batches.

    Raises:
        ValueError: if arrays are not finite, or a label is not one of the classes.
    """
    if isinstance(x, tf.data.Dataset):
        return x.map(lambda *batch: _tensors(classes(), batch))
    if isinstance(x, keras.utils.PyDataset):
        return _CheckedDataset(x, classes)
    if inspect.isgenerator(x):
        return _batches(x, classes)
    if x is not None:
        _arrays(classes(), x, y, sample_weight)
    return x


def _batches(batches: Iterable[Any], classes: Classes) -> Iterable[Any]:
    for batch in batches:
        _arrays(classes(), *keras.utils.unpack_x_y_sample_weight(batch))
        yield batch


def _arrays(classes: int | None, x: Any, y: Any, sample_weight: Any) -> None:
    values = np.asarray(x) if not isinstance(x, (list, tuple, dict)) else None
    if values is not None and values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("`x` must be finite. Received an array with NaN or infinite numbers.")
    if y is None:
        raise ValueError("`y` must be given: a network learns from labels or targets. Received: y=None")
    labels = np.asarray(y)
    if labels.dtype.kind not in "biuf":
        raise ValueError(f"`y` must hold numbers. Received an array of {labels.dtype}.")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError("`y` must be finite. Received an array with NaN or infinite numbers.")
    if sample_weight is not None and not np.isfinite(np.asarray(sample_weight, np.float64)).all():
        raise ValueError("`sample_weight` must be finite. Received an array with NaN or infinite numbers.")
    if classes is None or not labels.size:
        return
    if labels.min() < 0 or labels.max() >= classes or (labels.dtype.kind == "f" and (labels % 1).any()):
        raise ValueError(
            f"Labels must be integers from 0 to {classes - 1}, which is what the output layer can tell apart. "
            f"Received labels from {labels.min()} to {labels.max()}."
        )


def _tensors(classes: int | None, batch: tuple[Any, ...]) -> Any:
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch if len(batch) > 1 else batch[0])
    if y is None:
        raise ValueError("A dataset for `fit` must give (x, y) or (x, y, sample_weight). Received batches without y.")
    checks = []
    for name, value in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        if value is not None and value.dtype.is_floating:
            checks.append(tf.debugging.assert_all_finite(value, f"`{name}` must be finite"))
    if classes is not None:
        wrong = f"Labels must be integers from 0 to {classes - 1}"
        limit = tf.cast(classes, y.dtype)
        checks += [tf.debugging.assert_non_negative(y, wrong), tf.debugging.assert_less(y, limit, wrong)]
    with tf.control_dependencies(checks):
        return tuple(tf.nest.map_structure(tf.identity, batch))


class _CheckedDataset(keras.utils.PyDataset):
    """A `PyDataset` whose batches are checked as they come."""

    def __init__(self, inner: keras.utils.PyDataset, classes: Classes):
        super().__init__(
            workers=inner.workers, use_multiprocessing=inner.use_multiprocessing, max_queue_size=inner.max_queue_size
        )
        self._inner, self._classes = inner, classes

    def __getitem__(self, index: int) -> Any:
        batch = self._inner[index]
        _arrays(self._classes(), *keras.utils.unpack_x_y_sample_weight(batch))
        return batch

    @property
    def num_batches(self) -> int | None:
        return self._inner.num_batches

    def on_epoch_begin(self) -> None:
        self._inner.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._inner.on_epoch_end()


# Kinds of files that are written from start to end, so that a device such as /dev/stdout can take them.
_STREAMED = (".json", ".csv", ".png", ".pdf", ".svg")


def check_output(name: str, path: str | os.PathLike[str], endings: tuple[str, ...] = (), overwrite: bool = True) -> None:
    """Checks that a file can be written, before the work whose result it is to hold.

    Args:
        name: the argument, or the flag with its dashes, that an error names.
        path: the file. A symbolic link stands for its target, and a device needs no ending. Of a path with a scheme, as in
            `gs://bucket/file.json`, only the ending and the existence are checked.
        endings: those that the path may have; empty for any.
        overwrite: whether the file may exist already.

    Raises:
        ValueError: if `path` isn't a path, is a folder, has another ending, lies in a folder that is missing or cannot be
            written, or exists and must not be overwritten.

    Example:

    >>> check_output("path", "curves.txt", (".png", ".pdf"))
    Traceback (most recent call last):
    ValueError: `path` must end with .png or .pdf. Received: path='curves.txt'
    """
    shown = name if name.startswith("--") else f"`{name}`"

    def refuse(expected: str) -> NoReturn:
        raise ValueError(f"{shown} must {expected}. Received: {name}={path!r}")

    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path) or "\0" in os.fspath(path):
        refuse("be the path of a file")
    path = os.fspath(path)
    device = not is_remote(path) and os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path)
    if device and set(endings) <= set(_STREAMED):
        if not os.access(path, os.W_OK):
            refuse("be a device that can be written")
        return
    if os.path.isdir(path) or path.endswith("/"):
        refuse("be a file, not a folder")
    known = tuple(ending for ending in endings if path.endswith(ending))
    if endings and not known and not path.lower().endswith(tuple(set(endings) & set(_STREAMED))):
        *first, last = endings
        refuse(f"end with {', '.join(first)} or {last}" if first else f"end with {last}")
    if os.path.basename(path).startswith(".") and os.path.basename(path) in endings:
        refuse("have a name before its ending")
    if is_remote(path):
        there = exists(path)
    else:
        folder = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(folder):
            refuse(f"be a file in a folder that exists; there is no folder {folder!r}")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            refuse(f"be a file in a folder that can be written; {folder!r} cannot be: {error.strerror}")
        try:
            os.stat(path)
            there = True
        except FileNotFoundError:
            there = False
        except OSError as error:
            refuse(f"be a file that can be written: {error.strerror}")
    if there and not overwrite:
        allowed = "--overwrite" if name.startswith("--") else "`overwrite`"
        refuse(f"be a new file, unless {allowed} is given; {path!r} exists")
