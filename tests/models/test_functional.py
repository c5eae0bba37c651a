"""Functional models: the backprop genome on any graph is SGD of the Keras model that it came
from."""

import keras
import numpy as np
import pytest
from descent import RATE, ROUNDING, assert_descends, assert_same, named, randomized
from keras import layers as kl
from keras import ops
from marks import slow_but
from on_backend import JAX

import keras_blur as kb

RNG = np.random.default_rng(0)
IMAGES, ROWS, TWO = RNG.standard_normal((6, 6, 6, 2)), RNG.standard_normal((6, 5)), RNG.standard_normal((6, 2))
CLASSES = RNG.integers(0, 3, 6)
GENOME = kb.genomes.backprop(RATE)
CROSS = keras.losses.SparseCategoricalCrossentropy


def head(value, units=2):
    return kl.Dense(units, name="head")(kl.Flatten()(value) if len(value.shape) > 2 else value)


def residual():
    entry = keras.Input((6, 6, 2))
    first = kl.Conv2D(3, 3, padding="same", activation="tanh")(entry)
    inner = kl.Activation("tanh")(kl.BatchNormalization()(kl.Conv2D(3, 3, padding="same", use_bias=False)(first)))
    inner = kl.BatchNormalization()(kl.Conv2D(3, 3, padding="same", use_bias=False)(inner))
    second = kl.Activation("tanh")(kl.Add()([first, inner]))
    short = kl.Conv2D(4, 1, strides=2)(second)
    inner = kl.Conv2D(4, 3, strides=2, padding="same", activation="tanh")(second)
    return keras.Model(entry, head(kl.GlobalAveragePooling2D()(kl.ReLU()(kl.Add()([inner, short])))))


def branches():
    entry = keras.Input((6, 6, 2))
    stem = kl.Conv2D(3, 3, padding="same", activation="tanh")(entry)
    parts = [
        kl.Conv2D(2, 1, activation="relu")(stem),
        kl.Conv2D(2, 3, padding="same")(stem),
        kl.MaxPooling2D(3, 1, "same")(stem),
        kl.Conv2D(2, 1)(kl.AveragePooling2D(3, 1, "same")(stem)),
    ]
    return keras.Model(entry, head(kl.MaxPooling2D(2)(kl.Concatenate()(parts))))


def separable():
    entry = keras.Input((6, 6, 2))
    value = kl.DepthwiseConv2D(3, padding="same", depth_multiplier=2, use_bias=False)(entry)
    value = kl.ReLU(6.0)(kl.BatchNormalization()(value))
    value = kl.Conv2D(3, 1, use_bias=False)(value)
    value = kl.SeparableConv2D(3, 3, activation="tanh")(kl.BatchNormalization()(value))
    return keras.Model(entry, head(value))


def autoencoder():
    entry = keras.Input((6, 6, 2))
    value = kl.Conv2D(3, 3, strides=2, padding="same", activation="tanh")(entry)
    value = kl.Conv2D(2, 3, activation="tanh")(kl.ZeroPadding2D(1)(kl.UpSampling2D(2)(value)))
    skip = kl.Cropping2D(1)(kl.Conv2DTranspose(2, 3, activation="tanh")(value))
    return keras.Model(entry, head(kl.Multiply()([value, skip])))


def operations():
    entry = keras.Input((5,))
    first = kl.Dense(4, "tanh")(entry)
    gate = ops.sigmoid(kl.Dense(4)(first))
    value = ops.concatenate([gate * first, 2.0 - ops.square(first)], axis=-1)
    value = ops.transpose(ops.reshape(value, (-1, 2, 4)), (0, 2, 1))
    value = ops.logsumexp(kl.Dense(3, "tanh")(value), axis=1)
    return keras.Model(entry, head(value[:, :2] / (1.0 + ops.abs(value[:, 1:]))))


def gated():
    """Squeeze and excitation: a branch scales the channels of an image."""
    entry = keras.Input((6, 6, 2))
    value = kl.Conv2D(4, 3, activation="tanh")(entry)
    scale = kl.Dense(2, "relu")(kl.GlobalAveragePooling2D()(value))
    scale = kl.Reshape((1, 1, 4))(kl.Dense(4, "sigmoid")(scale))
    return keras.Model(entry, head(kl.GlobalMaxPooling2D()(kl.Multiply()([value, scale]))))


def transformer():
    entry = keras.Input((5,), dtype="int32")
    value = kl.Add()([kl.Embedding(7, 4)(entry), kl.Embedding(7, 4)(entry)])
    inner = kl.LayerNormalization()(value)
    value = kl.Add()([value, kl.MultiHeadAttention(2, 3, name="attention")(inner, inner, use_causal_mask=True)])
    inner = kl.Dense(6, "gelu")(kl.LayerNormalization()(value))
    return keras.Model(entry, head(kl.Add()([value, kl.Dense(4)(inner)])))


def nested():
    entry = keras.Input((5,))
    block = keras.Sequential([keras.Input((5,)), kl.Dense(4, "tanh", name="fc"), kl.Dense(5, name="out")], name="block")
    inner = keras.Input((5,))
    functional = keras.Model(inner, kl.Add()([kl.Dense(5, "tanh", name="fc2")(inner), inner]), name="inner")
    return keras.Model(entry, head(functional(block(functional(entry)))))


def shared():
    entry = keras.Input((5,))
    layer = kl.Dense(5, "tanh", name="shared")
    return keras.Model(entry, head(layer(layer(layer(entry)))))


