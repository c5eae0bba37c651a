"""Any Keras network inside a learner: as it learns under `fit`, and as dense networks learn."""

import keras
import numpy as np
import pytest
from keras import ops
from on_backend import JAX, in_a_graph

import keras_blur as kb
from keras_blur import backend, learners, meta, random, tasks
from keras_blur.core.rule import Rule
from keras_blur.distribution import Shard
from keras_blur.report.episodes import score_episodes

kl = keras.layers
RULE = Rule(batch_reduction="mean", last_activation="linear")
SHAPE, OUTPUTS = (8, 8, 1), 10


def residual(shape, outputs):
    x = keras.Input(shape)
    h = kl.Conv2D(4, 3, padding="same", activation="relu")(x)
    r = kl.BatchNormalization()(kl.Conv2D(4, 3, padding="same", use_bias=False)(h))
    h = kl.Activation("relu")(kl.Add()([h, r]))
    return keras.Model(x, kl.Dense(outputs)(kl.GlobalAveragePooling2D()(h)))


def attending(shape, outputs):
    x = keras.Input(shape)
    h = kl.Dense(8)(kl.Reshape((8, 8))(x))
    h = kl.LayerNormalization()(kl.Add()([h, kl.MultiHeadAttention(2, 4)(h, h)]))
    return keras.Model(x, kl.Dense(outputs)(kl.Flatten()(h)))


NETWORKS = {
    "convolutions": lambda shape, outputs: [
        kl.Conv2D(4, 3, activation="relu"), kl.MaxPooling2D(2), kl.Flatten(), kl.Dense(outputs),
    ],
    "channels by groups": lambda shape, outputs: [
        kl.DepthwiseConv2D(3, depth_multiplier=2, activation="relu"), kl.Conv2D(6, 3, groups=2), kl.Flatten(),
        kl.Dense(outputs),
    ],
    "transposed": lambda shape, outputs: [
        kl.Conv2D(2, 3, strides=2), kl.Conv2DTranspose(2, 3, strides=2, activation="relu"), kl.Flatten(), kl.Dense(outputs),
    ],
    "einsum": lambda shape, outputs: [
        kl.Reshape((8, 8)), kl.EinsumDense("abc,cd->abd", (8, 4), bias_axes="d", activation="gelu"),
        kl.EinsumDense("abc,bcd->ad", outputs, bias_axes="d"),
    ],
    "residual": residual,
    "attention": attending,
    "layers of keras_blur": lambda shape, outputs: [
        kb.layers.Conv2D(4, 3), kl.GlobalAveragePooling2D(), kb.layers.Dense(outputs),
    ],
}  # fmt: skip


def batch(count=12, seed=0):
    x, y = tasks.images("digits").examples(random.seed_of(seed), count, "train")
    return ops.reshape(x, (count, -1)), y


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_learns_in_a_learner_as_under_fit(name):
    """The same synapses after three steps on the same batches, from the same start."""
    genome = kb.Genome.random(RULE, 3, std=0.3)
    learner = learners.Blur(NETWORKS[name], RULE).on(SHAPE, OUTPUTS)
    outer = {key: value[None, None] for key, value in genome.arrays.items()}
    # Two tasks on a leading axis. The second one's batches are in another order.
    order = [0, 1, 2], [2, 0, 1]
    state = learner.init(outer, random.seed_of(5), 64, OUTPUTS, (1, 2))
    begin = state
    x, y = (ops.stack(one) for one in zip(*(batch(seed=seed) for seed in range(3)), strict=True))
    for time in range(3):
        now_x, now_y = (ops.stack([part[own[time]] for own in order])[None] for part in (x, y))
        before = learner.predict(outer, state, now_x)
        state, prediction = learner.step(outer, state, now_x, now_y)
        np.testing.assert_allclose(before, prediction, rtol=1e-4, atol=1e-5)  # with the statistics of the batch, too
    made = learner.network(SHAPE, OUTPUTS)
    if isinstance(made, list):
        made = [keras.Input(SHAPE), *made]
        own = any(isinstance(layer, kb.layers.Dense) for layer in made)
        model = kb.Sequential(made, genome=genome) if own else kb.convert(keras.Sequential(made), genome)
    else:
        model = kb.convert(made, genome)
    model.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True), targets="signs")
    for task in range(2):
        for layer, start in zip(model.reading.layers, begin.synapses, strict=True):
            for key, variable in layer.synapses.items():
                variable.assign(start[key][0, task])
        model.learning_step.assign(0)
        for time in range(3):
            number = order[task][time]
            model.train_on_batch(ops.reshape(x[number], (-1, *SHAPE)), y[number])
        for layer, learned in zip(model.reading.layers, state.synapses, strict=True):
            for key, variable in layer.synapses.items():
                wanted = ops.convert_to_numpy(variable)
                np.testing.assert_allclose(learned[key][0, task], wanted, rtol=2e-4, atol=2e-5 * np.abs(wanted).max())


