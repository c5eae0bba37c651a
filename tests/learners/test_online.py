"""Gregor's learned online rules: what is shared, what is local, what is wiped; the memory task; the
Keras cell."""

import keras
import numpy as np
import pytest
from gradient_harness import assert_difference_quotient
from keras import ops
from on_backend import compiled, served
from task_harness import arrays, take

from keras_blur import backend, learners, meta, random, tasks
from keras_blur.meta.estimator import binary_cross_entropy, correct_bits, over_tasks, start
from keras_blur.report.episodes import score_episodes

UNITS, ITEMS, TASKS, QUERY = 6, 3, 2, 4
SEED = random.seed_of(1)


def rule(**options):
    return learners.OnlineRule(**{"hidden": 5, "types": 2, "units": UNITS, **options})


def drawn(learner, members=2, dtype="float64"):
    rng = np.random.default_rng(1)
    begin = learner.draw(1, members, 2 * UNITS, UNITS)
    return {name: ops.array(own + 0.3 * rng.standard_normal(own.shape), dtype) for name, own in begin.items()}


def episodes(units=UNITS, items=ITEMS, dtype="float64"):
    return drawn_episodes(units, items, QUERY, TASKS, dtype)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_a_loss_that_counts_bits_which_are_not_scored_is_refused(loss):
    with pytest.raises(ValueError, match=f"`loss` of bits, .* must be 'binary' or 'auto'. Received: loss='{loss}'"):
        meta.MetaTrainer(tasks.remember(4), learners.OnlineRule(units=4), meta.Unroll(2, loss=loss), batch_size=1)


def drawn_episodes(units, items, query, count, dtype="float32", split="train"):
    stream = tasks.remember(units).dataset(0, steps=items, batch=1, query=query, split=split)
    every = take(stream, count)
    return {name: ops.array(np.stack([one[name] for one in every]), dtype) for name in every[0]}


def stored(learner, outer, data):
    state = start(learner, outer, data, SEED)
    for time in range(data["x"].shape[1]):
        state, _ = learner.step(over_tasks(outer), state, data["x"][None, :, time], data["y"][None, :, time])
    return state


def logits(learner, outer, data):
    return learner.predict(over_tasks(outer), stored(learner, outer, data), data["query_x"][None])


def by_hand(outer, learner, data, member, task):
    """The logits of one task in numpy, neuron by neuron and synapse by synapse."""
    own = {name: np.asarray(value)[member] for name, value in outer.items()}

    def net(name, values):
        hidden = np.tanh(np.concatenate(values) @ own[f"{name}_kernel_0"] + own[f"{name}_bias_0"][0])
        return hidden @ own[f"{name}_kernel_1"] + own[f"{name}_bias_1"][0]

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    def ticks(x, w, item, phase):
        for _ in range(learner.ticks[phase]):
            new = []
            for j in range(UNITS):
                message = np.mean([net("message", [w[i, j], x[i]]) for i in range(UNITS)], axis=0)
                told = [item[[j, UNITS + j]], np.eye(2)[phase], own["types"][j % learner.types]]
                new.append(np.tanh(net("body", [x[j], message, *told])))
            x = np.stack(new)
        return x

    x, w = np.zeros((UNITS, learner.neuron)), np.zeros((UNITS, UNITS, learner.synapse))
    for item in np.asarray(data["x"][task])[:, 0]:
        x, old = ticks(x, w, item, 0), w
        w = np.zeros_like(old)
        for i in range(UNITS):
            for j in range(UNITS):
                gate, value = np.split(net("write", [old[i, j], x[i], x[j]]), 2)
                w[i, j] = (1 - sigmoid(gate - 1)) * old[i, j] + sigmoid(gate - 1) * np.tanh(value)
    recalled = [ticks(np.zeros_like(x), w, cue, 1) for cue in np.asarray(data["query_x"][task])]
    return np.array([[net("read", [one])[0] for one in x] for x in recalled])


