"""Two classes told by one output: every learner, estimator and score takes the logistic loss, or
refuses by name."""

import keras
import numpy as np
import pytest
from keras import ops
from marks import slow_but
from on_backend import in_a_graph, slopes

from keras_blur import Genome, Rule, learners, meta, random, tasks
from keras_blur.learners import updates
from keras_blur.meta.estimator import classes_of, cross_entropy, over_tasks, start
from keras_blur.report.comparison import compare
from keras_blur.report.evaluation import evaluate

FEATURES = 2


class Sides(tasks.Tasks):
    """Sides of a line through 0, told by one output or by two."""

    name, shape, kind = "sides of a line", (FEATURES,), "classes"

    def __init__(self, outputs):
        self.outputs = outputs

    def available(self, split):
        return 1000

    def examples(self, seed, count, split):
        x = random.normal(seed + 1, (count, FEATURES))
        y = ops.where(ops.matmul(x, random.normal(seed, (FEATURES, 1))) > 0, 1.0, -1.0)
        return x, (y if self.outputs == 1 else ops.concatenate([y, -y], axis=1))


def warp(outputs):
    model, warps = learners.warped(FEATURES, (8,), outputs)
    return learners.Warp(model, warps, keras.optimizers.SGD(0.5))


ERRORS = Rule(feedback="error", last_activation="linear", batch_reduction="mean")
LEARNERS = {
    "maml": lambda outputs: learners.MAML(keras.optimizers.SGD(0.5), (8,), "tanh"),
    "warp": warp,
    "prototypes": lambda outputs: learners.Prototypes((8,), 4, "tanh"),
    "neural process": lambda outputs: learners.NeuralProcess((8,), 8, "tanh"),
}


def examples(outputs=1, count=12):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, FEATURES)).astype("float32")
    y = np.where(x[:, :1] + 0.5 * x[:, 1:] > 0, 1.0, -1.0).astype("float32")
    return ops.array(x), ops.array(y if outputs == 1 else np.concatenate([y, -y], axis=1))


def test_the_cross_entropy_of_one_logit_is_the_logistic_one():
    logits, y = ops.array([[0.3], [-2.0], [30.0]]), ops.array([[1.0], [-1.0], [-1.0]])
    wanted = keras.losses.BinaryCrossentropy(from_logits=True, reduction=None)(0.5 * (y + 1.0), logits)
    np.testing.assert_allclose(updates.losses("cross_entropy", logits, y), wanted, rtol=1e-5)
    (slope,) = slopes(lambda logits: updates.losses("cross_entropy", logits, y), [logits])
    np.testing.assert_allclose(slope, ops.sigmoid(logits) - 0.5 * (y + 1.0), rtol=1e-5)
    assert float(cross_entropy(logits, y)) == pytest.approx(float(np.mean(wanted)), rel=1e-5)


@pytest.mark.parametrize("name", slow_but(["maml", "prototypes"], LEARNERS))
@pytest.mark.parametrize("loss", slow_but(["auto"], ["auto", "cross_entropy"]))
def test_one_output_is_learned(name, loss):
    made = meta.MetaTrainer(
        Sides(1), LEARNERS[name](1), meta.Unroll(3, loss=loss), meta_batch_size=4, batch_size=12, query_size=32
    )
    made.compile(keras.optimizers.Adam(1e-2), jit_compile=False, run_eagerly=loss == "cross_entropy")
    history = made.fit(2, 5 if loss == "cross_entropy" else 80, verbose=0).history
    assert 0.05 < history["loss"][0] < 1.5
    if loss == "auto" and name != "neural process":  # whose two networks take longer
        assert history["accuracy"][-1] > 0.85


def test_maml_takes_the_steps_of_keras():
    learner, (x, y) = learners.MAML(keras.optimizers.SGD(0.1), (5,), "tanh"), examples()
    outer = {name: ops.array(own) for name, own in learner.draw(0, 1, FEATURES, 1).items()}
    model = learner.learned({name: ops.convert_to_numpy(own)[0] for name, own in outer.items()})
    model.compile(keras.optimizers.SGD(0.1), keras.losses.BinaryCrossentropy(from_logits=True))
    state = learner.init(over_tasks(outer), random.seed_of(0), FEATURES, 1, (1, 1))
    for _ in range(3):
        state, _ = learner.step(over_tasks(outer), state, x[None, None], y[None, None])
        model.train_on_batch(x, 0.5 * (y + 1.0))
    np.testing.assert_allclose(learner.predict(over_tasks(outer), state, x[None, None])[0, 0], model(x), atol=1e-5)


