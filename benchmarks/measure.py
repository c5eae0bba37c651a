"""What several benchmarks measure with: a program's arithmetic, the machine's matmul peak, peak
memory."""

from __future__ import annotations

import math
import resource
import threading
import time
from collections.abc import Iterator
from typing import Any

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


def operations(program: Any) -> int:
    """Multiplications and additions of the matrix products, factorisations and triangular solves of
    a JAX program (`jax.make_jaxpr`), those of a loop's body once for each round, those of all
    branches of a condition.

    Raises:
        ValueError: if the number of rounds of a loop with products is not known.
    """
    total = 0
    for equation in program.eqns:
        name, given = equation.primitive.name, equation.params
        shapes = [one.aval.shape for one in equation.invars]
        size = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "dot_general":
            summed = given["dimension_numbers"][0][0]
            total += 2 * size * math.prod(shapes[0][axis] for axis in summed)
        elif name == "conv_general_dilated":
            summed = given["dimension_numbers"].rhs_spec[1:]
            total += 2 * size * math.prod(shapes[1][axis] for axis in summed)
        elif name == "cholesky":
            total += math.prod(shapes[0]) * shapes[0][-1] // 3
        elif name == "triangular_solve":
            total += size * shapes[0][-1]
        else:
            inner = sum(operations(getattr(one, "jaxpr", one)) for one in _programs(given))
            if name == "while" and inner:
                raise ValueError(
                    "`program` must have a known number of rounds in each loop of matrix products. Received: a while loop."
                )
            total += inner * (given["length"] if name == "scan" else 1)
    return total


def _programs(given: dict[str, Any]) -> Iterator[Any]:
    """The programs among the parameters of a JAX equation."""
    for value in given.values():
        for one in value if isinstance(value, tuple) else (value,):
            if hasattr(getattr(one, "jaxpr", one), "eqns"):
                yield one


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