def test_a_twin_in_numpy():
    learner, data = rule(), episodes()
    outer = drawn(learner)
    found = logits(learner, outer, data)
    for member in range(2):
        for task in range(TASKS):
            np.testing.assert_allclose(found[member, task], by_hand(outer, learner, data, member, task), atol=1e-12)


@pytest.mark.parametrize(
    "estimator",
    [meta.Unroll(ITEMS, trajectory_loss_weight=0.5, kind="bits"), meta.TruncatedUnroll(1, episode_steps=ITEMS, kind="bits")],
)
def test_the_outer_gradient_is_the_difference_quotient(estimator):
    learner, data = rule(), episodes()
    outer = drawn(learner)
    data = {**data, **{name: data[name][:, : estimator.steps] for name in ("x", "y")}}
    carried = estimator.nothing_carried(learner, outer, data)
    found = estimator(learner, outer, data, SEED, carried, True)[0].gradients
    assert_difference_quotient(estimator, learner, outer, data, SEED, found)


def test_units_of_one_type_can_change_places():
    learner, data = rule(), episodes()
    outer = drawn(learner)
    order = np.array([4, 3, 0, 1, 2, 5])  # even stay even, odd stay odd: the two types
    moved = {
        name: ops.take(value, np.concatenate([order, UNITS + order]) if "x" in name else order, axis=-1)
        for name, value in data.items()
    }
    losses = [binary_cross_entropy(logits(learner, outer, one), one["query_y"][None]) for one in (data, moved)]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-12)
    wrong = np.array([1, 0, 2, 3, 4, 5])  # of different types
    moved = {n: ops.take(v, np.concatenate([wrong, UNITS + wrong]) if "x" in n else wrong, axis=-1) for n, v in data.items()}
    other = binary_cross_entropy(logits(learner, outer, moved), moved["query_y"][None])
    assert np.abs(other - losses[0]).max() > 1e-4


def test_memory_is_in_the_synapses_alone():
    learner, data = rule(), episodes()
    outer = drawn(learner)
    state = stored(learner, outer, data)
    cue = data["query_x"][None]
    found = learner.predict(over_tasks(outer), state, cue)
    loud = learner.predict(over_tasks(outer), state._replace(neurons=state.neurons + 3.0), cue)
    np.testing.assert_array_equal(found, loud)  # wiped before a cue
    blank = learner.predict(over_tasks(outer), state._replace(synapses=0.0 * state.synapses), cue)
    fresh = learner.predict(over_tasks(outer), start(learner, outer, data, SEED), cue)
    np.testing.assert_array_equal(blank, fresh)
    off = rule(plastic=False)
    np.testing.assert_array_equal(logits(off, outer, data), fresh)
    assert np.abs(found - fresh).max() > 1e-3


