"""CMA-ES beside the library `cma`, beside the tutorial written out in numpy, and on its
invariances."""

import dataclasses
import functools
import math
import warnings

import numpy as np
import pytest
from keras import ops
from on_backend import JAX, compiled, in_a_graph

from keras_blur import random
from keras_blur.meta.cma import CMAES, CMAState, eigh

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cma

SIZE = 10
SCALES = 10.0 ** np.linspace(0.0, 6.0, SIZE)


def sphere(x):
    return ops.sum(x**2, axis=-1)


def ellipsoid(x):
    return ops.sum(ops.convert_to_tensor(SCALES, x.dtype) * x**2, axis=-1)


def rosenbrock(x):
    return ops.sum(100.0 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1.0 - x[..., :-1]) ** 2, axis=-1)


def elsewhere(size, population=None, seed=0, **options):
    """The library's search from 3, ..., 3 with sigma 0.5."""
    options = {"verbose": -9, "seed": seed + 1, **({"popsize": population} if population else {}), **options}
    return cma.CMAEvolutionStrategy(np.full(size, 3.0), 0.5, options)


@functools.cache
def methods(search, jit=True):
    """Programs of `ask` and `tell`; on JAX all are compiled."""
    return tuple(in_a_graph(method, jit or JAX) for method in (search.ask, search.tell))


def run(search, function, generations, seed=0, state=None, start=3.0, jit=True):
    """The state after some generations, and the best fitness of each."""
    ask, tell = methods(search, jit)
    state, best = search.init(np.full(search.size, start)) if state is None else state, []
    for _ in range(generations):
        candidates = ask(state, random.seed_of(seed))
        fitness = function(candidates)
        best.append(np.nanmin(fitness))
        state = tell(state, candidates, fitness)
    return state, np.array(best)


def shape_of(state):
    """The covariance that candidates are drawn with, whatever the signs and order of the
    eigenvectors."""
    B, D = np.asarray(state.B), np.asarray(state.D)
    return (B * D**2) @ B.T


def assert_close(one, other, rtol, skip=()):
    for name, a, b in zip(CMAState._fields, one, other, strict=True):
        if name not in skip:
            a, b = np.asarray(a), np.asarray(b)
            np.testing.assert_allclose(a, b, rtol=0.0, atol=rtol * max(np.abs(b).max(), 1e-300), err_msg=name)


