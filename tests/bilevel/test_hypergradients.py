"""Estimators of the hypergradient: against differences of the loss itself, against each other, and
where they cannot go."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from on_backend import JAX, compiled, in_a_graph, once, products_of_branches, slopes, soon

from keras_blur import backend, bilevel, random
from keras_blur.bilevel import training_losses
from keras_blur.bilevel.evograd import named
from keras_blur.bilevel.hypergradient import Bilevel, LookAhead, gradient

LAYERS = {"low": ("a", "b"), "middle": ("c",), "high": ("d",)}
SEED, RATE = random.seed_of(3), 0.3


def average(x):
    """The mean over all axes, in the type of x."""
    return backend.mean(x, tuple(range(len(x.shape))))


def problem(dtype="float64", activation=backend.tanh):
    """A network of three layers, a training loss with weights of examples and a scalar, and a meta
    loss."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return ops.convert_to_tensor(rng.standard_normal(shape), dtype)

    x, y, meta_x, meta_y = draw(6, 3), draw(6, 2), draw(5, 3), draw(5, 2)
    weights = {"a": draw(3, 4), "b": draw(4), "c": draw(4, 4), "d": draw(4, 2)}
    outer = {"examples": draw(6), "scale": ops.convert_to_tensor(0.7, dtype)}

    def predict(w, inputs):
        hidden = activation(inputs @ w["a"] + w["b"])
        return backend.tanh(hidden @ w["c"]) @ w["d"]

    def train(outer, w):
        each = backend.mean(ops.square(predict(w, x * outer["scale"]) - y), -1)
        return average(ops.sigmoid(outer["examples"]) * each)

    def judge(w):
        return average(ops.square(predict(w, meta_x) - meta_y))

    return Bilevel(train, judge, LAYERS), outer, weights


def estimate(estimator, found):
    nested, outer, weights = found
    own = estimator.parameters({layer: [tuple(weights[n].shape) for n in names] for layer, names in LAYERS.items()})
    rate = ops.convert_to_tensor(RATE, weights["a"].dtype)
    run = soon(lambda *arrays: estimator.estimate(nested, *arrays)[0])
    return run(outer, weights, rate, SEED, own)


def flat(gradients):
    return np.concatenate([np.ravel(gradients[name]) for name in sorted(gradients)])


def difference(function, outer, name, index):
    """The central difference of a function of outer parameters."""
    results, function = [], soon(function)
    for width in (1e-5, -1e-5):
        moved = np.array(outer[name])
        moved[index] += width
        results.append(float(function({**outer, name: ops.convert_to_tensor(moved)})))
    return (results[0] - results[1]) / 2e-5


def after_a_step(nested, weights):
    def function(outer):
        slope = gradient(lambda w: nested.train(outer, w), weights)[1]
        return nested.judge({name: weights[name] - RATE * slope[name] for name in weights})

    return function


def test_one_step_is_the_derivative_of_the_loss_after_it():
    nested, outer, weights = found = problem()
    got, function = estimate(bilevel.OneStep(), found), after_a_step(nested, weights)
    for name, index in (("examples", 0), ("examples", 4), ("scale", ())):
        assert float(np.array(got.gradients[name])[index]) == pytest.approx(
            difference(function, outer, name, index), rel=1e-6
        )
    assert float(got.loss) == pytest.approx(float(function(outer)), rel=1e-12)


def test_a_rate_of_its_own_takes_the_place_of_the_optimizers():
    found = problem()
    np.testing.assert_allclose(
        flat(estimate(bilevel.OneStep(rate=RATE), found).gradients),
        flat(estimate(bilevel.OneStep(), found).gradients),
        rtol=1e-12,
    )
    other, own = (flat(estimate(bilevel.OneStep(rate=rate), found).gradients) for rate in (0.1, None))
    assert np.abs(other - own).max() > 0.1 * np.abs(own).max()


def test_the_difference_quotient_comes_close_to_the_exact_gradient():
    found = problem()
    exact = flat(estimate(bilevel.OneStep(), found).gradients)
    wide, narrow = (flat(estimate(bilevel.FiniteDifference(width=width), found).gradients) for width in (1e-2, 1e-3))
    error_wide, error_narrow = (np.linalg.norm(one - exact) / np.linalg.norm(exact) for one in (wide, narrow))
    assert error_narrow < 1e-4
    assert error_wide / error_narrow == pytest.approx(100, rel=0.2)  # of second order in the width


