"""Damaged files for `fuzz.py`: genomes, checkpoints and vector files, changed as bytes and as
documents."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import keras
import numpy as np
from fuzz_case import Case

import keras_blur as kb
from keras_blur import conformance, files
from keras_blur.training import settings

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 7, 1e300, -0.5, float("nan"), float("inf"), "", "tanh", "nonsense", [], [1],
    [[1.0]], {}, {"a": 1},
)  # fmt: skip
VECTORS = os.path.join(os.path.dirname(__file__), "..", "tests", "conformance", "default_2state.npz")


def cases(number: int, seed: int) -> Iterator[Case]:
    """Damaged files, the three kinds in turn.

    Args:
        number: how many.
        seed: random seed; case i of a seed is always the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        kinds = (_genomes(folder), _checkpoints(folder), _vectors(folder))
        for place in range(number):
            yield kinds[place % 3](np.random.default_rng([seed, place]))


def damaged(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """A file's bytes after one or a few random changes, and their names."""
    done = []
    for _ in range(rng.integers(1, 4)):
        start, end = sorted(rng.integers(0, len(content) + 1, 2))
        end = min(end, start + int(rng.integers(1, 400)))
        name, content = {
            0: ("truncated", content[:start]),
            1: ("a bit flipped", _flipped(content, start, rng)),
            2: ("bytes deleted", content[:start] + content[end:]),
            3: ("bytes inserted", content[:start] + rng.bytes(int(rng.integers(1, 50))) + content[start:]),
            4: ("bytes repeated", content[:end] + content[start:end] + content[end:]),
            5: ("bytes zeroed", content[:start] + bytes(end - start) + content[end:]),
            6: ("bytes appended", content + rng.bytes(int(rng.integers(1, 50)))),
        }[int(rng.integers(7))]
        done.append(name)
    return content, ", ".join(done)


def _flipped(content: bytes, place: int, rng: np.random.Generator) -> bytes:
    place = min(place, len(content) - 1)
    if place < 0:
        return content
    return content[:place] + bytes([content[place] ^ 1 << int(rng.integers(8))]) + content[place + 1 :]


def _genomes(folder: str) -> Callable[[np.random.Generator], Case]:
    rule = kb.Rule(states=3, update_decay="power", momentum="after", normalize_activations="both")
    genome = kb.Genome.random(rule, 0)
    whole, path = genome.to_json().encode(), os.path.join(folder, "genome.json")

    def make(rng: np.random.Generator) -> Case:
        if rng.random() < 0.5:
            content, text = damaged(whole, rng)
            document = None
        else:
            document = json.loads(whole)
            text = _edited(document, rng)
            document.pop("checksum", None)  # an edit with a checksum of its own
            plain = json.dumps(document, sort_keys=True, separators=(",", ":"))
            document["checksum"] = hashlib.sha256(plain.encode()).hexdigest()
            content = json.dumps(document).encode()

        def run() -> None:
            _write(path, content)
            found = kb.Genome.load(path)
            if document is None:
                assert found == genome, "another genome"
                return
            assert found.rule == kb.Rule.from_config(document["rule"]), "another rule"
            for name, own in found.arrays.items():
                said = np.array(document["arrays"][name]["values"], own.dtype).reshape(own.shape)
                assert np.isfinite(own).all(), f"{name} is not finite"
                assert np.array_equal(own, said), f"another {name}"

        return Case("genome files", text, run, ("genome.json",))

    return make


def _edited(document: Any, rng: np.random.Generator) -> str:
    """Changes one random place of a JSON document, and says which."""
    path: list[Any] = []
    place = document
    while isinstance(place, (dict, list)) and place and (len(path) < 1 or rng.random() < 0.8):
        key = list(place)[rng.integers(len(place))] if isinstance(place, dict) else int(rng.integers(len(place)))
        path.append(key)
        parent, place = place, place[key]
    if rng.random() < 0.2:
        del parent[path[-1]]
        text = "deleted"
    else:
        value = copy.deepcopy(ODD[rng.integers(len(ODD))])
        parent[path[-1]] = value
        text = f"set to {value!r}"
    return f"{'/'.join(map(str, path))} {text}"


def _checkpoints(folder: str) -> Callable[[np.random.Generator], Case]:
    start = os.path.join(folder, "start.weights.h5")
    path = os.path.join(folder, "checkpoint.weights.h5")

    def trainer() -> kb.meta.MetaTrainer:
        made = kb.meta.MetaTrainer(
            kb.tasks.functions("xor"), kb.learners.Blur((3,)), kb.meta.Unroll(1), batch_size=4, query_size=4
        )
        made.compile(keras.optimizers.Adam(1e-3), jit_compile=False)
        return made

    first = trainer()
    first.fit(1, 1, checkpoint=start, verbose=0)
    expected = first.parameters()
    with open(start, "rb") as file:
        whole = file.read()
    places: list[str] = []
    with h5py.File(start) as file:
        file.visititems(lambda name, item: places.append(name) if isinstance(item, h5py.Dataset) else None)
    again = trainer()

    def make(rng: np.random.Generator) -> Case:
        change = None
        if rng.random() < 0.7:
            content, text = damaged(whole, rng)
        else:
            content, text = whole, ""
            place = places[rng.integers(len(places))]
            change = ("deleted", "longer", "text", "empty")[rng.integers(4)]
            text = f"{place} {change}"

        def run() -> None:
            _write(path, content)
            if change:
                _rewritten(path, place, change)
            again.fit(1, 1, checkpoint=path, verbose=0)
            found = again.parameters()
            assert all(np.array_equal(found[name], own) for name, own in expected.items()), "other numbers"

        return Case("checkpoint files", text, run, ("checkpoint.weights.h5",))

    return make


def _rewritten(path: str, place: str, change: str) -> None:
    """Changes one array of a checkpoint, with a checksum that fits again."""
    kept = settings.read(path)
    with h5py.File(path, "r+") as file:
        value = file[place][()]
        del file[place]
        if change != "deleted":
            file[place] = {
                "longer": lambda: np.concatenate([np.ravel(value), [1]]),
                "text": lambda: "text",
                "empty": lambda: np.zeros((0,)),
            }[change]()
    weights = files.Memory(path)
    with open(path, "rb") as file:
        weights.write(file.read())
    settings.write(path, weights, kept)


def _vectors(folder: str) -> Callable[[np.random.Generator], Case]:
    path = os.path.join(folder, "vectors.npz")
    with open(VECTORS, "rb") as file:
        whole = file.read()
    with np.load(VECTORS) as archive:
        arrays = {key: archive[key] for key in archive.files}

    def make(rng: np.random.Generator) -> Case:
        if rng.random() < 0.7:
            content, text = damaged(whole, rng)
            changed = None
        else:
            changed = dict(arrays)
            text = _changed(changed, rng)
            buffer = io.BytesIO()
            np.savez(buffer, **changed)
            content = buffer.getvalue()

        def run() -> None:
            _write(path, content)
            report = conformance.replay(path)
            assert set(report.errors) == set(conformance.GROUPS), "a group is missing"
            if changed is None:
                assert report.agrees, "the numbers were damaged and nothing was said of the file"

        return Case("vector files", text, run, ("vectors.npz",))

    return make


def _changed(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> str:
    """Changes one array of a vector file or one entry of its config, and says which."""
    key = list(arrays)[rng.integers(len(arrays))]
    if key == "config" or rng.random() < 0.5:
        config = json.loads(bytes(arrays["config"]).decode())
        text = _edited(config, rng)
        arrays["config"] = np.frombuffer(json.dumps(config).encode(), np.uint8)
        return f"config: {text}"
    value = arrays[key]
    how = int(rng.integers(6))
    if how == 0:
        del arrays[key]
    else:
        arrays[key] = {
            1: lambda: value.astype("int32"),
            2: lambda: np.full_like(value, np.nan),
            3: lambda: value[None],
            4: lambda: value.ravel()[:-1],
            5: lambda: 1.5 * value,
        }[how]()
    names = ("deleted", "of integers", "not finite", "with an axis more", "shorter", "scaled")
    return f"{key} {names[how]}"


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
