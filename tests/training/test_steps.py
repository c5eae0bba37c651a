"""A step of both trainers does what a step of Keras's own `fit` does, wherever it has one:
optimizers, policies, loss scaling."""

import keras
import numpy as np
import pytest
from bilevel_table import ESTIMATORS
from duties import (
    MSE,
    ONES,
    POLICIES,
    SGD,
    Scale,
    assert_close,
    batches,
    bilevel_trainer,
    data,
    meta_trainer,
    network,
    several,
    single,
    started,
)
from marks import slow_but

from keras_blur import Rule, bilevel, learners, meta, tasks


def without_decay_of_biases():
    made = keras.optimizers.AdamW(0.05, weight_decay=0.1)
    made.exclude_from_weight_decay(var_names=["bias"])
    return made


OPTIMIZERS = {
    "sgd": lambda: SGD(0.1),
    "nesterov": lambda: SGD(0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "adam": lambda: keras.optimizers.Adam(0.02, amsgrad=True),
    "adamw without biases": without_decay_of_biases,
    "lion": lambda: keras.optimizers.Lion(0.01),
    "ftrl": lambda: keras.optimizers.Ftrl(0.05),
    "adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "lamb": lambda: keras.optimizers.Lamb(0.05),
    "clipnorm": lambda: SGD(0.1, clipnorm=0.1),
    "clipvalue": lambda: SGD(0.1, clipvalue=0.05),
    "global_clipnorm": lambda: SGD(0.1, global_clipnorm=0.1),
    "schedule": lambda: SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
    "ema": lambda: keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.6),
    "ema overwrites": lambda: SGD(0.1, use_ema=True, ema_momentum=0.6, ema_overwrite_frequency=2),
    "accumulation": lambda: keras.optimizers.Adam(0.05, gradient_accumulation_steps=2, use_ema=True, weight_decay=0.1),
    "loss_scale_factor": lambda: SGD(0.1, loss_scale_factor=1000.0, clipnorm=0.5),
    "several": several,
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(SGD(0.1, clipnorm=0.1, use_ema=True)),
}


def assert_as_keras(optimizer, *, dtype=None, tolerance=2e-5, **options):
    x, y = data(20)  # the last batch is a short one
    plain, model = network(dtype), network(dtype)
    plain.compile(optimizer(), MSE, run_eagerly=True)
    wanted = plain.fit(batches(x, y), epochs=2, shuffle=False, verbose=0).history
    made = bilevel_trainer(model, optimizer(), estimator=bilevel.OneStep(rate=0.1), **options)
    found = made.fit(batches(x, y), meta_data=batches(x, y), epochs=2, verbose=0).history
    assert_close(model.get_weights(), plain.get_weights(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=10 * tolerance)
    assert found["skipped"] == [0.0, 0.0]
    assert int(made.optimizer.iterations) == int(plain.optimizer.iterations)


@pytest.mark.parametrize("name", slow_but(["adam", "ema", "accumulation", "several", "loss scaling"], OPTIMIZERS))
def test_a_training_loss_that_changes_nothing_is_keras_fit(name):
    assert_as_keras(OPTIMIZERS[name])


@pytest.mark.parametrize("name", slow_but(["clipnorm"], ["ema overwrites", "accumulation", "loss scaling", "clipnorm"]))
def test_compiled_steps_are_keras_fit(name):
    assert_as_keras(OPTIMIZERS[name], jit_compile=True)


def test_steps_in_a_graph_are_keras_fit():
    assert_as_keras(OPTIMIZERS["accumulation"], jit_compile=False)


@pytest.mark.parametrize("policy", POLICIES[1:], indirect=True)
@pytest.mark.parametrize("name", ["adam", "ema"])
def test_policies_are_keras_fit(policy, name):
    tolerance = {"float64": 1e-5, "mixed_bfloat16": 2e-2, "mixed_float16": 2e-3}[policy]
    assert_as_keras(OPTIMIZERS[name], tolerance=tolerance)


@pytest.mark.parametrize("dtype", POLICIES[1:])
def test_policies_of_layers_are_keras_fit(dtype):
    tolerance = {"float64": 1e-5, "mixed_bfloat16": 2e-2, "mixed_float16": 2e-3}[dtype]
    assert_as_keras(OPTIMIZERS["sgd"], dtype=dtype, tolerance=tolerance)


def test_all_in_float64():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        assert_as_keras(OPTIMIZERS["adam"])
        x, y = data()
        made = bilevel_trainer(network(), SGD(0.1), meta_model=Scale())
        made.fit(x.astype("float64"), y, meta_data=(x, y), batch_size=8, verbose=0)
        assert made._sources[0].spec[0].dtype == np.float64
    finally:
        keras.config.set_floatx(before)
        keras.config.set_dtype_policy("float32")


def test_losses_that_a_model_adds_are_summed():
    class Adds(keras.layers.Layer):
        def call(self, inputs):
            self.add_loss(0.1 * keras.ops.square(inputs))  # not a scalar
            return inputs

    def made():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), Adds()])

    x, y = data(8)
    plain, model = made(), made()
    plain.compile(SGD(0.1), MSE, jit_compile=False)
    plain.fit(batches(x, y), shuffle=False, verbose=0)
    bilevel_trainer(model, SGD(0.1)).fit(batches(x, y), meta_data=batches(x, y), verbose=0)
    assert_close(model.get_weights(), plain.get_weights(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [lambda: SGD(0.1), lambda: keras.optimizers.Adam(0.1)])
def test_weights_of_a_lookup(optimizer):
    def made():
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [keras.Input((2,), dtype="int32"), keras.layers.Embedding(5, 3), keras.layers.Flatten(), keras.layers.Dense(2)]
        )

    x, y = np.arange(16).reshape(8, 2) % 5, data(8)[1]
    plain, model = made(), made()
    plain.compile(optimizer(), MSE, jit_compile=False)
    plain.fit(batches(x, y), epochs=2, shuffle=False, verbose=0)
    trainer = bilevel_trainer(model, optimizer(), SGD(0.0), Scale())
    trainer.fit(batches(x, y), meta_data=batches(x, y), epochs=2, verbose=0)
    assert_close(model.get_weights(), plain.get_weights(), rtol=1e-5, atol=1e-6)