@pytest.mark.slow
def test_compiled_equals_uncompiled():
    learner, data = rule(), episodes(dtype="float32")
    outer, estimator = drawn(learner, dtype="float32"), meta.Unroll(ITEMS, kind="bits")

    def gradients(outer, data):
        return estimator(learner, outer, data, SEED)[0]

    plain, whole = gradients(outer, data), compiled(gradients)(outer, data)
    for one, other in zip(backend.leaves(plain), backend.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_keras_cell_stores_and_recalls_as_the_learner(tmp_path):
    learner, data = rule(ticks=(1, 2)), episodes(dtype="float32")
    outer = drawn(learner, members=1, dtype="float32")
    wanted = logits(learner, outer, data)[0]
    model = learner.learned({name: ops.convert_to_numpy(value)[0] for name, value in outer.items()})
    flags = np.concatenate([np.zeros(ITEMS), np.ones(QUERY)]).astype("float32")
    items = ops.concatenate([data["x"][:, :, 0], data["query_x"]], axis=1)
    sequence = ops.concatenate([items, ops.broadcast_to(flags[None, :, None], (*items.shape[:2], 1))], axis=-1)
    np.testing.assert_allclose(model(sequence)[:, ITEMS:], wanted, atol=1e-5)
    model.save(tmp_path / "rule.keras")
    back = keras.models.load_model(tmp_path / "rule.keras")
    np.testing.assert_allclose(back(sequence)[:, ITEMS:], wanted, atol=1e-5)
    for found in (learner.parameters(model), learner.parameters(tmp_path / "rule.keras")):
        for name, value in outer.items():
            np.testing.assert_array_equal(found[name], value)


def test_remember_shows_part_of_what_was_stored_and_asks_for_the_rest():
    of = tasks.remember(8, cue=0.25)
    for seed in range(20):
        drawn = arrays(of.episode(random.seed_of(seed), steps=3, batch=2, query=9))
        patterns = drawn["y"].reshape(6, 8)
        np.testing.assert_array_equal(drawn["x"].reshape(6, 16), np.concatenate([patterns, np.ones((6, 8))], 1))
        assert set(np.unique(patterns)) == {-1.0, 1.0}
        cue, shown = np.split(drawn["query_x"], 2, axis=1)
        np.testing.assert_array_equal(shown.sum(1), 2.0)
        asked = patterns[np.arange(9) % 6]
        np.testing.assert_array_equal(cue, asked * shown)
        np.testing.assert_array_equal(drawn["query_y"], asked * (1 - shown))
    again = arrays(of.episode(random.seed_of(3), steps=3, batch=2, query=9))
    other = arrays(of.episode(random.seed_of(4), steps=3, batch=2, query=9))
    assert (again["y"] != other["y"]).any()


def test_only_labelled_bits_are_scored():
    y = ops.array([[[1.0, -1.0, 0.0, 0.0]]])
    for unscored in (-5.0, 5.0):
        prediction = ops.array([[[2.0, 1.0, unscored, unscored]]])
        assert float(correct_bits(prediction, y)[0]) == 0.5
        loss = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(1.0))) / 2
        assert float(binary_cross_entropy(prediction, y)[0]) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.remember(1), "`units` must be an integer of at least 2"),
        (lambda: tasks.remember(4, cue=0.0), "`cue` must be a fraction"),
        (lambda: tasks.remember(4, cue=1.0), "`cue` must be a fraction"),
        (lambda: learners.OnlineRule(neuron=0), "`neuron` must be a positive integer"),
        (lambda: learners.OnlineRule(ticks=(0, 1)), "`ticks` must be a sequence of positive integers"),
        (lambda: learners.OnlineRule().check("classes", 2), "needs tasks of bits"),
        (lambda: learners.OnlineRule().parameters(keras.Sequential([keras.Input((2,))])), "must have an OnlineCell"),
        (lambda: keras.layers.RNN(learners.OnlineCell(4))(ops.zeros((1, 2, 4))), r"2 \* units \+ 1 = 9"),
        (lambda: meta.Unroll(2, kind="bit"), "`kind` must be one of"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def hopfield(units, items, episodes=500):
    """Accuracy of hidden bits after one step of the outer-product rule."""
    correct = []
    drawn = arrays(drawn_episodes(units, items, items, episodes, split="test"))
    patterns = drawn["y"][:, :, 0]
    weights = np.einsum("epi,epj->eij", patterns, patterns) * (1 - np.eye(units))
    field = np.einsum("eqi,eij->eqj", drawn["query_x"][..., :units], weights)
    scored = drawn["query_y"] != 0
    correct = (field > 0) == (drawn["query_y"] > 0)
    return correct[scored].mean()


@pytest.mark.slow
def test_a_rule_learns_to_remember():
    """Three starts side by side: recall, the control without plasticity, and another size without
    training."""
    learner = learners.OnlineRule()
    of, shape = tasks.remember(16), {"steps": 4, "batch_size": 1, "query_size": 4, "episodes": 500}
    made = meta.MetaTrainer(
        of, learner, meta.Unroll(4), members=3, meta_batch_size=32, batch_size=1, query_size=4, clipnorm=1.0, seed=0
    )
    made.compile(keras.optimizers.Adam(3e-3))
    made.fit(1, 900, verbose=0)
    models = [learner.learned(made.parameters(member)) for member in range(3)]
    recall = np.mean([score_episodes(learner, model, of, **shape)["mean_accuracy"] for model in models])
    assert recall >= 0.95
    assert recall > hopfield(16, 4)
    off = learners.OnlineRule(plastic=False)
    assert np.mean([score_episodes(off, model, of, **shape)["mean_accuracy"] for model in models]) <= 0.55
    larger = [score_episodes(learner, model, tasks.remember(24), **shape)["mean_accuracy"] for model in models]
    assert np.mean(larger) >= 0.95


def sequences(batch, time=3, seed=0):
    rng = np.random.default_rng(seed)
    bits = rng.choice([-1.0, 1.0], (batch, time, UNITS))
    recall = np.zeros((batch, time, 1))
    recall[:, -1] = 1.0
    x = np.concatenate([bits, np.ones((batch, time, UNITS)), recall], axis=-1)
    return x.astype("float32"), (0.5 * (bits + 1.0)).astype("float32")


def learned(**options):
    learner = rule(**options)
    return learner.learned({name: ops.convert_to_numpy(own)[0] for name, own in drawn(learner, 1, "float32").items()})


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "float64", "mixed_bfloat16", "mixed_float16"], indirect=True)
def test_a_learned_model_takes_batches_of_any_size(policy, tmp_path):
    model, (x, y) = learned(), sequences(5)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=False)
    whole = model.predict(x, batch_size=5, verbose=0)
    rough = {"float32": 1e-5, "float64": 1e-9}.get(policy, 0.1)
    assert np.ptp(whole) > 2.0 * rough
    for size in (1, 2, 7):
        np.testing.assert_allclose(model.predict(x, batch_size=size, verbose=0), whole, atol=rough)
    before = model.evaluate(x, y, batch_size=2, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(again.predict(x, batch_size=2, verbose=0), whole, atol=rough)
    model.export(str(tmp_path / "model"), verbose=False)
    for size in (2, 3):
        np.testing.assert_allclose(served(tmp_path / "model", x[:size]), whole[:size], atol=rough)
    model.fit(x, y, batch_size=2, epochs=20, verbose=0)
    assert model.evaluate(x, y, batch_size=2, verbose=0) < before


@pytest.mark.slow
def test_a_cell_has_no_size_of_its_own_compiled_and_in_a_functional_model():
    model, (x, _) = learned(types=1), sequences(5)
    given = keras.Input((3, 2 * UNITS + 1))
    around = keras.Model(given, model(given))
    whole = model.predict(x, verbose=0)
    np.testing.assert_allclose(around.predict(x, batch_size=2, verbose=0), whole, atol=1e-5)
    np.testing.assert_allclose(compiled(model)(ops.array(x[:2])), whole[:2], atol=1e-5)
    found = rule(types=1).parameters(around)
    assert found.keys() == rule(types=1).draw(0, 1, 2 * UNITS, UNITS).keys()


@pytest.mark.slow
def test_a_control_that_stores_nothing_stores_nothing_as_a_keras_model():
    x, _ = sequences(3)
    other = x.copy()
    other[:, 0, :UNITS] *= -1.0  # what was stored before
    plastic, control = learned(), learned(plastic=False)
    recalled = [model.predict(one, verbose=0)[:, -1] for model in (plastic, control) for one in (x, other)]
    assert np.abs(recalled[0] - recalled[1]).max() > 1e-6
    np.testing.assert_array_equal(recalled[2], recalled[3])