def assert_same(one, other):
    for name, a, b in zip(CMAState._fields, one, other, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


# Constants.


@pytest.mark.parametrize(
    ("size", "population"),
    [(2, None), (3, None), (5, None), (10, None), (10, 6), (10, 11), (37, None), (37, 80), (100, None), (4, 200)],
)
def test_constants_are_those_of_the_library(size, population):
    ours, theirs = CMAES(size, population), elsewhere(size, population)
    assert ours.population == theirs.popsize
    np.testing.assert_allclose(ours.weights, np.array(theirs.sp.weights), rtol=0.0, atol=1e-12)
    model = theirs.sm.parameters()  # what its update takes
    wanted = {"mu": theirs.sp.weights.mu, "mu_eff": theirs.sp.weights.mueff, "c_c": theirs.sp.cc}
    for name, value in {**wanted, "c_1": model["c1"], "c_mu": model["cmu"]}.items():
        assert getattr(ours, name) == pytest.approx(value, rel=1e-12), name
    assert ours.chi == pytest.approx(theirs.const.chiN, rel=1e-3)  # theirs is an approximation


def test_constants_of_table_1_that_the_library_has_otherwise():
    """The library has other c_sigma, and other d_sigma for large populations; below 6 candidates,
    other c_1."""
    one = CMAES(10)
    assert one.population == 10
    assert one.c_sigma == pytest.approx((one.mu_eff + 2) / (10 + one.mu_eff + 5), rel=1e-14)
    assert one.d_sigma == pytest.approx(1 + one.c_sigma, rel=1e-14)
    big = CMAES(4, 200)
    assert big.d_sigma == pytest.approx(1 + 2 * (math.sqrt((big.mu_eff - 1) / 5) - 1) + big.c_sigma, rel=1e-14)
    assert CMAES(1).population == 4
    assert CMAES(1).chi == pytest.approx(math.sqrt(2 / math.pi), rel=1e-14)
    assert [CMAES(n).population for n in (2, 20, 40, 500)] == [6, 12, 15, 22]


@pytest.mark.parametrize("population", [4, 5, 6, 9, 80, 1000])
def test_weights(population):
    search = CMAES(12, population)
    weights = np.array(search.weights)
    assert weights[: search.mu].sum() == pytest.approx(1.0, abs=1e-12)
    assert (weights[: search.mu] > 0).all()
    assert (weights[search.mu :] <= 0).all()
    assert (np.diff(weights) <= 0).all()
    assert 1.0 - search.c_1 - search.c_mu * weights.sum() >= 0.0
    assert CMAES(12).gap == 1
    assert CMAES(500).gap == 4


# One generation and thirty, beside others.


class Twin:
    """The tutorial in numpy, candidate by candidate, sorted; of the guards, only that of the growth
    of sigma."""

    def __init__(self, mean, sigma, population):
        n = self.n = len(mean)
        self.m, self.sigma, self.C = np.array(mean), sigma, np.eye(n)
        self.ps, self.pc, self.g = np.zeros(n), np.zeros(n), 0
        raw = np.log((population + 1) / 2) - np.log(np.arange(1, population + 1))
        mu = population // 2
        self.mueff = raw[:mu].sum() ** 2 / (raw[:mu] ** 2).sum()
        minus = raw[mu:].sum() ** 2 / (raw[mu:] ** 2).sum()
        self.cs = (self.mueff + 2) / (n + self.mueff + 5)
        self.ds = 1 + 2 * max(0, np.sqrt((self.mueff - 1) / (n + 1)) - 1) + self.cs
        self.cc = (4 + self.mueff / n) / (n + 4 + 2 * self.mueff / n)
        self.c1 = 2 / ((n + 1.3) ** 2 + self.mueff)
        self.cmu = min(1 - self.c1, 2 * (1 / 4 + self.mueff + 1 / self.mueff - 2) / ((n + 2) ** 2 + self.mueff))
        alpha = min(1 + self.c1 / self.cmu, 1 + 2 * minus / (self.mueff + 2), (1 - self.c1 - self.cmu) / (n * self.cmu))
        self.w = np.where(raw >= 0, raw / raw[raw > 0].sum(), alpha * raw / -raw[raw < 0].sum())
        self.mu, self.decompositions = mu, [np.eye(n), np.eye(n)]
        self.chi = np.sqrt(2) * math.gamma((n + 1) / 2) / math.gamma(n / 2)
        self.stalled = 0

    def tell(self, x, fitness, gap=1):
        n, inverse_root = self.n, self.decompositions[1]
        y = [(x[i] - self.m) / self.sigma for i in np.argsort(fitness, kind="stable")]
        mean_y = sum(self.w[i] * y[i] for i in range(self.mu))
        self.m = self.m + self.sigma * mean_y
        self.ps = (1 - self.cs) * self.ps + np.sqrt(self.cs * (2 - self.cs) * self.mueff) * inverse_root @ mean_y
        length = np.linalg.norm(self.ps)
        self.g += 1
        h = float(length / np.sqrt(1 - (1 - self.cs) ** (2 * self.g)) < (1.4 + 2 / (n + 1)) * self.chi)
        self.stalled += h == 0
        self.pc = (1 - self.cc) * self.pc + h * np.sqrt(self.cc * (2 - self.cc) * self.mueff) * mean_y
        delta = (1 - h) * self.cc * (2 - self.cc)
        C = (1 + self.c1 * delta - self.c1 - self.cmu * self.w.sum()) * self.C + self.c1 * np.outer(self.pc, self.pc)
        for w, one in zip(self.w, y, strict=True):
            scale = 1.0 if w >= 0 else n / np.linalg.norm(inverse_root @ one) ** 2
            C += self.cmu * w * scale * np.outer(one, one)
        self.C = C
        self.sigma *= np.exp(min(1, self.cs / self.ds * (length / self.chi - 1)))
        if self.g % gap == 0:
            values, vectors = np.linalg.eigh(self.C)
            self.decompositions = [(vectors * v) @ vectors.T for v in (np.sqrt(values), 1 / np.sqrt(values))]


@pytest.mark.parametrize(
    ("size", "population", "gap", "jit"), [(7, None, 1, False), (7, None, 1, True), (6, 30, 3, True), (1, 5, 1, True)]
)
def test_thirty_generations_are_those_of_the_tutorial(size, population, gap, jit):
    search = CMAES(size, population, sigma=0.05, gap=gap)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0] * 10.0 ** np.linspace(0.0, 1.5, size)
    state, twin = search.init(np.full(size, 2.0)), Twin(np.full(size, 2.0), 0.05, search.population)
    ask, tell = methods(search, jit)
    for _ in range(30):
        candidates = np.asarray(ask(state, random.seed_of(4)))
        fitness = np.sum((candidates @ turn) ** 2, axis=1)
        state = tell(state, candidates, fitness)
        twin.tell(candidates, fitness, gap)
        expected = (twin.m, twin.sigma, twin.C, twin.ps, twin.pc, None, None, twin.g)
        assert_close(state, expected, 1e-10, skip=("B", "D"))
        np.testing.assert_allclose(shape_of(state), twin.decompositions[0] @ twin.decompositions[0], rtol=0, atol=1e-10)
    assert 0 < twin.stalled < 30 or size == 1  # both values of h_sigma were met


