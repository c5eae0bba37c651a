"""What commands write, and how they say so."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from keras_blur.files import write_text


def save_json(path: str, document: Any) -> None:
    """Writes JSON, with `null` for non-finite numbers."""
    write_text(path, json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def write_json(path: str, document: Any) -> None:
    """Writes JSON, with `null` for non-finite numbers, and prints the file name."""
    save_json(path, document)
    wrote(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def wrote(path: str) -> None:
    """Prints the name of a written file, on stderr if the file itself is stdout."""
    print(f"wrote {path}", file=sys.stderr if path in ("/dev/stdout", "/dev/fd/1") else sys.stdout, flush=True)


def interrupted(kept: str) -> int:
    """Reports what an interrupted run kept. Returns the exit status."""
    print(f"keras-blur: interrupted; {kept}", file=sys.stderr)
    return 130
