"""WarpGrad: the gradient at constant thetas, its two orders and its buffer, starts, warps that are
held, and controls."""

from itertools import pairwise

import keras
import numpy as np
import pytest
from gradient_harness import draw_episodes
from keras import ops
from marks import slow_but
from on_backend import bytes_of_loops, in_a_graph, operations

from keras_blur import backend, convert, genomes, learners, meta, random, tasks
from keras_blur.distribution import Shard
from keras_blur.meta.estimator import over_tasks, start
from keras_blur.report.episodes import adaptation_curve

FEATURES, OUTPUTS, TASKS, BATCH, STEPS = 3, 2, 2, 6, 4
SEED = random.seed_of(3)


def network(dtype="float64", warps=True, norm=False, activation="tanh"):
    def bend(number):
        return [keras.layers.Dense(5, kernel_initializer="identity", name=f"bend_{number}", dtype=dtype)] if warps else []

    normal = [keras.layers.BatchNormalization(momentum=0.5, name="norm", dtype=dtype)] if norm else []
    first, second, last = (keras.initializers.GlorotUniform(seed) for seed in (1, 2, 3))
    layers = [keras.Input((FEATURES,), dtype=dtype), keras.layers.Dense(5, None, kernel_initializer=first, dtype=dtype)]
    layers += [*bend(0), *normal, keras.layers.Activation(activation, dtype=dtype)]
    layers += [keras.layers.Dense(5, activation, kernel_initializer=second, dtype=dtype), *bend(1)]
    return keras.Sequential([*layers, keras.layers.Dense(OUTPUTS, kernel_initializer=last, dtype=dtype)])


def warp(dtype="float64", optimizer=None, loss="cross_entropy", **options):
    model = network(dtype, **options)
    names = [layer.name for layer in model.layers if layer.name.startswith("bend")]
    return learners.Warp(model, names, optimizer or keras.optimizers.SGD(0.3), loss=loss)


def drawn(learner, members=2, dtype="float64"):
    rng = np.random.default_rng(1)
    begin = learner.draw(1, members, FEATURES, OUTPUTS)
    return {name: ops.convert_to_tensor(own + 0.2 * rng.standard_normal(own.shape), dtype) for name, own in begin.items()}


def episodes(dtype="float64", count=TASKS, steps=STEPS + 1):
    return draw_episodes(count, steps, BATCH, BATCH, FEATURES, OUTPUTS, dtype)


def trajectory(learner, outer, data, steps=STEPS):
    """theta_0 to theta_K."""
    states = [start(learner, outer, data, SEED)]
    for time in range(steps):
        states.append(learner.step(over_tasks(outer), states[-1], data["x"][None, :, time], data["y"][None, :, time])[0])
    return states


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.3),
    "momentum": lambda: keras.optimizers.SGD(0.3, momentum=0.9),
    "clipped": lambda: keras.optimizers.SGD(0.3, global_clipnorm=0.1),
    "Adam": lambda: keras.optimizers.Adam(0.1, epsilon=1e-3),
}


@pytest.mark.parametrize("name", slow_but(["SGD", "Adam"], OPTIMIZERS))
def test_a_term_is_the_difference_quotient_at_a_constant_theta_and_the_first_order_one_is_not(name):
    learner, data = warp(optimizer=OPTIMIZERS[name](), activation="silu"), episodes()  # Keras rounds tanh on JAX
    outer = drawn(learner, members=1)
    theta, place = trajectory(learner, outer, data)[2], ops.array(2)
    estimator = meta.WarpGrad(STEPS)
    exact, first = (
        meta.WarpGrad(STEPS, order=order).at(learner, outer, data, theta, place)[0] for order in ("exact", "first")
    )
    rng = np.random.default_rng(2)
    direction = {n: rng.standard_normal(v.shape) for n, v in outer.items() if n.startswith("warp_")}

    def loss(width):
        moved = {**outer, **{n: outer[n] + width * d for n, d in direction.items()}}
        return float(estimator.at(learner, moved, data, theta, place)[1][0])

    quotient = (loss(1e-5) - loss(-1e-5)) / 2e-5
    slopes = [sum(float(np.sum(found[n] * d)) for n, d in direction.items()) for found in (exact, first)]
    assert slopes[0] == pytest.approx(quotient, rel=1e-6)
    assert abs(slopes[1] - quotient) > 1e-3 * abs(quotient)
    for n, value in exact.items():
        assert n.startswith("warp_") or not np.any(value)  # theta is a constant


