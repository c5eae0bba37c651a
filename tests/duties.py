"""Networks, data and trainers for the tests of what both trainers share with Keras's `fit`."""

import keras
import numpy as np
import tensorflow as tf

from keras_blur import bilevel, learners, meta, tasks

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


def several():
    rest = SGD(0.1, use_ema=True, ema_momentum=0.5)
    return keras.optimizers.MultiOptimizer(lambda v: keras.optimizers.Adam(0.02) if "bias" in v.path else rest)