def test_dense_layers_of_a_function_are_the_shorthand_bit_for_bit():
    def dense(shape, outputs):
        return [kl.Flatten(), kb.layers.Dense(16), kb.layers.Dense(outputs)]

    short, long = learners.Blur((16,), RULE), learners.Blur(dense, RULE).on(SHAPE, OUTPUTS)
    outer = {name: value[:, None] for name, value in short.draw(0, 2, 64, OUTPUTS).items()}
    x, y = batch()
    x, y = x[None, None], y[None, None]
    states = [one.init(outer, random.seed_of(0), 64, OUTPUTS, (2, 1)) for one in (short, long)]
    for _ in range(2):
        states = [one.step(outer, state, x, y)[0] for one, state in zip((short, long), states, strict=True)]
    for ours, theirs in zip(*map(backend.leaves, states), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(*(one.predict(outer, state, x) for one, state in zip((short, long), states, strict=True)))


def test_a_start_depends_on_seed_and_task_alone():
    learner = learners.Blur(residual, RULE).on(SHAPE, OUTPUTS)
    whole = learner.init({}, random.seed_of(0), 64, OUTPUTS, (2, 4))
    part = learner.init({}, random.seed_of(0), 64, OUTPUTS, (2, 2), Shard(1, 2))
    for ours, all_of in zip(part.synapses, whole.synapses, strict=True):
        for name, value in ours.items():
            np.testing.assert_array_equal(value, all_of[name][:, 1::2])
    kernel = ops.convert_to_numpy(whole.synapses[1]["kernel"])  # [members, tasks, channels, 3, 3, 4, 4]
    np.testing.assert_array_equal(kernel[0], kernel[1])
    assert np.abs(kernel[0, 0] - kernel[0, 1]).max() > 0.1
    assert kernel.std() == pytest.approx(36**-0.5, rel=0.1)
    scale = whole.synapses[2]
    assert set(scale) == {"kernel", "bias", "backward_kernel"}
    assert np.unique(scale["kernel"]).tolist() == np.unique(scale["backward_kernel"]).tolist() == [1.0]
    assert not ops.convert_to_numpy(scale["bias"]).any()


def test_an_embedding_starts_with_vectors_of_norm_one():
    def words(shape, outputs):
        return [kl.Embedding(50, 16), kl.GlobalAveragePooling1D(), kl.Dense(outputs)]

    learner = learners.Blur(words, RULE).on((6,), 3)
    state = learner.init({}, random.seed_of(0), 6, 3, (1, 1))
    vectors = ops.convert_to_numpy(state.synapses[0]["kernel"])[0, 0, 0]
    assert np.linalg.norm(vectors, axis=1).mean() == pytest.approx(1.0, abs=0.1)
    outer = {name: value[None, None] for name, value in kb.Genome.random(RULE, 1).arrays.items()}
    x = np.random.default_rng(0).integers(0, 50, (1, 1, 8, 6)).astype("float32")
    y = 2.0 * np.eye(3, dtype="float32")[np.arange(8) % 3][None, None] - 1.0
    after, prediction = learner.step(outer, state, ops.array(x), ops.array(y))
    assert prediction.shape == (1, 1, 8, 3)
    old, new = (ops.convert_to_numpy(one.synapses[0]["kernel"])[0, 0] for one in (state, after))
    changed = np.abs(new - old).max(axis=(0, 2)) > 0
    assert set(np.flatnonzero(changed)) == set(x.astype(int).ravel())


def test_the_outer_gradient_of_a_convolutional_net_is_that_of_difference_quotients():
    """Of a smooth net: past a relu, all states but the first jump where its sum changes sign."""

    def smooth(shape, outputs):
        return [kl.Conv2D(4, 3, strides=2, activation="tanh"), kl.AveragePooling2D(2), kl.Flatten(), kl.Dense(outputs)]

    learner = learners.Blur(smooth, RULE).on(SHAPE, OUTPUTS)
    estimator = meta.Unroll(steps=2, trajectory_loss_weight=1.0)
    of = tasks.images("digits")
    drawn = [of.episode(random.seed_of(seed), steps=2, batch=8, query=16) for seed in range(2)]
    episodes = {name: ops.stack([one[name] for one in drawn]) for name in drawn[0]}
    arrays = kb.Genome.random(RULE, 3, std=0.3).arrays
    outer = {name: ops.array(value[None]) for name, value in arrays.items()}
    loss = in_a_graph(lambda outer: estimator(learner, outer, episodes, random.seed_of(1))[0], JAX)
    found = loss(outer)
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = {name: rng.standard_normal(value.shape).astype("float32") for name, value in outer.items()}
        slope = sum(float(np.sum(np.asarray(found.gradients[name]) * direction[name])) for name in outer)
        ahead, behind = (
            float(loss({name: value + sign * 1e-3 * direction[name] for name, value in outer.items()}).loss[0])
            for sign in (1, -1)
        )
        assert (ahead - behind) / 2e-3 == pytest.approx(slope, rel=0.02, abs=0.01)


def test_groups_of_channels_are_normalised_after_a_convolution_without_xla():
    def grouped(shape, outputs):
        return [kl.Conv2D(4, 3), kl.GroupNormalization(2), kl.GlobalAveragePooling2D(), kl.Dense(outputs)]

    learner = learners.Blur(grouped, Rule(states=3, batch_reduction="mean", last_activation="linear"))

    def gradient_norm(jit_compile):
        trainer = meta.MetaTrainer(
            tasks.images("digits", size=5), learner, meta.Unroll(1), meta_batch_size=2, batch_size=8, query_size=8
        )
        trainer.compile(keras.optimizers.Adam(1e-3), jit_compile=jit_compile)
        return trainer.fit(1, 1, verbose=0).history["gradient_norm"][0]

    assert gradient_norm(False) == pytest.approx(gradient_norm(True), rel=1e-4)


def test_several_networks_and_shapes_share_a_genome():
    images = [tasks.images("digits"), tasks.images("digits", size=6)]
    trainer = meta.MetaTrainer(
        images,
        [learners.Blur(NETWORKS["convolutions"], RULE), learners.Blur((12,), RULE)],
        meta.Unroll(steps=2, trajectory_loss_weight=1.0),
        members=2,
        batch_size=8,
        query_size=16,
    )
    assert [one.units(10) if isinstance(one.network, tuple) else one._plan.shape for _, one in trainer.families] == [
        (8, 8, 1), (12, 10), (6, 6, 1), (12, 10),
    ]  # fmt: skip
    trainer.compile(keras.optimizers.Adam(1e-2), run_eagerly=not JAX)
    before = {name: ops.convert_to_numpy(value) for name, value in trainer.outer.items()}
    history = trainer.fit(1, 4, callbacks=[meta.MetaValidate(images, episodes=2)], verbose=0).history
    assert np.isfinite([*history["loss"], *history["val_loss"]]).all()
    assert history["skipped"] == [0.0]
    assert max(np.abs(ops.convert_to_numpy(trainer.outer[name]) - old).max() for name, old in before.items()) > 1e-3
    assert trainer.genome.rule == RULE
    scores = score_episodes(
        learners.Blur(NETWORKS["convolutions"], RULE), trainer.genome, images[1], steps=1, batch_size=4, query_size=8,
        episodes=2, jit_compile=False,
    )  # fmt: skip
    assert len(scores["loss"]) == 2


@pytest.mark.slow
def test_xla_compiles_the_outer_gradient():
    found = {}
    for jit_compile in (False, True):
        trainer = meta.MetaTrainer(
            tasks.images("digits"), learners.Blur(NETWORKS["convolutions"], RULE),
            meta.Unroll(2, trajectory_loss_weight=1.0), members=2, batch_size=8, query_size=16,
        )  # fmt: skip
        trainer.compile(keras.optimizers.SGD(0.1), jit_compile=jit_compile)
        trainer.fit(1, 2, verbose=0)
        found[jit_compile] = {key: ops.convert_to_numpy(value) for key, value in trainer.outer.items()}
    for key, value in found[True].items():
        np.testing.assert_allclose(value, found[False][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda shape, outputs: 3, "must return a list of Keras layers or a built Keras model"),
        (lambda shape, outputs: [kl.Flatten(), kl.Dense(outputs + 1)], r"must take one input of shape \(8, 8, 1\) and have"),
        (lambda shape, outputs: [kl.Flatten(), kl.Dense(outputs, "softmax")], "must end with a layer of synapses"),
        (lambda shape, outputs: [kl.Flatten(), kl.Dropout(0.5), kl.Dense(outputs)], "no layer that draws random numbers"),
        (lambda shape, outputs: [kl.RandomFlip(), kl.Flatten(), kl.Dense(outputs)], "no layer that draws random numbers"),
        (lambda shape, outputs: [kl.Reshape((8, 8)), kl.LSTM(4), kl.Dense(outputs)], "LSTM"),
    ],
    ids=["no layers", "wrong outputs", "softmax", "dropout", "augmentation", "recurrent"],
)
def test_refuses_by_name_what_a_learner_cannot_use(network, message):
    with pytest.raises(ValueError, match=message):
        meta.MetaTrainer(tasks.images("digits"), learners.Blur(network, RULE))