# Loss scaling.


@pytest.mark.parametrize("policy", POLICIES, indirect=True)
@pytest.mark.parametrize("jit_compile", slow_but([True], [False, True]))
def test_the_first_step_of_a_policy(policy, jit_compile):
    model = single()
    made = bilevel_trainer(model, SGD(0.1), jit_compile=jit_compile)
    x = np.ones((32, 1), "float32")
    made.fit(x, x, meta_data=(x, x), batch_size=32, verbose=0)
    assert model.get_weights()[0][0, 0] == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_gradients_below_float16_are_kept(policy):
    model, scale = single(), Scale(1e-7)
    made = bilevel_trainer(model, SGD(1e6), SGD(1e13), scale, estimator=bilevel.OneStep(rate=0.1))
    made.fit(ONES, ONES, meta_data=(ONES, ONES), batch_size=8, verbose=0)
    # The meta gradient is -rate * <train gradient, meta gradient> = -0.1 * 2e-7 * 2.
    moved = float(scale.log_scale.numpy())
    assert moved == pytest.approx(4e5, rel=1e-2)


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_lowers_the_scale(policy, jit_compile):
    huge = 1e5 * ONES  # not finite in float16
    model, plain = single("ones"), single("ones")
    plain.compile(SGD(0.1), MSE, jit_compile=False)
    plain.fit(batches(huge, ONES, 4), shuffle=False, verbose=0)
    made = bilevel_trainer(model, SGD(0.1), SGD(0.1), Scale(), jit_compile=jit_compile)
    history = made.fit(huge, ONES, meta_data=(huge, ONES), batch_size=4, verbose=0).history
    assert history["skipped"] == [1.0]
    assert model.get_weights()[0][0, 0] == plain.get_weights()[0][0, 0] == 1.0
    for one in (made.optimizer, made.meta_optimizer):
        assert float(one.dynamic_scale.numpy()) == float(plain.optimizer.dynamic_scale.numpy()) == 2.0**13
        assert int(one.iterations) == 0
    assert float(made.meta_model.log_scale.numpy()) == 0.0


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_loss_scaling_can_be_left_out(policy):
    made = bilevel_trainer(single(), SGD(0.1), auto_scale_loss=False)
    assert type(made.optimizer) is type(made.meta_optimizer) is SGD