@pytest.mark.parametrize(("size", "population"), [(2, None), (10, 40), (20, 80)])
def test_forty_generations_are_those_of_the_library(size, population):
    """On its candidates, its two rates of sigma set to the tutorial's and its start exactly
    round."""
    search, theirs = CMAES(size, population, sigma=0.5), elsewhere(size, population)
    theirs.sm.C, theirs.sm.B, theirs.sm.D = np.eye(size), np.eye(size), np.ones(size)
    theirs.sm.lazy_update_gap = 0
    theirs.adapt_sigma.cs, theirs.adapt_sigma.damps = search.c_sigma, search.d_sigma
    state, tell = search.init(np.full(size, 3.0)), methods(search, False)[1]
    for _ in range(40):
        candidates = np.array(theirs.ask())
        fitness = np.sum(10.0 ** np.linspace(0.0, 3.0, size) * candidates**2, axis=1)
        theirs.tell(list(candidates), list(fitness))
        state = tell(state, candidates, fitness)
    found = CMAState(theirs.mean, theirs.sigma, theirs.sm.C, theirs.adapt_sigma.ps, theirs.pc, None, None, theirs.countiter)
    assert_close(state, found, 1e-7, skip=("B", "D"))


SEARCH, SMALL = CMAES(SIZE, sigma=0.5), CMAES(4, 10)
FUNCTIONS = {"sphere": (sphere, 3.0, 1.25), "ellipsoid": (ellipsoid, 3.0, 1.25), "rosenbrock": (rosenbrock, 0.0, 1.4)}


