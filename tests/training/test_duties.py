"""What Keras's trainer does around a step, both trainers do: its own `fit` is the oracle wherever
it has one."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from bilevel_table import ESTIMATORS

from keras_blur import Rule, bilevel, learners, meta, tasks

SGD, MSE = keras.optimizers.SGD, "mean_squared_error"
POLICIES = ("float32", "float64", "mixed_bfloat16", "mixed_float16")


class Unchanged(bilevel.TrainingLoss):
    """The plain mean, with an outer parameter that changes nothing."""

    def __init__(self):
        super().__init__()
        self.unused = self.add_weight(shape=(), initializer="zeros", name="unused")


class Scale(bilevel.TrainingLoss):
    """The plain mean times a learned factor."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        self.log_scale = self.add_weight(shape=(), initializer="zeros", name="log_scale")

    def training_loss(self, model, x, y, losses):
        mean = keras.ops.mean(losses(y, model(x, training=True)))
        return keras.ops.cast(self.factor * keras.ops.exp(self.log_scale), mean.dtype) * mean


def data(count=24, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 3)).astype("float32")
    return x, np.stack([x.sum(1), x[:, 0] * x[:, 1]], axis=1).astype("float32")


def batches(x, y, size=8):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size)


def network(dtype=None, penalties=True):
    """A network with every kind of additional loss, and with weights that are constrained.

    Keras adds losses of one dtype only, so there are none outside float32.
    """
    penalties = penalties and (dtype or keras.config.dtype_policy().name) == "float32"
    first = keras.layers.Dense(4, "tanh", kernel_regularizer=keras.regularizers.L2(0.02) if penalties else None, dtype=dtype)
    between = keras.layers.ActivityRegularization(l2=0.01, dtype=dtype)
    last = keras.layers.Dense(2, kernel_constraint=keras.constraints.MaxNorm(0.7), dtype=dtype)
    return started(keras.Sequential([keras.Input((3,)), first, *([between] if penalties else []), last]))


def started(model):
    """A model with the same weights whatever its dtype."""
    rng = np.random.default_rng(0)
    model.set_weights([0.5 * rng.standard_normal(v.shape) for v in model.weights])
    return model


def single(kernel="zeros"):
    return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer=kernel)])


ONES = np.ones((8, 1), "float32")
COMPILED = {"jit_compile", "steps_per_execution"}  # without these a few steps run eagerly


def bilevel_trainer(model, optimizer, meta_optimizer=None, meta_model=None, estimator=None, **options):
    made = bilevel.BilevelTrainer(model, meta_model or Unchanged(), estimator)
    options = {"loss": MSE, "run_eagerly": not options.keys() & COMPILED, **options}
    made.compile(optimizer, meta_optimizer or SGD(0.1), **options)
    return made


def meta_trainer(optimizer=None, learner=None, of=None, **options):
    learner = learner or learners.MAML(SGD(0.01), (4,), loss="squared")
    compiling = {name: options.pop(name) for name in ("steps_per_execution", "run_eagerly") if name in options}
    compiling = {"run_eagerly": not compiling, "jit_compile": False, **compiling}
    options = {"estimator": meta.Unroll(1), "batch_size": 4, "query_size": 4, **options}
    made = meta.MetaTrainer(of or tasks.sines(), learner, **options)
    made.compile(optimizer, **compiling)
    return made


def assert_close(found, wanted, **tolerance):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(one, "float64"), np.asarray(other, "float64"), **tolerance)


# A step.


def without_decay_of_biases():
    made = keras.optimizers.AdamW(0.05, weight_decay=0.1)
    made.exclude_from_weight_decay(var_names=["bias"])
    return made


def several():
    rest = SGD(0.1, use_ema=True, ema_momentum=0.5)
    return keras.optimizers.MultiOptimizer(lambda v: keras.optimizers.Adam(0.02) if "bias" in v.path else rest)


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_loss_that_changes_nothing_is_keras_fit(name):
    assert_as_keras(OPTIMIZERS[name])


@pytest.mark.parametrize("name", ["ema overwrites", "accumulation", "loss scaling", "clipnorm"])
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
@pytest.mark.parametrize("jit_compile", [False, True])
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


@pytest.mark.parametrize("name", ESTIMATORS)
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


@pytest.mark.parametrize("name", ["blur", "maml", "prototypes", "neural process"])
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


# Averages of weights.


def average(values, momentum):
    mean = values[0]
    for value in values[1:]:
        mean = momentum * mean + (1.0 - momentum) * value
    return mean


