"""Any Keras network in learners that descend a gradient or embed examples."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from on_backend import compiled

from keras_blur import backend, learners, meta, random, tasks
from keras_blur.core.rule import Rule
from keras_blur.meta.estimator import over_tasks

kl = keras.layers
SHAPE, OUTPUTS = (8, 8, 1), 10


def residual(shape, outputs):
    """Convolution, batch normalisation, a sum around both and pooling."""
    x = keras.Input(shape)
    r = kl.BatchNormalization()(kl.Conv2D(3, 3, padding="same", use_bias=False)(x))
    h = kl.MaxPooling2D(2)(kl.Activation("tanh")(kl.Add()([x, r])))
    return keras.Model(x, kl.Dense(outputs)(kl.Flatten()(h)))


def smooth(shape, outputs):
    x = keras.Input(shape)
    h = kl.AveragePooling2D(2)(kl.Conv2D(2, 3, padding="same", activation="tanh")(x))
    h = kl.Add()([h, kl.Conv2D(2, 3, padding="same")(h)])
    return keras.Model(x, kl.Dense(outputs)(kl.Flatten()(h)))


def limited(shape, outputs, frozen=True):
    """Regularizers and constraints, which have no effect in a frozen layer."""
    l2, norm = keras.regularizers.L2(0.3), keras.constraints.UnitNorm(axis=[0, 1, 2])
    return [
        kl.Conv2D(3, 3, kernel_constraint=norm, bias_regularizer=keras.regularizers.L1(0.2), activation="tanh"),
        kl.Conv2D(2, 3, kernel_regularizer=l2, bias_constraint="non_neg", activation="tanh"),
        kl.Conv2D(2, 1, kernel_regularizer=l2, kernel_constraint=norm, trainable=not frozen),
        kl.Flatten(),
        kl.Dense(outputs, kernel_regularizer="orthogonal_regularizer", kernel_constraint="max_norm"),
    ]


def sgd(rate=0.1):
    return keras.optimizers.SGD(rate)


def batch(count=12, seed=0):
    x, y = tasks.images("digits").examples(random.seed_of(seed), count, "train")
    return ops.reshape(x, (count, -1)), y


def images(x):
    return np.asarray(ops.convert_to_numpy(x)).reshape(-1, *SHAPE)


def as_keras(learner, arrays):
    """The network of a learner as a Keras model with these weights."""
    return learner._net.model(learner._net.named(arrays))


learned_limited = functools.partial(limited, frozen=False)


@pytest.mark.parametrize(
    ("kind", "network"),
    [("baseline", residual), ("baseline", limited), ("maml", residual), ("maml", learned_limited)],
)
def test_steps_are_those_of_keras(kind, network):
    learner = (learners.BaselineLearner if kind == "baseline" else learners.MAML)(sgd(), network).on(SHAPE, OUTPUTS)
    outer = {} if kind == "baseline" else learner.draw(0, 1, 64, OUTPUTS)
    outer = over_tasks({name: ops.array(own) for name, own in outer.items()})
    state = learner.init(outer, random.seed_of(3), 64, OUTPUTS, (1, 2))
    for task in range(2):
        model = as_keras(learner, [ops.convert_to_numpy(one)[0, task] for one in state.weights])
        model.compile(sgd(), keras.losses.CategoricalCrossentropy(from_logits=True))
        x, y = batch(seed=task)
        both = ops.stack([x, x])[None], ops.stack([y, y])[None]
        np.testing.assert_allclose(
            learner.predict(outer, state, both[0])[0, task], model(images(x), training=True), rtol=1e-5, atol=1e-5
        )
        after, _ = learner.step(outer, state, *both)
        model.train_on_batch(images(x), 0.5 * (ops.convert_to_numpy(y) + 1.0))
        arrays = learner._net.read(model)
        for name, found in learner._net.named(after.weights).items():
            np.testing.assert_allclose(found[0, task], arrays[name][0], rtol=1e-5, atol=1e-5)


def test_the_start_is_that_of_blur():
    seed, rule = random.seed_of(4), Rule(states=3)
    ours = learners.Blur(residual, rule).on(SHAPE, OUTPUTS).init({}, seed, 64, OUTPUTS, (2, 2))
    learner = learners.BaselineLearner(sgd(), residual).on(SHAPE, OUTPUTS)
    theirs = learner._net.named(learner.init({}, seed, 64, OUTPUTS, (2, 2)).weights)
    for index, layer in enumerate(ours.synapses):
        for kind in {"kernel", "bias"} & layer.keys():
            np.testing.assert_array_equal(layer[kind][:, :, 0], theirs[f"start_{kind}_{index}"])


MAKERS = {
    "maml": lambda network: learners.MAML(sgd(), network),
    "prototypes": lambda network: learners.Prototypes(network, 8),
    "neural process": lambda network: learners.NeuralProcess(network, 8),
}


def episodes(steps=2, count=2):
    of = tasks.images("digits")
    drawn = [of.episode(random.seed_of(seed), steps=steps, batch=8, query=10) for seed in range(count)]
    return {name: ops.stack([one[name] for one in drawn]) for name in drawn[0]}


@pytest.mark.parametrize("name", MAKERS)
def test_the_outer_gradient_is_that_of_difference_quotients(name):
    learner = MAKERS[name](smooth).on(SHAPE, OUTPUTS)
    estimator, data, seed = meta.Unroll(2, trajectory_loss_weight=0.5), episodes(), random.seed_of(1)
    outer = {key: ops.array(own) for key, own in learner.draw(1, 2, 64, OUTPUTS).items()}
    loss = compiled(lambda outer: estimator(learner, outer, data, seed)[0])
    found, rng = loss(outer), np.random.default_rng(0)
    direction = {key: rng.standard_normal(own.shape).astype("float32") for key, own in outer.items()}
    slope = sum(float(np.sum(np.asarray(found.gradients[key]) * one)) for key, one in direction.items())
    ahead, behind = (
        float(np.sum(loss({key: own + sign * 1e-2 * direction[key] for key, own in outer.items()}).loss)) for sign in (1, -1)
    )
    assert abs(slope) > 0.05
    assert (ahead - behind) / 2e-2 == pytest.approx(slope, rel=0.02, abs=0.01)


@pytest.mark.parametrize("name", MAKERS)
def test_meta_training_lowers_the_loss_and_gives_a_keras_model(name, tmp_path):
    trainer = meta.MetaTrainer(
        tasks.images("digits"), MAKERS[name](residual), meta.Unroll(2), members=2, batch_size=10, query_size=20, seed=1
    )
    trainer.compile(keras.optimizers.Adam(1e-2), jit_compile=False)
    history = trainer.fit(2, 15, verbose=0).history["loss"]
    assert history[-1] < history[0] - 0.05
    trainer.learned.save(tmp_path / "learned.keras")
    back = trainer.families[0][1].parameters(tmp_path / "learned.keras")
    assert back.keys() == trainer.parameters().keys()
    for key, own in trainer.parameters().items():
        np.testing.assert_array_equal(back[key][0], own)
    again = meta.MetaTrainer(
        tasks.images("digits"), MAKERS[name](residual), meta.Unroll(2), batch_size=20, query_size=20, start=trainer.learned
    )
    for key, own in trainer.parameters().items():
        np.testing.assert_array_equal(again.parameters()[key], own)


@pytest.mark.parametrize("name", MAKERS)
def test_frozen_layers_are_no_outer_parameters(name):
    """Else ES, PES, CMA-ES and weight decay would move them."""

    def frozen(shape, outputs):
        return [kl.Flatten(), kl.Dense(4, trainable=False, name="held"), kl.Dense(outputs)]

    with pytest.raises(ValueError, match=r"`network` must have no frozen layers .* Received: trainable=False in held"):
        meta.MetaTrainer(tasks.images("digits"), MAKERS[name](frozen), meta.ES(2), batch_size=4, query_size=4)


def test_embeddings_have_no_regularizers():
    for name in ("prototypes", "neural process"):
        with pytest.raises(ValueError, match="`network` must have no regularizers and no constraints"):
            MAKERS[name](limited).on(SHAPE, OUTPUTS)


def test_warps_descend_the_loss_of_keras_under_the_constraints():
    model = keras.Sequential([keras.Input(SHAPE), *limited(SHAPE, OUTPUTS)])
    warp = [model.layers[1].name]
    learner = learners.Warp(model, warp, sgd())
    drawn = {name: own[0] for name, own in learner.draw(0, 1, 64, OUTPUTS).items()}
    theirs, outer = learner.learned(drawn), {name: ops.array(own[None, None]) for name, own in drawn.items()}
    theirs.compile(sgd(), keras.losses.CategoricalCrossentropy(from_logits=True))
    state = learner.init(outer, random.seed_of(0), 64, OUTPUTS, (1, 2))
    for step in range(2):
        x, y = batch(seed=step)
        state, _ = learner.step(outer, state, ops.stack([x, x])[None], ops.stack([y, y])[None])
        theirs.train_on_batch(images(x), 0.5 * (ops.convert_to_numpy(y) + 1.0))
    for found, variable in zip(state.weights, theirs.trainable_variables, strict=True):
        np.testing.assert_allclose(found[0, 1], variable, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_refuses_by_name_what_a_learner_cannot_use(name):
    with pytest.raises(ValueError, match="`network` must be a sequence of positive integers"):
        MAKERS[name]((0,))
    with pytest.raises(ValueError, match="`network` must return a list of Keras layers or a built Keras model"):
        meta.MetaTrainer(tasks.images("digits"), MAKERS[name](lambda shape, outputs: 3))
    with pytest.raises(ValueError, match=r"must know the shape of an example: use learner.on\(shape, outputs\)"):
        MAKERS[name](residual).draw(0, 1, 64, OUTPUTS)


def test_a_sum_around_a_layer_from_the_input_has_members_in_blur():
    learner = learners.Blur(residual, Rule(batch_reduction="mean", last_activation="linear")).on(SHAPE, OUTPUTS)
    outer = {key: ops.array(own[:, None]) for key, own in learner.draw(0, 2, 64, OUTPUTS).items()}
    state = learner.init(outer, random.seed_of(0), 64, OUTPUTS, (2, 2))
    x, y = (ops.stack(one)[None] for one in zip(batch(), batch(seed=1), strict=True))
    after, whole = learner.step(outer, state, x, y)
    alone = backend.tree_map(lambda leaf: leaf[1, 1] if len(leaf.shape) else leaf, state)
    own, single = learner.step({key: one[1, 0] for key, one in outer.items()}, alone, x[0, 1], y[0, 1])
    np.testing.assert_allclose(whole[1, 1], single, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.synapses[0]["kernel"][1, 1], own.synapses[0]["kernel"], rtol=1e-4, atol=1e-5)
