"""What several benchmarks measure with: an unroll's arithmetic, the machine's matmul peak, peak
memory."""

from __future__ import annotations

import resource
import threading
import time
from itertools import pairwise

import numpy as np
from keras import ops


def peak_flops() -> float:
    """What a large float32 matrix product reaches here, in operations a second."""
    side = 2048
    a = ops.ones((side, side))
    np.asarray(ops.matmul(a, a))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        np.asarray(ops.matmul(a, a))
        times.append(time.perf_counter() - start)
    return 2 * side**3 / float(np.median(times))


def operations(sizes: list[int], batch: int, steps: int, states: int) -> int:
    """Multiplications and additions of the matrix products of the unroll, the query and their
    derivatives."""
    products = [2 * batch * a * b * states for a, b in pairwise(sizes)]
    first, rest = products[0], sum(products[1:])
    # First layer: forward and Hebbian product, one derivative each, since the input is data.
    # Others: forward, backward and the Hebbian products of both directions, two derivatives each.
    step = 4 * first + 12 * rest
    return steps * step + 2 * first + 3 * rest


class PeakMemory:
    """Largest resident memory of this process while it is open, above that before, in MB; sampled
    each 2 ms."""

    def __enter__(self) -> PeakMemory:
        self._before = self._largest = self._resident()
        self._open = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._open = False
        self._thread.join()
        self.megabytes = (self._largest - self._before) / 2**20

    def _watch(self) -> None:
        while self._open:
            self._largest = max(self._largest, self._resident())
            time.sleep(0.002)

    @staticmethod
    def _resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