@pytest.mark.parametrize("name", slow_but(["one step", "cut"], ESTIMATORS))
def test_outer_gradients_of_all_policies_agree(name):
    x, y = data(8)
    found = {}
    for policy in POLICIES:
        keras.config.set_dtype_policy(policy)
        try:
            model, net = network(penalties=False), started(bilevel.SampleWeightNet(4))
            made = bilevel_trainer(model, SGD(0.1), SGD(1.0), net, ESTIMATORS[name])
            before = [np.array(v.value) for v in net.trainable_variables]
            history = made.fit(x, y, meta_data=(x, y), batch_size=8, verbose=0).history
        finally:
            keras.config.set_dtype_policy("float32")
        assert history["skipped"] == [0.0]
        after = [np.array(v.value) for v in net.trainable_variables]
        found[policy] = np.concatenate([(a - b).ravel() for a, b in zip(after, before, strict=True)])
    size = np.linalg.norm(found["float32"])
    assert size > 0.0
    for policy, error in (("float64", 1e-3), ("mixed_bfloat16", 0.3), ("mixed_float16", 0.1)):
        assert np.linalg.norm(found[policy] - found["float32"]) < error * size, policy


def learner_of(name):
    if name == "warp":
        model, names = learners.warped(1, (4,), 1)
        return learners.Warp(started(model), names, SGD(0.05), loss="squared")
    return {
        "blur": lambda: learners.Blur((4,), Rule(batch_reduction="mean", last_activation="linear")),
        "maml": lambda: learners.MAML(SGD(0.01), (4,), loss="squared"),
        "prototypes": lambda: learners.Prototypes((4,), 3),
        "neural process": lambda: learners.NeuralProcess((4,)),
    }[name]()


@pytest.mark.parametrize("name", slow_but(["blur", "maml"], ["blur", "maml", "prototypes", "neural process"]))
def test_meta_training_does_not_depend_on_the_policy(name):
    of = tasks.sines() if name in ("maml", "neural process") else tasks.images("digits")
    found = {}
    for policy in POLICIES:
        keras.config.set_dtype_policy(policy)
        try:
            made = meta_trainer(SGD(0.1), learner_of(name), of)
            before = made.parameters()
            made.fit(1, 1, verbose=0)
        finally:
            keras.config.set_dtype_policy("float32")
        found[policy] = made.parameters()
    assert any(np.any(found["float32"][key] != value) for key, value in before.items())
    for policy in POLICIES:
        assert_close(found[policy].values(), found["float32"].values(), rtol=0, atol=0)


def test_warps_of_all_policies_agree():
    found = {}
    for policy in POLICIES:
        keras.config.set_dtype_policy(policy)
        try:
            made = meta_trainer(SGD(0.1), learner_of("warp"), estimator=meta.Unroll(2))
            before = made.parameters()
            history = made.fit(1, 1, verbose=0).history
        finally:
            keras.config.set_dtype_policy("float32")
        assert history["skipped"] == [0.0]
        found[policy] = np.concatenate([(value - before[name]).ravel() for name, value in made.parameters().items()])
    size = np.linalg.norm(found["float32"])
    assert size > 0.0
    for policy, error in (("float64", 1e-3), ("mixed_bfloat16", 0.1), ("mixed_float16", 0.02)):
        assert np.linalg.norm(found[policy] - found["float32"]) < error * size, policy


@pytest.mark.parametrize("scaling", [lambda o: keras.optimizers.LossScaleOptimizer(o), lambda o: o])
def test_meta_training_with_loss_scaling(scaling):
    plain = meta_trainer(SGD(0.1))
    plain.fit(1, 2, verbose=0)
    factor = meta_trainer(SGD(0.1, loss_scale_factor=64.0))
    wrapped = meta_trainer(scaling(SGD(0.1)))
    for made in (factor, wrapped):
        made.fit(1, 2, verbose=0)
        assert_close(made.parameters().values(), plain.parameters().values(), rtol=1e-6, atol=1e-7)