def test_the_difference_quotient_holds_what_the_loss_takes_as_constants():
    """Weights of examples as a function of their losses, which are constants there."""
    nested, outer, weights = problem()

    def train(outer, w):
        each = backend.mean(ops.square(backend.tanh(ops.ones((6, 3), "float64") @ w["a"] + w["b"]) @ w["d"]), -1) * size
        return average(ops.sigmoid(outer["scale"] * bilevel.held(each)) * each)

    size = ops.convert_to_tensor(np.arange(1.0, 7.0))
    found = nested._replace(train=train), {"scale": outer["scale"]}, weights
    exact = flat(estimate(bilevel.OneStep(), found).gradients)
    close = flat(estimate(bilevel.FiniteDifference(width=1e-3), found).gradients)
    np.testing.assert_allclose(close, exact, rtol=1e-4)


def test_example_weights_hold_the_losses():
    net, found = bilevel.SampleWeightNet(4), []
    each = ops.convert_to_tensor(np.array([0.5, 2.0], "float32"))
    with training_losses.recording(found):
        net.training_loss(lambda x, training: x, each, None, lambda y, prediction: prediction)
    assert [ops.convert_to_numpy(one).tolist() for one in found] == [[0.5, 2.0]]


def test_all_layers_are_the_exact_gradient_and_parts_sum_to_it():
    found = problem()
    exact = flat(estimate(bilevel.OneStep(), found).gradients)
    np.testing.assert_allclose(flat(estimate(bilevel.LayerwiseMetaGradient(None), found).gradients), exact, rtol=1e-10)
    np.testing.assert_allclose(flat(estimate(bilevel.LayerwiseMetaGradient("last:3"), found).gradients), exact, rtol=1e-10)
    parts = [flat(estimate(bilevel.LayerwiseMetaGradient((layer,)), found).gradients) for layer in LAYERS]
    np.testing.assert_allclose(sum(parts), exact, rtol=1e-10)
    assert all(np.abs(part).max() > 1e-4 for part in parts)


def test_the_head_alone_is_the_gradient_of_the_heads_weights():
    nested, outer, weights = found = problem()
    slope = soon(lambda w: gradient(lambda w: nested.train(outer, w), w)[1])(weights)
    ahead = {name: weights[name] - RATE * slope[name] for name in weights}  # the step is that of all layers

    def function(values):
        step = RATE * (gradient(lambda w: nested.train(values, w), weights)[1]["d"] - slope["d"])
        return nested.judge({**ahead, "d": ahead["d"] - step})

    got = estimate(bilevel.LayerwiseMetaGradient("last:1"), found).gradients
    for name, index in (("examples", 1), ("scale", ())):
        assert float(np.array(got[name])[index]) == pytest.approx(difference(function, outer, name, index), rel=1e-6)


def test_the_cut_does_not_compute_what_it_leaves_out():
    found = problem(activation=once)
    held = {"examples": found[1]["examples"]}  # what does not enter below the cut
    nested = found[0]._replace(train=lambda outer, w: found[0].train({**found[1], **outer}, w))
    cut = estimate(bilevel.LayerwiseMetaGradient("last:2"), (nested, held, found[2]))
    assert np.abs(flat(cut.gradients)).max() > 1e-4
    with pytest.raises(RuntimeError, match="no second derivative"):
        estimate(bilevel.OneStep(), (nested, held, found[2]))


def test_first_order_estimators_need_no_second_derivative():
    found, smooth = problem(activation=once), problem()
    for estimator in (bilevel.EvoGrad(5, sigma=0.1), bilevel.FiniteDifference()):
        got = flat(estimate(estimator, found).gradients)
        np.testing.assert_allclose(got, flat(estimate(estimator, smooth).gradients), rtol=1e-10)
        assert np.abs(got).max() > 1e-6
    with pytest.raises(RuntimeError, match="no second derivative"):
        estimate(bilevel.OneStep(), found)


