"""Labelled images as arrays: scikit-learn's digits, or prepared `tensorflow_datasets` sets.

Nothing is downloaded here, because training should not depend on the network. If data are missing,
the error names the folder and the command that gets them.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from keras_blur import arguments

_DIGITS_TEST = 360
_READ = 512  # images that are read at a time


@dataclasses.dataclass(frozen=True)
class Images:
    """A set of labelled images.

    Attributes:
        name: name of the set.
        x_train: images `[n, height, width, channels]` with values from 0 to `scale`.
        y_train: `[n]` int64 labels from 0 to `classes - 1`.
        x_test: test images, never used for learning.
        y_test: test labels.
        classes: number of classes.
        scale: largest possible pixel value.
        groups: group of each class, `[classes]`, -1 for a class without images; or `None`.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    scale: float
    groups: np.ndarray | None = None


def load_images(
    name: str = "digits",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    group: str | None = None,
    convert: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Images:
    """Loads an image set.

    Args:
        name: `"digits"` for the 1,797 8x8 digits of scikit-learn, or the name of a prepared
            `tensorflow_datasets` set with the features `image` and `label`.
        data_dir: folder of prepared sets; `None` uses the environment variable `TFDS_DATA_DIR`,
            then the default of `tensorflow_datasets`.
        group: name of an integer feature that is the same for all images of a class, such as
            `alphabet` in omniglot; `None` for no groups.
        convert: function applied to parts `[n, height, width, channels]` of the set while reading,
            for sets that do not fit into memory at full size; `None` keeps images unchanged.

    Returns:
        `Images`.

    Raises:
        ImportError: if scikit-learn or tensorflow_datasets is not installed; the message has the
            install command.
        ValueError: if the data are missing or not labelled images of one size (the message names
            the folder), or the group does not exist.

    Example:

    >>> digits = load_images()
    >>> digits.x_train.shape, digits.classes
    ((1437, 8, 8, 1), 10)
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"`name` must be 'digits' or the name of an image set. {arguments.received('name', name)}")
    if name == "digits":
        if group is not None:
            raise ValueError(f"`group` must be None for the digits, which have none. Received: group={group!r}")
        return _digits(convert or _as_they_are)
    return _prepared(name, data_dir, group, convert or _as_they_are)


def _as_they_are(images: np.ndarray) -> np.ndarray:
    return images


def _digits(convert: Callable[[np.ndarray], np.ndarray]) -> Images:
    data = needs("sklearn.datasets", "scikit-learn").load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))  # neighbours in the file are by the same writer
    x, y = convert(data.images.astype(np.uint8)[order][..., None]), data.target.astype(np.int64)[order]
    return Images("digits", x[:-_DIGITS_TEST], y[:-_DIGITS_TEST], x[-_DIGITS_TEST:], y[-_DIGITS_TEST:], 10, 16.0)


def _prepared(
    name: str, data_dir: str | os.PathLike[str] | None, group: str | None, convert: Callable[[np.ndarray], np.ndarray]
) -> Images:
    tfds = needs("tensorflow_datasets", "tensorflow-datasets")
    folder = os.path.expanduser(
        os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets"))
    )
    prepare = f"tfds.builder('{name}', data_dir='{folder}').download_and_prepare()"
    get = f'python -c "import tensorflow_datasets as tfds; {prepare}"'
    try:
        builder = tfds.builder(name, data_dir=folder, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"`name` (--data) must be 'digits' or an image set that tensorflow_datasets knows or that is prepared in "
            f"{folder!r}. Received: name={name!r}"
        ) from error
    if not os.path.isdir(builder.data_path) or not builder.info.splits:
        raise ValueError(
            f"The image set {name!r} is not prepared in {folder!r} (looked at {os.fspath(builder.data_path)!r}). "
            f"Give its folder with data_dir (--data_dir) or TFDS_DATA_DIR, or download it with: {get}"
        )
    splits = builder.info.splits
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"The image set {name!r} must have the splits train and test. It has: {', '.join(splits)}.")
    features = dict(builder.info.features.items())
    shape = getattr(features.get("image"), "shape", (None,))
    if None in shape or not hasattr(features.get("label"), "num_classes"):
        raise ValueError(
            f"The set {name!r} must have the features `image`, all of one size, and `label`, a class. It has: {features}"
        )
    if group is not None and group not in features:
        known = ", ".join(sorted(features))
        raise ValueError(f"`group` must be a feature of {name!r}, one of {known}. Received: group={group!r}")
    if group is not None and (features[group].shape != () or not np.issubdtype(features[group].np_dtype, np.integer)):
        raise ValueError(f"`group` must be the name of an integer feature, one number per image. Received: group={group!r}")
    classes = int(features["label"].num_classes)
    train_x, train_y, *of_train = _arrays(tfds, builder, "train", group, convert)
    test_x, test_y, *of_test = _arrays(tfds, builder, test, group, convert)
    groups = None
    if group is not None:
        groups = _of_classes(group, np.concatenate([train_y, test_y]), np.concatenate([*of_train, *of_test]), classes)
    return Images(name, train_x, train_y, test_x, test_y, classes, 255.0, groups)


def _arrays(
    tfds: ModuleType, builder: Any, split: str, group: str | None, convert: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """Images, labels and optional groups of a split."""
    names = ["label"] if group is None else ["label", group]
    parts = [(convert(batch["image"]), *(batch[name] for name in names)) for batch in _batches(tfds, builder, split)]
    if not parts:
        raise ValueError(f"The split {split!r} in {os.fspath(builder.data_path)!r} has no images.")
    x, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return [x, *(column.astype(np.int64) for column in columns)]


def _of_classes(name: str, labels: np.ndarray, groups: np.ndarray, classes: int) -> np.ndarray:
    """Derives the group of each class from the groups of its images."""
    found = np.full(classes, -1)
    found[labels] = groups
    if not np.array_equal(found[labels], groups):
        raise ValueError(f"`group` must be the same in all images of a class; {name!r} is not.")
    return found


def _batches(tfds: ModuleType, builder: Any, split: str) -> Iterator[dict[str, np.ndarray]]:
    once = tfds.ReadConfig(try_autocache=False)  # otherwise the decoded images would be held a second time
    try:
        yield from tfds.as_numpy(builder.as_dataset(split=split, batch_size=_READ, shuffle_files=False, read_config=once))
    except Exception as error:  # what a damaged record raises depends on where it is damaged
        raise ValueError(f"The split {split!r} in {os.fspath(builder.data_path)!r} could not be read: {error}") from error


def needs(module: str, distribution: str) -> ModuleType:
    """Imports a module of the extra `data`. The `ImportError` has the install command."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"This needs {distribution}, which is not installed: pip install 'keras_blur[data]'") from error
