"""The gradient through the unroll: finite differences for every rule option, members apart, one
loop of any length."""

import keras
import numpy as np
import pytest
from keras import ops
from marks import slow_but
from on_backend import bytes_of_loops, compiled, in_a_graph, operations
from rule_table import COVER, SINGLE

from keras_blur import Genome, Rule, backend, random
from keras_blur.learners import Blur
from keras_blur.meta import Unroll
from keras_blur.meta.estimator import NOTHING, accuracy, cross_entropy

TASKS, STEPS, BATCH, FEATURES, CLASSES = 2, 3, 6, 5, 3


def as_double(leaf):
    return ops.cast(leaf, "float64") if keras.backend.is_float_dtype(leaf.dtype) else leaf


class Double(Blur):
    """The learner in float64, for finite differences."""

    def init(self, *arguments, **options):
        state = super().init(*arguments, **options)
        return backend.tree_map(as_double, state)


def episodes(dtype="float64", steps=STEPS, seed=0):
    rng = np.random.default_rng(seed)

    def labels(*shape):
        return 2 * np.eye(CLASSES)[rng.integers(0, CLASSES, shape)] - 1

    made = {
        "x": rng.standard_normal((TASKS, steps, BATCH, FEATURES)),
        "y": labels(TASKS, steps, BATCH),
        "query_x": rng.standard_normal((TASKS, BATCH, FEATURES)),
        "query_y": labels(TASKS, BATCH),
    }
    return {name: ops.convert_to_tensor(value, dtype) for name, value in made.items()}


def outer_of(rule, members=1, dtype="float64", seed=0):
    """Random outer parameters `[members, ...]`, every number away from its neutral value."""
    genome = Genome.random(rule, seed, std=0.6, synapse_update=-0.05, population=(members,))
    rng = np.random.default_rng(seed + 1)
    axis = 0 if rule.layers is None else 1
    arrays = {name: np.moveaxis(ops.convert_to_numpy(array), axis, 0) for name, array in genome.arrays.items()}
    return {
        name: ops.convert_to_tensor(array + 0.1 * rng.standard_normal(array.shape), dtype) for name, array in arrays.items()
    }


def estimated(estimator, learner, outer, data, seed, carried=NOTHING, first=True):
    """The estimate and what it carries on, computed by a program."""

    def run(outer, data, seed, carried):
        return estimator(learner, outer, data, seed, carried, first)

    return backend.compiled(run, jit_compile=False)(outer, data, seed, carried)


RULES = {name: options for name, options in {**COVER, **SINGLE}.items() if not Rule(**options).keep_neurons}
# Each option, beside others.
COVERING = [name for name in RULES if name in {*COVER, "normalize_both_batch", "whitening_orthogonal_tied"}]
RECOMPUTED = [(1, 0.3, None), (4, 0.0, False), (7, 0.3, None), (7, 0.0, True)]  # steps, loss on the way, compiled
QUICK = {"plain", "pair"}


@pytest.mark.parametrize("name", slow_but(QUICK, COVERING))
def test_gradient_is_the_difference_quotient(name):
    check_gradient(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RULES if name not in COVERING])
def test_gradient_under_an_option_alone(name):
    check_gradient(name)


def check_gradient(name):
    rule = Rule(**RULES[name])
    learner = Double((7, 6), rule)
    estimator = Unroll(STEPS, trajectory_loss_weight=0.5)
    outer, rng = outer_of(rule), np.random.default_rng(2)
    direction = {key: rng.standard_normal(value.shape) for key, value in outer.items()}
    width = 1e-6
    # The ends of the quotient are two more members.
    members = {key: ops.concatenate([outer[key] + sign * width * direction[key] for sign in (0, 1, -1)], 0) for key in outer}
    found = estimated(estimator, learner, members, episodes(), random.seed_of(3))[0]
    quotient = float(found.loss[1] - found.loss[2]) / (2 * width)
    slope = sum(float(np.sum(np.asarray(found.gradients[key])[:1] * direction[key])) for key in outer)
    assert slope == pytest.approx(quotient, rel=2e-5, abs=1e-8)
    assert abs(quotient) > 1e-7


