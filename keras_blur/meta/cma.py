"""CMA-ES: gradient-free search by a normal distribution with adaptive mean, scale and covariance.

Source: "The CMA Evolution Strategy: A Tutorial" (N. Hansen, 2016, arXiv 1604.00772). Numbers in
brackets refer to its equations. The constants are those of its Table 1, with the 1/4 in (58) from
the revision of 2023. Negative weights (active CMA) are used.

This implementation consists of pure functions of tensors. A generation compiles as one program
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

import numpy as np
import tensorflow as tf

from keras_blur import arguments
from keras_blur.core import random

Array = Any

_DTYPES = {"float64": 1e14, "float32": 1e5}  # the bound on the condition that each has the digits for
_TINY = 1e-30
_SWEEPS = 30  # of rotations at most; two to five are usual, up to twenty from far away


class CMAState(NamedTuple):
    """The search distribution. Tensors only, named as in the tutorial.

    Args:
        mean: mean, `[size]`.
        sigma: overall standard deviation (step size).
        C: covariance without sigma, `[size, size]`.
        p_sigma: evolution path of the step size, `[size]`.
        p_c: evolution path of the rank-one update, `[size]`.
        B: eigenvectors of C in columns, unordered, `[size, size]`.
        D: square roots of the eigenvalues, `[size]`.
        generation: number of generations so far, int32.
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
    """The constants and the pure methods of CMA-ES.

    Args:
        size: number of variables.
        population: candidates per generation; `None` is `4 + floor(3 ln(size))`.
        sigma: initial standard deviation. The optimum should be within a few sigma in every
            direction.
        dtype: `"float64"` or `"float32"`. float32 does not resolve ill-conditioned problems.
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
        ValueError: if an argument is out of range.

    Example:

    >>> search = CMAES(3, sigma=0.5)
    >>> state = search.init([1.0, 1.0, 1.0])
    >>> generation = tf.function(lambda s: search.tell(s, x := search.ask(s, random.seed_of(0)), tf.norm(x, axis=1)))
    >>> for _ in range(70):
    ...     state = generation(state)
    >>> float(tf.norm(state.mean)) < 1e-4
    True
    """

    size: int
    population: int | None = None
    sigma: float = 0.3
    dtype: str = "float64"
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
        if self.dtype not in _DTYPES:
            raise ValueError(f"`dtype` must be 'float64' or 'float32'. Received: dtype={self.dtype!r}")
        low, high = self.sigma_range
        if not 0.0 < low < high < math.inf:
            raise ValueError(
                f"`sigma_range` must be two ascending positive numbers. Received: sigma_range={self.sigma_range!r}"
            )
        if not low <= self.sigma <= high:
            raise ValueError(
                f"`sigma` must be a positive number within sigma_range={self.sigma_range!r}. Received: sigma={self.sigma!r}"
            )
        condition = _DTYPES[self.dtype] if self.condition is None else self.condition
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
            ValueError: if `mean` has another shape or, in eager mode, a non-finite value.

        Example:

        >>> CMAES(2).init([0.0, 1.0]).mean.numpy().tolist()
        [0.0, 1.0]
        """
        mean = tf.cast(mean, self.dtype)
        if tuple(mean.shape) != (self.size,):
            raise ValueError(f"`mean` must have shape ({self.size},). Received: shape {tuple(mean.shape)}")
        if tf.executing_eagerly() and not np.isfinite(mean.numpy()).all():
            raise ValueError("`mean` must be finite. Received: a value that is not.")
        eye, zeros = tf.eye(self.size, dtype=self.dtype), tf.zeros(self.size, self.dtype)
        sigma = tf.constant(self.sigma, self.dtype)
        return CMAState(mean, sigma, eye, zeros, zeros, eye, tf.ones(self.size, self.dtype), tf.constant(0, tf.int32))

    def ask(self, state: CMAState, seed: Array) -> Array:
        """Samples the candidates of a generation.

        Args:
            state: the search distribution.
            seed: a seed from `random.seed_of`. The generation number is folded in, so one seed
                serves a whole run.

        Returns:
            Candidates `[population, size]`.

        Example:

        >>> search = CMAES(5, population=12)
        >>> search.ask(search.init(tf.zeros(5)), random.seed_of(0)).shape
        TensorShape([12, 5])
        """
        shape = (len(self.weights), self.size)
        z = tf.cast(random.normal(random.fold_in(seed, state.generation), shape), self.dtype)  # (38)
        y = tf.matmul(z, tf.matmul(state.B * state.D, state.B, transpose_b=True))  # (39), by the symmetric root
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
        candidates, fitness = tf.cast(candidates, self.dtype), tf.convert_to_tensor(fitness)
        fitness = fitness if fitness.dtype.is_floating else tf.cast(fitness, tf.float64)
        if tuple(candidates.shape) != (population, n):
            raise ValueError(f"`candidates` must have shape ({population}, {n}). Received: shape {tuple(candidates.shape)}")
        if tuple(fitness.shape) != (population,):
            raise ValueError(f"`fitness` must have shape ({population},). Received: shape {tuple(fitness.shape)}")
        y = (candidates - state.mean) / state.sigma
        whitened = tf.matmul(y, state.B) / state.D
        square = tf.reduce_sum(tf.square(whitened), axis=1)  # of the Mahalanobis length
        here = tf.math.is_finite(square)
        sound = here & tf.math.is_finite(fitness)
        weight = tf.gather(tf.constant(self.weights, self.dtype), _ranks(fitness, sound))
        y = tf.where((here & (sound | (weight < 0.0)))[:, None], y, tf.zeros_like(y))
        square = tf.where(here, tf.maximum(square, _TINY), tf.ones_like(square))

        step = tf.linalg.matvec(y, tf.maximum(weight, 0.0), transpose_a=True)  # (41)
        mean = state.mean + state.sigma * step  # (42), with c_m = 1 (54)
        white_step = tf.linalg.matvec(state.B, tf.linalg.matvec(state.B, step, transpose_a=True) / state.D)
        gain = math.sqrt(self.c_sigma * (2.0 - self.c_sigma) * self.mu_eff)
        p_sigma = (1.0 - self.c_sigma) * state.p_sigma + gain * white_step  # (43)
        length = tf.norm(p_sigma)
        growth = self.c_sigma / self.d_sigma * (length / self.chi - 1.0)
        sigma = tf.clip_by_value(state.sigma * tf.exp(tf.minimum(growth, 1.0)), *self.sigma_range)  # (44)

        generation = state.generation + 1
        settled = tf.sqrt(1.0 - tf.pow(tf.constant(1.0 - self.c_sigma, self.dtype), 2.0 * tf.cast(generation, self.dtype)))
        calm = tf.cast(length < (1.4 + 2.0 / (n + 1.0)) * self.chi * settled, self.dtype)  # h_sigma
        gain = math.sqrt(self.c_c * (2.0 - self.c_c) * self.mu_eff)
        p_c = (1.0 - self.c_c) * state.p_c + calm * gain * step  # (45)
        scaled = tf.where(weight < 0.0, weight * n / square, weight)  # (46)
        missed = (1.0 - calm) * self.c_c * (2.0 - self.c_c)
        keep = 1.0 + self.c_1 * missed - self.c_1 - self.c_mu * sum(self.weights)
        rank_mu = tf.matmul(y * scaled[:, None], y, transpose_a=True)
        covariance = keep * state.C + self.c_1 * p_c[:, None] * p_c[None, :] + self.c_mu * rank_mu  # (47)
        covariance = (covariance + tf.transpose(covariance)) / 2.0

        if self.gap == 1:
            covariance, vectors, scales = self._decompose(covariance, state.B)
        else:
            covariance, vectors, scales = tf.cond(
                tf.equal(generation % self.gap, 0),
                lambda: self._decompose(covariance, state.B),
                lambda: (covariance, state.B, state.D),
            )
        found = CMAState(mean, sigma, covariance, p_sigma, p_c, vectors, scales, generation)
        some = tf.reduce_any(sound)
        chosen = CMAState(*(tf.where(some, new, old) for new, old in zip(found, state, strict=True)))
        return chosen._replace(generation=generation)

    def _decompose(self, covariance: Array, vectors: Array) -> tuple[Array, Array, Array]:
        """Bounds the condition of the covariance; returns it with eigenvectors and root values.

        The smallest sufficient number is added to the diagonal, which changes no eigenvector.
        """
        values, vectors = eigh(covariance, vectors)
        limit = self.condition or math.inf
        largest, smallest = tf.reduce_max(values), tf.reduce_min(values)
        more = tf.maximum((largest - limit * smallest) / (limit - 1.0), 0.0)
        covariance += more * tf.eye(self.size, dtype=self.dtype)
        return covariance, vectors, tf.sqrt(tf.maximum(values + more, _TINY))


def _ranks(fitness: Array, sound: Array) -> Array:
    """Ranks of the candidates from best, 0, to worst. Ties go to the first; unsound ones are last.

    Ranks are counted, not sorted. This is exact and identical under every compiler, including -0.0
    and 0.0.
    """
    fitness = tf.where(sound, fitness, tf.zeros_like(fitness))
    order = tf.range(fitness.shape[0])
    first = order[None, :] < order[:, None]
    better = (fitness[None, :] < fitness[:, None]) | ((fitness[None, :] == fitness[:, None]) & first)
    same_kind = sound[None, :] == sound[:, None]
    ahead = (sound[None, :] & ~sound[:, None]) | (same_kind & better)
    return tf.reduce_sum(tf.cast(ahead, tf.int32), axis=1)


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

    >>> values, vectors = eigh(tf.constant([[2.0, 1.0], [1.0, 2.0]]), tf.eye(2))
    >>> sorted(values.numpy().round(5).tolist())
    [1.0, 3.0]
    """
    n = matrix.shape[0]
    if n == 1:
        return matrix[0], tf.ones_like(vectors)
    dtype = matrix.dtype
    # The vectors have been through many rotations: a step of Newton's for orthogonality.
    vectors = tf.matmul(vectors, 1.5 * tf.eye(n, dtype=dtype) - 0.5 * tf.matmul(vectors, vectors, transpose_a=True))
    matrix = tf.matmul(vectors, tf.matmul(matrix, vectors), transpose_a=True)
    matrix = (matrix + tf.transpose(matrix)) / 2.0
    odd = n % 2
    matrix, vectors = (tf.pad(value, [[0, odd], [0, odd]]) for value in (matrix, vectors))
    half = (n + odd) // 2
    top, bottom = list(range(half)), list(range(half, 2 * half))
    seats = tf.constant([0, bottom[0], *top[1:-1], *bottom[1:], top[-1]] if half > 1 else [0, 1])
    enough = n * float(np.finfo(dtype.as_numpy_dtype).eps)

    def turned(left: Array, right: Array, cosine: Array, sine: Array) -> tuple[Array, Array]:
        return cosine * left - sine * right, sine * left + cosine * right

    def round_of_pairs(number: Array, matrix: Array, vectors: Array) -> tuple[Array, Array, Array]:
        diagonal, off = tf.linalg.diag_part(matrix), tf.linalg.diag_part(matrix[:half, half:])
        flat = off == 0.0
        cotangent = (diagonal[half:] - diagonal[:half]) / (2.0 * tf.where(flat, tf.ones_like(off), off))
        side = tf.where(cotangent < 0.0, -tf.ones_like(off), tf.ones_like(off))
        tangent = side / (tf.abs(cotangent) + tf.sqrt(1.0 + tf.square(cotangent)))
        tangent = tf.where(flat, tf.zeros_like(off), tangent)
        cosine = tf.math.rsqrt(1.0 + tf.square(tangent))
        sine = tangent * cosine
        matrix = tf.concat(turned(matrix[:, :half], matrix[:, half:], cosine, sine), axis=1)
        matrix = tf.concat(turned(matrix[:half], matrix[half:], cosine[:, None], sine[:, None]), axis=0)
        vectors = tf.concat(turned(vectors[:, :half], vectors[:, half:], cosine, sine), axis=1)
        matrix = tf.gather(tf.gather(matrix, seats, axis=0), seats, axis=1)
        return number + 1, matrix, tf.gather(vectors, seats, axis=1)

    def unfinished(sweep: Array, matrix: Array, vectors: Array) -> Array:
        diagonal = tf.abs(tf.linalg.diag_part(matrix))
        off = tf.square(tf.linalg.set_diag(matrix, tf.zeros_like(diagonal)))
        return (sweep < _SWEEPS) & tf.reduce_any(off > enough**2 * diagonal[:, None] * diagonal[None, :])

    def one_sweep(sweep: Array, matrix: Array, vectors: Array) -> tuple[Array, Array, Array]:
        start = (tf.constant(0), matrix, vectors)
        _, matrix, vectors = tf.while_loop(lambda number, *_: number < 2 * half - 1, round_of_pairs, start)
        return sweep + 1, (matrix + tf.transpose(matrix)) / 2.0, vectors

    _, matrix, vectors = tf.while_loop(unfinished, one_sweep, (tf.constant(0), matrix, vectors))
    return tf.linalg.diag_part(matrix)[:n], vectors[:n, :n]
