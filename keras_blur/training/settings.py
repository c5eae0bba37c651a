"""Settings of a run as JSON, their comparison, and checkpoints that carry them.

A checkpoint is a Keras weights file, followed by the settings and a checksum of both. HDF5 readers
ignore the trailing data. The checksum is verified first, because HDF5 may read a damaged file
silently or crash the process.

Equal settings must give equal JSON in every process, so automatic layer names, object identities
and memory addresses are left out. Data are represented by their shapes, their norm and a projection
of their direction. Both numbers are compared with a tolerance, since preprocessing may round
differently on another machine.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import struct
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_blur import files
from keras_blur.tasks.base import Tasks

_MAGIC = b"keras_blur run 1"
_TRAILER = struct.Struct(f"<Q32s{len(_MAGIC)}s")  # bytes of settings, checksum, magic
_PROJECTION, _NORM = "projection", "euclidean_norm"
_TOLERANCE = 1e-5
_ROWS = 4096
_OF_CLASSES = ("class", "class_name", "module", "registered_name")
_CONFIGURED = (keras.Layer, keras.losses.Loss, keras.metrics.Metric, keras.optimizers.Optimizer)


def described(value: Any) -> Any:
    """Converts a setting to JSON-compatible data.

    Args:
        value: a number, string, array, container, function, dataclass, task distribution, learner
            or Keras object.

    Returns:
        Equal nests for equal settings. Arrays become projections, variables become shapes and
        dtypes, Keras objects become configs without names, and other objects become their public
        attributes; a user's tasks have private numbers and texts, too.

    Example:

    >>> described({"rate": np.float64(0.5), "shape": (2, 3)})
    {'rate': 0.5, 'shape': [2, 3]}
    >>> described(keras.optimizers.schedules.PiecewiseConstantDecay([5], [1.0, 0.1]))["values"]
    [1.0, 0.1]
    """
    return _described(value, ())


def _described(value: Any, above: tuple[int, ...]) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, keras.Variable):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
        return projected([value])
    if id(value) in above:
        return type(value).__name__
    above = (*above, id(value))
    if isinstance(value, Mapping):
        return {str(key): _described(one, above) for key, one in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_described(one, above) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_described(one, above), sort_keys=True) for one in value)
    if isinstance(value, functools.partial):
        return {"class": _described(value.func, above), "args": _described([value.args, value.keywords], above)}
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        return value.__qualname__
    own: dict[str, Any] = {"class": type(value).__name__}
    if isinstance(value, keras.Model):
        weights = [_described(weight, above) for weight in value.weights]
        return {**own, **_config(value, above), "weights": weights}
    if isinstance(value, _CONFIGURED) or (hasattr(value, "get_config") and _package(value) == "keras"):
        return {**own, **_config(value, above)}
    if dataclasses.is_dataclass(value):
        return {**own, **{f.name: _described(getattr(value, f.name), above) for f in dataclasses.fields(value)}}
    if _package(value) in ("tensorflow", "jax", "jaxlib", "keras", "numpy") or not hasattr(value, "__dict__"):
        return own["class"]
    own |= {name: _described(one, above) for name, one in vars(value).items() if not name.startswith("_")}
    if isinstance(value, Tasks):
        private = {name: one for name, one in vars(value).items() if name.startswith("_")}
        hidden = list(_arrays(list(private.values())))
        own |= {"data": projected(hidden)} if hidden else {}
        if _package(value) != "keras_blur":  # a user's; those here have all their options as public attributes
            own |= {name: _described(one, above) for name, one in private.items() if _plain(one)}
    return own


def _plain(value: Any) -> bool:
    """Whether a value is a number, a text or a tuple of such."""
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return isinstance(value, (bool, int, float, str, np.generic))


def _package(value: Any) -> str:
    return type(value).__module__.split(".")[0]


def _config(value: Any, above: tuple[int, ...]) -> dict[str, Any]:
    """The config of a Keras object, with names replaced by their order of appearance."""
    try:
        with warnings.catch_warnings():  # Keras warns of a lambda, which is only compared here
            warnings.simplefilter("ignore")
            config = _described(value.get_config(), above)
    except (NotImplementedError, TypeError, ValueError):  # a user's class without a config
        return {}
    names: dict[str, str] = {}

    def collect(one: Any) -> None:
        if isinstance(one, dict):
            if isinstance(one.get("name"), str):
                names.setdefault(one["name"], f"name {len(names)}")
            for inner in one.values():
                collect(inner)
        elif isinstance(one, list):
            for inner in one:
                collect(inner)

    def renamed(one: Any) -> Any:
        if isinstance(one, dict):
            left_out = ("shared_object_id", "compile_config", "build_config")
            kept = {key: inner for key, inner in one.items() if key not in left_out}
            return {key: inner if key in _OF_CLASSES else renamed(inner) for key, inner in kept.items()}
        if isinstance(one, list):
            return [renamed(inner) for inner in one]
        return names.get(one, one) if isinstance(one, str) else one

    collect(config)
    return {name: one for name, one in renamed(config).items() if name != "name"}


def _arrays(nest: Any) -> Iterator[Any]:
    if isinstance(nest, np.ndarray) or keras.ops.is_tensor(nest):
        yield nest
    elif isinstance(nest, (list, tuple)):
        for one in nest:
            yield from _arrays(one)
    elif isinstance(nest, Mapping):
        for one in nest.values():
            yield from _arrays(one)
    elif dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        yield from _arrays([getattr(nest, field.name) for field in dataclasses.fields(nest)])


def projected(arrays: list[Any]) -> dict[str, Any]:
    """Summarises arrays: element count, norm, and the projection on a fixed direction over the
    norm.

    Example:

    >>> projected([np.arange(6.0).reshape(2, 3)])["elements"]
    6
    """
    elements, along, square = 0, 0.0, 0.0
    shapes = []
    for place, array in enumerate(arrays):
        given = np.asarray(array)
        shapes.append([str(given.dtype), list(given.shape)])
        if given.dtype.kind not in "biuf":
            digest = hashlib.sha256(repr(given.tolist()).encode()).digest()
            given = np.frombuffer(digest, "uint8")
        if not given.size:
            continue
        rows = given.reshape(len(given), -1) if given.ndim else given.reshape(1, 1)
        columns = np.cos(1.0 + place + 0.7 * np.arange(rows.shape[1]))
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS].astype("float64")
            along += float(np.cos(2.0 + np.arange(start, start + len(part))) @ (part @ columns))
            square += float(np.vdot(part, part))
        elements += given.size
    kind = shapes[0] if len(shapes) == 1 else len(shapes)
    norm = math.sqrt(square)
    return {"arrays": kind, "elements": elements, _PROJECTION: along / norm if norm else 0.0, _NORM: norm}


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields the settings that differ between two descriptions, with both values as text.

    Example:

    >>> list(differences({"seed": 0, "estimator": {"class": "ES", "steps": 3}}, {"seed": 1, "estimator": {"class": "PES"}}))
    [('seed', '0', '1'), ('estimator', 'ES', 'PES')]
    """
    of_one_kind = type(before) is type(now) and (not isinstance(before, dict) or before.get("class") == now.get("class"))
    if isinstance(before, dict) and of_one_kind:
        for key in {**before, **now}:
            inner = f"{name}.{key}" if name else key
            if key not in before or key not in now:
                one, other = (_shown(side[key]) if key in side else "nothing" for side in (before, now))
                yield inner, one, other
            else:
                yield from differences(before[key], now[key], inner)
    elif isinstance(before, list) and of_one_kind and len(before) == len(now):
        for place, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from differences(one, other, f"{name}[{place}]" if len(now) > 1 else name)
    elif not _equal(before, now, name):
        yield name, _shown(before), _shown(now)


