"""Truncated unrolls, evolution strategies and the score of evolution, against exact numbers."""

import functools

import numpy as np
import pytest
from keras import ops
from marks import slow_but
from on_backend import compiled
from test_unroll import BATCH, Double, episodes, estimated, outer_of

from keras_blur import Genome, Rule, backend, random
from keras_blur.distribution import ALL, Shard
from keras_blur.learners import Blur, Learner
from keras_blur.meta import ES, PES, Evolution, TruncatedUnroll, Unroll
from keras_blur.meta.es import perturbations, perturbed
from keras_blur.meta.estimator import binary_cross_entropy, classes_of, explained, squared_error, start
from keras_blur.meta.evolution import from_vectors, to_vector

STEPS, SIGMA, THETA = 3, 0.4, 0.25


class Drift(Learner):
    """Adds theta to a number at each step and predicts its square: all expectations are
    polynomials."""

    def init(self, outer, seed, features, outputs, leading=(), shard=ALL):
        return {"s": ops.ones(leading)}

    def step(self, outer, state, x, y):
        return {"s": state["s"] + outer["theta"]}, self.predict(outer, state, x)

    def predict(self, outer, state, x):
        return ops.square(state["s"])[..., None, None]


def test_a_share_of_the_tasks_starts_as_among_all():
    learner, seed = Blur((4,), Rule(states=2)), random.seed_of(3)

    def begin(*arguments):
        return backend.compiled(lambda seed: learner.init({}, seed, 3, 2, *arguments), jit_compile=False)(seed)

    whole = begin((2, 6))
    for index in range(3):
        shard = Shard(index, 3)
        part = begin((2, 2), shard)
        for one, other in zip(backend.leaves(part), backend.leaves(shard.part(whole, axis=1)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def begun(learner, outer, data, seed):
    """The learner state before the first batch, computed by a program."""
    return backend.compiled(lambda seed: start(learner, outer, data, seed), jit_compile=False)(seed)


def nothing(steps=STEPS):
    return {"x": ops.zeros((1, steps, 1, 1)), "y": ops.zeros((1, steps, 1, 1)),
            "query_x": ops.zeros((1, 1, 1)), "query_y": ops.zeros((1, 1, 1))}  # fmt: skip


def true_gradient(window):
    """d/dtheta E[s^4] after `window` windows, s normal with mean m and deviation steps sigma
    sqrt(window)."""
    mean, variance = 1.0 + STEPS * window * THETA, window * (STEPS * SIGMA) ** 2
    return 4 * STEPS * window * (mean**3 + 3 * mean * variance)


def within_errors(found, wanted):
    """Asserts that the mean is the wanted number within its standard error, which must be small
    enough to tell."""
    mean, error = np.mean(found), np.std(found, ddof=1) / len(found) ** 0.5
    assert abs(mean - wanted) < 4 * error
    assert error < 0.02 * wanted


def test_es_is_the_gradient_of_the_smoothed_loss():
    estimator = ES(STEPS, antithetic_pairs=500, sigma=SIGMA, kind="values")
    outer = {"theta": ops.array([THETA], "float32")}
    run = backend.compiled(lambda seed: estimator(Drift(), outer, nothing(), seed)[0], jit_compile=False)
    found = [run(random.seed_of(number)) for number in range(60)]
    within_errors([float(one.gradients["theta"][0]) for one in found], true_gradient(1))
    assert true_gradient(1) > 1.3 * 4 * STEPS * (1 + STEPS * THETA) ** 3  # the plain gradient would be told from it
    mean, variance = 1 + STEPS * THETA, (STEPS * SIGMA) ** 2
    within_errors([float(one.loss[0]) for one in found], mean**4 + 6 * mean**2 * variance + 3 * variance**2)


def test_pes_is_the_gradient_of_the_smoothed_loss_over_all_pieces():
    estimator = PES(STEPS, antithetic_pairs=500, sigma=SIGMA, kind="values", episode_steps=3 * STEPS)
    outer = {"theta": ops.array([THETA], "float32")}

    def run(seed, carried, first):
        return estimator(Drift(), outer, nothing(), seed, carried, first)

    run = backend.compiled(run, jit_compile=False)
    found = np.zeros((3, 60))
    for number in range(60):
        carried = estimator.nothing_carried(Drift(), outer, nothing())
        for window in range(3):
            seed = random.fold_in(random.seed_of(number), window)
            estimate, carried = run(seed, carried, ops.array(window == 0))
            found[window, number] = float(estimate.gradients["theta"][0])
    for window in range(3):
        within_errors(found[window], true_gradient(window + 1))


def test_pes_starts_anew_where_an_episode_begins():
    estimator = PES(STEPS, antithetic_pairs=4, kind="values", episode_steps=2 * STEPS)
    outer, seed = {"theta": ops.array([THETA, -0.5], "float32")}, random.seed_of(5)
    empty = estimator.nothing_carried(Drift(), outer, nothing())
    garbage = backend.tree_map(lambda leaf: leaf + 7.0, empty)
    fresh, again = (estimator(Drift(), outer, nothing(), seed, carried, True) for carried in (empty, garbage))
    for one, other in zip(backend.leaves(fresh), backend.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_es_of_a_genome_is_the_gradient_where_noise_is_small():
    rule = Rule(states=2, normalize_activations="both", batch_reduction="mean")
    learner, outer, data, seed = Double((5,), rule), outer_of(rule), episodes(), random.seed_of(3)
    exact = estimated(Unroll(STEPS), learner, outer, data, seed)[0].gradients
    estimator, antithetic_pairs = ES(STEPS, antithetic_pairs=100, sigma=1e-4), 100
    state = begun(learner, outer, data, seed)
    copies = backend.tree_map(lambda leaf: ops.repeat(leaf, 2 * antithetic_pairs, 0) if len(leaf.shape) else leaf, state)

    def gradient(number):  # other noise, the same initial network
        noise = perturbations(outer, antithetic_pairs, number)
        losses, accuracies, _ = estimator.objective(learner, perturbed(outer, noise, estimator.sigma), data, copies)
        return estimator.estimate(outer, noise, backend.mean(losses, 1), backend.mean(accuracies, 1)).gradients

    gradient = backend.compiled(gradient, jit_compile=False)

    def along(gradients):
        return sum(float(np.sum(np.asarray(gradients[name]) * np.asarray(exact[name]))) for name in outer)

    found = [along(gradient(random.seed_of(number))) for number in range(40)]
    error = np.std(found, ddof=1) / len(found) ** 0.5
    assert abs(np.mean(found) - along(exact)) < 4 * error
    assert error < 0.05 * along(exact)


def test_a_pair_without_a_finite_loss_is_left_out():
    estimator = ES(1, antithetic_pairs=3, sigma=0.5)
    outer = {"theta": ops.zeros((1,))}
    directions = {"theta": ops.array([[1.0, 2.0, -1.0]])}
    losses = ops.array([3.0, np.nan, 1.0, 1.0, 9.0, 2.0])  # three pluses, three minuses
    found = estimator.estimate(outer, directions, losses, ops.zeros(6))
    assert float(found.gradients["theta"][0]) == pytest.approx(((3 - 1) * 1.0 + (1 - 2) * -1.0) / (2 * 0.5) / 2)
    assert float(found.loss[0]) == pytest.approx((3 + 1 + 1 + 2) / 4)
    nothing_left = estimator.estimate(outer, directions, losses * np.nan, ops.zeros(6))
    assert np.isnan(float(nothing_left.loss[0]))


def test_a_part_of_the_members_has_the_noise_that_it_has_among_all():
    outer, seed = {"gate": ops.zeros(6), "nu": ops.zeros((6, 2, 2))}, random.seed_of(2)
    whole = perturbations(outer, 3, seed)
    for index in range(2):
        own = {name: value[3 * index : 3 * index + 3] for name, value in outer.items()}
        for name, found in perturbations(own, 3, seed, Shard(index, 2, in_blocks=True)).items():
            wanted = whole[name][3 * index : 3 * index + 3]
            np.testing.assert_array_equal(ops.convert_to_numpy(found), ops.convert_to_numpy(wanted))


def test_perturbations_are_antithetic_and_differ():
    outer = {"a": ops.zeros((2, 3)), "b": ops.zeros((2,))}
    noise = perturbations(outer, 4, random.seed_of(1))
    moved = perturbed(outer, noise, 0.5)
    a = np.asarray(moved["a"]).reshape(2, 2, 4, 3)
    np.testing.assert_array_equal(a[:, 0], -a[:, 1])
    np.testing.assert_allclose(a[:, 0], 0.5 * np.asarray(noise["a"]))
    assert len(np.unique(np.concatenate([np.ravel(noise["a"]), np.ravel(noise["b"])]))) == 32


def cut(data, window, steps):
    return {name: value[:, window * steps : (window + 1) * steps] if name in "xy" else value for name, value in data.items()}


@pytest.mark.slow
def test_truncated_pieces_are_the_full_unroll_cut_and_each_gradient_its_difference_quotient():
    rule = Rule(states=3, normalize_activations="both", batch_reduction="mean", update_decay="power")
    learner, outer, seed = Double((5,), rule), outer_of(rule), random.seed_of(3)
    data = episodes(steps=6)
    estimator = TruncatedUnroll(3, trajectory_loss_weight=0.5, episode_steps=6)
    empty = estimator.nothing_carried(learner, outer, cut(data, 0, 3))
    first, carried = estimated(estimator, learner, outer, cut(data, 0, 3), seed, empty)
    second, final = estimated(estimator, learner, outer, cut(data, 1, 3), random.seed_of(9), carried, first=False)
    same = estimated(Unroll(3, trajectory_loss_weight=0.5), learner, outer, cut(data, 0, 3), seed)[0]
    for name in outer:
        np.testing.assert_array_equal(first.gradients[name], same.gradients[name])
    _, _, whole = Unroll(6).objective(learner, outer, data, begun(learner, outer, data, seed))
    for one, other in zip(backend.leaves(final), backend.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    rng = np.random.default_rng(2)
    direction = {name: rng.standard_normal(value.shape) for name, value in outer.items()}

    def loss(sign):
        moved = {name: value + sign * 1e-6 * direction[name] for name, value in outer.items()}
        return np.mean(estimator.objective(learner, moved, cut(data, 1, 3), carried.learners)[0])

    slope = sum(float(np.sum(np.asarray(second.gradients[name]) * direction[name])) for name in outer)
    assert slope == pytest.approx((loss(1) - loss(-1)) / 2e-6, rel=2e-5)


CUT = {
    "truncated": lambda: TruncatedUnroll(3, episode_steps=6),
    "es": lambda: ES(3, antithetic_pairs=2),
    "pes": lambda: PES(3, antithetic_pairs=2, episode_steps=6),
}


@pytest.mark.parametrize("name", slow_but(["pes"], CUT))
def test_compiled_equals_uncompiled(name):
    rule = Rule(states=3, normalize_activations="both", batch_reduction="mean")
    learner, outer, data = Blur((5,), rule), outer_of(rule, members=2, dtype="float32"), episodes("float32")
    estimator = CUT[name]()
    empty = estimator.nothing_carried(learner, outer, data)

    def estimate(outer, data, carried):
        return estimator(learner, outer, data, random.seed_of(1), carried, True)

    plain, whole = (run(outer, data, empty) for run in (backend.compiled(estimate, jit_compile=False), compiled(estimate)))
    for one, other in zip(backend.leaves(plain), backend.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=5e-3, atol=2e-3 * (1 + np.abs(one).max()))


def test_evolution_scores_each_genome_and_marks_what_is_not_finite():
    rule = Rule(batch_reduction="mean", last_activation="linear", forward_activation="linear")
    learner, data, seed = Blur((5,), rule), episodes("float32"), random.seed_of(3)
    outer = outer_of(rule, members=3, dtype="float32")
    outer = {name: ops.concatenate([value[:2], value[2:] * 1e30], 0) for name, value in outer.items()}
    scores = []
    for fitness in ("accuracy", "loss"):
        score = functools.partial(Evolution(3, population=4, fitness=fitness).score, learner)
        scores.append(backend.compiled(score, jit_compile=False)(outer, data, seed))
    (fitness, loss, accuracy), (by_loss, _, _) = scores
    wanted = estimated(Unroll(3), learner, outer, data, seed)[0]
    np.testing.assert_allclose(loss[:2], wanted.loss[:2], rtol=1e-5)
    np.testing.assert_allclose(fitness[:2], -np.asarray(wanted.accuracy[:2]))
    assert np.isnan(float(fitness[2]))
    np.testing.assert_allclose(by_loss[:2], wanted.loss[:2], rtol=1e-5)
    assert float(accuracy[0]) * BATCH * 2 == pytest.approx(round(float(accuracy[0]) * BATCH * 2), abs=1e-4)


def test_evolution_scores_speed_at_powers_of_two():
    rule = Rule(batch_reduction="mean", last_activation="linear", update_decay="power")
    learner, data, seed = Blur((5,), rule), episodes("float32"), random.seed_of(3)
    outer = outer_of(rule, members=4, dtype="float32")
    fitness, loss, accuracy = Evolution(3, population=4, fitness="speed").score(learner, outer, data, seed)
    parts = []
    for steps in (1, 2, 3):
        one = Evolution(steps, population=4).score(learner, outer, cut(data, 0, steps), seed)
        parts.append([np.asarray(value) for value in one])
    np.testing.assert_allclose(fitness, np.mean([part[0] for part in parts], axis=0), rtol=1e-6)
    np.testing.assert_allclose(loss, np.mean([part[1] for part in parts], axis=0), rtol=1e-5)
    np.testing.assert_array_equal(accuracy, parts[-1][2])
    assert len({tuple(part[0]) for part in parts}) == 3
    for steps, scored in ((1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])):
        assert Evolution(steps, population=4, fitness="speed")._scored_at() == scored


@pytest.mark.parametrize(
    "options", [{}, {"layers": 2, "states": 3}, {"normalize_activations": "both", "update_decay": "power"}]
)
def test_vectors_of_genomes_go_there_and_back(options):
    genome = Genome.random(Rule(**options), 3)
    shapes = {name: array.shape for name, array in genome.arrays.items()}
    back = from_vectors(shapes, np.stack([to_vector(genome.arrays), 2 * to_vector(genome.arrays)]))
    assert to_vector(genome.arrays).shape == (genome.size,)
    for name, array in genome.arrays.items():
        np.testing.assert_array_equal(back[name][0], array)
        np.testing.assert_allclose(back[name][1], 2 * np.asarray(array), rtol=1e-6)


def test_zeros_of_both_signs_are_equal_outputs():
    outputs = ops.array([[-0.0, 0.0], [0.0, -0.0], [-0.0, 1.0], [-1.0, -0.0]])
    assert ops.convert_to_numpy(classes_of(outputs)).tolist() == [0, 0, 1, 1]


def test_losses_of_values_and_single_outputs():
    y = ops.array([[1.0], [-1.0], [1.0]], "float32")
    p = ops.array([[2.0], [0.5], [-1.0]], "float32")
    assert float(squared_error(p, y)) == pytest.approx((1 + 2.25 + 4) / 3)
    assert float(binary_cross_entropy(p, y)) == pytest.approx(np.log1p(np.exp([-2.0, 0.5, 1.0])).mean())
    assert float(explained(y, y)) == 1.0
    assert float(explained(ops.zeros_like(y) + 1 / 3, y)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ES(3, antithetic_pairs=0), "`antithetic_pairs` must be a positive integer"),
        (lambda: ES(3, sigma=0.0), "`sigma` must be a positive number"),
        (lambda: ES(3, recompute=True), "`recompute` must be False"),
        (lambda: PES(3, episode_steps=10), "`episode_steps` must be a multiple of steps=3. Received: episode_steps=10"),
        (lambda: TruncatedUnroll(4, episode_steps=6), "`episode_steps` must be a multiple of steps=4"),
        (lambda: Unroll(3, loss="hinge"), "`loss` must be one of"),
        (lambda: Unroll(3, loss="binary", kind="values"), "`loss` of values"),
        (lambda: Unroll(3, kind="words"), "`kind` must be"),
        (lambda: Evolution(population=3), "`population` must be an integer of at least 4"),
        (lambda: Evolution(sigma=-1.0), "`sigma` must be a positive number"),
        (lambda: Evolution(fitness="beauty"), "`fitness` must be one of"),
        (lambda: Evolution(recompute=True), "`recompute` must be False"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_products_in_bfloat16_round_what_a_learner_learns_and_little_else():
    rule, found = Rule(states=2, batch_reduction="mean"), {}
    outer, data = outer_of(rule, dtype="float32"), episodes("float32", steps=2)
    for kind in (None, "bfloat16"):
        learner = Blur((4,), rule, compute_dtype=kind)
        found[kind] = np.asarray(estimated(Unroll(2), learner, outer, data, random.seed_of(0))[0].loss)
    assert found["bfloat16"].dtype == np.float32
    assert 0 < np.abs(found["bfloat16"] - found[None]).max() < 0.05 * np.abs(found[None]).max()
    with pytest.raises(ValueError, match=r"`compute_dtype` must be .*Received: compute_dtype='int8'"):
        Blur((4,), compute_dtype="int8")