@compiled
def evaluations_to_arrive(place, start, seed):
    """Of a run on one of the functions until 1e-8, compiled as one."""

    def body(state, best):
        candidates = SEARCH.ask(state, seed)
        fitness = ops.take(ops.stack([function(candidates) for function, *_ in FUNCTIONS.values()]), place, axis=0)
        return SEARCH.tell(state, candidates, fitness), ops.min(fitness)

    state, best = ops.while_loop(
        lambda state, best: (best > 1e-8) & (state.generation < 3000),
        body,
        (SEARCH.init(ops.broadcast_to(start, (SIZE,))), ops.convert_to_tensor(math.inf, "float64")),
    )
    return state.generation * SEARCH.population, best


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_evaluations_to_the_optimum_beside_the_library(name):
    """Medians of seven seeds, at most the factor in the table apart; a run that does not arrive
    counts as infinite."""
    function, start, factor = FUNCTIONS[name]
    plain = {
        "sphere": lambda x: float(x @ x),
        "ellipsoid": lambda x: float(SCALES @ x**2),
        "rosenbrock": lambda x: float(np.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)),
    }[name]
    probe = np.linspace(0.5, 2.0, SIZE)
    assert plain(probe) == pytest.approx(float(function(ops.array(probe))), rel=1e-12)
    place, ours, theirs = list(FUNCTIONS).index(name), [], []
    for seed in range(7):
        count, best = evaluations_to_arrive(ops.array(place), ops.array(start), random.seed_of(seed))
        ours.append(int(count) if best < 1e-8 else math.inf)
        options = {"verbose": -9, "seed": seed + 1, "ftarget": 1e-8, "maxfevals": 30_000}
        other = cma.CMAEvolutionStrategy(np.full(SIZE, start), 0.5, options).optimize(plain).result
        theirs.append(other.evaluations if other.fbest < 1e-8 else math.inf)
    print(f"{name}: median {np.median(ours):.0f} of {sorted(ours)}; cma: {np.median(theirs):.0f} of {sorted(theirs)}")
    assert np.median(ours) < factor * np.median(theirs)


# Candidates.


def test_candidates_have_the_mean_and_covariance_of_the_state():
    search = CMAES(3, 20_000)
    wanted = np.array([[4.0, 1.0, 0.0], [1.0, 2.0, -0.5], [0.0, -0.5, 1.0]])
    values, vectors = np.linalg.eigh(wanted)
    state = search.init([1.0, -2.0, 3.0])._replace(
        B=ops.array(vectors), D=ops.array(np.sqrt(values)), sigma=ops.array(0.1, "float64")
    )
    candidates = np.asarray(search.ask(state, random.seed_of(0)))
    assert candidates.dtype == np.float64
    np.testing.assert_allclose(candidates.mean(axis=0), [1.0, -2.0, 3.0], atol=0.005)
    np.testing.assert_allclose(np.cov(candidates.T) / 0.01, wanted, atol=0.12)
    mirrored = state._replace(B=-state.B[:, ::-1], D=state.D[::-1])  # the same matrix, decomposed otherwise
    np.testing.assert_allclose(search.ask(mirrored, random.seed_of(0)), candidates, atol=1e-12)


def test_candidates_follow_from_seed_and_generation():
    search = CMAES(4)
    state = search.init(np.zeros(4))
    first = np.asarray(search.ask(state, random.seed_of(1)))
    np.testing.assert_array_equal(search.ask(state, random.seed_of(1)), first)
    assert not np.array_equal(search.ask(state, random.seed_of(2)), first)
    later = state._replace(generation=ops.array(1))
    assert not np.array_equal(search.ask(later, random.seed_of(1)), first)
    assert len(np.unique(first)) == first.size


# Invariances.


def test_only_the_order_of_fitness_counts():
    changes = [lambda f: f, lambda f: ops.log(f) * 7.0 - 3.0, lambda f: -1.0 / f, ops.sqrt]
    states = [run(SEARCH, lambda x, change=change: change(rosenbrock(x)), 60, seed=3)[0] for change in changes]
    for state in states[1:]:
        assert_same(state, states[0])


def test_a_shift_of_everything_shifts_the_run():
    plain = run(SEARCH, ellipsoid, 40)[0]
    moved = run(SEARCH, lambda x: ellipsoid(x - 8.0), 40, start=11.0)[0]
    assert_close(moved._replace(mean=moved.mean - 8.0), plain, 1e-7, skip=("B", "D"))
    np.testing.assert_allclose(shape_of(moved), shape_of(plain), rtol=0, atol=1e-7 * np.abs(shape_of(plain)).max())


def test_a_change_of_scale_of_everything_scales_the_run():
    plain = run(SEARCH, ellipsoid, 40)[0]
    scaled = run(dataclasses.replace(SEARCH, sigma=0.5 * 64), ellipsoid, 40, start=3.0 * 64)[0]
    assert_same(scaled._replace(mean=scaled.mean / 64, sigma=scaled.sigma / 64), plain)  # a power of two: exactly