@pytest.mark.parametrize("noise", ["rademacher", "normal"])
@pytest.mark.parametrize("scope", [None, ("middle", "high")])
def test_evograd_is_the_derivative_of_the_loss_of_the_merged_candidates(noise, scope):
    nested, outer, weights = found = problem()
    estimator = bilevel.EvoGrad(4, sigma=0.2, temperature=0.3, noise=noise, scope=scope)
    names = named(LAYERS, scope or tuple(LAYERS), "scope")
    drawn = [
        {n: ops.cast(estimator._drawn(random.fold_in(SEED, k, place), tuple(weights[n].shape)), "float64")
         for place, n in enumerate(names)} for k in range(4)
    ]  # fmt: skip

    def function(values):
        candidates = [{**weights, **{n: weights[n] + 0.2 * eps[n] for n in names}} for eps in drawn]
        shares = [ops.exp(-nested.train(values, one) / 0.3) for one in candidates]
        shares = [one / sum(shares) for one in shares]
        return nested.judge({n: sum(s * c[n] for s, c in zip(shares, candidates, strict=True)) for n in weights})

    got = estimate(estimator, found)
    for name, index in (("examples", 2), ("scale", ())):
        assert float(np.array(got.gradients[name])[index]) == pytest.approx(
            difference(function, outer, name, index), rel=1e-5
        )
    assert float(got.loss) == pytest.approx(float(function(outer)), rel=1e-10)
    assert 1.0 <= float(got.logs["candidates"]) <= 4.0


def test_a_population_of_one_has_no_gradient():
    assert np.array_equal(flat(estimate(bilevel.EvoGrad(1), problem()).gradients), np.zeros(7))


def test_small_perturbations_move_as_theory_says():
    """The mean over draws of the merged displacement is -sigma^2 (K - 1) / (K tau) times the
    gradient."""
    sigma, tau, population = 0.02, 0.5, 3
    slope = ops.convert_to_tensor([1.0, -2.0, 0.5], "float64")
    size = 200_000
    eps = 2.0 * np.array(random.integers(SEED, (size, population, 3), 2), "float64") - 1.0

    def merged(eps):
        weighing = np.exp(-np.sum(sigma * eps * np.array(slope), axis=-1, keepdims=True) / tau)
        return np.sum(sigma * weighing * eps, axis=-2) / np.sum(weighing, axis=-2)

    # By the estimator: with the meta loss <u, theta>, the merged candidate's loss is <u, theta*>.
    estimator = bilevel.EvoGrad(population, sigma=sigma, temperature=tau)
    moved = []
    start = {"l": ops.ones((), "float64")}, {"theta": ops.zeros(3, "float64")}
    direction = ops.convert_to_tensor([1.0, 3.0, -2.0], "float64")
    nested = Bilevel(
        lambda outer, w: outer["l"] * ops.sum(slope * w["theta"]),
        lambda w: ops.sum(direction * w["theta"]), {"one": ("theta",)},
    )  # fmt: skip

    def one_step(number):
        seed = random.fold_in(SEED, number)
        found = estimator.estimate(nested, *start, None, seed, {})[0]
        return found.loss, ops.stack([estimator._drawn(random.fold_in(seed, k, 0), (3,)) for k in range(population)])

    one_step = backend.compiled(one_step, jit_compile=False)
    for number in range(200):
        loss, shares = one_step(np.int32(number))
        moved.append(merged(np.array(shares, "float64")))
        assert float(loss) == pytest.approx(np.sum(np.array(direction) * moved[-1]), rel=1e-6)
    mean, theory = merged(eps), -(sigma**2) * (population - 1) / (population * tau) * np.array(slope)
    np.testing.assert_allclose(mean.mean(axis=0), theory, rtol=0.05, atol=4 * mean.std() / size**0.5)
    assert np.abs(np.mean(moved, axis=0) - theory).max() < 5 * np.std(moved) / len(moved) ** 0.5