def test_averages_are_in_place_at_the_end():
    w, path = 0.0, []
    for _ in range(6):
        w -= 0.1 * 2.0 * (w - 1.0)
        path.append(w)
    model = single()
    made = bilevel_trainer(model, SGD(0.1, use_ema=True, ema_momentum=0.9))
    made.fit(ONES, ONES, meta_data=(ONES, ONES), batch_size=8, epochs=6, verbose=0)
    assert model.get_weights()[0][0, 0] == pytest.approx(average(path, 0.9), abs=1e-6)


def test_averages_of_outer_parameters():
    seen, scale = [], Scale()
    made = bilevel_trainer(single(), SGD(0.1), SGD(1.0, use_ema=True, ema_momentum=0.5), scale)
    follow = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(float(scale.log_scale.numpy()))
    )
    made.fit(ONES, ONES, meta_data=(ONES, ONES), batch_size=4, epochs=2, callbacks=[follow], verbose=0)
    assert seen[0] != seen[-1]
    assert float(scale.log_scale.numpy()) == pytest.approx(average(seen, 0.5), rel=1e-5)


def test_averages_of_meta_training(tmp_path):
    seen = []
    made = meta_trainer(keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5), members=2)
    follow = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(made.parameters(1)))
    save = meta.SaveLearned(tmp_path / "learned.keras")
    made.fit(2, 2, callbacks=[follow, save], verbose=0)
    for name, value in made.parameters(1).items():
        np.testing.assert_allclose(value, average([one[name] for one in seen], 0.5), rtol=1e-5, atol=1e-6)
    saved = made.learner.parameters(tmp_path / "learned.keras")
    assert_close([own[0] for own in saved.values()], made.parameters().values(), rtol=1e-6)


def test_averages_survive_a_step_that_is_skipped():
    made = meta_trainer(SGD(np.inf, use_ema=True), learner=learners.MAML(SGD(np.inf), (4,), loss="squared"))
    before = made.parameters()
    history = made.fit(1, 1, verbose=0).history
    assert history["skipped"] == [1.0]
    assert_close(made.parameters().values(), before.values(), rtol=0, atol=0)
    assert int(made.optimizer.iterations) == 0


def test_resumed_averages(tmp_path):
    path = str(tmp_path / "run.weights.h5")
    found = []
    for epochs in ((3,), (1, 3)):
        for number, end in enumerate(epochs):
            model = single()
            made = bilevel_trainer(model, SGD(0.1, use_ema=True, ema_momentum=0.9))
            made.fit(
                ONES, ONES, meta_data=(ONES, ONES), batch_size=4, epochs=end, verbose=0,
                checkpoint=path if len(epochs) > 1 else None,
            )  # fmt: skip
            assert number + 1 <= end
        found.append(model.get_weights()[0][0, 0])
    assert found[0] == found[1]


def test_averages_are_swapped_in_for_validation():
    x, y = data()
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    plain, model = network(), network()
    plain.compile(SGD(0.1, use_ema=True, ema_momentum=0.5), MSE, jit_compile=False)
    wanted = plain.fit(batches(x, y), validation_data=(x, y), epochs=2, callbacks=[swap], shuffle=False, verbose=0).history
    made = bilevel_trainer(model, SGD(0.1, use_ema=True, ema_momentum=0.5))
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    history = made.fit(
        batches(x, y), meta_data=batches(x, y), validation_data=(x, y), epochs=2, callbacks=[swap], verbose=0
    ).history
    assert_close(model.get_weights(), plain.get_weights(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(history["val_loss"], wanted["val_loss"], rtol=1e-5)


# The loop.


class Log(keras.callbacks.Callback):
    """Which hooks are called, with which numbers."""

    def __init__(self):
        super().__init__()
        self.calls, self.end = [], None

    def on_train_begin(self, logs=None):
        self.calls.append("train")

    def on_epoch_begin(self, epoch, logs=None):
        self.calls.append(("epoch", epoch))

    def on_train_batch_begin(self, batch, logs=None):
        self.calls.append(("begin", batch))

    def on_train_batch_end(self, batch, logs=None):
        self.calls.append(("end", batch))

    def on_test_begin(self, logs=None):
        self.calls.append("test")

    def on_epoch_end(self, epoch, logs=None):
        self.calls.append(("epoch end", epoch, sorted(logs)))

    def on_train_end(self, logs=None):
        self.end = sorted(logs)


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 2}])
def test_hooks_and_history_are_those_of_keras(options):
    x, y = data()
    fit = {"validation_data": (x, y), "validation_freq": 2, "initial_epoch": 1, "epochs": 4, "verbose": 0}
    plain, logs = network(), (Log(), Log())
    plain.compile(SGD(0.1), MSE, jit_compile=False, **options)
    wanted = plain.fit(batches(x, y), callbacks=[logs[0]], shuffle=False, **fit)
    made = bilevel_trainer(network(), SGD(0.1), **options)
    found = made.fit(batches(x, y), meta_data=batches(x, y), callbacks=[logs[1]], **fit)

    def of_keras(calls):  # without what only this trainer logs
        extra = {"meta_loss", "skipped"}
        return [(*call[:2], [name for name in call[2] if name not in extra]) if len(call) == 3 else call for call in calls]

    assert of_keras(logs[1].calls) == logs[0].calls
    assert set(logs[1].end) - {"meta_loss", "skipped"} == set(logs[0].end)
    assert found.epoch == wanted.epoch == [1, 2, 3]
    assert len(found.history["val_loss"]) == len(wanted.history["val_loss"]) == 2
    np.testing.assert_allclose(found.history["val_loss"], wanted.history["val_loss"], rtol=1e-4)


