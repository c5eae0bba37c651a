"""Progress of long commands on stderr: current stage, position and elapsed time."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO


class ProgressLine:
    """A progress line, overwritten on a terminal. Elsewhere, one line per stage.

    Args:
        stream: output stream; `None` is stderr.

    Example:

    >>> import io
    >>> out = io.StringIO()
    >>> with ProgressLine(out) as line:
    ...     line.show("SGD (2 of 5)", "step 0 of 100")
    ...     line.show("SGD (2 of 5)", "step 10 of 100")
    >>> out.getvalue()
    'SGD (2 of 5), 0 s\\n'
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._begin = time.perf_counter()
        self._stage = ""

    def show(self, stage: str, detail: str) -> None:
        """Shows the current stage, and the position within it on a terminal."""
        seconds = time.perf_counter() - self._begin
        if self._terminal:
            self._stream.write(f"\r{stage}, {detail}, {seconds:.0f} s\x1b[K")
        elif stage != self._stage:
            self._stream.write(f"{stage}, {seconds:.0f} s\n")
        self._stream.flush()
        self._stage = stage

    def clear(self) -> None:
        """Removes the line from a terminal before a result is printed."""
        if self._terminal and self._stage:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        self._stage = ""

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.clear()
