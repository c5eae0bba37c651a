"""Learners with outer parameters: a row of the table for each, and what all have to do; and each
against numpy or Keras."""

import shutil

import keras
import numpy as np
import pytest
from gradient_harness import assert_difference_quotient, draw_episodes
from keras import ops
from marks import slow_but
from on_backend import JAX, compiled

from keras_blur import Genome, Rule, backend, learners, meta, random, tasks
from keras_blur.distribution import Shard
from keras_blur.meta.estimator import over_tasks, start

FEATURES, CLASSES, TASKS, BATCH, QUERY = 4, 3, 2, 6, 5

# A learner, its unrolled steps, and the tasks that it is meta-trained on.
LEARNERS = {
    "maml": (lambda: learners.MAML(keras.optimizers.SGD(0.1), (5,), "tanh"), 3),
    "maml, momentum": (lambda: learners.MAML(keras.optimizers.SGD(0.1, momentum=0.5), (5,), "tanh"), 3),
    "maml of values": (lambda: learners.MAML(keras.optimizers.SGD(0.1), (5,), "tanh", loss="squared"), 3),
    "prototypes": (lambda: learners.Prototypes((5,), 4, "tanh"), 2),
    "neural process": (lambda: learners.NeuralProcess((5,), 4, "tanh"), 2),
}
OF_VALUES = ("maml of values", "neural process")


def drawn(learner, members=2, dtype="float64", seed=1):
    """Outer parameters away from zero, biases too."""
    rng = np.random.default_rng(seed)
    begin = learner.draw(seed, members, FEATURES, CLASSES)
    return {name: ops.array(own + 0.1 * rng.standard_normal(own.shape), dtype) for name, own in begin.items()}


def episodes(steps, dtype="float64"):
    return draw_episodes(TASKS, steps, BATCH, QUERY, FEATURES, CLASSES, dtype)


@pytest.mark.parametrize("name", LEARNERS)
def test_the_outer_gradient_is_the_difference_quotient(name):
    make, steps = LEARNERS[name]
    learner, estimator, data, seed = (
        make(),
        meta.Unroll(steps, trajectory_loss_weight=0.5),
        episodes(steps),
        random.seed_of(3),
    )
    outer = drawn(learner)
    found = estimator(learner, outer, data, seed)[0].gradients
    assert_difference_quotient(estimator, learner, outer, data, seed, found)


@pytest.mark.parametrize("name", LEARNERS)
def test_members_and_tasks_do_not_touch_each_other(name):
    make, steps = LEARNERS[name]
    learner, estimator, data, seed = make(), meta.Unroll(steps), episodes(steps), random.seed_of(3)
    outer = drawn(learner)
    found = estimator(learner, outer, data, seed)[0]
    for member in range(2):
        single = {key: value[member : member + 1] for key, value in outer.items()}
        parts = [
            estimator(learner, single, {n: v[task : task + 1] for n, v in data.items()}, seed)[0] for task in range(TASKS)
        ]
        np.testing.assert_allclose(found.loss[member], np.mean([part.loss[0] for part in parts]), rtol=1e-10)
        for key in outer:
            np.testing.assert_allclose(
                found.gradients[key][member], np.mean([part.gradients[key][0] for part in parts], axis=0), atol=1e-10
            )