def test_hooks_of_meta_training():
    logs = [Log(), Log()]
    made = meta_trainer(SGD(0.1), steps_per_execution=2)
    found = made.fit(3, 3, initial_epoch=1, callbacks=[logs[0]], verbose=0)
    assert found.epoch == [1, 2]
    batch = [("begin", 0), ("end", 1), ("begin", 2), ("end", 3)]
    assert [call for call in logs[0].calls if call[0] in ("begin", "end")] == batch * 2
    assert int(made.meta_step.numpy()) == 6
    plain = meta_trainer(SGD(0.1))
    plain.fit(2, 3, verbose=0)
    assert_close(made.parameters().values(), plain.parameters().values(), rtol=1e-6)


def test_eager_meta_training():
    plain, eager = meta_trainer(SGD(0.1), run_eagerly=False), meta_trainer(SGD(0.1), run_eagerly=True)
    for made in (plain, eager):
        made.fit(1, 1, verbose=0)
    assert_close(eager.parameters().values(), plain.parameters().values(), rtol=1e-4, atol=1e-6)


def validated(trainer, x, y, w):
    return trainer.evaluate(x, y, sample_weight=w, batch_size=8, verbose=0, return_dict=True)


def test_validation_has_weights_and_a_length():
    x, y = data(20)
    w = np.linspace(0.0, 3.0, 20).astype("float32")
    made = bilevel_trainer(network(), SGD(0.1), metrics=["mae"], weighted_metrics=["mse"])
    fit = {"meta_data": (x, y), "batch_size": 8, "verbose": 0}
    history = made.fit(x, y, validation_data=(x, y, w), **fit).history
    wanted = validated(made, x, y, w)
    for name in ("loss", "mae", "mse"):
        assert history[f"val_{name}"] == pytest.approx([wanted[name]], rel=1e-5)
    assert wanted["mse"] == pytest.approx(np.average(np.square(made.predict(x, verbose=0) - y).mean(1), weights=w), rel=1e-4)
    whole = tf.data.Dataset.from_tensor_slices((x, y, w)).batch(4)
    history = made.fit(x, y, validation_data=whole, validation_steps=2, **fit).history
    assert history["val_loss"] == pytest.approx([validated(made, x[:8], y[:8], w[:8])["loss"]], rel=1e-5)
    history = made.fit(x, y, validation_data=(x, y), validation_batch_size=5, validation_freq=[2], epochs=3, **fit).history
    assert len(history["val_loss"]) == 1
    assert len(history["loss"]) == 3


class Stop(keras.callbacks.Callback):
    def __init__(self, when):
        super().__init__()
        self.when = when

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "when"):
            return self.stop
        return object.__getattribute__(self, name)

    def stop(self, *_, **__):
        self.model.stop_training = True


@pytest.mark.parametrize("when", ["on_train_begin", "on_epoch_begin", "on_train_batch_end", "on_epoch_end"])
def test_training_stops_where_keras_stops(when):
    x, y = data()
    plain = network()
    plain.compile(SGD(0.1), MSE, jit_compile=False)
    wanted = plain.fit(batches(x, y), epochs=2, callbacks=[Stop(when)], shuffle=False, verbose=0)
    made = bilevel_trainer(network(), SGD(0.1))
    found = made.fit(batches(x, y), meta_data=batches(x, y), epochs=2, callbacks=[Stop(when)], verbose=0)
    assert found.epoch == wanted.epoch
    assert int(made.meta_step.numpy()) == int(plain.optimizer.iterations)
    trainer = meta_trainer(SGD(0.1))
    assert trainer.fit(2, 3, callbacks=[Stop(when)], verbose=0).epoch == wanted.epoch
    assert int(trainer.meta_step.numpy()) == int(plain.optimizer.iterations)