def test_the_online_gradient_is_the_mean_of_the_terms():
    learner, data, estimator = warp(), episodes(), meta.WarpGrad(STEPS)
    outer = drawn(learner)
    found = estimator(learner, outer, data, SEED)[0]
    states = trajectory(learner, outer, data)
    terms = [estimator.at(learner, outer, data, states[k], ops.array(k))[0] for k in range(STEPS)]
    for name in outer:
        np.testing.assert_allclose(found.gradients[name], np.mean([term[name] for term in terms], axis=0), atol=1e-12)
    prediction = learner.predict(over_tasks(outer), states[-1], data["query_x"][None])
    chances = ops.softmax(prediction)
    wanted = -np.sum(np.log(chances) * (np.asarray(data["query_y"]) + 1) / 2, axis=-1)
    np.testing.assert_allclose(found.loss, np.mean(wanted, axis=(1, 2)), rtol=1e-12)


@pytest.mark.slow
def test_a_buffer_in_any_order_gives_the_online_gradient():
    """Thetas are constants, so the whole buffer at once is the sum over the run; each part of it is
    used once."""
    learner, data = warp(), episodes()
    outer = drawn(learner)
    online = meta.WarpGrad(STEPS)(learner, outer, data, SEED)[0].gradients
    whole = meta.OfflineWarpGrad(STEPS, thetas=STEPS)
    for number in range(2):
        nothing = whole.nothing_carried(learner, outer, data)
        found = whole(learner, outer, data, random.seed_of(number), nothing, True)[0].gradients
        for name in online:
            np.testing.assert_allclose(found[name], online[name], atol=1e-12)
    single = meta.OfflineWarpGrad(STEPS, thetas=1)
    carried, sums = single.nothing_carried(learner, outer, data), dict.fromkeys(online, 0.0)
    for window in range(single.windows):
        estimate, carried = single(learner, outer, data, random.seed_of(9 + window), carried, window == 0)
        sums = {name: sums[name] + np.asarray(estimate.gradients[name]) / STEPS for name in sums}
    for name in online:
        np.testing.assert_allclose(sums[name], online[name], atol=1e-12)


def test_the_buffer_holds_what_was_visited_before_each_step():
    learner, data, estimator = warp(optimizer=OPTIMIZERS["Adam"]()), episodes(), meta.OfflineWarpGrad(STEPS, thetas=2)
    outer = drawn(learner)
    _, carried = estimator(learner, outer, data, SEED, estimator.nothing_carried(learner, outer, data), True)
    for place, state in enumerate(trajectory(learner, outer, data)[:-1]):  # never theta_K
        for one, other in zip(backend.leaves(carried.learners.take(ops.array(place))), backend.leaves(state), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


def test_every_window_of_a_buffer_reports_the_query_of_its_run():
    learner, data = warp(), episodes()
    outer = drawn(learner)
    wanted = meta.WarpGrad(STEPS)(learner, outer, data, SEED)[0]
    estimator = meta.OfflineWarpGrad(STEPS, thetas=2)
    carried = estimator.nothing_carried(learner, outer, data)
    for window in range(estimator.windows):
        found, carried = estimator(learner, outer, data, SEED, carried, window == 0)
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-12)
        np.testing.assert_allclose(found.accuracy, wanted.accuracy, rtol=1e-12)
    other = {**data, "query_y": -data["query_y"]}
    found = estimator(learner, outer, other, SEED, carried, True)[0]
    assert np.abs(found.loss - wanted.loss).min() > 0.01
    np.testing.assert_allclose(found.accuracy, 1.0 - wanted.accuracy)