@pytest.mark.parametrize("name", slow_but(["maml", "prototypes"], LEARNERS))
def test_compiled_equals_uncompiled(name):
    make, steps = LEARNERS[name]
    learner, estimator, data = make(), meta.Unroll(steps, trajectory_loss_weight=0.5), episodes(steps, "float32")
    outer, seed = drawn(learner, dtype="float32"), random.seed_of(3)

    def gradients(outer, data, seed):
        return estimator(learner, outer, data, seed)[0]

    plain = gradients(outer, data, seed)
    whole = compiled(gradients)(outer, data, seed)
    for one, other in zip(backend.leaves(plain), backend.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", LEARNERS)
def test_what_was_learned_is_a_keras_model_and_comes_back(name, tmp_path):
    learner = LEARNERS[name][0]()
    outer = {key: ops.convert_to_numpy(value)[0] for key, value in drawn(learner, dtype="float32").items()}
    model = learner.learned(outer)
    assert isinstance(model, keras.Model)
    model.save(tmp_path / "learned.keras")
    for back in (learner.parameters(model), learner.parameters(tmp_path / "learned.keras")):
        assert back.keys() == outer.keys()
        for key, value in outer.items():
            np.testing.assert_array_equal(back[key][0], value)


def trainer(name, **options):
    make, steps = LEARNERS[name]
    of = tasks.pose(objects=9) if name in OF_VALUES else tasks.functions("blobs3", relabel=True)
    made = meta.MetaTrainer(
        of,
        make(),
        **{"estimator": meta.Unroll(steps), "meta_batch_size": 4, "batch_size": BATCH, "query_size": 12, **options},
    )
    made.compile(None if isinstance(made.estimator, meta.Evolution) else keras.optimizers.Adam(3e-3), jit_compile=False)
    return made


@pytest.mark.parametrize("name", slow_but(["prototypes"], LEARNERS))
def test_meta_training_improves_and_resumes_bit_for_bit(name, tmp_path):
    path, half = tmp_path / "run.weights.h5", tmp_path / "half.weights.h5"

    class Keep(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                shutil.copy(path, half)

    whole, second = (trainer(name, members=2, seed=1) for _ in range(2))
    history = whole.fit(4, 30, checkpoint=path, callbacks=[Keep()], verbose=0).history["loss"]
    assert history[-1] < history[0] - 0.02
    assert second.fit(4, 30, checkpoint=half, verbose=0).epoch == [2, 3]
    for one, other in zip(whole.variables, second.variables, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "estimator", [meta.ES(2, antithetic_pairs=8, sigma=0.03), meta.Evolution(2, population=12, sigma=0.1)]
)
def test_a_population_works_as_for_a_genome(estimator):
    made = trainer("prototypes", estimator=estimator)
    history = made.fit(3, 20, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert made.parameters().keys() == made.learner.draw(0, 1, 2, 3).keys()


def test_meta_training_goes_on_from_a_model(tmp_path):
    first = trainer("neural process", seed=1)
    first.fit(1, 5, verbose=0)
    first.learned.save(tmp_path / "m.keras")
    second = trainer("neural process", seed=2, start=tmp_path / "m.keras", members=2)
    for key, value in first.parameters().items():
        for member in range(2):
            np.testing.assert_array_equal(second.parameters(member)[key], value)
    with pytest.raises(ValueError, match="has no genome"):
        _ = first.genome


def test_validation_and_files(tmp_path):
    made = trainer("maml", seed=1)
    validate = meta.MetaValidate(made.families[0][0], episodes=3, path=tmp_path / "best.keras")
    history = made.fit(2, 3, callbacks=[validate, meta.SaveLearned(tmp_path / "last.keras")], verbose=0).history
    assert len(history["val_accuracy"]) == 2
    back = made.learner.parameters(tmp_path / "last.keras")
    for key, value in made.parameters().items():
        np.testing.assert_array_equal(back[key][0], value)
    assert (tmp_path / "best.keras").exists()


def test_tasks_of_other_sizes_are_refused():
    learner = learners.Prototypes((5,), 4)
    with pytest.raises(ValueError, match="`tasks` must have one number of features and of outputs"):
        meta.MetaTrainer([tasks.functions("xor"), tasks.images("digits")], learner, meta.Unroll(1))
    meta.MetaTrainer(
        [tasks.functions("xor"), tasks.functions("blobs3")], learner, meta.Unroll(1)
    )  # an embedding has no classes
    with pytest.raises(ValueError, match="`learner` must be one or more learners that share"):
        meta.MetaTrainer(tasks.functions("xor"), [learner, learners.Prototypes((5,), 4)], meta.Unroll(1))
    with pytest.raises(ValueError, match="`learner` must be one or more learners that share"):
        meta.MetaTrainer(tasks.functions("xor"), [learners.BaselineLearner(keras.optimizers.SGD(0.1))], meta.Unroll(1))
    small = trainer("prototypes").learned
    with pytest.raises(ValueError, match="`start` must fit the learner and the tasks"):
        meta.MetaTrainer(tasks.images("digits"), learner, meta.Unroll(1), start=small)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learners.Prototypes((0,)), "`network` must be a sequence of positive integers"),
        (lambda: learners.Prototypes((4,), 0), "`dimensions` must be a positive integer"),
        (lambda: learners.NeuralProcess((4,), representation=0), "`representation` must be a positive integer"),
        (lambda: learners.NeuralProcess(activation="swish"), "`activation` must be one of"),
        (lambda: learners.MAML(keras.optimizers.SGD(0.1), loss="hinge"), "`loss` must be one of"),
        (lambda: learners.MAML(keras.optimizers.SGD(0.1), activation="relu_tanh"), "`activation` must be one of"),
        (lambda: learners.MAML(keras.optimizers.Adagrad()), "`optimizer` must be a Keras SGD, Adam or RMSprop"),
        (lambda: learners.Prototypes().check("values", 2), "needs tasks of two classes or more"),
        (lambda: learners.MAML(keras.optimizers.SGD(0.1)).check("values", 1), "must be 'squared' for tasks of values"),
        (lambda: learners.Prototypes().parameters("/no/such.keras"), "is not a Keras model"),
        (lambda: learners.Prototypes().parameters(3), "A Keras model or a path to one is needed"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_maml_takes_the_steps_of_keras_from_the_learned_start():
    learner, data = learners.MAML(keras.optimizers.SGD(0.1), (5,), "relu"), episodes(3, "float32")
    outer = drawn(learner, members=1, dtype="float32")
    model = learner.learned({key: ops.convert_to_numpy(value)[0] for key, value in outer.items()})
    model.compile(keras.optimizers.SGD(0.1), keras.losses.CategoricalCrossentropy(from_logits=True))
    state = start(learner, outer, {n: v[:1] for n, v in data.items()}, random.seed_of(0))
    for x, y in zip(data["x"][0], data["y"][0], strict=True):
        state, prediction = learner.step(over_tasks(outer), state, x[None, None], y[None, None])
        np.testing.assert_allclose(prediction[0, 0], model(x), atol=1e-5)
        model.train_on_batch(x, (y + 1) / 2)
    np.testing.assert_allclose(
        learner.predict(over_tasks(outer), state, data["query_x"][:1][None])[0, 0], model(data["query_x"][0]), atol=1e-5
    )


def test_first_order_is_the_gradient_at_the_adapted_weights():
    exact, first = (learners.MAML(keras.optimizers.SGD(0.1), (5,), "tanh", first_order=flag) for flag in (False, True))
    data, seed, estimator = episodes(3), random.seed_of(0), meta.Unroll(3)
    outer = drawn(exact)
    found = estimator(first, outer, data, seed)[0].gradients
    state = start(exact, outer, data, seed)
    for time in range(3):
        state, _ = exact.step(over_tasks(outer), state, data["x"][None, :, time], data["y"][None, :, time])

    def loss(weights):
        prediction = exact.predict({}, state._replace(weights=weights), data["query_x"][None])
        labels = ops.broadcast_to(0.5 * (data["query_y"] + 1.0), prediction.shape)
        return ops.sum(ops.categorical_crossentropy(labels, prediction, from_logits=True)) / QUERY, ()

    wanted = [np.mean(own, axis=1) for own in backend.gradient(loss, state.weights)[1]]
    names = [f"start_{kind}_{index}" for index in range(2) for kind in ("kernel", "bias")]
    for name, value in zip(names, wanted, strict=True):
        np.testing.assert_allclose(found[name], value, atol=1e-12)
    other = estimator(exact, outer, data, seed)[0].gradients
    assert np.abs(np.asarray(other[names[0]]) - np.asarray(found[names[0]])).max() > 1e-3


def mlp(outer, name, x, member=0):
    """A dense network of tanh in numpy."""
    for index in (0, 1):
        x = x @ np.asarray(outer[f"{name}_kernel_{index}"])[member] + np.asarray(outer[f"{name}_bias_{index}"])[member]
        x = np.tanh(x) if index == 0 else x
    return x


def test_prototypes_by_hand():
    learner, data = LEARNERS["prototypes"][0](), episodes(2)
    outer = drawn(learner)
    state = start(learner, outer, data, random.seed_of(0))
    for time in range(2):
        state, _ = learner.step(over_tasks(outer), state, data["x"][None, :, time], data["y"][None, :, time])
    logits = learner.predict(over_tasks(outer), state, data["query_x"][None])
    for member in range(2):
        for task in range(TASKS):
            x, y = (np.asarray(data[part][task]).reshape(2 * BATCH, -1) for part in ("x", "y"))
            embedded, query = (mlp(outer, "embedding", one, member) for one in (x, np.asarray(data["query_x"][task])))
            means = np.stack([embedded[y.argmax(-1) == c].mean(0) for c in range(CLASSES)])
            distance = np.square(query[:, None] - means).sum(-1)
            softmax = np.exp(-distance) / np.exp(-distance).sum(-1, keepdims=True)
            np.testing.assert_allclose(ops.softmax(logits[member, task]), softmax, atol=1e-12)


def test_neural_process_by_hand_and_as_its_keras_model():
    learner, data = LEARNERS["neural process"][0](), episodes(2, "float32")
    outer = drawn(learner, dtype="float32")
    state = start(learner, outer, data, random.seed_of(0))
    for time in range(2):
        state, _ = learner.step(over_tasks(outer), state, data["x"][None, :, time], data["y"][None, :, time])
    found = learner.predict(over_tasks(outer), state, data["query_x"][None])
    model = learner.learned({key: ops.convert_to_numpy(value)[1] for key, value in outer.items()})
    x, y = (ops.reshape(data[part], (TASKS, 2 * BATCH, -1)) for part in ("x", "y"))
    np.testing.assert_allclose(found[1], model([x, y, data["query_x"]]), atol=1e-5)
    told = mlp(outer, "encoder", np.concatenate([x[0], y[0]], -1)).mean(0, keepdims=True)
    query = np.asarray(data["query_x"][0])
    wanted = mlp(outer, "decoder", np.concatenate([query, np.repeat(told, len(query), 0)], -1))
    np.testing.assert_allclose(found[0, 0], wanted, atol=1e-5)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_share_of_the_tasks_starts_as_among_all(name):
    learner = LEARNERS[name][0]()
    outer = over_tasks(drawn(learner))
    whole = learner.init(outer, random.seed_of(0), FEATURES, CLASSES, (2, 4))
    part = learner.init(outer, random.seed_of(0), FEATURES, CLASSES, (2, 2), Shard(1, 2))
    for one, other in zip(backend.leaves(part), backend.leaves(Shard(1, 2).part(whole, axis=1)), strict=True):
        np.testing.assert_array_equal(one, other)


def keras_inputs(learner, count):
    """Inputs and targets of what a learner learned, as a Keras model takes them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, FEATURES)).astype("float32")
    if isinstance(learner, learners.NeuralProcess):
        support, y = rng.standard_normal((count, 6, FEATURES)), rng.standard_normal((count, 6, CLASSES))
        return [support.astype("float32"), y.astype("float32"), x[:, None]], np.ones((count, 1, CLASSES), "float32")
    return x, np.ones((count, 4 if isinstance(learner, learners.Prototypes) else CLASSES), "float32")


def warp_learner_of(features, classes):
    model, names = learners.warped(features, (5,), classes)
    return learners.Warp(model, names, keras.optimizers.SGD(0.1))


@pytest.mark.parametrize("policy", slow_but(["float32"], ["float32", "float64", "mixed_bfloat16"]))
@pytest.mark.parametrize("name", ["maml", "prototypes", "neural process", "warp"])
def test_a_learned_model_is_any_keras_model(name, policy, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        learner = warp_learner_of(FEATURES, CLASSES) if name == "warp" else LEARNERS[name][0]()
        outer = {key: own[0] for key, own in learner.draw(0, 1, FEATURES, CLASSES).items()}
        model, (x, y) = learner.learned(outer), keras_inputs(learner, 5)
        model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=True)
        whole, rough = model.predict(x, verbose=0), 0.1 if policy.startswith("mixed") else 1e-5
        np.testing.assert_allclose(model.predict(x, batch_size=2, verbose=0), whole, atol=rough)
        assert np.isfinite(model.evaluate(x, y, batch_size=2, verbose=0))
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(again.predict(x, batch_size=2, verbose=0), whole, atol=rough)
        if not (JAX and name == "neural process"):  # which does not know that support x and y have one length
            model.export(str(tmp_path / "model"), verbose=False)
        loss = model.evaluate(x, y, batch_size=2, verbose=0)
        model.fit(x, y, batch_size=2, epochs=3, verbose=0)
        assert model.evaluate(x, y, batch_size=2, verbose=0) < loss
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("policy", slow_but(["mixed_bfloat16"], ["float64", "mixed_bfloat16", "mixed_float16"]))
def test_a_warped_model_of_another_precision_is_meta_trained(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        learner = warp_learner_of(2, 3)
    finally:
        keras.config.set_dtype_policy(before)
    made = meta.MetaTrainer(
        tasks.functions("blobs3"), learner, meta.Unroll(2), meta_batch_size=2, batch_size=6, query_size=6
    )
    made.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
    history = made.fit(1, 3, verbose=0).history
    assert history["skipped"] == [0.0]
    assert 0.0 < history["loss"][0] < 2.0


def test_meta_learning_goes_through_the_signs():
    """The step of a rule with signs has a derivative by the genome, and holds backward synapses in
    a learner, too."""
    rule = Rule(directions="signs")
    learner = learners.Blur((6,), rule)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)).astype("float32"), 2.0 * np.eye(3, dtype="float32")[rng.integers(3, size=8)] - 1.0
    outer = {name: ops.array(value) for name, value in Genome.random(rule, 0, synapse_update=-0.1).arrays.items()}

    def loss(outer):
        state = learner.init(outer, random.seed_of(0), 4, 3)
        begin = state.synapses[1]["backward_kernel"]
        for _ in range(3):
            state, output = learner.step(outer, state, x, y)
        return ops.sum(ops.square(output - y)) / y.size, (begin, state.synapses[1]["backward_kernel"])

    (begin, end), slopes = backend.gradient(loss, outer)
    assert np.abs(slopes["mu"]).max() > 1e-4
    assert all(np.isfinite(value).all() for value in slopes.values())
    np.testing.assert_array_equal(end, begin)