def callbacks_of(folder):
    return [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / (1 + epoch)),
        keras.callbacks.EarlyStopping("loss", patience=1, min_delta=1e9, restore_best_weights=True),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.ModelCheckpoint(
            str(folder / "best.weights.h5"), "loss", save_best_only=True, save_weights_only=True
        ),
        keras.callbacks.CSVLogger(str(folder / "log.csv")),
    ]


def test_callbacks_of_keras_work_in_bilevel_training(tmp_path):
    x, y = data()
    made, plain = bilevel_trainer(network(), SGD(0.1)), network()
    plain.compile(SGD(0.1), MSE, jit_compile=False)
    for name in ("mine", "keras"):
        (tmp_path / name).mkdir()
    wanted = plain.fit(batches(x, y), epochs=5, callbacks=callbacks_of(tmp_path / "keras"), shuffle=False, verbose=0)
    found = made.fit(batches(x, y), meta_data=batches(x, y), epochs=5, callbacks=callbacks_of(tmp_path / "mine"), verbose=0)
    assert found.epoch == wanted.epoch == [0, 1]
    np.testing.assert_allclose(found.history["learning_rate"], wanted.history["learning_rate"], rtol=1e-6)
    assert_close(made.model.get_weights(), plain.get_weights(), rtol=1e-5, atol=1e-6)
    for name in ("best.weights.h5", "log.csv"):
        assert (tmp_path / "mine" / name).exists()
    assert len((tmp_path / "mine" / "log.csv").read_text().splitlines()) == 3
    made.load_weights(str(tmp_path / "mine" / "best.weights.h5"))


