"""Checks of task distributions."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_blur import backend
from keras_blur.core import random

_TASK_KINDS = ("classes", "values", "bits")


def check_tasks(tasks: Any, batch: int, query: int, split: str = "train") -> None:
    """Draws one episode of a task distribution and checks it.

    Args:
        tasks: a `tasks.Tasks`.
        batch: examples in each support batch.
        query: examples of the query.
        split: the split to draw from.

    Raises:
        ValueError: if an attribute is missing or invalid; if an array has a wrong shape or dtype or
            is not finite; or if labels are not +1 and -1, exactly one +1 in each row, for
            `kind="classes"`, or +1, -1 and 0 (unscored) for `"bits"`.
    """
    named = f"`tasks` ({getattr(tasks, 'name', type(tasks).__name__)})"
    shape, outputs = getattr(tasks, "shape", None), getattr(tasks, "outputs", None)
    if not isinstance(shape, tuple) or not all(map(_is_count, shape)):
        raise ValueError(f"{named} must have `shape`, a tuple of positive integers. Received: shape={shape!r}")
    if not _is_count(outputs):
        raise ValueError(f"{named} must have `outputs`, a positive integer. Received: outputs={outputs!r}")
    if tasks.kind not in _TASK_KINDS:
        known = ", ".join(map(repr, _TASK_KINDS))
        raise ValueError(f"{named} must have a `kind`, one of {known}. Received: kind={tasks.kind!r}")
    seed = random.seed_of(0)
    with backend.on_cpu():
        count = min(batch + query, tasks.available(split))
        drawn = tasks.examples(seed, count, split)
        if not isinstance(drawn, (tuple, list)) or len(drawn) != 2:
            raise ValueError(f"{named} must give examples (x, y). Received: {type(drawn).__name__}")
        for name, value, own in zip("xy", drawn, (shape, (outputs,)), strict=True):
            found = keras.ops.convert_to_numpy(value)
            if found.shape != (count, *own):
                raise ValueError(
                    f"{named} must give examples with `{name}` of shape {(count, *own)}. Received: shape {found.shape}"
                )
            if found.dtype.kind not in "iuf" and found.dtype.name != "bfloat16":
                raise ValueError(f"{named} must give examples with `{name}` of numbers. Received: {found.dtype}")
        episode = tasks.episode(seed, steps=1, batch=batch, query=query, split=split)
    wanted = {
        "x": (1, batch, tasks.features),
        "y": (1, batch, tasks.outputs),
        "query_x": (query, tasks.features),
        "query_y": (query, tasks.outputs),
    }
    if not isinstance(episode, Mapping) or set(episode) != set(wanted):
        came = sorted(episode) if isinstance(episode, Mapping) else type(episode).__name__
        raise ValueError(f"{named} must give episodes with x, y, query_x and query_y. Received: {came}")
    for name, shape in wanted.items():
        value = np.asarray(episode[name])
        if value.shape != shape:
            raise ValueError(f"{named} must give `{name}` of shape {shape}. Received: shape {value.shape}")
        if value.dtype != np.float32:
            raise ValueError(f"{named} must give `{name}` as float32. Received: {value.dtype}")
        if not np.isfinite(value).all():
            raise ValueError(f"{named} must give finite numbers. Received: NaN or infinite numbers in `{name}`")
        if not name.endswith("y") or tasks.kind == "values":
            continue
        allowed = (-1.0, 0.0, 1.0) if tasks.kind == "bits" else (-1.0, 1.0)
        if not np.isin(value, allowed).all():
            known = "labels +1, -1 and 0 (unscored)" if tasks.kind == "bits" else "labels +1 and -1"
            raise ValueError(
                f"{named} must give {known} for kind={tasks.kind!r}. Received: `{name}` from {value.min():g} to "
                f"{value.max():g}, with other values"
            )
        if tasks.kind == "classes" and tasks.outputs > 1 and not ((value > 0).sum(-1) == 1).all():
            raise ValueError(
                f"{named} must give one label +1 in each row for kind='classes'. Received: `{name}` with "
                f"{(value > 0).sum(-1).min()} to {(value > 0).sum(-1).max()}"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1