def test_a_step_is_scored_on_the_query():
    """By hand, as if the query were the next batch."""
    learner, data = warp(), episodes()
    outer, place = drawn(learner), ops.array(1)
    theta = trajectory(learner, outer, data)[1]
    by_query = meta.WarpGrad(STEPS, scored="query")
    assert by_query.horizon == STEPS
    found = by_query.at(learner, outer, data, theta, place)
    moved = {n: ops.concatenate([data[n][:, :2], data[f"query_{n}"][:, None], data[n][:, 3:]], axis=1) for n in ("x", "y")}
    wanted = meta.WarpGrad(STEPS).at(learner, outer, {**data, **moved}, theta, place)
    for one, other in zip(backend.leaves(found), backend.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    assert np.abs(found[1] - meta.WarpGrad(STEPS).at(learner, outer, data, theta, place)[1]).max() > 1e-3


def blobs(count=90):
    x = np.random.default_rng(0).standard_normal((count, 2)).astype("float32")
    return tasks.arrays(x, (x[:, 0] > 0).astype(int))


@pytest.mark.parametrize("augmented", [False, True])
def test_warps_are_never_scored_on_what_a_step_has_learned(augmented):
    """A batch of the whole support is also the next one; one of up to half of it is not."""
    few = tasks.classes(shots=4)  # a support of 5 x 4
    few = tasks.augment(few, tasks.LabelPermutation()) if augmented else few
    learner = learners.Warp(*learners.warped(few.features, (4,), few.outputs), keras.optimizers.SGD(0.1))

    def scored(of, learner, batch, estimator):
        return meta.MetaTrainer(of, learner, estimator, batch_size=batch, query_size=10).estimator.scored

    support = few.support(10)
    for make in (meta.WarpGrad, meta.OfflineWarpGrad):
        found = [scored(few, learner, batch, make(2)) for batch in (support // 2, support // 2 + 1, support, 2 * support)]
        assert found == ["next", "query", "query", "query"]
    assert scored(few, learner, 1, meta.WarpGrad(2, scored="query")) == "query"
    of = blobs()
    most = of.available("train") - 10  # the examples of an episode besides its query
    plain = learners.Warp(*learners.warped(2, (4,), 2), keras.optimizers.SGD(0.1))
    assert [scored(of, plain, batch, meta.WarpGrad(2)) for batch in (most // 2, most // 2 + 1)] == ["next", "query"]


def test_warps_of_a_whole_support_learn_from_the_query():
    """The batch is the whole support, so its gradient depends on the query."""
    few = tasks.classes(shots=2)
    model, names = learners.warped(few.features, (4,), few.outputs)
    made = meta.MetaTrainer(
        few, learners.Warp(model, names, keras.optimizers.SGD(0.1)), meta.WarpGrad(2), batch_size=few.support(10),
        query_size=10,
    )  # fmt: skip
    learner, estimator = made.families[0][1], made.estimator
    outer = {name: ops.convert_to_tensor(value[None]) for name, value in made.parameters(0).items()}
    data = next(iter(few.dataset(0, steps=estimator.horizon, batch=made.batch_size, query=10).batch(1)))
    found = estimator(learner, outer, data, SEED)[0].gradients
    other = {**data, "query_x": -data["query_x"]}
    changed = estimator(learner, outer, other, SEED)[0].gradients
    warps = [name for name in found if name.startswith("warp_")]
    assert max(float(np.abs(found[name] - changed[name]).max()) for name in warps) > 1e-3


@pytest.mark.slow
def test_starts_by_hand():
    learner, data = warp(), episodes()
    outer = drawn(learner)
    states = [learner.adapted(state) for state in trajectory(learner, outer, data)]
    plain = meta.WarpGrad(STEPS)(learner, outer, data, SEED)[0].gradients
    found = {kind: meta.WarpGrad(STEPS, start=kind)(learner, outer, data, SEED)[0].gradients for kind in ("reptile", "leap")}
    for name in states[0]:
        assert not np.any(plain[name])
        moved = np.mean(states[0][name] - states[-1][name], axis=1)
        np.testing.assert_allclose(found["reptile"][name], moved, atol=1e-12)
    path = dict.fromkeys(states[0], 0.0)
    for before, after in pairwise(states):
        moved = {name: np.asarray(before[name] - after[name]) for name in before}
        length = np.sqrt(sum(np.sum(v**2, axis=tuple(range(2, v.ndim))) for v in moved.values()))
        path = {n: path[n] + (v / length.reshape(2, TASKS, *[1] * (v.ndim - 2))).mean(1) for n, v in moved.items()}
    for name, value in path.items():
        np.testing.assert_allclose(found["leap"][name], value, atol=1e-12)
    maml = meta.WarpGrad(STEPS, start="maml")(learner, outer, data, SEED)[0].gradients
    unrolled = meta.Unroll(STEPS)(learner, outer, data, SEED)[0].gradients
    for name in plain:
        np.testing.assert_allclose(maml[name], unrolled[name] if name in path else plain[name], atol=1e-12)


@pytest.mark.parametrize("kind", slow_but(["reptile"], ["none", "reptile", "leap", "maml"]))
def test_offline_starts_are_those_of_online_and_come_once(kind):
    learner, data = warp(), episodes()
    outer = drawn(learner)
    online = meta.WarpGrad(STEPS, start=kind)(learner, outer, data, SEED)[0].gradients
    estimator = meta.OfflineWarpGrad(STEPS, start=kind, thetas=2)
    carried = estimator.nothing_carried(learner, outer, data)
    first, carried = estimator(learner, outer, data, SEED, carried, True)
    second, _ = estimator(learner, outer, data, SEED, carried, False)
    for name, value in online.items():
        if name.startswith("start_"):
            np.testing.assert_allclose(first.gradients[name], value, atol=1e-12)
            assert not np.any(second.gradients[name])


def test_identity_warps_are_no_warps():
    """The control: with warps at the identity every step is that of the network without them."""
    bent, straight = warp(), warp(warps=False)
    outer = {name: ops.convert_to_tensor(v, "float64") for name, v in bent.draw(0, 1, FEATURES, OUTPUTS).items()}
    other = {name: value for name, value in outer.items() if name.startswith("start_")}
    names = dict(zip([n for n in outer if n.startswith("start_")], straight.draw(0, 1, FEATURES, OUTPUTS), strict=True))
    other = {names[name]: value for name, value in other.items()}
    data = episodes()
    for one, two in zip(trajectory(bent, outer, data), trajectory(straight, other, data), strict=True):
        for value, wanted in zip(one.weights, two.weights, strict=True):
            np.testing.assert_allclose(value, wanted, atol=1e-14)


def test_the_step_is_the_step_of_keras_with_warps_held():
    learner, data = (
        warp("float32", optimizer=keras.optimizers.SGD(0.1, momentum=0.9), norm=True),
        episodes("float32", count=1),
    )
    outer = drawn(learner, members=1, dtype="float32")
    model = learner.learned({name: np.asarray(value)[0] for name, value in outer.items()})
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.CategoricalCrossentropy(from_logits=True))
    state = start(learner, outer, data, SEED)
    for time in range(STEPS):
        state, _ = learner.step(over_tasks(outer), state, data["x"][None, :, time], data["y"][None, :, time])
        model.train_on_batch(data["x"][0, time], (data["y"][0, time] + 1) / 2)
    found = learner.predict(over_tasks(outer), state, data["query_x"][None])[0, 0]
    np.testing.assert_allclose(found, model(data["query_x"][0], training=False), atol=2e-5)
    moving = [np.asarray(value)[0, 0] for value in state.buffers]
    kept = [np.asarray(v) for v in model.get_layer("norm").non_trainable_variables]
    for one, other in zip(moving, kept, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(moving[0]).max() > 0.01  # a task has averages of its own, which begin anew
    np.testing.assert_array_equal(start(learner, outer, data, SEED).buffers[0], np.zeros((1, 1, 5)))


def test_adapting_gives_a_keras_model_and_leaves_warps_to_the_bit(tmp_path):
    learner = warp("float32", loss="squared")
    learned = learner.learned({name: np.asarray(value)[0] for name, value in drawn(learner, 1, "float32").items()})
    learned.save(tmp_path / "learned.keras")
    loaded = keras.models.load_model(tmp_path / "learned.keras")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, FEATURES)).astype("float32")
    y = np.tanh(x[:, :OUTPUTS])
    before = loaded.get_weights()
    for optimizer in (None, keras.optimizers.Nadam(0.01)):  # any
        model = learner.adapt(loaded, x, y, steps=60, batch_size=16, optimizer=optimizer)
        assert model.evaluate(x, y, verbose=0) < 0.7 * np.mean((loaded(x) - y) ** 2)
        for layer, old in zip(model.layers, loaded.layers, strict=True):
            same = [np.array_equal(one, other) for one, other in zip(layer.get_weights(), old.get_weights(), strict=True)]
            assert all(same) if layer.name.startswith("bend") else not any(same)
    for one, other in zip(loaded.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    for name, value in learner.parameters(tmp_path / "learned.keras").items():
        np.testing.assert_array_equal(value, learner.parameters(learned)[name])


def nodes(steps, order):
    """Operations of a meta-gradient's graph, loop bodies included."""
    learner, data = warp("float32"), episodes("float32", steps=steps + 1)
    outer = drawn(learner, dtype="float32")
    estimator = meta.WarpGrad(steps, order=order, start="leap")
    return operations(lambda outer, data: estimator(learner, outer, data, SEED)[0], outer, data)


@pytest.mark.parametrize("order", slow_but(["first"], ["exact", "first"]))
def test_operations_do_not_depend_on_the_number_of_steps(order):
    assert nodes(10, order) == nodes(100, order)


def kept(make, steps):
    """Bytes that the loops of a compiled meta-gradient carry, and those of the support."""
    learner, data = warp("float32"), episodes("float32", steps=steps + 1)
    outer, estimator = drawn(learner, dtype="float32"), make(steps)
    carried = bytes_of_loops(lambda outer, data: estimator(learner, outer, data, SEED)[0], outer, data)
    return carried, 4 * (np.size(data["x"]) + np.size(data["y"]))


@pytest.mark.slow
def test_memory_grows_by_the_data_alone():
    """The loop over the steps carries nothing for a gradient through it; that of an unroll does."""
    (few, data), (many, more) = kept(meta.WarpGrad, 10), kept(meta.WarpGrad, 100)
    assert many - few <= 2 * (more - data)
    (few, data), (many, more) = kept(meta.Unroll, 10), kept(meta.Unroll, 100)
    assert many - few > 10 * (more - data)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [meta.WarpGrad(STEPS, start="leap"), meta.OfflineWarpGrad(STEPS, start="reptile")])
def test_compiled_equals_uncompiled(estimator):
    learner, data = warp("float32", norm=True), episodes("float32")
    outer = drawn(learner, dtype="float32")
    carried = estimator.nothing_carried(learner, outer, data)

    def gradients(outer, data):
        return estimator(learner, outer, data, SEED, carried, ops.array(True))[0]

    plain, whole = (in_a_graph(gradients, jit)(outer, data) for jit in (False, True))
    for one, other in zip(backend.leaves(plain), backend.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_shares_of_the_tasks_have_the_mean_of_all():
    learner, data = warp(), episodes(count=4)
    outer = drawn(learner)
    estimator = meta.WarpGrad(STEPS, start="leap")
    whole = estimator(learner, outer, data, SEED)[0]
    parts = []
    for index in range(2):
        own = Shard(index, 2).part(data, axis=0)
        parts.append(estimator.local_estimate(learner, outer, own, SEED, (), True, Shard(index, 2))[0])
    for one, other in zip(backend.leaves(whole), zip(*map(backend.leaves, parts), strict=True), strict=True):
        np.testing.assert_allclose(one, np.mean(other, axis=0), atol=1e-12)


def trainer(estimator, **options):
    made = meta.MetaTrainer(
        tasks.functions("blobs2"), learners.Warp(plane(), ["bend"], keras.optimizers.SGD(0.1)), estimator,
        **{"members": 2, "meta_batch_size": 2, "batch_size": 8, "query_size": 16, **options},
    )  # fmt: skip
    made.compile(keras.optimizers.Adam(1e-2), start_optimizer=keras.optimizers.SGD(0.1), jit_compile=False)
    return made


def plane():
    first, last = (keras.initializers.GlorotUniform(seed) for seed in (1, 2))
    bend = keras.layers.Dense(6, kernel_initializer="identity", name="bend")
    layers = [keras.Input((2,)), keras.layers.Dense(6, "tanh", kernel_initializer=first), bend]
    return keras.Sequential([*layers, keras.layers.Dense(2, kernel_initializer=last)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [meta.WarpGrad(4, start="leap"), meta.OfflineWarpGrad(4, start="reptile", thetas=2)],
    ids=["online", "offline"],
)
def test_meta_training_resumes_bit_for_bit_also_inside_a_buffer(estimator, tmp_path):
    path = tmp_path / "run.weights.h5"
    whole, first, second = (trainer(estimator, seed=1) for _ in range(3))
    whole.fit(2, 5, verbose=0)
    first.fit(1, 5, checkpoint=path, verbose=0)  # five steps: in the middle of a buffer
    assert second.fit(2, 5, checkpoint=path, verbose=0).epoch == [1]
    every, again = ([*made.variables, *made.start_optimizer.variables] for made in (whole, second))
    for one, other in zip(every, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(whole.parameters()["warp_bend_0"] - np.eye(6)).max() > 1e-3


def test_the_start_has_an_optimizer_and_a_norm_of_its_own():
    made = trainer(meta.WarpGrad(4, start="leap"), clipnorm=1e-3)
    made.compile(keras.optimizers.SGD(2.0), start_optimizer=keras.optimizers.SGD(5.0), run_eagerly=True)
    before = [made.parameters(member) for member in range(2)]
    made.fit(1, 1, verbose=0)
    for member in range(2):
        moved = {name: value - before[member][name] for name, value in made.parameters(member).items()}
        for kind, rate in (("warp_", 2.0), ("start_", 5.0)):
            norm = np.sqrt(sum(np.sum(value**2) for name, value in moved.items() if name.startswith(kind)))
            assert norm == pytest.approx(rate * 1e-3, rel=1e-2)  # each is clipped as a whole


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learners.Warp(plane(), ["bent"], keras.optimizers.SGD(0.1)), "`warp` must be names of layers with weights"),
        (lambda: learners.Warp(keras.Sequential(), [], keras.optimizers.SGD(0.1)), "must be a Keras model that is built"),
        (
            lambda: learners.Warp(convert(plane(), genomes.load("fast")), [], keras.optimizers.SGD(0.1)),
            "`model` must be a Keras model that an optimizer trains.*learn with a genome",
        ),
        (lambda: learners.Warp(plane(), [x.name for x in plane().layers], keras.optimizers.SGD(0.1)), "`warp` must"),
        (lambda: warp().draw(0, 1, 7, OUTPUTS), "must map 7 features to"),
        (lambda: warp().parameters(plane()), "must have the layers of this learner's"),
        (lambda: warp().parameters("/no/such.keras"), "is not a Keras model"),
        (lambda: warp().adapt(None, None, None, steps=0), "`steps` must be a positive integer. Received: steps=0"),
        (lambda: warp().adapt(None, None, None, steps=2.5), "`steps` must be a positive integer. Received: steps=2.5"),
        (lambda: warp().adapt(None, None, None, batch_size=-1), "`batch_size` must be a positive integer. Received"),
        (lambda: meta.WarpGrad(3, order="second"), "`order` must be one of"),
        (lambda: meta.WarpGrad(3, start="zero"), "`start` must be one of"),
        (lambda: meta.WarpGrad(3, scored="both"), "`scored` must be one of"),
        (lambda: meta.WarpGrad(3, trajectory_loss_weight=1.0), "`trajectory_loss_weight` must be 0"),
        (lambda: meta.OfflineWarpGrad(10, thetas=3), "`thetas` must divide steps=10"),
        (
            lambda: meta.MetaTrainer(tasks.functions("xor"), learners.Blur((4,)), meta.WarpGrad(2, start="leap")).compile(
                start_optimizer="sgd"
            ),
            "`start_optimizer` must be None",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_genome_has_such_a_gradient_too():
    """The estimator asks for no more than a step: BLUR's rule, a step at a time."""
    made = meta.MetaTrainer(tasks.functions("blobs2"), learners.Blur((6,)), meta.WarpGrad(3), batch_size=8, query_size=16)
    made.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
    before = made.genome
    assert made.fit(1, 3, verbose=0).history["gradient_norm"][0] > 0
    assert np.abs(made.genome.nu - before.nu).max() > 1e-3


@pytest.mark.slow
def test_warps_learn_sines_better_than_their_start_alone():
    """Reptile's start in both; the rate on new tasks is chosen for each arm, on validation
    tasks."""
    of, shape = tasks.functions("sine"), {"at": [0, 1, 2, 5, 10, 20, 50], "batch_size": 16}
    found = {}
    for warps in (False, True):
        model, names = learners.warped(1, (32, 32), 1, warps=warps)

        def learner(rate, model=model, names=names):
            return learners.Warp(model, names, keras.optimizers.SGD(rate, global_clipnorm=10.0), loss="squared")

        made = meta.MetaTrainer(
            of, learner(0.02), meta.WarpGrad(50, start="reptile"), meta_batch_size=8, batch_size=16, query_size=100, seed=0
        )
        made.compile(keras.optimizers.Adam(3e-3), start_optimizer=keras.optimizers.SGD(0.3))
        made.fit(1, 400, verbose=0)
        curves = [
            [adaptation_curve(learner(rate), made.learned, of, split=split, **shape) for split in ("validation", "test")]
            for rate in (0.005, 0.01, 0.015)
        ]
        found[warps] = min(curves, key=lambda pair: pair[0]["mean_loss"][-1])[1]
    assert found[True]["mean_loss"][-1] <= found[False]["mean_loss"][-1] / 2
    assert found[True]["area"] <= 0.8 * found[False]["area"]


# Variables beside the weights.


def with_dropout(seed=None):
    layers = [keras.layers.Dense(5, name="task"), keras.layers.Dense(5, kernel_initializer="identity", name="bend")]
    layers += [keras.layers.Dropout(0.5, seed=seed), keras.layers.Dense(OUTPUTS, name="last")]
    return learners.Warp(keras.Sequential([keras.Input((FEATURES,)), *layers]), ["bend"], keras.optimizers.SGD(0.1))


def test_masks_follow_from_the_seed_and_differ_between_tasks_and_steps():
    keras.utils.set_random_seed(0)
    learner = with_dropout()
    outer = drawn(learner, 2, "float32")
    outer = {name: ops.repeat(value[:1], 2, axis=0) for name, value in outer.items()}
    x, y = ops.ones((1, 2, BATCH, FEATURES)), ops.ones((1, 2, BATCH, OUTPUTS))

    def predictions(number, of=learner):
        state = of.init(over_tasks(outer), random.seed_of(number), FEATURES, OUTPUTS, (2, 2))
        state, first = of.step(over_tasks(outer), state, x, y)
        return [np.array(one) for one in (first, of.step(over_tasks(outer), state, x, y)[1])]

    first, second = predictions(1)
    np.testing.assert_array_equal(first[0], first[1])  # members
    assert np.abs(first[:, 0] - first[:, 1]).max() > 1e-3  # tasks
    assert np.abs(first - second).max() > 1e-3  # steps
    assert np.abs(first - predictions(2)[0]).max() > 1e-3
    keras.utils.set_random_seed(7)
    model = with_dropout()
    np.testing.assert_array_equal(predictions(1, model)[0], first)
    # A shard of the tasks draws as the whole does.
    whole = learner.init(outer, random.seed_of(1), FEATURES, OUTPUTS, (2, 4)).buffers
    part = learner.init(outer, random.seed_of(1), FEATURES, OUTPUTS, (2, 2), Shard(1, 2)).buffers
    for all_of_them, own in zip(whole, part, strict=True):
        np.testing.assert_array_equal(np.array(all_of_them)[:, 1::2], np.array(own))


def test_a_resumed_run_has_the_same_masks_and_refuses_other_statistics(tmp_path):
    def trainer(learner):
        made = meta.MetaTrainer(
            tasks.functions("xor"), learner, meta.WarpGrad(2, start="leap"), batch_size=8, query_size=8, seed=4
        )
        made.compile(keras.optimizers.Adam(1e-2), jit_compile=False)
        return made

    def dropping():
        start = keras.initializers.GlorotUniform(1)
        task, bend = (keras.layers.Dense(5, kernel_initializer=start, name=name) for name in ("task", "bend"))
        last = keras.layers.Dense(2, kernel_initializer=start, name="last")
        layers = [keras.Input((2,)), task, bend, keras.layers.Dropout(0.5), last]
        return learners.Warp(keras.Sequential(layers), ["bend"], keras.optimizers.SGD(0.1))

    whole = trainer(dropping())
    whole.fit(2, 2, verbose=0)
    trainer(dropping()).fit(1, 2, checkpoint=tmp_path / "run.weights.h5", verbose=0)
    keras.utils.set_random_seed(99)  # another process
    resumed = trainer(dropping())
    resumed.fit(2, 2, checkpoint=tmp_path / "run.weights.h5", verbose=0)
    for name, value in whole.parameters().items():
        np.testing.assert_array_equal(resumed.parameters()[name], value)

    def normalising(mean):
        start = keras.initializers.GlorotUniform(1)
        layers = [keras.layers.Dense(5, kernel_initializer=start, name="bend"), keras.layers.BatchNormalization()]
        model = keras.Sequential([keras.Input((2,)), *layers, keras.layers.Dense(2, kernel_initializer=start)])
        model.layers[1].moving_mean.assign(np.full(5, mean))
        return learners.Warp(model, ["bend"], keras.optimizers.SGD(0.1))

    trainer(normalising(0.0)).fit(1, 1, checkpoint=tmp_path / "other.weights.h5", verbose=0)
    with pytest.raises(ValueError, match="buffers"):
        trainer(normalising(5.0)).fit(2, 1, checkpoint=tmp_path / "other.weights.h5", verbose=0)


def test_batch_normalisation_is_no_warp():
    layers = [keras.layers.Dense(5), keras.layers.BatchNormalization(name="norm"), keras.layers.Dense(OUTPUTS)]
    inner = keras.Sequential([keras.Input((5,)), keras.layers.Dense(5), keras.layers.BatchNormalization()], name="inner")
    for model, name in (
        (keras.Sequential([keras.Input((FEATURES,)), *layers]), "norm"),
        (keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(5), inner, keras.layers.Dense(2)]), "inner"),
    ):
        names = [path for path in learners.base.places(model) if path.startswith(name)]
        with pytest.raises(ValueError, match="`warp` must name no batch normalisation"):
            learners.Warp(model, names, keras.optimizers.SGD(0.1))