def test_a_warped_model_adapts_to_labels_of_zero_and_one():
    learner, (x, y) = warp(1), examples(count=40)
    model = learner.learned({name: own[0] for name, own in learner.draw(0, 1, FEATURES, 1).items()})
    x, y = np.asarray(x), np.asarray(y)
    told = (y[:, 0] > 0).astype("int32")
    adapted = learner.adapt(model, x, told, steps=60)
    assert np.mean((adapted.predict(x, verbose=0)[:, 0] > 0) == told) > 0.9


def test_prototypes_of_one_output_are_those_of_two():
    learner, results = learners.Prototypes((5,), 4, "tanh"), []
    outer = over_tasks({name: ops.array(own) for name, own in learner.draw(0, 1, FEATURES, 2).items()})
    for outputs in (1, 2):
        x, y = examples(outputs)
        state = learner.init(outer, random.seed_of(0), FEATURES, outputs, (1, 1))
        state, before = learner.step(outer, state, x[None, None], y[None, None])
        assert before.shape == (1, 1, 12, outputs)
        assert not np.asarray(before).any()
        results.append(np.asarray(learner.predict(outer, state, x[None, None])[0, 0]))
    np.testing.assert_allclose(results[0][:, 0], results[1][:, 0] - results[1][:, 1], rtol=1e-5)


def test_a_rule_that_learns_from_errors_descends_the_logistic_loss():
    learner, (x, y) = learners.Blur((), ERRORS), examples()
    outer = over_tasks({name: ops.array(own) for name, own in learner.draw(0, 1, FEATURES, 1).items()})
    found = learner._feedback(y, ops.full(y.shape, 0.7))
    np.testing.assert_allclose(found, (1.0 / (1.0 + np.exp(-0.7)) - 0.5 * (y + 1.0)) / 12.0, rtol=1e-5)
    state = learner.init(outer, random.seed_of(0), FEATURES, 1, (1, 1))
    new, _ = learner.step(outer, state, x[None, None], y[None, None])
    assert np.abs(new.synapses[0]["kernel"] - state.synapses[0]["kernel"]).max() > 0.0