def test_the_first_of_equals_is_the_better():
    state = SMALL.init(np.zeros(4))
    candidates = SMALL.ask(state, random.seed_of(0))
    for tell in (SMALL.tell, methods(SMALL)[1]):
        ordered = tell(state, candidates, np.arange(10.0))
        for flat in (np.zeros(10), np.array([0.0, -0.0] * 5), np.array([-0.0, 0.0] * 5)):
            assert_same(tell(state, candidates, flat), ordered)
    assert_same(SMALL.tell(state, candidates, np.zeros(10, int)), SMALL.tell(state, candidates, np.arange(10)))
    two, apart = [1.0, 0.0] * 5, [5.0, 0.0, 6.0, 1.0, 7.0, 2.0, 8.0, 3.0, 9.0, 4.0]
    assert_same(SMALL.tell(state, candidates, two), SMALL.tell(state, candidates, apart))


# Scores that are not finite.


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_the_worst(bad, jit):
    search = SMALL
    state = search.init(np.zeros(4))
    candidates = search.ask(state, random.seed_of(0))
    fitness = np.arange(10.0)
    fitness[2] = bad
    plain = np.arange(10.0)
    plain[2] = 1e6
    tell = methods(search)[1] if jit else search.tell
    assert_same(tell(state, candidates, fitness), tell(state, candidates, plain))


def test_not_finite_moves_nothing_though_it_has_a_positive_weight():
    search = SMALL
    state = search.init(np.zeros(4))
    candidates = search.ask(state, random.seed_of(0))
    fitness = np.full(10, math.nan)
    fitness[6] = 1.0
    after = search.tell(state, candidates, fitness)
    np.testing.assert_allclose(after.mean, search.weights[0] * candidates[6], rtol=1e-12)
    assert all(np.isfinite(value).all() for value in after)
    assert (np.asarray(after.D) > 0).all()


def test_a_generation_without_a_score_teaches_nothing():
    search = SMALL
    state = run(search, sphere, 5)[0]
    after = search.tell(state, search.ask(state, random.seed_of(0)), np.full(search.population, math.nan))
    assert_same(after, state._replace(generation=state.generation + 1))
    again = np.asarray(search.ask(after, random.seed_of(0)))
    assert not np.array_equal(again, search.ask(state, random.seed_of(0)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_candidate_that_is_not_finite_does_not_spread(bad):
    search = SMALL
    state = search.init(np.zeros(4))
    candidates = np.array(search.ask(state, random.seed_of(0)))
    candidates[3, 1] = bad
    for fitness in (np.arange(10.0), np.full(10, 2.0), np.array([0.0, 1, 2, math.nan, 4, 5, 6, 7, 8, 9])):
        assert all(np.isfinite(value).all() for value in search.tell(state, candidates, fitness))


def test_search_goes_on_where_half_of_space_has_no_score():
    def edge(x):
        return ops.where(x[..., 0] > 2.5, math.nan, sphere(x))

    state, best = run(SEARCH, edge, 300)  # the start is beyond the edge
    assert best.min() < 1e-8
    assert np.abs(state.mean).max() < 1e-3


# Guards.


@pytest.mark.parametrize(("function", "end"), [(sphere, 0.1), (lambda x: x[..., 0], 2.0)], ids=["low", "high"])
def test_sigma_is_kept_in_its_range(function, end):
    state, sigmas = None, []
    for _ in range(20):  # at an optimum, it moves about its lower bound
        state, _ = run(CMAES(5, sigma=0.5, sigma_range=(0.1, 2.0)), function, 10, state=state)
        sigmas.append(float(state.sigma))
    assert end in sigmas
    assert 0.1 <= min(sigmas) <= max(sigmas) <= 2.0
    assert all(np.isfinite(value).all() for value in state)


def test_condition_is_bounded():
    scales = np.array([1.0, 1e2, 1e4, 1e6])
    state, _ = run(CMAES(4, condition=100.0), lambda x: np.asarray(x) ** 2 @ scales, 200)
    values = np.linalg.eigvalsh(state.C)
    assert values[-1] / values[0] == pytest.approx(100.0, rel=1e-6)
    np.testing.assert_allclose(shape_of(state), state.C, rtol=0, atol=1e-10 * values[-1])


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (sphere, "float64"),
        (ellipsoid, "float32"),
        (lambda x: ops.zeros(x.shape[0], x.dtype), "float64"),
        (lambda x: x[..., 0], "float64"),
    ],
    ids=["below rounding", "below rounding in float32", "flat", "falls for ever"],
)
def test_a_long_run_stays_finite(function, dtype):
    state, _ = run(CMAES(SIZE, sigma=0.5, dtype=dtype), function, 500)
    for name, value in state._asdict().items():
        assert np.isfinite(value).all(), name
    assert (np.asarray(state.D) > 0).all()
    largest = np.abs(state.C).max()
    np.testing.assert_allclose(state.C, np.transpose(state.C), rtol=0, atol=2 * np.finfo(dtype).eps * largest)
    np.testing.assert_allclose(shape_of(state), state.C, rtol=0, atol=100 * np.finfo(dtype).eps * largest)


