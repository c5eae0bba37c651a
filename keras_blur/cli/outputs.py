"""Output of commands: tables, JSON files and messages."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import keras

from keras_blur.files import exists, is_remote, read_text, write_text

written: list[str] = []  # the files of this command, for what Ctrl-C says


class Table:
    """A table that is printed row by row, as plain text or styled for a terminal.

    On a terminal the header is bold with a rule below it, marked rows are red, and lines are cut to
    the width. The environment variable `NO_COLOR` turns off colours and bold text.

    Args:
        columns: heading and width of each column. A negative width aligns to the right. The last
            column may have width 0.
        stream: output stream; `None` is stdout.

    Example:

    >>> table = Table({"name": 8, "states": -6, "": 0})
    name    states
    >>> table.row("fast", "2", "  by hand")
    fast         2  by hand
    """

    def __init__(self, columns: Mapping[str, int], stream: TextIO | None = None):
        self._stream = sys.stdout if stream is None else stream
        self._widths = list(columns.values())
        self._terminal = self._stream.isatty()
        self._styled = self._terminal and not os.environ.get("NO_COLOR")
        self._columns = shutil.get_terminal_size().columns
        self._print(list(columns), "1")
        if self._terminal:
            self._print(["\u2500" * self._columns], "")

    def row(self, *cells: str, marked: bool = False) -> None:
        """Prints a row; a marked one is red on a terminal."""
        self._print(cells, "31" if marked else "")

    def _print(self, cells: Sequence[str], style: str) -> None:
        sides = zip(cells, self._widths, strict=False)
        line = "".join(cell.rjust(-width) if width < 0 else cell.ljust(width) for cell, width in sides).rstrip()
        if self._terminal and len(line) > self._columns:
            line = line[: self._columns - 1] + "\u2026"
        self._stream.write((f"\x1b[{style}m{line}\x1b[0m" if self._styled and style else line) + "\n")
        self._stream.flush()


def draft_json(path: str, document: Any) -> None:
    """Writes JSON that is written again later. A device gets only the last."""
    if is_remote(path) or os.path.isfile(path) or not os.path.exists(path):
        _save_json(path, document)


def write_json(path: str, document: Any) -> None:
    """Writes JSON, with `null` for non-finite numbers, and prints the file name."""
    _save_json(path, document)
    wrote(path)


def _save_json(path: str, document: Any) -> None:
    write_text(path, json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")
    _remember(path)


def read_json(path: str | None) -> Any:
    """What an earlier run wrote with `write_json`; `None` if there is no such file."""
    try:
        if path and (exists(path) if is_remote(path) else os.path.isfile(path)):
            return json.loads(read_text(path))
    except ValueError:  # not JSON
        pass
    return None


def of_same_run(document: Any, flag: Mapping[str, Any], free: Sequence[str]) -> Any:
    """What an earlier run wrote, or `None` if it had other flags.

    Args:
        document: the JSON of the earlier run, with its `flags`.
        flag: the flags of this run.
        free: flags that may differ, beside `epochs` and `overwrite`, such as those of outputs.
    """
    if not isinstance(document, Mapping) or not isinstance(document.get("flags"), Mapping):
        return None

    def kept(flags: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in flags.items() if name not in (*free, "epochs", "overwrite")}

    return document if kept(document["flags"]) == kept(json.loads(json.dumps(_finite(flag)))) else None


def history_of(log: keras.callbacks.History) -> dict[str, Any]:
    """The numbers of the epochs of a run, from 1 on, and what Keras logged in them.

    A run that goes on from a checkpoint has the epochs after it; `continued` adds those before.
    """
    history = {name: [float(value) for value in column] for name, column in log.history.items()}
    return {"epochs": [epoch + 1 for epoch in getattr(log, "epoch", ())], "history": history}


def continued(earlier: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Puts the epochs of an interrupted run before those of the run that resumed it.

    Args:
        earlier: a result with `epochs`, `history` and perhaps `seconds`, as an earlier run wrote
            it. Anything else, or a result that does not reach where the run resumed, is ignored.
        found: the same of this run. Without any epoch, the earlier result stands for it.

    Returns:
        The result of both runs. Numbers that one of them lacks are `None`.

    Example:

    >>> continued({"epochs": [1], "history": {"loss": [2.0]}}, {"epochs": [2], "history": {"loss": [1.0]}})
    {'epochs': [1, 2], 'history': {'loss': [2.0, 1.0]}}
    """
    if not isinstance(earlier, Mapping) or not earlier.get("epochs") or not isinstance(earlier.get("history"), Mapping):
        return found
    before, after = earlier["epochs"], found["epochs"]
    if after and after[0] - 1 not in before:
        return found
    count = before.index(after[0] - 1) + 1 if after else len(before)  # an epoch may have been run twice
    history = {}
    for name in {**earlier["history"], **found["history"]}:
        old, new = (part["history"].get(name) or [None] * len(part["epochs"]) for part in (earlier, found))
        history[name] = [*old[:count], *new]
    joined = {**found, "epochs": [*before[:count], *after], "history": history}
    if "seconds" in found:
        joined["seconds"] = found["seconds"] + (earlier.get("seconds") or 0.0)
    return joined


def left_alone(path: str, going_on: bool) -> bool:
    """Whether a run that did no epoch leaves a file as it is, and says so.

    It does if it would go on from a checkpoint and the file exists.
    """
    if going_on and exists(path):
        print(f"left {path} unchanged: no epoch was done")
        return True
    return False


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remember(path: str) -> None:
    if path not in written:
        written.append(path)


def wrote(path: str) -> None:
    """Prints the name of a written file, on stderr if the file itself is stdout."""
    _remember(path)
    print(f"wrote {path}", file=sys.stderr if path in ("/dev/stdout", "/dev/fd/1") else sys.stdout, flush=True)


def interrupted(otherwise: str, kept: str = "kept what was learned") -> int:
    """Reports which files an interrupted run wrote, or why none, and returns the exit status."""
    said = f"{kept} in {', '.join(written)}" if written else otherwise
    print(f"keras-blur: interrupted; {said}", file=sys.stderr)
    return 130