@pytest.mark.parametrize("loss", ["CategoricalCrossentropy", "SparseCategoricalCrossentropy"])
def test_a_loss_of_several_outputs_is_refused(loss):
    rule = Rule(feedback="error", last_activation="linear", loss=getattr(keras.losses, loss)(from_logits=True))
    with pytest.raises(ValueError, match=r"`learner` must have a rule whose loss fits a single output.*Categorical"):
        meta.MetaTrainer(Sides(1), learners.Blur((4,), rule), meta.Unroll(1))
    genome = Genome.random(rule, 0)
    with pytest.raises(ValueError, match="`learner` must have a rule whose loss fits a single output"):
        evaluate(genome, Sides(1), (4,), steps=1, seeds=2, batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_comparison_scores_one_output_by_its_sign(outputs):
    genome = Genome.random(Rule(batch_reduction="mean", last_activation="linear"), 0)
    found = compare(genome, Sides(outputs), (8,), steps=50, seeds=2, batch_size=32, grids={"Adam": (0.03,)})
    assert 0.05 < np.mean([seed[0] for seed in found["curves"]["genome"]["accuracy"]]) < 0.95
    learned = found["curves"]["Adam 0.03"]
    assert np.mean([seed[-1] for seed in learned["accuracy"]]) > 0.9
    assert 0.3 < np.mean([seed[0] for seed in learned["loss"]]) < 1.3  # about ln 2 before learning
    assert 0.0 < np.mean([seed[-1] for seed in learned["loss"]]) < 0.4


def test_classes_of_one_output_are_told_by_its_sign():
    assert np.asarray(classes_of(ops.array([[2.0], [-1.0]]))).tolist() == [1, 0]
    assert np.asarray(classes_of(ops.array([[2.0, 3.0, 1.0], [-1.0, -2.0, -3.0]]))).tolist() == [1, 0]


@pytest.mark.parametrize("make", [lambda: learners.MAML(keras.optimizers.SGD(0.1), (4,)), lambda: warp(4)])
def test_bits_are_refused_in_one_sentence(make):
    with pytest.raises(ValueError, match=r"`tasks` of this learner must be of classes or values\. Received: tasks of bits"):
        make().check("bits", 4)


@pytest.mark.parametrize("loss", [None, keras.losses.BinaryCrossentropy(from_logits=True), "mse"])
def test_bits_are_learned_from_labels_alone(loss):
    learners.Blur((4,)).check("bits", 4)
    rule = Rule(feedback="error", last_activation="linear", loss=loss)
    with pytest.raises(
        ValueError, match=r"^`learner` must have a rule with feedback='labels' .*Received: feedback='error'$"
    ):
        learners.Blur((4,), rule).check("bits", 4)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_class_that_was_never_shown_is_never_predicted(outputs):
    learner, rng = learners.Prototypes((8,), 4), np.random.default_rng(0)
    outer = {name: ops.array(own) for name, own in learner.draw(0, 1, FEATURES, outputs).items()}
    data = {
        "x": 3.0 + rng.standard_normal((1, 2, 6, FEATURES)), "query_x": 0.1 * rng.standard_normal((1, 50, FEATURES)),
    }  # fmt: skip
    shown = rng.integers(0, 2, (1, 2, 6)) if outputs == 3 else np.zeros((1, 2, 6), int)
    told = np.eye(3)[shown] if outputs == 3 else shown[..., None]
    data["y"] = 2.0 * told - 1.0
    data["query_y"] = 2.0 * (np.eye(3)[np.full((1, 50), 2)] if outputs == 3 else np.ones((1, 50, 1))) - 1.0  # absent
    data = {name: ops.array(value, "float32") for name, value in data.items()}
    state = start(learner, outer, data, random.seed_of(0))
    for time in range(2):
        state, _ = learner.step(over_tasks(outer), state, data["x"][None, :, time], data["y"][None, :, time])
    logits = learner.predict(over_tasks(outer), state, data["query_x"][None])[0, 0]
    absent = 2 if outputs == 3 else 1
    assert not (np.asarray(classes_of(logits)) == absent).any()
    for jit in (False, True):
        found = in_a_graph(lambda outer, data: meta.Unroll(2)(learner, outer, data, random.seed_of(0))[0], jit)(outer, data)
        assert float(found.loss[0]) == pytest.approx(-np.log(np.finfo("float32").eps), rel=1e-3)
        for own in found.gradients.values():  # nothing can be learned of a class that was not there
            np.testing.assert_allclose(own, np.zeros(own.shape), atol=1e-5)


def test_a_class_that_was_never_shown_changes_nothing_for_the_others():
    learner, rng, losses = learners.Prototypes((8,), 4), np.random.default_rng(0), []
    outer = {name: ops.array(own) for name, own in learner.draw(0, 1, FEATURES, 3).items()}
    x, query_x = rng.standard_normal((1, 1, 6, FEATURES)), rng.standard_normal((1, 9, FEATURES))
    y, query_y = rng.integers(0, 2, (1, 1, 6)), rng.integers(0, 2, (1, 9))
    y[0, 0, :2] = 0, 1
    for classes in (2, 4):
        arrays = {"x": x, "y": 2 * np.eye(classes)[y] - 1, "query_x": query_x, "query_y": 2 * np.eye(classes)[query_y] - 1}
        data = {name: ops.array(value, "float32") for name, value in arrays.items()}
        losses.append(meta.Unroll(1)(learner, outer, data, random.seed_of(0))[0])
    assert float(losses[0].loss[0]) == pytest.approx(float(losses[1].loss[0]), rel=1e-5)
    for name, own in losses[0].gradients.items():
        np.testing.assert_allclose(own, losses[1].gradients[name], rtol=1e-3, atol=1e-5)


def test_a_neural_process_without_a_context_is_its_keras_model():
    learner = learners.NeuralProcess((5,), 3, "tanh")
    outer = {name: ops.array(own) for name, own in learner.draw(0, 1, FEATURES, 1).items()}
    model = learner.learned({name: ops.convert_to_numpy(own)[0] for name, own in outer.items()})
    query = random.normal(random.seed_of(1), (2, 4, FEATURES))
    state = learner.init(over_tasks(outer), random.seed_of(0), FEATURES, 1, (1, 2))
    wanted = learner.predict(over_tasks(outer), state, query[None])[0]
    found = model([ops.zeros((2, 0, FEATURES)), ops.zeros((2, 0, 1)), query])
    np.testing.assert_allclose(found, wanted, atol=1e-6)