@pytest.mark.slow
def test_members_do_not_touch_each_other():
    rule = Rule(states=3, normalize_activations="both", batch_reduction="mean")
    learner, estimator, data, seed = Blur((7,), rule), Unroll(STEPS), episodes("float32"), random.seed_of(1)
    outer = outer_of(rule, members=3, dtype="float32")
    together, _ = estimated(estimator, learner, outer, data, seed)
    for member in range(3):
        own = {key: value[member : member + 1] for key, value in outer.items()}
        alone = estimated(estimator, learner, own, data, seed)[0]
        assert float(alone.loss[0]) == pytest.approx(float(together.loss[member]), rel=1e-5)
        for key in outer:
            np.testing.assert_allclose(alone.gradients[key][0], together.gradients[key][member], rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_a_diverged_member_does_not_spread():
    rule = Rule(last_activation="linear", forward_activation="linear", batch_reduction="mean")
    learner, estimator, data, seed = Blur((7,), rule), Unroll(STEPS), episodes("float32"), random.seed_of(1)
    outer = outer_of(rule, members=2, dtype="float32")
    broken = {key: ops.concatenate([value[:1], value[1:] * np.float32(1e30)], 0) for key, value in outer.items()}
    whole, torn = (estimated(estimator, learner, one, data, seed)[0] for one in (outer, broken))
    assert not np.isfinite(float(torn.loss[1]))
    for key in outer:
        np.testing.assert_allclose(torn.gradients[key][0], whole.gradients[key][0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", slow_but([(1, 0.3, None), (7, 0.3, None)], RECOMPUTED))
def test_recomputation_changes_nothing(options):
    steps, trajectory_loss_weight, jit = options
    rule = Rule(normalize_activations="both", batch_reduction="mean")
    data, outer = episodes(steps=steps), outer_of(rule)
    learner, seed = Double((7,), rule), random.seed_of(1)

    def gradient(recompute):
        estimator = Unroll(steps, trajectory_loss_weight=trajectory_loss_weight, recompute=recompute)
        run = lambda outer, data: estimator(learner, outer, data, seed)[0]  # noqa: E731
        return (run if jit is None else in_a_graph(run, jit))(outer, data)

    plain, again = gradient(False), gradient(True)
    np.testing.assert_allclose(again.loss, plain.loss, rtol=1e-12)
    for key in outer:
        np.testing.assert_allclose(again.gradients[key], plain.gradients[key], rtol=1e-9, atol=1e-12)


def gradient_of(steps, **options):
    """The gradient through an unroll, and its arguments."""
    rule = Rule()
    estimator, learner = Unroll(steps, **options), Blur((7,), rule)
    arguments = outer_of(rule, dtype="float32"), episodes("float32", steps)
    return lambda outer, data: estimator(learner, outer, data, random.seed_of(0))[0], *arguments


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_the_program_does_not_grow_with_the_unroll(recompute):
    few, many = (operations(*gradient_of(steps, recompute=recompute)) for steps in (9, 64))
    assert many == pytest.approx(few, rel=0.01)


@pytest.mark.slow
def test_recomputation_stores_a_state_a_segment_instead_of_a_step():
    plain, again = (bytes_of_loops(*gradient_of(64, recompute=recompute)) for recompute in (False, True))
    assert again < 0.5 * plain


@pytest.mark.slow
def test_compiled_equals_uncompiled():
    rule = Rule(states=3, normalize_activations="both", normalize_synapses="stored", batch_reduction="mean")
    outer, data = outer_of(rule, members=2, dtype="float32"), episodes("float32")

    def gradients(outer, data):
        return Unroll(STEPS)(Blur((7,), rule), outer, data, random.seed_of(0))[0]

    results = [run(outer, data) for run in (gradients, compiled(gradients))]
    np.testing.assert_allclose(results[0].loss, results[1].loss, rtol=1e-5)
    for key in outer:
        np.testing.assert_allclose(results[0].gradients[key], results[1].gradients[key], rtol=1e-3, atol=1e-5)


def test_losses_by_hand():
    prediction = np.array([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]], "float32")
    y = ops.array([[-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]], "float32")
    logs = prediction - np.log(np.exp(prediction).sum(-1, keepdims=True))
    prediction = ops.array(prediction)
    assert float(cross_entropy(prediction, y)) == pytest.approx(-(logs[0, 2] + logs[1, 1]) / 2)
    assert float(accuracy(prediction, y)) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps`.*steps=0"),
        ({"steps": 2.0}, "`steps`"),
        ({"trajectory_loss_weight": -1.0}, "`trajectory_loss_weight`.*trajectory_loss_weight=-1.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Unroll(**options)


def test_blur_learner_errors():
    with pytest.raises(ValueError, match="keep_neurons=False"):
        Blur((3,), Rule(keep_neurons=True))
    with pytest.raises(ValueError, match="`network` must be a sequence of positive integers"):
        Blur((0,))


def test_initial_networks_are_equal_for_members_and_differ_for_tasks():
    learner = Blur((4,), Rule(states=3))
    state = learner.init({}, random.seed_of(5), 6, 2, (3, 2))
    kernel = np.asarray(state.synapses[0]["kernel"])
    assert kernel.shape == (3, 2, 3, 6, 4)
    np.testing.assert_array_equal(kernel[0], kernel[2])
    assert np.abs(kernel[:, 0] - kernel[:, 1]).max() > 0.1
    assert np.abs(kernel[0, 0, 0] - kernel[0, 0, 1]).max() > 0.1
    assert "backward_kernel" not in state.synapses[0]
    assert kernel.std() == pytest.approx(1 / 6**0.5, rel=0.15)
