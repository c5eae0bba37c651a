"""Layers are known by their path: equal names in models inside a model, layers that are used twice,
wrapped models."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_blur import bilevel, learners, meta, random, tasks
from keras_blur.learners.base import places, resolve
from keras_blur.meta.estimator import over_tasks

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
FEATURES, CLASSES = 4, 3


def dense(name, units=FEATURES, seed=0):
    return keras.layers.Dense(units, "tanh", name=name, kernel_initializer=keras.initializers.GlorotUniform(seed))


def block(model, name, seed=0):
    return keras.Sequential([keras.Input((FEATURES,)), dense(name, seed=seed)], name=model)


def nested():
    """Two models inside a model, each with a layer of the same name."""
    head = dense("head", CLASSES, 2)
    return keras.Sequential([keras.Input((FEATURES,)), block("first", "fc", 0), block("second", "fc", 1), head])


def shared():
    """A layer and a model that are used twice each."""
    given, layer, inner = keras.Input((FEATURES,)), dense("fc"), block("inner", "fc", 1)
    return keras.Model(given, dense("head", CLASSES, 2)(inner(layer(inner(layer(given))))))


def wrapped():
    return keras.Sequential([keras.Input((FEATURES,)), nested()])


def crossed():
    """Layers that are made in another order than they run in, and one beside the others."""
    given = keras.Input((FEATURES,))
    head, late, early, beside = (
        dense("head", CLASSES, 0),
        dense("late", seed=1),
        dense("early", seed=2),
        dense("beside", seed=3),
    )
    return keras.Model(given, head(keras.layers.Add()([late(early(given)), beside(given)])))


class Twins(keras.Model):
    """A subclass with two layers of one name, which Keras allows, and a weight beside its
    layers."""

    output_shape = (None, CLASSES)  # which Keras does not know of a subclass

    def __init__(self):
        super().__init__(name="twins")
        self.low, self.high = dense("fc", seed=0), dense("fc", CLASSES, 1)
        self.scale = self.add_weight(name="scale", shape=(CLASSES,), initializer="ones")

    def call(self, inputs):
        return self.high(self.low(inputs)) * self.scale


@keras.saving.register_keras_serializable(package="test_identity")
class Pair(keras.layers.Layer):
    """A layer with two weights of one name."""

    def build(self, input_shape):
        size = input_shape[-1]
        self.first = self.add_weight(name="w", shape=(size, size), initializer=keras.initializers.GlorotUniform(1))
        self.second = self.add_weight(name="w", shape=(size, size), initializer=keras.initializers.GlorotUniform(2))

    def call(self, inputs):
        return keras.ops.tanh(inputs @ self.first) @ self.second


def pair():
    return keras.Sequential([keras.Input((FEATURES,)), Pair(name="pair"), dense("head", CLASSES)])


def timed():
    """A model inside a wrapper around it."""
    return keras.Sequential(
        [keras.Input((FEATURES,)), keras.layers.Reshape((1, FEATURES)), keras.layers.TimeDistributed(block("inner", "fc")),
         keras.layers.Flatten(), dense("head", CLASSES)]
    )  # fmt: skip


def twins():
    made = Twins()
    made(np.zeros((1, FEATURES), "float32"))
    return made


MODELS = {
    "nested": nested, "shared": shared, "wrapped": wrapped, "crossed": crossed, "twins": twins, "pair": pair, "timed": timed,
}  # fmt: skip
FUNCTIONAL = [name for name in MODELS if name != "twins"]


def test_paths():
    assert list(places(nested())) == ["first/fc", "second/fc", "head"]
    assert [path for path, place in places(shared()).items() if place.weights] == ["fc", "inner/fc", "head"]
    assert [path.split("/", 1)[1] for path in list(places(wrapped()))] == ["first/fc", "second/fc", "head"]
    assert [path for path, place in places(twins()).items()] == ["twins", "fc", "fc_1"]


@pytest.mark.parametrize("name", MODELS)
def test_each_weight_has_one_place(name):
    model = MODELS[name]()
    found = [id(weight) for place in places(model).values() for weight in place.weights]
    assert len(found) == len(set(found)) == len(model.weights)


def test_layers_are_in_the_order_in_which_they_run():
    order = [path for path, place in places(crossed()).items() if place.weights]
    assert order.index("early") < order.index("late") < order.index("head")
    assert order[-1] == "head"


def test_names():
    paths = ["first/fc", "second/fc", "head", "fc_2", "second/deep/x"]
    assert resolve(["head", "second/fc", "x", "deep/x"], paths, "warp") == (
        "head", "second/fc", "second/deep/x", "second/deep/x",
    )  # fmt: skip
    assert resolve(["fc"], ["fc", "second/fc"], "warp") == ("fc",)  # a path comes before a name
    with pytest.raises(ValueError, match=r"`warp` must have the path .* one of first/fc, second/fc\. Received: 'fc'"):
        resolve(["fc"], paths, "warp")
    for wrong in (["c"], "head", [], [3]):
        with pytest.raises(ValueError, match=r"`warp` must be names of layers with weights, some of first/fc, second/fc,"):
            resolve(wrong, paths, "warp")


def data(count=24):
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, FEATURES)).astype("float32"), rng.integers(0, CLASSES, count)


def learned_weights(name, estimator):
    """Class weights after a step: by the size of the outer step, which the outer gradient has."""
    x, y = data()
    outer = bilevel.Hyperparameters(class_weights=CLASSES)
    made = bilevel.BilevelTrainer(MODELS[name](), outer, estimator)
    made.compile(keras.optimizers.SGD(0.5), keras.optimizers.SGD(100.0), LOSS, run_eagerly=True)
    made.fit(x, y, meta_data=(x[::-1].copy(), y[::-1].copy()), batch_size=24, verbose=0)
    return np.array(outer.class_logits)


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_are_the_exact_step(name):
    exact = learned_weights(name, bilevel.OneStep())
    assert np.abs(exact).max() > 1e-3
    np.testing.assert_allclose(learned_weights(name, bilevel.LayerwiseMetaGradient(None)), exact, rtol=1e-4, atol=1e-5)


def test_the_parts_of_layers_with_one_name_sum_to_the_whole():
    parts = [learned_weights("nested", bilevel.LayerwiseMetaGradient((path,))) for path in ("first/fc", "second/fc", "head")]
    assert np.abs(parts[0] - parts[1]).max() > 1e-4
    np.testing.assert_allclose(sum(parts), learned_weights("nested", bilevel.OneStep()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "estimator",
    [
        bilevel.LayerwiseMetaGradient(None, bilevel.GradientSampler(target=1, hidden=3)),
        bilevel.LayerwiseMetaGradient(("second/fc", "head")),
        bilevel.EvoGrad(2, scope=("first/fc",)),
    ],
)
def test_estimators_take_paths(estimator):
    assert np.isfinite(learned_weights("nested", estimator)).all()


@pytest.mark.parametrize(
    ("estimator", "argument"),
    [(bilevel.LayerwiseMetaGradient(("fc",)), "layers"), (bilevel.EvoGrad(2, scope=("fc",)), "scope")],
)
def test_a_name_of_several_layers_is_refused_with_their_paths(estimator, argument):
    with pytest.raises(ValueError, match=f"`{argument}` must have the path .* one of first/fc, second/fc"):
        bilevel.BilevelTrainer(nested(), bilevel.SampleWeightNet(), estimator)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_all_weights_are_outer_parameters_and_come_back(name, tmp_path):
    model = MODELS[name]()
    learner = learners.Warp(model, [], keras.optimizers.SGD(0.1))
    outer = learner.draw(0, 2, FEATURES, CLASSES)
    assert len(outer) == len(model.trainable_variables)
    x = data()[0]
    back = learner.learned({key: own[0] for key, own in outer.items()})
    np.testing.assert_allclose(back.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    other = learner.learned({key: own[1] for key, own in outer.items()})
    assert np.abs(other.predict(x, verbose=0) - model.predict(x, verbose=0)).max() > 0.05
    other.save(tmp_path / "learned.keras")
    for found in (learner.parameters(other), learner.parameters(tmp_path / "learned.keras")):
        assert found.keys() == outer.keys()
        for key, own in found.items():
            np.testing.assert_array_equal(own[0], outer[key][1])


@pytest.mark.parametrize(("name", "warp"), [("nested", "second/fc"), ("shared", "inner/fc"), ("pair", "pair")])
def test_warps_of_models_inside_a_model_are_held(name, warp):
    learner = learners.Warp(MODELS[name](), [warp], keras.optimizers.SGD(0.1))
    outer = learner.draw(0, 1, FEATURES, CLASSES)
    warps = [key for key in outer if key.startswith("warp_")]
    assert warps == [f"warp_{warp}_{index}" for index in range(2)]
    model = learner.learned({key: own[0] for key, own in outer.items()})
    x, y = data()
    adapted = learner.adapt(model, x, y, steps=3, batch_size=8)
    before, after = learner.parameters(model), learner.parameters(adapted)
    for key in outer:
        assert np.array_equal(before[key], after[key]) == key.startswith("warp_")


def test_a_compiled_model_with_a_loss_of_a_user_learns_with_warps():
    model = nested()
    model.compile("sgd", lambda y, prediction: ops.mean(ops.square(y - prediction), axis=-1))
    learner = learners.Warp(model, ["second/fc"], keras.optimizers.SGD(0.1))
    outer = learner.draw(0, 1, FEATURES, CLASSES)
    found = learner.learned({key: own[0] for key, own in outer.items()})
    assert model.compiled
    assert not found.compiled
    for key, own in learner.parameters(found).items():
        np.testing.assert_array_equal(own, outer[key])


def test_a_step_inside_is_the_step_of_keras():
    learner, (x, y) = learners.Warp(nested(), ["second/fc"], keras.optimizers.SGD(0.1)), data()
    drawn = learner.draw(0, 1, FEATURES, CLASSES)
    outer = over_tasks({key: ops.array(own) for key, own in drawn.items()})
    model = learner.learned({key: own[0] for key, own in drawn.items()})
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    state = learner.init(outer, random.seed_of(0), FEATURES, CLASSES, (1, 1))
    signs = 2.0 * np.eye(CLASSES, dtype="float32")[y] - 1.0
    for _ in range(2):
        state, _ = learner.step(outer, state, ops.array(x[None, None]), ops.array(signs[None, None]))
        model.train_on_batch(x, y)
    found = learner.predict(outer, state, ops.array(x[None, None]))[0, 0]
    np.testing.assert_allclose(found, model.predict(x, verbose=0), atol=1e-5)


def test_meta_training_of_nested_models_resumes(tmp_path):
    path, of = tmp_path / "run.weights.h5", tasks.functions("blobs3")

    def trainer():
        inner = keras.Sequential([keras.Input((2,)), dense("fc", 4)], name="inner")
        outer = keras.Sequential([keras.Input((4,)), dense("fc", CLASSES)], name="outer")
        model = keras.Sequential([keras.Input((2,)), inner, outer])
        learner = learners.Warp(model, ["inner/fc"], keras.optimizers.SGD(0.1))
        made = meta.MetaTrainer(of, learner, meta.WarpGrad(2), batch_size=4, query_size=6)
        made.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
        return made

    whole, first, second = trainer(), trainer(), trainer()
    whole.fit(2, 3, verbose=0)
    first.fit(1, 3, checkpoint=path, verbose=0)
    second.fit(2, 3, checkpoint=path, verbose=0)
    for key, own in whole.parameters().items():
        np.testing.assert_array_equal(second.parameters()[key], own)


def test_a_name_of_several_warps_is_refused_with_their_paths():
    with pytest.raises(ValueError, match=r"`warp` must have the path .* one of first/fc, second/fc"):
        learners.Warp(nested(), ["fc"], keras.optimizers.SGD(0.1))
    assert learners.Warp(nested(), ["head"], keras.optimizers.SGD(0.1)).warp == ("head",)


def test_a_layer_that_two_models_share_is_refused_where_it_must_be_copied():
    layer, given = dense("fc"), keras.Input((FEATURES,))
    inner = keras.Sequential([keras.Input((FEATURES,)), layer], name="inner")
    model = keras.Model(given, dense("head", CLASSES)(layer(inner(given))))
    with pytest.raises(ValueError, match="`model` must have each layer in one of the models inside it"):
        learners.Warp(model, [], keras.optimizers.SGD(0.1))
    assert sum(len(place.weights) for place in places(model).values()) == 4


@pytest.mark.parametrize(
    "learner",
    [learners.MAML(keras.optimizers.SGD(0.1), (5,)), learners.Prototypes((5,), CLASSES)],
    ids=["maml", "prototypes"],
)
def test_what_was_learned_is_found_inside_a_wrapper(learner):
    outer = learner.draw(0, 1, FEATURES, CLASSES)
    model = learner.learned({key: own[0] for key, own in outer.items()})
    around = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Rescaling(2.0), model, keras.layers.Dense(2)])
    for key, own in learner.parameters(around).items():
        np.testing.assert_array_equal(own, outer[key])
    with pytest.raises(ValueError, match="The model must have dense layers named"):
        learner.parameters(nested())