GRAPHS = {
    "residual": (residual, IMAGES), "branches": (branches, IMAGES), "separable": (separable, IMAGES),
    "autoencoder": (autoencoder, IMAGES), "operations": (operations, ROWS), "gated": (gated, IMAGES),
    "transformer": (transformer, RNG.integers(0, 7, (6, 5))), "nested": (nested, ROWS), "shared": (shared, ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_learns_as_under_sgd(name, float64):
    make, x = GRAPHS[name]
    assert_descends(randomized(make()), x, TWO, still={"attention/key/bias"})  # a softmax does not see that bias


@pytest.mark.parametrize("name", GRAPHS)
def test_conversion_and_back_keep_names_and_weights(name, float64):
    make, x = GRAPHS[name]
    twin = randomized(make())
    model = kb.convert(twin, GENOME)
    assert model.name == twin.name
    assert [layer.name for layer in model.layers] == [one.name for one in twin.layers if type(one).__name__ != "InputLayer"]
    back = model.to_keras()
    assert_same(named(back), named(twin), 0.0)
    near = max(1e-12, ROUNDING)
    np.testing.assert_allclose(back(x), twin(x), rtol=near, atol=near)
    np.testing.assert_allclose(model(x), twin(x), rtol=near, atol=near)


@pytest.mark.parametrize("name", slow_but(["residual", "transformer"], GRAPHS))
def test_a_file_gives_the_model_back(name, tmp_path):
    make, x = GRAPHS[name]
    model = kb.convert(randomized(make()), kb.Genome.random(kb.Rule(states=3), seed=0, std=0.3, synapse_update=-0.01))
    model.compile(loss="mean_squared_error", jit_compile=JAX, run_eagerly=not JAX)
    model.train_on_batch(x, TWO)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.genome == model.genome
    for found, wanted in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(loaded(x), model(x))
    losses = [one.train_on_batch(x, TWO) for one in (model, loaded)]
    assert losses[0] == losses[1]


# Arguments of a call.

TENSORS = [RNG.standard_normal((6, 5, 4)) for _ in range(3)]


class Twice(kl.Layer):
    def call(self, inputs, training=None):
        return 2.0 * inputs if training else inputs


class Keywords(kl.Layer):
    def call(self, first, *, second, another):
        return first * second - ops.tanh(another)


def swapped_names(one, two, three):
    """A nested model with inputs that are not in alphabetical order, called with a dict."""
    second, first = keras.Input((5, 4), name="second"), keras.Input((5, 4), name="first")
    inner = keras.Model([second, first], kl.Subtract()([second, kl.Activation("tanh")(first)]))
    return inner({"first": one, "second": kl.Add()([two, three])})


CALLS = {
    "key and value": lambda q, v, k: kl.MultiHeadAttention(2, 3, name="mha")(q, key=k, value=v),
    "query and value": lambda q, v, k: kl.MultiHeadAttention(2, 3, name="mha")(value=v, query=kl.Add()([q, k])),
    "own layer": lambda q, v, k: Keywords()(q, second=v, another=k),
    "operation": lambda q, v, k: kl.Add()([ops.subtract(x2=q, x1=ops.tanh(v)), k]),
    "nested": swapped_names,
    "in training": lambda q, v, k: Twice()(kl.Add()([q, v, k])),
    "function in training": lambda q, v, k: kl.Lambda(
        lambda x, training=False: x * x if training else x, output_shape=(5, 4)
    )(kl.Add()([q, v, k])),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_have_the_places_of_the_signature(name, float64):
    entries = [keras.Input((5, 4)) for _ in range(3)]
    inner = CALLS[name](*(kl.Dense(4, "tanh")(entry) for entry in entries))
    assert_descends(randomized(keras.Model(entries, head(inner))), TENSORS, TWO, still={"mha/key/bias"})


MASKED = {
    "pooling": lambda value, mask: kl.GlobalAveragePooling1D()(value, mask=mask),
    "softmax": lambda value, mask: kl.Dot(1)([kl.Softmax()(kl.Dense(1, use_bias=False)(value)[..., 0], mask=mask), value]),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_in_a_call_is_used_in_both_passes(name, float64):
    entry, mask = keras.Input((5, 4)), keras.Input((5,), dtype="bool")
    twin = randomized(keras.Model([entry, mask], head(MASKED[name](kl.Dense(4, "tanh")(entry), mask))))
    assert_descends(twin, [TENSORS[0], np.arange(5) < np.array([[1, 2, 3, 4, 5, 2]]).T], TWO)


class NotZero(kl.Layer):
    def compute_mask(self, inputs, previous_mask=None):
        return ops.any(ops.not_equal(inputs, 0.0), axis=-1)

    def call(self, inputs):
        return inputs


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.filterwarnings("ignore:.*does not support masking")
def test_masks_that_layers_make_are_refused(behind):
    entry = keras.Input((5, 4))
    value = NotZero()(kb.layers.Dense(4)(entry) if behind else entry)
    value = kl.GlobalAveragePooling1D(name="odd")(value) if behind else kb.layers.Dense(4, name="odd")(value)
    with pytest.raises(ValueError, match="Layer 'odd' must not read a mask"):
        kb.Model(entry, kb.layers.Dense(2)(value), genome=GENOME)


def test_a_layer_inside_a_preparing_layer_knows_of_training():
    class Outer(kl.Layer):
        def __init__(self):
            super().__init__()
            self.inner = Twice()

        def call(self, inputs):
            return self.inner(inputs)

    entry = keras.Input((3,))
    dense = kb.layers.Dense(1, "linear", kernel_initializer="ones", name="head")
    model = kb.Model(entry, dense(Outer()(entry)), genome=kb.genomes.backprop(1e-12))
    model.compile(loss="mean_squared_error", run_eagerly=True)
    x, y = np.ones((2, 3)), np.zeros((2, 1))
    assert [model.train_on_batch(x, y), model.test_on_batch(x, y)] == pytest.approx([36.0, 9.0])


@pytest.mark.parametrize("kind", ["SpatialDropout2D", "SpatialDropout3D"])
def test_dropout_of_channels_that_come_first(kind):
    entry = keras.Input((40, 2, 3, 2)[: int(kind[-2]) + 1])
    one = [kb.layers.Dense(entry.shape[-1], "linear", kernel_initializer="identity") for _ in range(2)]
    value = getattr(kl, kind)(0.5, data_format="channels_first", seed=1)(one[0](entry))
    model = kb.Model(entry, one[1](value), genome=GENOME)
    kept = np.array(model(np.ones((3, *entry.shape[1:])), training=True)) != 0.0
    share = kept.reshape(3, 40, -1).mean(-1)
    assert set(share.ravel()) == {0.0, 1.0}
    assert 0.3 < share.mean() < 0.7


# Inputs and outputs.


def test_inputs_have_the_type_of_the_entry(float64):
    entry = keras.Input((5,), dtype="int32")
    assert_descends(randomized(keras.Model(entry, head(entry))), 5.0 * ROWS, TWO)


def test_an_output_without_features_is_refused():
    entry = keras.Input((5,))
    with pytest.raises(ValueError, match=r"`outputs` must have axes of features.*Received shape \(None,\)"):
        kb.Model(entry, kl.Reshape(())(kb.layers.Dense(1)(entry)), genome=GENOME)


def two_by_two():
    left, right = keras.Input((5,), name="left"), keras.Input((6, 6, 2), name="right")
    inner = kl.Flatten()(kl.Conv2D(2, 3, activation="tanh")(right))
    both = kl.Concatenate()([kl.Dense(4, "tanh")(left), kl.Dense(3, "tanh")(inner)])
    first = kl.Dense(2, name="first")(both)
    second = kl.Dense(3, "softmax", name="second")(kl.Concatenate()([both, first]))
    return keras.Model([left, right], [first, second])


@pytest.mark.parametrize("form", ["list", "dict"])
def test_two_inputs_and_two_outputs(form, float64):
    x, y = [ROWS, IMAGES], [TWO, CLASSES]
    options = {"loss": ["mean_squared_error", CROSS()], "loss_weights": [0.5, 2.0]}
    if form == "dict":
        x, y = dict(zip(("left", "right"), x, strict=True)), dict(zip(("first", "second"), y, strict=True))
        options = {name: dict(zip(("first", "second"), value, strict=True)) for name, value in options.items()}
    assert_descends(randomized(two_by_two()), x, y, **options)


@pytest.mark.parametrize("kind", [list, tuple])
def test_one_output_in_a_list_is_that_output(kind):
    """As in Keras, where `predict`, `fit` and a call give an array."""
    entry = keras.Input((5,))
    twin = keras.Model(entry, kind([kl.Dense(2)(entry)]))
    model = kb.convert(twin, GENOME)
    model.compile(loss="mean_squared_error")
    model.fit(ROWS, TWO, verbose=0)
    for one in (model, twin):
        assert [np.shape(one(ROWS)), np.shape(one.predict(ROWS, verbose=0)), type(one.predict_on_batch(ROWS))] == [
            (6, 2), (6, 2), np.ndarray
        ]  # fmt: skip


def test_an_output_that_is_read_again_gets_both_errors(float64):
    entry = keras.Input((5,))
    early = kl.Dense(3, "tanh", name="early")(entry)
    late = kl.Dense(2, name="late")(kl.Dense(4, "tanh")(early))
    model = randomized(keras.Model(entry, [early, late]))
    y = [RNG.standard_normal((6, 3)), TWO]
    assert_descends(model, ROWS, y, loss=["mean_squared_error", "mean_absolute_error"], loss_weights=[1.0, 0.3])


def test_a_siamese_net(float64):
    left, right = keras.Input((5,)), keras.Input((5,))
    arm = keras.Sequential([keras.Input((5,)), kl.Dense(4, "tanh"), kl.Dense(3, "tanh")], name="arm")
    distance = kl.Dot(1, normalize=True)([arm(left), arm(right)])
    model = randomized(keras.Model([left, right], kl.Dense(1, name="head")(distance)))
    assert_descends(model, [ROWS, ROWS[::-1].copy()], TWO[:, :1], loss="squared_hinge")


def test_a_layer_may_be_shared_between_depths_and_inputs(float64):
    left, right = keras.Input((4, 5)), keras.Input((5,))
    layer = kl.Dense(5, "tanh", name="shared")
    value = kl.Add()([kl.GlobalAveragePooling1D()(layer(left)), layer(right)])
    model = randomized(keras.Model([left, right], head(value)))
    assert_descends(model, [RNG.standard_normal((6, 4, 5)), ROWS], TWO)


@pytest.mark.parametrize("frozen", [["first"], ["second"], ["first", "norm"], ["head"]])
def test_frozen_layers(frozen, float64):
    entry = keras.Input((5,))
    value = kl.Dense(4, "tanh", name="first")(entry)
    value = kl.BatchNormalization(name="norm")(kl.Dense(4, use_bias=False, name="second")(value))
    twin = randomized(keras.Model(entry, head(kl.Activation("tanh")(value))))
    for name in frozen:
        twin.get_layer(name).trainable = False
    before = named(twin)
    model = assert_descends(twin, ROWS, TWO)
    after = named(model.to_keras())
    for name, value in before.items():
        if name.split("/")[0] in frozen:
            np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize("frozen", ["first", "second"])
def test_a_frozen_layer_predicts_with_its_synapses_beside_slow_ones(frozen):
    """Averages of a layer that never learned were zeros, which the prediction read."""
    entry = keras.Input((5,))
    twin = randomized(keras.Model(entry, kl.Dense(2, name="second")(kl.Dense(4, "relu", name="first")(entry))))
    model = kb.convert(twin, kb.genomes.load("fast"))
    model.get_layer(frozen).trainable = False
    model.compile(loss="mean_squared_error", jit_compile=False)
    model.fit(ROWS, TWO, epochs=3, verbose=0)
    back = model.to_keras()
    kernels = {name: one.get_layer(frozen).kernel for name, one in (("twin", twin), ("back", back))}
    np.testing.assert_array_equal(kernels["back"], kernels["twin"])
    np.testing.assert_allclose(model.predict(ROWS, verbose=0), back.predict(ROWS, verbose=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"slow_synapses": True}, {"normalize_activations": "both"}])
def test_a_frozen_model_predicts_while_another_one_trains(options):
    """As in Keras: only dropout takes notice of `training`."""
    entry = keras.Input((5,))
    norm = kb.layers.BatchNormalization()
    genome = kb.Genome.random(kb.Rule(**options), seed=0)
    model = kb.Model(entry, kl.Dropout(0.5)(kb.layers.Dense(64)(norm(kb.layers.Dense(4)(entry)))), genome=genome)
    model.compile(loss="mean_squared_error")
    model.fit(np.repeat(ROWS, 4, axis=0), np.ones((24, 64)), batch_size=6, epochs=3, verbose=0)
    assert np.abs(np.array(model(ROWS, training=True)) - np.array(model(ROWS))).max() > 1e-3
    model.trainable = False
    dropped, whole = np.array(model(ROWS, training=True)), np.array(model(ROWS))
    stays = dropped != 0.0
    assert 0.2 < stays.mean() < 0.8
    np.testing.assert_allclose(dropped[stays], 2.0 * whole[stays], rtol=1e-5, atol=1e-6)


def attention():
    entry = keras.Input((5, 2))
    return entry, kl.MultiHeadAttention(2, 2, trainable=False, name="frozen")(entry, entry)


def separable():
    entry = keras.Input((6, 6, 2))
    return entry, kl.SeparableConv2D(3, 3, trainable=False, name="frozen")(entry)


@pytest.mark.parametrize("make", [attention, separable])
def test_a_frozen_layer_of_several_parts_stays_as_it_is(make, tmp_path):
    entry, value = make()
    twin = randomized(keras.Model(entry, head(value)))
    x = RNG.standard_normal((6, *entry.shape[1:]))
    model = kb.convert(twin, kb.genomes.backprop(0.1))
    model.compile(loss="mean_squared_error", jit_compile=False)
    model.save(tmp_path / "m.keras")
    for one in (model, keras.models.load_model(tmp_path / "m.keras")):
        before = named(one)
        one.fit(x, TWO, verbose=0)
        moved = {name for name, value in named(one).items() if np.any(value != before[name])}
        assert {name.split("/")[0] for name in moved} - {"learning_step"} == {"head"}
        one.get_layer("frozen").trainable = True
        one.compile(loss="mean_squared_error", jit_compile=False)
        one.fit(x, TWO, verbose=0)
        assert any("frozen" in name and np.any(value != before[name]) for name, value in named(one).items())


@pytest.mark.parametrize("merge", [kl.Add, kl.Subtract, kl.Concatenate])
def test_a_merge_may_begin_with_an_input(merge, float64):
    entry = keras.Input((5,))
    value = kl.Dense(5, "tanh", name="first")(entry)
    inner = kl.Dense(5, name="second")(merge()([entry, value]))
    twin = randomized(keras.Model(entry, merge()([entry, inner])))
    assert_descends(twin, ROWS, RNG.standard_normal((6, twin.output_shape[-1])))


def test_frozen_layers_of_a_file_and_a_clone(tmp_path):
    entry = keras.Input((5,))
    value = kl.Dense(3, name="second")(kl.Dense(4, "tanh", trainable=False, name="first")(entry))
    model = kb.convert(keras.Model(entry, value), kb.genomes.backprop(0.1, loss="mean_squared_error"))
    model.compile(loss="mean_squared_error", jit_compile=False)
    model.save(tmp_path / "m.keras")
    for other in (keras.models.load_model(tmp_path / "m.keras"), keras.models.clone_model(model)):
        assert [other.get_layer(name).trainable for name in ("first", "second")] == [False, True]


# Losses of what the head gives.

HEADS = {
    "softmax of probabilities": (lambda: kl.Dense(3, "softmax", name="head"), CROSS, CLASSES),
    "softmax layer": (lambda: keras.Sequential([kl.Dense(3), kl.Softmax()]), CROSS, CLASSES),
    "one-hot": (
        lambda: kl.Dense(3, "softmax"), lambda: keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        np.eye(3)[CLASSES],
    ),
    "sigmoid": (lambda: kl.Dense(2, "sigmoid"), "mean_squared_error", np.abs(TWO)),
    "softmax of squares": (lambda: kl.Dense(3, "softmax"), "mean_squared_error", np.eye(3)[CLASSES]),
    "weightless end": (lambda: keras.Sequential([kl.Dense(6), kl.Reshape((2, 3)), kl.GlobalMaxPooling1D()]),
        lambda: CROSS(from_logits=True), CLASSES),
    "unit vectors": (lambda: keras.Sequential([kl.Dense(2), kl.UnitNormalization()]), "cosine_similarity", TWO),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_what_follows_the_last_synapses(name, float64):
    make, loss, y = HEADS[name]
    loss = loss() if callable(loss) else loss  # made here, so that it computes in float64
    entry = keras.Input((5,))
    twin = randomized(keras.Model(entry, make()(kl.Dense(4, "tanh")(entry))))
    assert_descends(twin, ROWS, y, loss=loss)


def test_weights_of_examples(float64):
    entry = keras.Input((6, 6, 2))
    twin = randomized(keras.Model(entry, head(kl.Conv2D(3, 3, activation="tanh")(entry), 3)))
    weight = 0.5 * np.arange(6)
    assert_descends(twin, IMAGES, CLASSES, loss=CROSS(from_logits=True), sample_weight=weight)


# Any layer without weights, between two dense ones.


def sorted_features(x):
    return ops.sort(x, axis=-1)


WEIGHTLESS = {
    "leaky": (lambda: kl.LeakyReLU(0.2), (6,)),
    "elu": (lambda: kl.ELU(), (6,)),
    "softmax": (lambda: kl.Softmax(), (6,)),
    "softmax over positions": (lambda: kl.Softmax(axis=1), (3, 2)),
    "activation": (lambda: kl.Activation("silu"), (6,)),
    "rescaling": (lambda: kl.Rescaling(0.5, 0.3), (6,)),
    "max pooling": (lambda: kl.MaxPooling1D(3, 2, "same"), (6, 2)),
    "average pooling": (lambda: kl.AveragePooling2D(2), (4, 4, 2)),
    "padding": (lambda: kl.ZeroPadding1D(2), (3, 2)),
    "upsampling": (lambda: kl.UpSampling1D(2), (3, 2)),
    "cropping": (lambda: kl.Cropping1D(1), (4, 2)),
    "resizing": (lambda: kl.Resizing(3, 5, pad_to_aspect_ratio=True, fill_value=2.0), (4, 4, 2)),
    "permutation": (lambda: kl.Permute((2, 1)), (3, 2)),
    "repetition": (lambda: kl.RepeatVector(3), (4,)),
    "unit norm": (lambda: kl.UnitNormalization(), (5,)),
    "no dropout": (lambda: kl.Dropout(0.0), (5,)),
    "identity": (lambda: kl.Identity(), (5,)),
    "function": (lambda: kl.Lambda(lambda x: x * keras.ops.tanh(x), output_shape=(5,)), (5,)),
    "sorting": (lambda: kl.Activation(sorted_features), (5,)),
}


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_any_layer_without_weights(name, float64):
    make, shape = WEIGHTLESS[name]
    inner = [kl.Dense(int(np.prod(shape)), "linear"), kl.Reshape(shape), make(), kl.Flatten(), kl.Dense(2)]
    assert_descends(randomized(keras.Sequential([keras.Input((5,)), *inner])), ROWS, TWO, steps=3)


def test_a_dropout_of_everything_gives_zeros():
    model = kb.Sequential(
        [keras.Input((5,)), kb.layers.Dense(4), kl.Dropout(1.0), kb.layers.Dense(2)], genome=kb.genomes.backprop(0.1)
    )
    model.compile(loss="mean_squared_error")
    loss = model.train_on_batch(ROWS, TWO)
    np.testing.assert_allclose(loss, np.mean(TWO**2), rtol=1e-5)
    assert all(np.all(np.isfinite(value)) for value in named(model).values())


@pytest.mark.parametrize("value_dim", [2, 6])
def test_dropout_of_attention_has_a_mask_for_each_example(value_dim):
    entry = keras.Input((3, 4))
    layer = kb.layers.MultiHeadAttention(2, 4, value_dim=value_dim, dropout=0.5, seed=1)
    model = kb.Model(entry, kb.layers.Dense(2)(kl.Flatten()(layer(entry, entry))), genome=kb.genomes.backprop(0.1))
    model.compile(loss="mean_squared_error")
    model.fit(RNG.standard_normal((6, 3, 4)), TWO, verbose=0)
    alike = np.repeat(RNG.standard_normal((1, 3, 4)), 6, axis=0).astype("float32")
    outputs = np.array(layer(alike, alike, training=True))
    assert min(np.abs(outputs[place] - outputs[0]).max() for place in range(1, 6)) > 1e-4
    np.testing.assert_array_equal(*np.array(layer(alike, alike))[:2])


def test_dropout_has_one_mask_for_both_passes(float64):
    """With the mask of a step known, a step is SGD of the network times that mask."""
    keras.utils.set_random_seed(3)
    entry = keras.Input((5,))
    value = kb.layers.Dense(8, "tanh", name="first")(entry)
    value = kl.Dropout(0.5, name="dropout")(value)
    model = kb.Model(entry, kb.layers.Dense(2, name="head")(value), genome=GENOME)
    model.compile(loss="mean_squared_error", run_eagerly=True)
    masks = []
    (one,) = (one.map for one in model.reading.graph.operations if hasattr(one, "map"))
    context = one.context
    one.context = lambda states, training: masks.append(context(states, training)) or masks[-1]
    twin = keras.Model(entry, model.to_keras()(entry))
    for _ in range(3):
        plain = model.to_keras()
        mask = keras.Input((8,))
        masked = kl.Multiply()([plain.get_layer("first")(entry), mask])
        twin = keras.Model([entry, mask], plain.get_layer("head")(masked))
        twin.compile(keras.optimizers.SGD(RATE), "mean_squared_error", jit_compile=JAX)
        loss = model.train_on_batch(ROWS, TWO)
        assert loss == pytest.approx(twin.train_on_batch([ROWS, np.reshape(masks[-1], (6, 8))], TWO), rel=1e-5)
        assert_same(named(model.to_keras()), named(plain), 1e-9)
    drawn = [mask for mask in masks if mask is not None]  # none where JAX's trainer looks at shapes
    assert len(drawn) == 3
    assert 0.2 < np.mean(np.array(drawn) == 0.0) < 0.8


# What is kept and what is refused.


def test_moving_statistics_go_over_and_back(float64):
    twin = randomized(residual())
    model = kb.convert(twin, GENOME)
    model.compile(loss="mean_squared_error", jit_compile=JAX)
    twin.compile(keras.optimizers.SGD(RATE), "mean_squared_error", jit_compile=JAX)
    for one in (model, twin):
        one.fit(IMAGES, TWO, batch_size=3, epochs=2, shuffle=False, verbose=0)
    near = {"rtol": max(1e-9, ROUNDING), "atol": max(1e-12, ROUNDING)}
    np.testing.assert_allclose(model.predict(IMAGES, verbose=0), twin.predict(IMAGES, verbose=0), **near)
    np.testing.assert_allclose(model.to_keras()(IMAGES), twin(IMAGES), **near)


def test_fresh_statistics_are_unbiased_after_one_batch(float64):
    entry = keras.Input((5,))
    layer = kb.layers.BatchNormalization(name="norm", momentum=0.9)
    model = kb.Model(entry, kb.layers.Dense(2)(layer(kb.layers.Dense(4, "tanh", name="first")(entry))), genome=GENOME)
    model.compile(loss="mean_squared_error", jit_compile=JAX)
    hidden = np.array(model.get_layer("first")(ROWS))
    model.train_on_batch(ROWS, TWO)
    np.testing.assert_allclose(layer.moving_mean, hidden.mean(0), rtol=1e-9)
    np.testing.assert_allclose(layer.moving_variance, hidden.var(0), rtol=1e-9)


class Own(kl.Layer):
    def build(self, shape):
        self.scale = self.add_weight(name="scale", shape=shape[1:])

    def call(self, inputs):
        return inputs * self.scale


class Draws(kl.Layer):
    def compute_output_shape(self, shape):
        return shape

    def call(self, inputs):
        return inputs + keras.random.normal(ops.shape(inputs))


class Half(keras.Model):
    def call(self, inputs):
        return 0.5 * super().call(inputs)


def half():
    entry = keras.Input((4, 3))
    return Half(entry, kl.Activation("tanh")(entry), name="odd")


REFUSED = {
    "LSTM": (lambda: kl.LSTM(3, name="odd"), (4, 3)),
    "PReLU": (lambda: kl.PReLU(name="odd"), (4, 3)),
    "Own": (lambda: Own(name="odd"), (4, 3)),
    "GaussianNoise": (lambda: kl.GaussianNoise(0.1, name="odd"), (4, 3)),
    "Conv1DTranspose": (lambda: kl.Conv1DTranspose(3, 2, name="odd"), (4, 3)),
    "Bidirectional": (lambda: kl.Bidirectional(kl.LSTM(3), name="odd"), (4, 3)),
    "Masking": (lambda: kl.Masking(name="odd"), (4, 3)),
    "TimeDistributed": (lambda: kl.TimeDistributed(kl.Dropout(0.5), name="odd"), (4, 3)),
    "Draws": (lambda: Draws(name="odd"), (4, 3)),
    "Half": (half, (4, 3)),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*does not support masking")
def test_layers_that_cannot_learn_by_a_genome_are_refused_by_name(name):
    make, shape = REFUSED[name]
    for way in ("convert", "model"):
        entry = keras.Input(shape)
        dense = kl.Dense if way == "convert" else kb.layers.Dense
        value = make()(dense(3)(entry))
        value = dense(2)(kl.Flatten()(value) if len(value.shape) > 2 else value)
        with pytest.raises(ValueError, match=rf"Layer 'odd' .*{name}"):
            kb.convert(keras.Model(entry, value), GENOME) if way == "convert" else kb.Model(entry, value, genome=GENOME)


class Doubled(kb.layers.Dense):
    def call(self, inputs):
        return 2.0 * super().call(inputs)


def test_a_layer_of_neurons_with_a_call_of_its_own_is_refused():
    entry = keras.Input((4,))
    with pytest.raises(ValueError, match=r"Layer 'odd' must not have a `call` of its own.*Received: Doubled"):
        kb.Model(entry, kb.layers.Dense(2)(Doubled(3, name="odd")(entry)), genome=GENOME)


def test_keras_layers_with_a_twin_name_it():
    entry = keras.Input((4, 3))
    for layer in (kl.Dense(2, name="odd"), kl.LayerNormalization(name="odd"), kl.Conv1D(2, 1, name="odd")):
        value = kb.layers.Dense(2)(kl.Flatten()(layer(entry)))
        with pytest.raises(ValueError, match=rf"'odd' .*keras_blur\.layers\.{type(layer).__name__} in its place"):
            kb.Model(entry, value, genome=GENOME)


def test_noise_before_the_first_synapses_prepares_the_input():
    entry = keras.Input((4,))
    model = kb.Model(entry, kb.layers.Dense(2)(kl.GaussianNoise(0.5)(entry)), genome=GENOME)
    x = np.ones((3, 4), "float32")
    np.testing.assert_array_equal(model(x), model(x))
    assert np.abs(np.array(model(x, training=True)) - model(x)).max() > 1e-3


def test_several_inputs_are_checked_for_numbers_and_lengths():
    a, b = keras.Input((3,)), keras.Input((2,))
    model = kb.Model([a, b], kb.layers.Dense(2)(kl.Concatenate()([a, b])), genome=kb.genomes.backprop())
    model.compile(loss="mean_squared_error")
    x, y = [np.ones((4, 3)), np.ones((4, 2))], np.ones((4, 2))
    model.fit(x, y, verbose=0)
    broken = [x[0], np.full((4, 2), np.nan)]
    for wrong, labels, message in (
        (broken, y, "`x` must be finite"),
        ([x[0], np.ones((3, 2))], y, "`x` must have as many examples as the first array, 4"),
        (x, np.full((4, 2), np.inf), "`y` must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(wrong, labels, verbose=0)


def test_groups_of_layers_have_genomes_of_their_own():
    def network(names):
        image = keras.Input((6, 6, 2))
        h = kb.layers.Dense(4)(kl.Flatten()(kb.layers.Conv2D(3, 3)(image)))
        genome = kb.Genome.random(kb.Rule(layers=names), seed=0)
        return kb.Model(image, kb.layers.Dense(2, name="head")(h), genome=genome)

    model = network(("Conv*", "head", "*"))
    assert model.reading.graph.groups == (0, 2, 1)
    still = np.array([-1e-3, 0.0, -1e-3], "float32")
    model.genome = model.genome.replace(synapse_update=still)
    before = [np.array(weight) for weight in model.trainable_weights]
    model.compile(loss="mean_squared_error")
    model.fit(np.ones((4, 6, 6, 2)), np.ones((4, 2)), verbose=0)
    moved = {
        weight.path.split("/")[0].rstrip("_0123456789"): not np.array_equal(old, weight)
        for weight, old in zip(model.trainable_weights, before, strict=True)
        if weight.name == "kernel"
    }
    assert moved == {"conv2d": True, "dense": True, "head": False}
    with pytest.raises(ValueError, match="has none for 'dense"):
        network(("Conv*", "head"))


def test_a_dropout_after_the_last_layer_drops_in_training():
    entry = keras.Input((5,))
    output = kl.Dropout(0.5, seed=1)(kb.layers.Dense(400, kernel_initializer="ones")(entry))
    model = kb.Model(entry, output, genome=kb.genomes.backprop(0.0625))
    model.compile(loss="mean_squared_error", run_eagerly=True)
    model.train_on_batch(np.ones((1, 5)), np.zeros((1, 400)))
    moved = np.any(np.array(model.trainable_weights[0])[0] != 1.0, axis=0)
    assert 120 < moved.sum() < 280  # dropped units got no error
    assert np.all(model.predict(np.ones((1, 5)), verbose=0) != 0.0)


def test_a_normalisation_after_the_last_layer_takes_the_batch_in_training(float64):
    entry = keras.Input((5,))
    value = kl.Dense(3, use_bias=False, name="head")(kl.Dense(4, "tanh")(entry))
    model = randomized(keras.Model(entry, kl.BatchNormalization(center=False, scale=False)(value)))
    assert_descends(model, ROWS, RNG.standard_normal((6, 3)), loss="mean_squared_error")


def test_labels_of_several_outputs_take_one_weight_an_example():
    entry = keras.Input((3,))
    hidden = kb.layers.Dense(4)(entry)
    outputs = [kb.layers.Dense(2, name="one")(hidden), kb.layers.Dense(2, name="two")(hidden)]
    model = kb.Model(entry, outputs, genome=kb.Genome.random(kb.Rule(), seed=0))
    ignoring = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    with pytest.raises(ValueError, match="`loss` must not ignore a class"):
        model.compile(loss=[ignoring, ignoring])
    model.compile(loss=["mean_squared_error"] * 2, run_eagerly=True)
    x, y, weight = RNG.standard_normal((4, 3)), [np.ones((4, 2))] * 2, np.array([0.5, 2.0, 0.0, 1.0])
    start, found = model.get_weights(), []

    class Batches(keras.utils.PyDataset):
        num_batches = 1

        def __getitem__(self, index):
            return x, tuple(y), self.weight

    def batches(weight):
        made = Batches()
        made.weight = tuple(weight) if isinstance(weight, list) else weight
        return made

    ways = {
        "batch": lambda weight: model.train_on_batch(x, y, weight),
        "arrays": lambda weight: model.fit(x, y, sample_weight=weight, verbose=0),
        "PyDataset": lambda weight: model.fit(batches(weight), verbose=0),
        "generator": lambda weight: model.fit((batches(weight)[0] for _ in range(1)), steps_per_epoch=1, verbose=0),
    }
    for learn in ways.values():
        for same in (weight, [weight, weight.copy()]):
            model.set_weights(start)
            learn(same)
            found.append(model.get_weights()[0])
        model.set_weights(start)
        with pytest.raises(ValueError, match=r"`sample_weight` must be one array, or the same for .*: 2 arrays"):
            learn([weight, np.ones(4)])
        np.testing.assert_array_equal(model.get_weights()[0], start[0])
    assert np.abs(found[0] - start[0]).max() > 1e-3
    for one in found[1:]:
        np.testing.assert_array_equal(one, found[0])
    assert model.evaluate(x, y, sample_weight=[weight, np.ones(4)], verbose=0) is not None  # losses may have their own


def test_labels_of_one_of_several_outputs_take_its_weight(float64):
    def learned(weights):
        entry = keras.Input((3,))
        outputs = {name: kb.layers.Dense(2, name=name, kernel_initializer="ones")(entry) for name in "ab"}
        model = kb.Model(entry, outputs, genome=kb.Genome.random(kb.Rule(), seed=0))
        model.compile(loss={"b": "mean_squared_error"}, run_eagerly=True)
        x = np.arange(12.0).reshape(4, 3) / 12.0
        model.train_on_batch(x[: len(weights)], {"b": np.ones((len(weights), 2))}, {"b": np.array(weights)})
        return model.get_layer("b").get_weights()[0]

    np.testing.assert_allclose(learned([1.0, 1.0, 0.0, 0.0]), learned([1.0, 1.0]), rtol=1e-12)
    assert np.abs(learned([1.0, 1.0, 1.0, 1.0]) - learned([1.0, 1.0, 0.0, 0.0])).max() > 1e-4


def test_a_loss_in_a_list_is_that_of_the_one_output(float64):
    entry = keras.Input((5,))
    model = randomized(keras.Model(entry, kl.Dense(2, name="head")(entry)))
    assert_descends(model, ROWS, TWO, loss=["mean_squared_error"])


def test_added_losses_are_refused_beside_penalties():
    class Adds(keras.layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.sum(x))
            return x

    entry = keras.Input((5,))
    dense = kb.layers.Dense(2, kernel_regularizer="l2")
    model = kb.Model(entry, dense(Adds()(entry)), genome=kb.genomes.backprop())
    model.compile(loss="mean_squared_error", run_eagerly=True)
    with pytest.raises(ValueError, match=r"`layers` must add no losses of their own.*1 added"):
        model.train_on_batch(np.ones((4, 5)), np.ones((4, 2)))


def scaled_tanh(x):
    return 1.7 * ops.tanh(0.6 * x)


AFTER = {
    "normalization": kl.UnitNormalization(), "log_softmax": kl.Activation("log_softmax"), "softmax": kl.Softmax(axis=1),
    "gelu": keras.activations.gelu, "sigmoid": ops.sigmoid, "softmax operation": ops.softmax,
    "log_softmax operation": ops.log_softmax, "normalize": ops.normalize, "lambda": kl.Lambda(ops.square),
    "scaled": scaled_tanh, "leaky": lambda x: ops.maximum(x, 0.2 * x),
    "reciprocal": lambda x: 1.0 / x,
}  # fmt: skip


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
def test_an_activation_that_follows_takes_the_place_of_the_default(after):
    entry = keras.Input((6, 5))
    layer = kb.layers.Dense(4)
    model = kb.Model(entry, after(layer(entry)), genome=kb.genomes.backprop(last_activation="tanh"))
    x = RNG.standard_normal((3, 6, 5)).astype("float32")
    kernel, bias = (np.array(layer.synapses[name])[0] for name in ("kernel", "bias"))
    np.testing.assert_allclose(model(x), after(x @ kernel + bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("after", [lambda x: 0.5 * x - 1.0, kl.Lambda(lambda x: 2.0 * x), lambda x: x[:, ::2]])
def test_other_operations_leave_the_default(after):
    entry = keras.Input((6, 5))
    layer = kb.layers.Dense(4)
    model = kb.Model(entry, after(layer(entry)), genome=kb.genomes.backprop(last_activation="tanh"))
    x = RNG.standard_normal((3, 6, 5)).astype("float32")
    np.testing.assert_allclose(model(x), after(np.tanh(x @ np.array(layer.kernel)[0])), rtol=1e-5, atol=1e-6)


def test_losses_of_several_outputs_are_saved_with_their_numbers(tmp_path):
    """Keras leaves out the delta of a Huber loss."""
    entry = keras.Input((5,))
    model = kb.Model(entry, {name: kb.layers.Dense(2, name=name)(entry) for name in "ab"}, genome=GENOME)
    model.compile(loss={"a": keras.losses.Huber(5.0), "b": "mean_squared_error"})
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    y = {"a": 9.0 * TWO, "b": TWO}
    for one in (model, loaded):
        one.train_on_batch(ROWS, y)
    np.testing.assert_array_equal(model.predict(ROWS, verbose=0)["a"], loaded.predict(ROWS, verbose=0)["a"])


def test_statistics_of_a_layer_used_twice_are_averaged_over_its_uses():
    """With slow synapses too, whose first step replaces what was there."""
    genome = kb.genomes.load("fast")
    near, far = keras.Input((5,)), keras.Input((5,))
    norm = kb.layers.BatchNormalization(name="norm")
    value = kl.Concatenate()([norm(near), norm(far)])
    model = kb.Model([near, far], kb.layers.Dense(2)(value), genome=genome)
    model.compile(loss="mean_squared_error")
    model.train_on_batch([ROWS, 10.0 + ROWS], TWO)
    np.testing.assert_allclose(norm.moving_mean, ROWS.mean(0) + 5.0, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(norm.moving_variance, ROWS.var(0), rtol=1e-5, atol=1e-5)


def test_statistics_are_averaged_as_the_synapses_of_their_layer():
    rule = kb.genomes.load("fast").rule.replace(layers=("norm", "*"))
    breadth = {"log_averaging": np.log([1e-6, 100.0])}
    genome = kb.Genome.random(rule, 0).replace(**breadth)
    entry = keras.Input((5,))
    norms = [kb.layers.BatchNormalization(name=name) for name in ("other", "norm")]
    model = kb.Model(entry, kb.layers.Dense(2)(norms[1](norms[0](entry))), genome=genome)
    model.compile(loss="mean_squared_error")
    model.train_on_batch(ROWS, TWO)
    model.train_on_batch(3.0 + ROWS, TWO)
    np.testing.assert_allclose(norms[0].moving_mean, ROWS.mean(0) + 3.0 * 101.0 / 102.0, rtol=1e-4, atol=1e-4)


def small(h):
    """Layers after the first synapses whose feedback float16 would round to 0."""
    h = kl.ReLU()(kl.Concatenate()([kl.Add()([h, h]), kl.MaxPooling2D(3, 1, "same")(h)]))
    return kl.GlobalAveragePooling2D()(kl.Lambda(lambda x: 0.25 * x)(kl.AveragePooling2D(3)(h)))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"], indirect=True)
def test_layers_without_weights_round_nothing(policy):
    """Before the first synapses as after them: a mixed policy is for products alone."""
    moved = []
    for dtype in ("float32", policy):
        keras.config.set_dtype_policy(dtype)
        keras.utils.set_random_seed(0)
        entry = keras.Input((6, 6, 2))
        first = kb.layers.Conv2D(4, 3, padding="same", activation="relu", name="first", dtype="float32")
        head = kb.layers.Dense(2, dtype="float32")
        model = kb.Model(entry, head(small(first(kl.Rescaling(1e-6)(entry)))), genome=GENOME)
        model.compile(loss="mean_squared_error")
        start = np.array(first.kernel)
        first.kernel.assign(np.zeros_like(start) + 1e-3 * np.sign(start))
        model.train_on_batch(1e6 * IMAGES, TWO, sample_weight=np.full(6, 1e-6))
        moved.append(np.array(first.kernel) - 1e-3 * np.sign(start))
        assert [layer.dtype_policy.name for layer in model.layers if isinstance(layer, kl.Rescaling)] == [dtype]
    assert np.abs(moved[0]).max() > 1e-9
    np.testing.assert_allclose(moved[1], moved[0], rtol=1e-4, atol=1e-4 * np.abs(moved[0]).max())


def of_weight_0(kind):
    """A model, labels and weights of which examples 3 to 5 have weight 0 everywhere."""
    weight, ignoring = np.repeat([1.0, 0.0], 3), CROSS(from_logits=True, ignore_class=-1)
    entry = keras.Input((5,) if kind in ("weights", "classes", "outputs", "fast") else (4, 5))
    hidden = kb.layers.Dense(4)(entry)
    outputs = [kb.layers.Dense(3)(hidden) for _ in range(2 if kind == "outputs" else 1)]
    genome = kb.genomes.load("fast")
    if kind != "fast":
        genome = kb.Genome.random(kb.Rule(feedback="error"), seed=0, synapse_update=-0.05)
    model = kb.Model(entry, outputs, genome=genome)
    few = np.random.default_rng(1)
    if kind in ("weights", "fast", "outputs"):
        y, loss = few.standard_normal((6, 3)), "mean_squared_error"
        if kind == "outputs":
            return model, [y, y], [weight, 2.0 * weight], [loss, loss]
        return model, y, weight, loss
    y = few.integers(0, 3, (6,) if kind == "classes" else (6, 4))
    if kind in ("classes", "ignored"):
        y[3:] = -1
        return model, y, None, ignoring
    weights = np.repeat(weight[:, None], 4, axis=1)
    weights[3:, 0], y[3:, 0] = 1.0, -1  # a weight, but no label
    return model, y, weights, ignoring


@pytest.mark.parametrize("kind", ["weights", "outputs", "classes", "ignored", "positions", "fast"])
def test_an_example_of_weight_0_teaches_nothing_by_errors(kind):
    """Rules that learn from errors mix other states into their terms, too."""
    model, y, weight, loss = of_weight_0(kind)
    model.compile(loss=loss)
    shape = (6, *model.input_shape[1:])
    x, start = RNG.standard_normal(shape), model.get_weights()
    model.train_on_batch(x, y, weight)
    learned = model.get_weights()
    assert max(np.abs(now - then).max() for now, then in zip(learned[:2], start, strict=False)) > 1e-4
    model.compile(loss=loss)
    model.set_weights(start)
    x[3:] = 3.0 * RNG.standard_normal((3, *shape[1:]))
    model.train_on_batch(x, y, weight)
    for now, then in zip(model.get_weights(), learned, strict=True):
        np.testing.assert_allclose(now, then, rtol=1e-5, atol=1e-6)


def test_inputs_of_another_shape_are_refused():
    left, right = keras.Input((5, 2)), keras.Input((5, 3))
    for entry in (left, [left, right]):
        value = entry if entry is left else kl.Concatenate()(entry)
        model = kb.Model(entry, kb.layers.Dense(1)(value), genome=GENOME)
        model.compile(loss="mean_squared_error")
        x = [np.ones((4, 10, 2)), np.ones((4, 10, 3))][: 1 if entry is left else 2]
        with pytest.raises(ValueError, match=r"expected shape=\(None, 5, 2\), found shape=\(\w+, 10, 2\)"):
            model(x[0] if entry is left else x)
    for learn in (model.fit, model.train_on_batch, model.evaluate):
        with pytest.raises(ValueError, match=r"expected shape=\(None, 5, 2\), found shape=\(\w+, 10, 2\)"):
            learn(x, np.ones((4, 10, 1)))


def test_an_entry_has_the_type_that_each_of_its_readers_takes():
    entry = keras.Input((1,))
    table, dense = kb.layers.Embedding(100, 4), kb.layers.Dense(4)
    model = kb.Model(entry, kl.Concatenate()([kl.Flatten()(table(entry)), dense(entry)]), genome=GENOME)
    found = np.array(model(np.full((1, 1), 37.75, "float32")))[0]
    np.testing.assert_array_equal(found[:4], np.array(table.kernel)[0, 37])
    np.testing.assert_allclose(found[4:], 37.75 * np.array(dense.kernel)[0, 0], rtol=1e-6)


def test_operations_after_synapses_read_integers_and_booleans(float64):
    entry, places, chosen = keras.Input((5,)), keras.Input((3,), dtype="int32"), keras.Input((3,), dtype="bool")
    value = ops.take_along_axis(kl.Dense(4, "tanh")(entry), places, axis=1)
    value = ops.where(chosen, value, 2.0 * value)
    twin = randomized(keras.Model([entry, places, chosen], head(value)))
    x = [ROWS, RNG.integers(0, 4, (6, 3)).astype("int32"), RNG.integers(0, 2, (6, 3)).astype(bool)]
    assert_descends(twin, x, TWO)