def test_callbacks_of_keras_work_in_meta_training(tmp_path):
    made = meta_trainer(SGD(0.1))
    found = made.fit(5, 2, callbacks=callbacks_of(tmp_path), verbose=0)
    assert found.epoch == [0, 1]
    np.testing.assert_allclose(found.history["learning_rate"], [0.1, 0.05], rtol=1e-6)
    once = meta_trainer(SGD(0.1))
    once.fit(1, 2, verbose=0)
    assert_close(made.parameters().values(), once.parameters().values(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["bilevel", "meta"])
def test_a_plateau_lowers_the_rate(kind):
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    if kind == "meta":
        made = meta_trainer(SGD(0.1))
        made.fit(3, 1, callbacks=[plateau], verbose=0)
    else:
        made = bilevel_trainer(single(), SGD(0.1))
        made.fit(ONES, ONES, meta_data=(ONES, ONES), batch_size=8, epochs=3, callbacks=[plateau], verbose=0)
    assert float(made.optimizer.learning_rate) == pytest.approx(0.025)


class Kill(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["bilevel", "meta"])
def test_backup_and_restore_goes_on_where_it_was(tmp_path, kind):
    x, y = data()

    def run(callbacks):
        if kind == "meta":
            made = meta_trainer(keras.optimizers.Adam(0.01))
            return made, made.fit(4, 2, callbacks=callbacks, verbose=0).epoch
        made = bilevel_trainer(network(), keras.optimizers.Adam(0.01), meta_model=Scale())
        return made, made.fit(x, y, meta_data=(x, y), batch_size=8, epochs=4, callbacks=callbacks, verbose=0).epoch

    whole, _ = run([])
    folder = str(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        run([keras.callbacks.BackupAndRestore(folder), Kill()])
    resumed, epochs = run([keras.callbacks.BackupAndRestore(folder)])
    assert epochs == [2, 3]
    assert_close(resumed.get_weights(), whole.get_weights(), rtol=0, atol=0)


def test_a_loss_that_is_not_a_number_ends_training():
    made = bilevel_trainer(single(), SGD(1e30))
    history = made.fit(
        ONES,
        2 * ONES,
        meta_data=(ONES, ONES),
        batch_size=2,
        epochs=9,
        callbacks=[keras.callbacks.TerminateOnNaN()],
        verbose=0,
    )
    assert len(history.epoch) == 1


@pytest.mark.parametrize("verbose", [0, 1, 2, "auto"])
def test_verbosity_is_that_of_keras(capsys, verbose):
    made = bilevel_trainer(single(), SGD(0.1))
    made.fit(ONES, ONES, meta_data=(ONES, ONES), batch_size=4, epochs=2, validation_data=(ONES, ONES), verbose=verbose)
    lines = capsys.readouterr().out
    assert ("Epoch" in lines) == (verbose != 0)
    assert ("val_loss" in lines) == (verbose != 0)


def test_debugging_limits_of_keras():
    keras.config.set_max_epochs(2)
    keras.config.set_max_steps_per_epoch(1)
    try:
        made = meta_trainer(SGD(0.1))
        with pytest.warns(UserWarning, match="is limited to"):
            assert len(made.fit(5, 4, verbose=0).epoch) == 2
        assert int(made.meta_step.numpy()) == 2
    finally:
        keras.config.set_max_epochs(None)
        keras.config.set_max_steps_per_epoch(None)


def test_an_optimizer_keeps_its_state_when_compiled_again():
    made = bilevel_trainer(single(), keras.optimizers.Adam(0.1))
    fit = {"meta_data": (ONES, ONES), "batch_size": 8, "verbose": 0}
    made.fit(ONES, ONES, **fit)
    optimizers = made.optimizer, made.meta_optimizer
    made.compile(*optimizers, loss=MSE, jit_compile=False)
    assert len(made.optimizer.variables) == 4  # iterations, rate, two moments
    assert int(made.optimizer.iterations) == 1
    made.fit(ONES, ONES, **fit)


def evolution():
    learner = learners.Blur((4,), Rule(batch_reduction="mean", last_activation="linear"))
    made = meta.MetaTrainer(tasks.images("digits"), learner, meta.Evolution(1, population=4), batch_size=4, query_size=4)
    made.compile(jit_compile=False)
    return made


def fit_bilevel(optimizer=None, **options):
    made = bilevel_trainer(single(), optimizer or SGD(0.1))
    made.fit(ONES, ONES, **{"meta_data": (ONES, ONES), "batch_size": 8, "verbose": 0, **options})


def same_twice():
    one = SGD(0.1)
    bilevel_trainer(single(), one, one)


def of_another_model():
    one = SGD(0.1)
    one.build(single().trainable_variables)
    bilevel_trainer(single(), one)


def same_for_the_start():
    model, names = learners.warped(1, (4,), 1)
    learner = learners.Warp(model, names, SGD(0.05), loss="squared")
    made, one = meta.MetaTrainer(tasks.sines(), learner, meta.WarpGrad(2)), SGD(0.1)
    made.compile(one, start_optimizer=one)


SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
SCHEDULER = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: evolution().fit(1, 1, callbacks=[SCHEDULER]), "where the optimizer has none"),
        (lambda: fit_bilevel(SGD(SCHEDULE), callbacks=[SCHEDULER]), "follows a schedule of the optimizer"),
        (
            lambda: fit_bilevel(callbacks=[keras.callbacks.ModelCheckpoint("model.keras")]),
            "ModelCheckpoint with save_weights_only=True",
        ),
        (lambda: fit_bilevel(validation_data=(ONES, ONES), validation_freq=0), "`validation_freq` must be a positive"),
        (lambda: fit_bilevel(epochs=-1), "`epochs` must be an integer of at least 0"),
        (lambda: fit_bilevel(initial_epoch=0.5), "`initial_epoch` must be an integer of at least 0"),
        (lambda: meta_trainer().fit(1, 0), "`steps_per_epoch` must be a positive integer"),
        (lambda: meta_trainer(steps_per_execution=0), "`steps_per_execution` must be a positive integer"),
        (lambda: bilevel_trainer(single(), SGD(0.1), steps_per_execution=True), "`steps_per_execution` must be a positive"),
        (lambda: meta_trainer(SGD(0.1, clipnorm=1.0)), "must not clip"),
        (lambda: meta_trainer(keras.optimizers.LossScaleOptimizer(SGD(0.1, clipnorm=1.0))), "must not clip"),
        (lambda: meta_trainer(keras.optimizers.Lamb(), members=2), "must not mix members, as Lamb does"),
        (lambda: bilevel_trainer(single(), several()), "`rate` of the estimator must be given"),
        (same_twice, "must be different objects"),
        (same_for_the_start, "`start_optimizer` must be another object"),
        (of_another_model, "must be new, or have been compiled for the same weights"),
    ],
)
def test_what_cannot_work_is_refused_before_training(make, message):
    with pytest.raises(ValueError, match=message):
        make()
