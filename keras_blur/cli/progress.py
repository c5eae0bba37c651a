"""What a long command says on stderr while it works: what it does now, how far it is, and for how long it has run."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO


class ProgressLine:
    """One line that is written over again on a terminal; elsewhere a line for each new stage.

    Args:
        stream: where to write; `None` takes stderr.

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
        """Shows a stage of the work, and how far it is where the line can be written over."""
        seconds = time.perf_counter() - self._begin
        if self._terminal:
            self._stream.write(f"\r{stage}, {detail}, {seconds:.0f} s\x1b[K")
        elif stage != self._stage:
            self._stream.write(f"{stage}, {seconds:.0f} s\n")
        self._stream.flush()
        self._stage = stage

    def clear(self) -> None:
        """Takes the line off a terminal, so that a result can stand in its place."""
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