def _equal(before: Any, now: Any, name: str) -> bool:
    if name.endswith(_PROJECTION):
        close = math.isclose(before, now, abs_tol=_TOLERANCE)
    elif name.endswith(_NORM):
        close = math.isclose(before, now, rel_tol=_TOLERANCE)
    else:
        return before == now
    return close or (math.isnan(before) and math.isnan(now))


def _shown(value: Any) -> str:
    """Formats a setting for a message."""
    if isinstance(value, dict) and "class" in value:
        return str(value["class"])
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return f"[{', '.join(_shown(one) for one in value)}]"
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write(path: str, weights: files.Memory, settings: Mapping[str, Any]) -> None:
    """Writes a checkpoint atomically.

    Args:
        path: the file.
        weights: Keras's weights file.
        settings: the settings that `read` returns.
    """
    text = json.dumps(settings).encode()
    summed = hashlib.sha256(weights.getbuffer())
    summed.update(text)
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(weights.getbuffer())
        file.write(text + _TRAILER.pack(len(text), summed.digest(), _MAGIC))


def read(path: str) -> dict[str, Any]:
    """Verifies the checksum of a local checkpoint and returns its settings.

    Raises:
        ValueError: if the file is damaged or not a checkpoint.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2) - _TRAILER.size
        if size < 0:
            raise ValueError("it is too short")
        file.seek(size)
        length, digest, magic = _TRAILER.unpack(file.read())
        if magic != _MAGIC or length > size:
            raise ValueError("it does not end as a checkpoint does")
        file.seek(0)
        summed, left = hashlib.sha256(), size
        while left:
            part = file.read(min(left, 1 << 20))
            summed.update(part)
            left -= len(part)
        if summed.digest() != digest:
            raise ValueError("its checksum does not match")
        file.seek(size - length)
        return json.loads(file.read(length))
