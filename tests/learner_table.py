"""Three steps of every learner, as arrays by name; `test_same_learners.py` compares the backends.

python learner_table.py FILE
"""

import sys

import keras
import numpy as np

from keras_blur import Rule, backend, learners, random

FEATURES, CLASSES, TASKS, BATCH = 16, 3, 2, 8
ROUNDING = 1e-5  # of three steps, relative to the largest number of an array


def network(shape, outputs):
    kl = keras.layers
    x = keras.Input(shape)
    h = kl.Reshape((4, 4, 1))(x)
    h = kl.Activation("relu")(kl.BatchNormalization()(kl.Conv2D(3, 3)(h)))
    return keras.Model(x, kl.Dense(outputs)(kl.Flatten()(h)))


def warp():
    model, names = learners.warped(FEATURES, (5,), CLASSES)
    return learners.Warp(model, names, keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0))


def residual(shape, outputs):
    kl = keras.layers
    x = keras.Input(shape)
    h = kl.Reshape((4, 4, 1))(x)
    r = kl.BatchNormalization()(kl.Conv2D(2, 3, padding="same", use_bias=False)(h))
    h = kl.MaxPooling2D(2)(kl.Activation("tanh")(kl.Add()([h, r])))
    return keras.Model(x, kl.Dense(outputs)(kl.Flatten()(h)))


RULE = Rule(batch_reduction="mean", last_activation="linear")
ERRORS = Rule(feedback="error", last_activation="linear", batch_reduction="mean", momentum="before")
LEARNERS = {
    "blur": lambda: learners.Blur((5,), RULE),
    "blur from errors": lambda: learners.Blur((5,), ERRORS),
    "blur of a network": lambda: learners.Blur(network, RULE).on((FEATURES,), CLASSES),
    "sgd": lambda: learners.BaselineLearner(keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0), (5,)),
    "adam": lambda: learners.BaselineLearner(keras.optimizers.Adam(0.01), (5,), "relu"),
    "rmsprop": lambda: learners.BaselineLearner(keras.optimizers.RMSprop(0.01), (5,), loss="squared"),
    "maml": lambda: learners.MAML(keras.optimizers.SGD(0.1), (5,), "tanh"),
    "prototypes": lambda: learners.Prototypes((5,), 4, "tanh"),
    "neural process": lambda: learners.NeuralProcess((5,), 4, "tanh"),
    "adam of a network": lambda: learners.BaselineLearner(keras.optimizers.Adam(0.01), residual).on((FEATURES,), CLASSES),
    "maml of a network": lambda: learners.MAML(keras.optimizers.SGD(0.1), residual).on((FEATURES,), CLASSES),
    "prototypes of a network": lambda: learners.Prototypes(residual, 4).on((FEATURES,), CLASSES),
    "neural process of a network": lambda: learners.NeuralProcess(residual, 4).on((FEATURES,), CLASSES),
    "online": lambda: learners.OnlineRule(hidden=5, units=FEATURES // 2),
    "warp": warp,
}


def made():
    """The state before the first step, and state and prediction after the third, of each
    learner."""
    found = {}
    for name, make in LEARNERS.items():
        learner, rng = make(), np.random.default_rng(0)
        outputs = FEATURES // 2 if name == "online" else CLASSES
        outer = learner.draw(0, 2, FEATURES, outputs) if isinstance(learner, learners.MetaLearner) else {}
        if name == "warp":  # which would start with the weights of its model, drawn by the backend
            outer = {key: 0.5 * rng.standard_normal(value.shape).astype("float32") for key, value in outer.items()}
        outer = {key: keras.ops.array(value[:, None]) for key, value in outer.items()}
        x = rng.standard_normal((3, 1, TASKS, BATCH, FEATURES)).astype("float32")
        y = 2.0 * np.eye(outputs, dtype="float32")[rng.integers(0, outputs, (3, 1, TASKS, BATCH))] - 1.0
        state = learner.init(outer, random.seed_of(3), FEATURES, outputs, (2, TASKS))
        found |= {f"{name}/start/{number}": leaf for number, leaf in enumerate(backend.leaves(state))}
        step = backend.compiled(learner.step)
        for now_x, now_y in zip(x, y, strict=True):
            state, prediction = step(outer, state, keras.ops.array(now_x), keras.ops.array(now_y))
        after = [*backend.leaves(state), prediction, learner.predict(outer, state, keras.ops.array(x[0]))]
        found |= {f"{name}/end/{number}": leaf for number, leaf in enumerate(after)}
    return {name: keras.ops.convert_to_numpy(value) for name, value in found.items()}


if __name__ == "__main__":
    np.savez(sys.argv[1], **made())