def test_float64_is_the_default():
    assert CMAES(3) == CMAES(3, dtype="float64")
    assert {np.asarray(value).dtype for value in CMAES(3).init(np.zeros(3))} == {np.dtype("float64"), np.dtype("int32")}


def test_float32():
    state, best = run(CMAES(SIZE, sigma=0.5, dtype="float32"), sphere, 250)
    assert best.min() < 1e-8
    assert {np.asarray(value).dtype for value in state} == {np.dtype("float32"), np.dtype("int32")}


# Compiling and resuming.


def test_compiled_as_not_compiled():
    state = run(SEARCH, ellipsoid, 30)[0]
    candidates = SEARCH.ask(state, random.seed_of(0))
    compiled = methods(SEARCH)[0](state, random.seed_of(0))
    np.testing.assert_allclose(compiled, candidates, rtol=0, atol=1e-5 * np.abs(candidates - state.mean).max())
    fitness = ellipsoid(candidates)
    eager = SEARCH.tell(state, candidates, fitness)
    for jit in (False, True):
        assert_close(methods(SEARCH, jit)[1](state, candidates, fitness), eager, 1e-12)
    for one, other in zip(*(run(SEARCH, sphere, 30, jit=jit)[0] for jit in (False, True)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)  # normal numbers agree to float32's rounding


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    search = CMAES(6, gap=4)
    middle = run(search, rosenbrock, 13, seed=2)[0]
    np.savez(tmp_path / "state.npz", **{name: np.asarray(value) for name, value in middle._asdict().items()})
    with np.load(tmp_path / "state.npz") as saved:
        restored = CMAState(**{name: ops.array(saved[name]) for name in CMAState._fields})
    whole = run(search, rosenbrock, 26, seed=2)[0]
    anew = CMAES(6, gap=4)
    ask, tell = methods.__wrapped__(anew)  # another process would compile anew
    for _ in range(13):
        candidates = ask(restored, random.seed_of(2))
        restored = tell(restored, candidates, rosenbrock(candidates))
    assert_same(restored, whole)


def test_shapes_are_known_when_it_is_traced():
    search, shapes = CMAES(6, 9, gap=2), []

    def step(state):
        candidates = search.ask(state, random.seed_of(0))
        after = search.tell(state, candidates, ops.sum(candidates, axis=1))
        shapes.extend([tuple(candidates.shape), [(tuple(one.shape), one.dtype) for one in after]])
        return after

    state = search.init(np.zeros(6))
    in_a_graph(step, True)(state)
    assert shapes == [(9, 6), [(tuple(one.shape), one.dtype) for one in state]]


# Eigenvectors.


compiled_eigh = compiled(eigh)


@pytest.mark.parametrize("size", [1, 2, 10, 41])
@pytest.mark.parametrize("condition", [1.0, 1e6, 1e12])
def test_eigenvectors_are_as_good_as_lapack_s(size, condition):
    rng = np.random.default_rng(size)
    vectors = np.linalg.qr(rng.normal(size=(size, size)))[0]
    values = 10.0 ** np.linspace(0.0, np.log10(condition), size)
    matrix = (vectors * values) @ vectors.T
    matrix = (matrix + matrix.T) / 2
    near = np.linalg.qr(vectors + 0.01 * rng.normal(size=(size, size)))[0]
    for start in (np.eye(size), near):
        found, basis = map(np.asarray, compiled_eigh(ops.array(matrix), ops.array(start)))
        np.testing.assert_allclose(basis.T @ basis, np.eye(size), atol=1e-13)
        np.testing.assert_allclose((basis * found) @ basis.T, matrix, rtol=0, atol=1e-13 * condition)
        np.testing.assert_allclose(np.sort(found), np.linalg.eigvalsh(matrix), rtol=1e-15 * size * condition + 1e-13)


def test_eigenvectors_of_odd_matrices():
    for matrix in (np.zeros((3, 3)), np.ones((4, 4)), np.diag([1.0, -2.0, 0.0, 1.0]), [[0.0, 1.0], [1.0, 0.0]]):
        matrix = np.asarray(matrix)
        found, basis = map(np.asarray, eigh(ops.array(matrix), ops.eye(len(matrix), dtype="float64")))
        np.testing.assert_allclose((basis * found) @ basis.T, matrix, atol=1e-14)
        np.testing.assert_allclose(np.sort(found), np.linalg.eigvalsh(matrix), atol=1e-14)


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"size": 0}, "`size` must be a positive integer"),
        ({"size": 2.0}, "`size` must be a positive integer"),
        ({"size": True}, "`size` must be a positive integer"),
        ({"population": 3}, "`population` must be an integer of at least 4"),
        ({"population": 8.0}, "`population` must be an integer of at least 4"),
        ({"sigma": 0.0}, "`sigma` must be a positive number"),
        ({"sigma": -1.0}, "`sigma` must be a positive number"),
        ({"sigma": math.nan}, "`sigma` must be a positive number"),
        ({"sigma": math.inf}, "`sigma` must be a positive number"),
        ({"sigma_range": (1.0, 0.1)}, "`sigma_range` must be two ascending"),
        ({"sigma_range": (0.0, 1.0)}, "`sigma_range` must be two ascending"),
        ({"condition": 1.0}, "`condition` must be a number above 1"),
        ({"gap": 0}, "`gap` must be a positive integer"),
        ({"dtype": "bfloat16"}, "`dtype` must be"),
    ],
)
def test_refuses_what_is_out_of_range(arguments, match):
    with pytest.raises(ValueError, match=match):
        CMAES(**{"size": 3, **arguments})


def test_refuses_wrong_shapes():
    search = CMAES(3, 8)
    for mean in (0.0, [1.0, 2.0], np.zeros((1, 3))):
        with pytest.raises(ValueError, match=r"`mean` must have shape \(3,\)"):
            search.init(mean)
    for mean in ([1.0, math.nan, 0.0], [math.inf, 0.0, 0.0]):
        with pytest.raises(ValueError, match="`mean` must be finite"):
            search.init(mean)
    state = search.init(ops.zeros(3))
    with pytest.raises(ValueError, match=r"`candidates` must have shape \(8, 3\)"):
        search.tell(state, ops.zeros((3, 8)), ops.zeros(8))
    with pytest.raises(ValueError, match=r"`fitness` must have shape \(8,\)"):
        search.tell(state, ops.zeros((8, 3)), ops.zeros((8, 1)))


def test_constants_cannot_be_changed_and_are_found_again():
    search = CMAES(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        search.sigma = 1.0
    assert search == CMAES(3)
    assert hash(search) == hash(CMAES(3))
    assert search != CMAES(3, sigma=0.1)