@pytest.mark.slow
def test_evograd_of_a_rate_points_away_from_the_derivative_through_the_step():
    """Of a step of size a on theta' H theta / 2 it is 2 a_eff theta' H (I - a H) H^2 theta,
    positive where a is small; the loss after the step falls with a. examples/learn_a_gate.py shows
    it in a network."""
    sigma, tau, population, size = 0.02, 0.5, 2, 100_000
    h, theta = np.array([1.0, 0.5, 2.0]), np.array([1.0, -1.0, 0.5])

    def loss(values):
        return 0.5 * ops.sum(h * ops.square(values))

    nested = Bilevel(
        lambda outer, w: loss(w["theta"] * (1.0 - outer["a"] * h)), lambda w: loss(w["theta"]), {"one": ("theta",)}
    )
    estimator = bilevel.EvoGrad(population, sigma=sigma, temperature=tau)
    start, rate = {"theta": ops.convert_to_tensor(theta, "float64")}, ops.convert_to_tensor(0.1, "float64")

    def draw(number):
        seed = random.fold_in(SEED, number)
        return estimator.estimate(nested, {"a": rate}, start, None, seed, {})[0].gradients["a"]

    draws = np.array(in_a_graph(lambda numbers: ops.vectorized_map(draw, numbers), JAX)(ops.arange(size, dtype="int32")))
    effective = sigma**2 * (population - 1) / (population * tau)
    theory = 2.0 * effective * np.sum(h * theta * (1.0 - 0.1 * h) * h**2 * theta)
    assert draws.mean() == pytest.approx(theory, rel=0.05)
    assert float(slopes(lambda rate: loss(theta * (1.0 - rate * h)), (rate,))[0]) < 0.0 < theory


def test_the_sampler_gates_what_it_says_and_learns_from_its_losses():
    nested, outer, weights = problem("float32")
    sampler = bilevel.GradientSampler(target=1, hidden=4, distance_weight=0.0, count_weight=0.0)
    estimator = bilevel.LayerwiseMetaGradient(None, sampler)
    own = estimator.parameters({layer: [tuple(weights[n].shape) for n in names] for layer, names in LAYERS.items()})
    rate = ops.convert_to_tensor(RATE, "float32")
    seen, slope = set(), soon(lambda w: gradient(lambda w: nested.train(outer, w), w)[1])(weights)
    run = soon(lambda *arrays: estimator.estimate(nested, *arrays))
    gates_of = soon(lambda *arrays: estimator._gates(sampler, tuple(LAYERS), list(LAYERS.values()), *arrays))
    by_gates = functools.cache(lambda chosen: estimate(bilevel.LayerwiseMetaGradient(chosen), (nested, outer, weights)))
    for number in range(12):
        seed = random.fold_in(SEED, number)
        got, changes = run(outer, weights, rate, seed, own)
        gates = np.array(gates_of(slope, seed, own))
        seen.add(tuple(gates.tolist()))
        chosen = tuple(layer for layer, gate in zip(LAYERS, gates, strict=True) if gate)
        np.testing.assert_allclose(flat(got.gradients), flat(by_gates(chosen).gradients), rtol=1e-4, atol=1e-7)
        assert float(got.logs["layers"]) == sum(gates)
        assert float(got.logs["depth"]) == len(LAYERS) - list(gates).index(1.0)
        assert any(np.abs(value).max() > 0 for value in changes.values()) or sum(gates) == 1
    assert len(seen) > 2


def test_a_branch_of_the_sampler_computes_its_own_layers_alone():
    """Nor is a loss computed in it, or its way forward: those are made once, outside."""
    nested, outer, weights = problem("float32", activation=ops.relu)
    held = {"examples": outer["examples"]}  # a scale of inputs would need the layers below the cut
    nested = nested._replace(train=lambda values, w, train=nested.train: train({**outer, **values}, w))
    estimator = bilevel.LayerwiseMetaGradient(None, bilevel.GradientSampler(target=1, hidden=4))
    own = estimator.parameters({layer: [tuple(weights[n].shape) for n in names] for layer, names in LAYERS.items()})

    def step(seed):
        found, changes = estimator.estimate(nested, held, weights, ops.convert_to_tensor(RATE, "float32"), seed, own)
        return found.gradients, changes

    # Of the meta loss, from the head: a product for its weights; then one for what goes below it
    # and one for weights again. Of the mixed derivative, in the other direction: of each layer its
    # change of outputs, and what comes from below.
    assert products_of_branches(step, SEED) == [[5, 3, 1], [5, 3, 1]]


def test_the_samplers_count_is_drawn_to_its_target():
    nested, outer, weights = problem("float32")
    shapes = {layer: [tuple(weights[n].shape) for n in names] for layer, names in LAYERS.items()}

    def count(target):
        """The mean number of open gates after 150 steps."""
        sampler = bilevel.GradientSampler(target=target, hidden=8, temperature=1.0, distance_weight=0.0, count_weight=1.0)
        estimator = bilevel.LayerwiseMetaGradient(None, sampler)
        own, logs = estimator.parameters(shapes), []

        def step(own, number):
            rate, seed = ops.convert_to_tensor(RATE, "float32"), random.fold_in(SEED, number)
            found, changes = estimator.estimate(nested, outer, weights, rate, seed, own)
            return found.logs["layers"], {name: own[name] - 0.1 * changes[name] for name in own}

        step = backend.compiled(step, jit_compile=False)
        for number in range(200):
            layers, own = step(own, np.int32(number))
            logs.append(float(layers))
        return np.mean(logs[-50:])

    assert count(1) < 1.4
    assert count(3) > 2.6


