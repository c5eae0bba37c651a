"""CMA-ES: gradient-free search by a normal distribution with adaptive mean, scale and covariance.

Source: "The CMA Evolution Strategy: A Tutorial" (N. Hansen, 2016, arXiv 1604.00772). Numbers in
brackets refer to its equations. The constants are those of its Table 1, with the 1/4 in (58) from
the revision of 2023. Negative weights (active CMA) are used.

This implementation consists of pure functions of arrays. A generation compiles as one program
together with the learners it scores, and the whole state is a few arrays that can be saved,
restored and distributed. It differs from the tutorial as follows:

- Candidates are drawn with the symmetric root B D B^T instead of B D. The distribution is the same,
  but it does not depend on the signs and the order of the eigenvectors, which differ between
  compilers.
- Eigenvectors are found by Jacobi rotations, starting from those of the previous generation. XLA's
  `eigh` stops at errors of about 1e-7 of the largest eigenvalue, even in float64. At a condition
  number of 1e12 its small eigenvalues are meaningless.
- A non-finite score is the worst of all. If one still gets a positive weight, its candidate counts
  as if it had stayed at the mean. A generation without a finite score changes nothing.
- The condition number of C, the step size and its growth per generation are bounded.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_blur import arguments, backend
from keras_blur.core import random

Array = Any

_DTYPES = {"float64": 1e14, "float32": 1e5}  # the bound on the condition that each has the digits for
_TINY = 1e-30
_SWEEPS = 30  # of rotations at most; two to five are usual, up to twenty from far away


class CMAState(NamedTuple):
    """The search distribution. Arrays only, named as in the tutorial, in the `dtype` of `CMAES`.

    Args:
        mean: mean, `[size]`.
        sigma: overall standard deviation (step size), a scalar.
        C: covariance without sigma, `[size, size]`.
        p_sigma: evolution path of the step size, `[size]`.
        p_c: evolution path of the rank-one update, `[size]`.
        B: eigenvectors of C in columns, unordered, `[size, size]`.
        D: square roots of the eigenvalues, `[size]`.
        generation: number of generations so far, a scalar int32.

    Example:

    >>> state = CMAES(3, sigma=0.5).init([1.0, 2.0, 3.0])
    >>> tuple(state.C.shape), float(state.sigma)
    ((3, 3), 0.5)
    """

    mean: Array
    sigma: Array
    C: Array
    p_sigma: Array
    p_c: Array
    B: Array
    D: Array
    generation: Array


@dataclasses.dataclass(frozen=True)
class CMAES:
    """CMA-ES, gradient-free search by a normal distribution: its constants and its pure methods.

    Args:
        size: number of variables.
        population: candidates per generation; `None` is `4 + floor(3 ln(size))`.
        sigma: initial standard deviation. The optimum should be within a few sigma in every
            direction.
        dtype: `"float64"` or `"float32"`. float32 does not resolve ill-conditioned problems. `None`
            is float64 where the backend has it (TensorFlow, and JAX with 64 bits enabled), else
            float32.
        gap: generations between eigendecompositions; `None` balances their cost.
        sigma_range: lower and upper bound of sigma.
        condition: largest condition number of the covariance; `None` is 1e14, or 1e5 in float32.

    Attributes:
        weights: recombination weights from the best to the worst candidate. The first `mu` are
            positive and sum to one.
        mu, mu_eff: number of positive weights, and the variance-effective selection mass.
        c_sigma, d_sigma, c_c, c_1, c_mu: learning rate and damping of sigma, learning rate of p_c,
            and learning rates of the rank-one and rank-mu updates.
        chi: expected norm of a standard normal vector.

    Raises:
        ValueError: if an argument is out of range, or the backend has no float64 and `dtype` is
            that.

    Example:

    >>> search = CMAES(3, sigma=0.5)
    >>> state = search.init([1.0, 1.0, 1.0])
    >>> def generation(state):
    ...     candidates = search.ask(state, random.seed_of(0))
    ...     return search.tell(state, candidates, ops.sum(candidates**2, axis=1))
    >>> generation = backend.compiled(generation)
    >>> for _ in range(70):
    ...     state = generation(state)
    >>> float(ops.max(ops.abs(state.mean))) < 1e-4
    True

    Source: "The CMA Evolution Strategy: A Tutorial" (N. Hansen, 2016, arXiv 1604.00772).
    """

    size: int
    population: int | None = None
    sigma: float = 0.3
    dtype: str | None = None
    gap: int | None = None
    sigma_range: tuple[float, float] = (1e-20, 1e20)
    condition: float | None = None

    weights: tuple[float, ...] = dataclasses.field(init=False, repr=False)
    mu: int = dataclasses.field(init=False, repr=False)
    mu_eff: float = dataclasses.field(init=False, repr=False)
    c_sigma: float = dataclasses.field(init=False, repr=False)
    d_sigma: float = dataclasses.field(init=False, repr=False)
    c_c: float = dataclasses.field(init=False, repr=False)
    c_1: float = dataclasses.field(init=False, repr=False)
    c_mu: float = dataclasses.field(init=False, repr=False)
    chi: float = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        arguments.count("size", self.size)
        n = self.size
        population = 4 + math.floor(3.0 * math.log(n)) if self.population is None else self.population  # (48)
        arguments.integer("population", population, 4)
        widest = "float64" if _has_float64() else "float32"
        dtype = widest if self.dtype is None else self.dtype
        if dtype not in _DTYPES:
            raise ValueError(f"`dtype` must be 'float64', 'float32' or None. Received: dtype={dtype!r}")
        if dtype == "float64" != widest:
            raise ValueError(
                "`dtype` must be 'float32' or None where JAX has no 64 bits. To enable them, set the environment variable "
                f"JAX_ENABLE_X64=1 before JAX is imported. Received: dtype={dtype!r}"
            )
        low, high = self.sigma_range
        if not 0.0 < low < high < math.inf:
            raise ValueError(
                f"`sigma_range` must be two ascending positive numbers. Received: sigma_range={self.sigma_range!r}"
            )
        if not low <= self.sigma <= high:
            raise ValueError(
                f"`sigma` must be a positive number within sigma_range={self.sigma_range!r}. Received: sigma={self.sigma!r}"
            )
        condition = _DTYPES[dtype] if self.condition is None else self.condition
        if not 1.0 < condition < math.inf:
            raise ValueError(f"`condition` must be a number above 1. Received: condition={self.condition!r}")

        raw = [math.log((population + 1) / 2) - math.log(rank) for rank in range(1, population + 1)]  # (49)
        mu = population // 2
        mu_eff = sum(raw[:mu]) ** 2 / sum(w**2 for w in raw[:mu])
        mu_eff_minus = sum(raw[mu:]) ** 2 / sum(w**2 for w in raw[mu:])
        c_1 = 2.0 / ((n + 1.3) ** 2 + mu_eff)  # (57)
        c_mu = min(1.0 - c_1, 2.0 * (0.25 + mu_eff + 1.0 / mu_eff - 2.0) / ((n + 2) ** 2 + mu_eff))  # (58)
        negative = min(
            1.0 + c_1 / c_mu,  # (50)
            1.0 + 2.0 * mu_eff_minus / (mu_eff + 2.0),  # (51)
            (1.0 - c_1 - c_mu) / (n * c_mu),  # (52)
        )
        positive_sum, negative_sum = sum(w for w in raw if w > 0.0), -sum(w for w in raw if w < 0.0)
        weights = tuple(w / positive_sum if w >= 0.0 else w * negative / negative_sum for w in raw)  # (53)
        c_sigma = (mu_eff + 2.0) / (n + mu_eff + 5.0)  # (55)
        derived = {
            "population": population,
            "dtype": dtype,
            "condition": float(condition),
            "weights": weights,
            "mu": mu,
            "mu_eff": mu_eff,
            "c_sigma": c_sigma,
            "d_sigma": 1.0 + 2.0 * max(0.0, math.sqrt((mu_eff - 1.0) / (n + 1.0)) - 1.0) + c_sigma,  # (55)
            "c_c": (4.0 + mu_eff / n) / (n + 4.0 + 2.0 * mu_eff / n),  # (56)
            "c_1": c_1,
            "c_mu": c_mu,
            "chi": math.sqrt(2.0) * math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)),  # E||N(0, I)||
            # Appendix B.2: rarely enough that it does not dominate the time.
            "gap": max(1, math.floor(1.0 / (10.0 * n * (c_1 + c_mu)))) if self.gap is None else self.gap,
        }
        arguments.count("gap", derived["gap"])
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def init(self, mean: Array) -> CMAState:
        """The state before the first generation.

        Args:
            mean: initial mean, `[size]`.

        Returns:
            A state with an isotropic distribution around `mean`.

        Raises:
            ValueError: if `mean` has another shape, or numbers that are not finite. A backend's
                arrays are not looked into.

        Example:

        >>> [float(one) for one in CMAES(2).init([0.0, 1.0]).mean]
        [0.0, 1.0]
        """
        if not ops.is_tensor(mean) and not np.isfinite(mean).all():
            raise ValueError("`mean` must be finite. Received: a value that is not.")
        mean = ops.cast(mean, self.dtype)
        if tuple(mean.shape) != (self.size,):
            raise ValueError(f"`mean` must have shape ({self.size},). Received: shape {tuple(mean.shape)}")
        eye, zeros = ops.eye(self.size, dtype=self.dtype), ops.zeros(self.size, self.dtype)
        sigma, ones = ops.convert_to_tensor(self.sigma, self.dtype), ops.ones(self.size, self.dtype)
        return CMAState(mean, sigma, eye, zeros, zeros, eye, ones, ops.zeros((), "int32"))

    def ask(self, state: CMAState, seed: Array) -> Array:
        """Samples the candidates of a generation.

        Args:
            state: the search distribution.
            seed: a seed, `[2]` int32, from `random.seed_of`. The generation number is folded in, so
                one seed serves a whole run.

        Returns:
            Candidates `[population, size]`.

        Example:

        >>> search = CMAES(5, population=12)
        >>> tuple(search.ask(search.init(ops.zeros(5)), random.seed_of(0)).shape)
        (12, 5)
        """
        shape = (len(self.weights), self.size)
        z = ops.cast(random.normal(random.fold_in(seed, state.generation), shape), self.dtype)  # (38)
        y = backend.matmul(z, backend.matmul(state.B * state.D, ops.transpose(state.B)))  # (39), by the symmetric root
        return state.mean + state.sigma * y  # (40)

    def tell(self, state: CMAState, candidates: Array, fitness: Array) -> CMAState:
        """Updates the distribution with the fitness of the candidates.

        Args:
            state: the distribution the candidates were sampled from.
            candidates: `[population, size]`.
            fitness: values to minimise, `[population]`. Only their order matters; ties go to the
                first candidate.

        Returns:
            The next state.

        Raises:
            ValueError: if a shape is wrong.

        Example:

        >>> search = CMAES(2)
        >>> state = search.init([3.0, 3.0])
        >>> candidates = search.ask(state, random.seed_of(0))
        >>> int(search.tell(state, candidates, candidates[:, 0]).generation)
        1
        """
        n, population = self.size, len(self.weights)
        candidates, fitness = ops.cast(candidates, self.dtype), ops.convert_to_tensor(fitness)
        if tuple(candidates.shape) != (population, n):
            raise ValueError(f"`candidates` must have shape ({population}, {n}). Received: shape {tuple(candidates.shape)}")
        if tuple(fitness.shape) != (population,):
            raise ValueError(f"`fitness` must have shape ({population},). Received: shape {tuple(fitness.shape)}")
        y = (candidates - state.mean) / state.sigma
        whitened = backend.matmul(y, state.B) / state.D
        square = ops.sum(ops.square(whitened), axis=1)  # of the Mahalanobis length
        here = ops.isfinite(square)
        sound = here & ops.isfinite(fitness)
        weight = ops.take(ops.convert_to_tensor(self.weights, self.dtype), _ranks(fitness, sound))
        y = ops.where((here & (sound | (weight < 0.0)))[:, None], y, 0.0)
        square = ops.where(here, ops.maximum(square, _TINY), 1.0)

        step = _of_vector(ops.transpose(y), ops.maximum(weight, 0.0))  # (41)
        mean = state.mean + state.sigma * step  # (42), with c_m = 1 (54)
        white_step = _of_vector(state.B, _of_vector(ops.transpose(state.B), step) / state.D)
        gain = math.sqrt(self.c_sigma * (2.0 - self.c_sigma) * self.mu_eff)
        p_sigma = (1.0 - self.c_sigma) * state.p_sigma + gain * white_step  # (43)
        length = ops.sqrt(ops.sum(ops.square(p_sigma)))
        growth = self.c_sigma / self.d_sigma * (length / self.chi - 1.0)
        sigma = ops.clip(state.sigma * ops.exp(ops.minimum(growth, 1.0)), *self.sigma_range)  # (44)

        generation = state.generation + 1
        settled = ops.sqrt(1.0 - (1.0 - self.c_sigma) ** (2.0 * ops.cast(generation, self.dtype)))
        calm = ops.cast(length < (1.4 + 2.0 / (n + 1.0)) * self.chi * settled, self.dtype)  # h_sigma
        gain = math.sqrt(self.c_c * (2.0 - self.c_c) * self.mu_eff)
        p_c = (1.0 - self.c_c) * state.p_c + calm * gain * step  # (45)
        scaled = ops.where(weight < 0.0, weight * n / square, weight)  # (46)
        missed = (1.0 - calm) * self.c_c * (2.0 - self.c_c)
        keep = 1.0 + self.c_1 * missed - self.c_1 - self.c_mu * sum(self.weights)
        rank_mu = backend.matmul(ops.transpose(y * scaled[:, None]), y)
        covariance = keep * state.C + self.c_1 * p_c[:, None] * p_c[None, :] + self.c_mu * rank_mu  # (47)
        covariance = (covariance + ops.transpose(covariance)) / 2.0

        if self.gap == 1:
            covariance, vectors, scales = self._decompose(covariance, state.B)
        else:
            covariance, vectors, scales = ops.cond(
                ops.equal(generation % self.gap, 0),
                lambda: self._decompose(covariance, state.B),
                lambda: (covariance, state.B, state.D),
            )
        found = CMAState(mean, sigma, covariance, p_sigma, p_c, vectors, scales, generation)
        some = ops.any(sound)
        chosen = CMAState(*(ops.where(some, new, old) for new, old in zip(found, state, strict=True)))
        return chosen._replace(generation=generation)

    def _decompose(self, covariance: Array, vectors: Array) -> tuple[Array, Array, Array]:
        """Bounds the condition of the covariance; returns it with eigenvectors and root values.

        The smallest sufficient number is added to the diagonal, which changes no eigenvector.
        """
        values, vectors = eigh(covariance, vectors)
        limit = self.condition or math.inf
        largest, smallest = ops.max(values), ops.min(values)
        more = ops.maximum((largest - limit * smallest) / (limit - 1.0), 0.0)
        covariance += more * ops.eye(self.size, dtype=self.dtype)
        return covariance, vectors, ops.sqrt(ops.maximum(values + more, _TINY))


def _has_float64() -> bool:
    """Whether the backend has float64: TensorFlow always, JAX with 64 bits enabled."""
    return keras.backend.standardize_dtype(ops.convert_to_tensor(np.zeros((), "float64")).dtype) == "float64"


def _of_vector(matrix: Array, vector: Array) -> Array:
    """The product of a matrix and a vector."""
    return backend.matmul(matrix, vector[:, None])[:, 0]


def _ranks(fitness: Array, sound: Array) -> Array:
    """Ranks of the candidates from best, 0, to worst. Ties go to the first; unsound ones are last.

    Ranks are counted, not sorted. This is exact and identical under every compiler, including -0.0
    and 0.0.
    """
    fitness = ops.where(sound, fitness, ops.zeros_like(fitness))
    order = ops.arange(fitness.shape[0])
    first = order[None, :] < order[:, None]
    better = (fitness[None, :] < fitness[:, None]) | ((fitness[None, :] == fitness[:, None]) & first)
    same_kind = sound[None, :] == sound[:, None]
    ahead = (sound[None, :] & ~sound[:, None]) | (same_kind & better)
    return ops.sum(ops.cast(ahead, "int32"), axis=1)


def eigh(matrix: Array, vectors: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of a symmetric matrix by Jacobi rotations, with a warm start.

    All rows are rotated in pairs at once, in the order of a round-robin tournament, in which every
    two rows meet once per sweep. Sweeps continue until each off-diagonal element is negligible
    relative to its two diagonal elements. Small eigenvalues of a positive matrix are therefore as
    accurate as large ones. Source: "Matrix Computations" (Golub and Van Loan), section on Jacobi
    methods; stopping rule: "Jacobi's method is more accurate than QR" (Demmel and Veselic, 1992).

    Args:
        matrix: symmetric, `[n, n]`.
        vectors: orthogonal initial eigenvectors, `[n, n]`, for example the identity.

    Returns:
        Eigenvalues `[n]`, unsorted, and eigenvectors in columns.

    Example:

    >>> values, vectors = eigh(ops.array([[2.0, 1.0], [1.0, 2.0]]), ops.eye(2))
    >>> sorted(round(float(one), 5) for one in values)
    [1.0, 3.0]
    """
    n = matrix.shape[0]
    if n == 1:
        return matrix[0], ops.ones_like(vectors)
    dtype = keras.backend.standardize_dtype(matrix.dtype)
    # The vectors have been through many rotations: a step of Newton's for orthogonality.
    squares = backend.matmul(ops.transpose(vectors), vectors)
    vectors = backend.matmul(vectors, 1.5 * ops.eye(n, dtype=dtype) - 0.5 * squares)
    matrix = backend.matmul(ops.transpose(vectors), backend.matmul(matrix, vectors))
    matrix = (matrix + ops.transpose(matrix)) / 2.0
    odd = n % 2
    matrix, vectors = (ops.pad(value, [[0, odd], [0, odd]]) for value in (matrix, vectors))
    half = (n + odd) // 2
    on_diagonal = ops.eye(2 * half, dtype="bool")
    enough = n * float(np.finfo(dtype).eps)

    def turned(left: Array, right: Array, cosine: Array, sine: Array) -> tuple[Array, Array]:
        return cosine * left - sine * right, sine * left + cosine * right

    def seated(halves: tuple[Array, Array], axis: int) -> Array:
        """The halves joined, with all rows but the first a seat further around the table."""
        if half == 1:
            return ops.concatenate(halves, axis=axis)

        def part(rows: Array, begin: int, end: int) -> Array:
            return rows[begin:end] if axis == 0 else rows[:, begin:end]

        top, bottom = halves
        still, up, down = part(top, 0, 1), part(bottom, 0, 1), part(top, half - 1, half)
        return ops.concatenate([still, up, part(top, 1, half - 1), part(bottom, 1, half), down], axis=axis)

    def round_of_pairs(number: Array, matrix: Array, vectors: Array) -> tuple[Array, Array]:
        diagonal, off = ops.diagonal(matrix), ops.diagonal(matrix[:half, half:])
        flat = off == 0.0
        cotangent = (diagonal[half:] - diagonal[:half]) / (2.0 * ops.where(flat, 1.0, off))
        side = ops.where(cotangent < 0.0, -1.0, ops.ones_like(off))
        tangent = side / (ops.abs(cotangent) + ops.sqrt(1.0 + ops.square(cotangent)))
        tangent = ops.where(flat, 0.0, tangent)
        cosine = ops.rsqrt(1.0 + ops.square(tangent))
        sine = tangent * cosine
        matrix = seated(turned(matrix[:, :half], matrix[:, half:], cosine, sine), axis=1)
        matrix = seated(turned(matrix[:half], matrix[half:], cosine[:, None], sine[:, None]), axis=0)
        return matrix, seated(turned(vectors[:, :half], vectors[:, half:], cosine, sine), axis=1)

    def unfinished(sweep: Array, matrix: Array, vectors: Array) -> Array:
        diagonal = ops.abs(ops.diagonal(matrix))
        off = ops.where(on_diagonal, 0.0, ops.square(matrix))
        return (sweep < _SWEEPS) & ops.any(off > enough**2 * diagonal[:, None] * diagonal[None, :])

    def one_sweep(sweep: Array, matrix: Array, vectors: Array) -> tuple[Array, Array, Array]:
        matrix, vectors = backend.loop(2 * half - 1, round_of_pairs, matrix, vectors)
        return sweep + 1, (matrix + ops.transpose(matrix)) / 2.0, vectors

    _, matrix, vectors = ops.while_loop(unfinished, one_sweep, (ops.zeros((), "int32"), matrix, vectors))
    return ops.diagonal(matrix)[:n], vectors[:n, :n]