def test_a_function_needs_the_shape_first():
    learner = learners.Blur(NETWORKS["residual"], RULE)
    with pytest.raises(ValueError, match=r"use learner.on\(shape, outputs\)"):
        learner.init({}, random.seed_of(0), 64, OUTPUTS)
    with pytest.raises(ValueError, match=r"Received: learner\.on\(\(8, 8, 1\), 10\)"):
        learner.on(SHAPE, OUTPUTS).init({}, random.seed_of(0), 64, 5)
    with pytest.raises(ValueError, match="`compute_dtype` must be None where `network` is a function"):
        learners.Blur(residual, RULE, compute_dtype="bfloat16")
    with pytest.raises(ValueError, match="`units` is known for a dense network only"):
        learner.units(3)


def test_a_convolutional_model_with_learned_starts_takes_the_step_of_keras():
    model = keras.Sequential([keras.Input(SHAPE), kl.Conv2D(3, 3, activation="tanh"), kl.Flatten(), kl.Dense(OUTPUTS)])
    learner = learners.Warp(model, [], keras.optimizers.SGD(0.1))
    outer = {name: ops.array(value[:, None]) for name, value in learner.draw(0, 1, 64, OUTPUTS).items()}
    state = learner.init(outer, random.seed_of(0), 64, OUTPUTS, (1, 2))
    x, y = batch()
    both = [ops.stack([one, one[::-1]])[None] for one in (x, y)]  # the same examples in another order
    after, prediction = learner.step(outer, state, *both)
    np.testing.assert_allclose(prediction[0, 0], model(ops.reshape(x, (-1, *SHAPE))), rtol=1e-5, atol=1e-6)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.CategoricalCrossentropy(from_logits=True))
    model.train_on_batch(ops.reshape(x, (-1, *SHAPE)), 0.5 * (y + 1.0))
    for ours, theirs in zip(after.weights, model.trainable_variables, strict=True):
        for task in range(2):
            np.testing.assert_allclose(ours[0, task], ops.convert_to_numpy(theirs), rtol=1e-4, atol=1e-6)