def test_the_third_loss_is_the_distance_at_the_last_layer():
    (nested, outer, weights), results = problem("float32"), []
    for weight in (0.0, 0.5):
        sampler = bilevel.GradientSampler(hidden=4, distance_weight=weight, count_weight=0.0)
        estimator = bilevel.LayerwiseMetaGradient(None, sampler)
        results.append(estimate(estimator, (nested, outer, weights)).gradients)

    def distance(values):
        slope = gradient(lambda w: nested.train(outer, w), weights)[1]
        ahead = {name: weights[name] - RATE * slope[name] for name in weights}
        judged = ops.stop_gradient(backend.mean(gradient(nested.judge, ahead)[1]["d"], 0))
        pooled = backend.mean(gradient(lambda w: nested.train(values, w), weights)[1]["d"], 0)
        return 0.5 * ops.sum(ops.square(pooled - judged))

    wanted = soon(lambda outer: gradient(distance, outer)[1])(outer)
    np.testing.assert_allclose(flat(results[1]) - flat(results[0]), flat(wanted), rtol=1e-3, atol=1e-6)


class Scale(keras.layers.Layer):
    """One number for all neurons."""

    def build(self, shape):
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")

    def call(self, x):
        return self.scale * x


def test_a_sampler_takes_a_last_layer_of_one_number():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), Scale()])
    sampler = bilevel.GradientSampler(target=1, hidden=3, distance_weight=0.5)
    made = bilevel.BilevelTrainer(model, bilevel.SampleWeightNet(3), bilevel.LayerwiseMetaGradient(None, sampler))
    made.compile("sgd", "sgd", "mse", run_eagerly=not JAX)
    x = np.random.default_rng(0).standard_normal((8, 4)).astype("float32")
    found = made.fit(x, x[:, :3], meta_data=(x, x[:, 1:]), batch_size=8, verbose=0).history
    assert found["skipped"] == [0.0]


def test_a_target_that_cannot_be_reached_is_refused():
    model = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(3) for _ in range(3))])
    loss = bilevel.SampleWeightNet(3)
    message = r"^`target` of the sampler must be at most 2, .* by layers='last:2'. Received: target=4$"
    with pytest.raises(ValueError, match=message):
        bilevel.BilevelTrainer(model, loss, bilevel.LayerwiseMetaGradient(sampler=bilevel.GradientSampler()))
    bilevel.BilevelTrainer(model, loss, bilevel.LayerwiseMetaGradient(None, bilevel.GradientSampler(target=3)))


def test_a_look_ahead_compiles_whole():
    nested, outer, weights = problem("float32")

    def back(outer, weights):
        return LookAhead(nested, outer, weights, ops.convert_to_tensor(RATE, "float32")).mixed(weights)

    np.testing.assert_allclose(flat(compiled(back)(outer, weights)), flat(back(outer, weights)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bilevel.EvoGrad(0), "`population` must be a positive integer. Received: population=0"),
        (lambda: bilevel.EvoGrad(sigma=-1.0), "`sigma` must be a positive number"),
        (lambda: bilevel.EvoGrad(noise="uniform"), "`noise` must be one of 'rademacher', 'normal'"),
        (lambda: bilevel.OneStep(rate=0.0), "`rate` must be a positive number"),
        (lambda: bilevel.FiniteDifference(width=float("nan")), "`width` must be a positive number"),
        (lambda: bilevel.LayerwiseMetaGradient("first:2"), "`layers` must be 'last:N', names of layers, or None"),
        (lambda: bilevel.LayerwiseMetaGradient(("no",)).parameters(LAYERS), "`layers` must be names of layers with weights"),
        (lambda: bilevel.EvoGrad(scope=("no",)).parameters(LAYERS), "`scope` must be names of layers with weights"),
        (lambda: bilevel.GradientSampler(momentum=-1), "`momentum` must be a finite number of at least 0"),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
