"""`convert`: each option of a Keras network is kept or refused by name."""

import keras
import numpy as np
import pytest
from descent import ROUNDING, assert_descends, randomized
from keras import layers as kl

import keras_blur as kb
from keras_blur.models import networks

X = np.random.default_rng(0).standard_normal((6, 5)).astype("float32")
Y = np.random.default_rng(1).standard_normal((6, 2))
GENOME = kb.genomes.backprop(0.1, loss="mean_squared_error")
L2 = keras.regularizers.L2(0.05)
ORTHOGONAL = keras.regularizers.OrthogonalRegularizer(0.5)
HEADS = {"equation": "abc,cde->abde", "output_shape": (4, 2, 3), "bias_axes": "de"}
APART = {"equation": "abc,cde->adbe", "output_shape": (2, 4, 3), "bias_axes": "de"}
NARROW = keras.constraints.MaxNorm(0.3)


def chain(*layers):
    return keras.Sequential([keras.Input((5,)), *layers])


@pytest.mark.parametrize(("name", "value"), [("activity_regularizer", L2), ("lora_rank", 2)])
def test_options_without_a_place_are_refused_by_name(name, value):
    twin = chain(kl.Dense(4, name="inner", **{name: value}), kl.Dense(2))
    with pytest.raises(ValueError, match=f"`{name}` .*must be None"):
        kb.convert(twin, GENOME)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_regularizer": "l2"},
        {"kernel_regularizer": "l1l2", "bias_regularizer": "l1"},
        {"kernel_constraint": keras.constraints.MaxNorm(0.5)},
        {"bias_constraint": keras.constraints.MaxNorm(0.3), "kernel_constraint": keras.constraints.UnitNorm()},
    ],
    ids=lambda options: " and ".join(options),
)
def test_regularizers_and_constraints_are_those_of_keras(options, float64):
    twin = randomized(chain(kl.Dense(4, "tanh", name="inner", **options), kl.Dense(2, **options)))
    assert_descends(twin, X, Y)


def test_regularizers_of_all_kinds_of_layers(float64):
    penalty, limit = keras.regularizers.L2(0.05), keras.constraints.MaxNorm(0.3)
    entry = keras.Input((4, 4, 2))
    value = kl.Conv2D(3, 2, kernel_regularizer=penalty, bias_constraint=keras.constraints.NonNeg())(entry)
    value = kl.BatchNormalization(gamma_regularizer=penalty, beta_constraint=keras.constraints.NonNeg())(value)
    value = kl.SeparableConv2D(2, 2, depthwise_regularizer=penalty, pointwise_constraint=limit)(value)
    value = kl.Reshape((4, 2))(kl.Activation("tanh")(value))
    value = kl.MultiHeadAttention(2, 3, kernel_regularizer=penalty, bias_regularizer=penalty)(value, value)
    twin = randomized(keras.Model(entry, kl.Dense(2)(kl.Flatten()(value))))
    assert_descends(twin, np.random.default_rng(0).standard_normal((6, 4, 4, 2)), Y)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("EinsumDense", {**HEADS, "bias_regularizer": ORTHOGONAL}),
        ("EinsumDense", {**APART, "bias_constraint": NARROW}),
        ("LayerNormalization", {"axis": [1, 2], "gamma_regularizer": ORTHOGONAL, "beta_regularizer": ORTHOGONAL}),
        ("LayerNormalization", {"axis": [1, -1], "gamma_constraint": NARROW, "beta_constraint": NARROW}),
        ("MultiHeadAttention", {"num_heads": 2, "key_dim": 3, "bias_constraint": NARROW}),
    ],
)
def test_biases_of_several_axes_are_penalised_and_limited_in_the_shape_of_keras(kind, options):
    x = np.random.default_rng(0).standard_normal((6, 4, 5))

    def network(of):
        entry = keras.Input((4, 5))
        layer = getattr(of, kind)(name="inner", **options)
        value = layer(entry, entry) if kind == "MultiHeadAttention" else layer(entry)
        return randomized(keras.Model(entry, kl.Dense(2)(kl.Flatten()(kl.Activation("tanh")(value)))))

    assert_descends(network(kl), x, Y, still={"inner/key/bias"}, tolerance=1e-5)

    twin, model = network(kl), network(kb.layers)  # under an optimizer
    for one in (twin, model):
        one.compile(keras.optimizers.SGD(0.1), "mean_squared_error", jit_compile=False)
    for own, other in zip(model.weights, twin.weights, strict=True):
        own.assign(np.reshape(other, own.shape))
    for _ in range(2):
        ours, theirs = (one.train_on_batch(x, Y) for one in (model, twin))
    assert ours == pytest.approx(theirs, rel=1e-5)
    for own, other in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(own.reshape(other.shape), other, rtol=1e-4, atol=1e-6)


def test_an_option_that_a_later_keras_adds_is_refused(monkeypatch):
    twin = chain(kl.Dense(2, name="inner"))
    config = twin.layers[0].get_config()
    monkeypatch.setattr(twin.layers[0], "get_config", lambda: {**config, "sparsity": 0.5})
    with pytest.raises(ValueError, match=r"`sparsity` of layer 'inner' must be None.*Received: sparsity=0\.5"):
        kb.convert(twin, GENOME)


def test_weights_that_were_changed_after_the_layer_was_made():
    adapted = chain(kl.Dense(4, name="inner"), kl.Dense(2))
    adapted.layers[0].enable_lora(2)
    with pytest.raises(ValueError, match="`lora_rank` of layer 'inner'"):
        kb.convert(adapted, GENOME)
    quantized = chain(kl.Dense(4, name="inner"), kl.Dense(2))
    quantized.layers[0].quantize("int8")
    with pytest.raises(ValueError, match=r"`(quantization_config|dtype)` of layer 'inner'"):
        kb.convert(quantized, GENOME)


@pytest.mark.parametrize(
    "layers",
    [
        [kl.Flatten(activity_regularizer=L2, name="odd"), kl.Dense(2)],
        [kl.Dense(4), kl.Activation("tanh", activity_regularizer=L2, name="odd"), kl.Dense(2)],
        [kl.ActivityRegularization(0.1, name="odd"), kl.Dense(2)],
    ],
)
def test_regularizers_of_other_layers_are_refused(layers):
    with pytest.raises(ValueError, match="Layer 'odd' must have no `activity_regularizer`"):
        kb.convert(chain(*layers), GENOME)


def test_a_function_is_known_by_its_values():
    def tanh(x):
        return 0.5 * x

    for activation in (tanh, keras.ops.tanh, keras.activations.tanh):
        twin = chain(kl.Dense(4, activation, name="inner"), kl.Dense(2))
        model = kb.convert(twin, GENOME)
        np.testing.assert_allclose(model(X), twin(X), rtol=1e-5, atol=1e-6)
        assert (model.layers[0].activation == "tanh") == (activation is keras.activations.tanh)


def test_nested_models_are_unfolded():
    inner = keras.Sequential([keras.Input((6,)), kl.Dense(4, "sigmoid", name="middle"), kl.Dropout(0.5)])
    twin = chain(kl.Dense(6, "tanh", name="first"), inner, kl.Dense(2, name="last"))
    model = kb.convert(twin, GENOME)
    assert [layer.name for layer in model.layers if layer.weights] == ["first", "middle", "last"]
    np.testing.assert_allclose(model(X), twin(X), rtol=1e-5, atol=1e-6)


def test_equal_names_in_nested_models_are_refused():
    inner = keras.Sequential([keras.Input((6,)), kl.Dense(4, name="same")])
    with pytest.raises(ValueError, match="two layers named 'same'"):
        kb.convert(chain(kl.Dense(6, name="same"), inner, kl.Dense(2)), GENOME)


def test_other_models_are_refused():
    class Own(keras.Sequential):
        pass

    class Subclass(keras.Model):
        def call(self, inputs):
            return inputs

    class Half(keras.Model):
        def call(self, inputs):
            return 0.5 * super().call(inputs)

    entry = keras.Input((5,))
    for model in (Subclass(), Half(entry, kl.Dense(2)(entry)), kb.convert(chain(kl.Dense(2)), GENOME), kl.Dense(2)):
        with pytest.raises(ValueError, match=r"`model` must be a keras\.Sequential or a Functional keras\.Model"):
            kb.convert(model, GENOME)
    inner = chain(Own([keras.Input((5,)), kl.Dense(2)], name="own"))
    with pytest.raises(ValueError, match="own"):
        kb.convert(inner, GENOME)


def test_a_functional_model_inside_a_chain():
    entry = keras.Input((5,))
    functional = keras.Model(entry, kl.Add()([kl.Dense(5, name="inner")(entry), entry]), name="functional")
    twin = chain(functional, kl.Dense(2))
    np.testing.assert_allclose(kb.convert(twin, GENOME)(X), twin(X), rtol=1e-5, atol=1e-6)


def test_types_of_the_model_and_of_layers_are_kept():
    keras.config.set_dtype_policy("float64")
    try:
        twin = chain(kl.Dense(4, "tanh"), kl.Dense(2))
    finally:
        keras.config.set_dtype_policy("float32")
    model = kb.convert(twin, GENOME)
    assert {variable.dtype for layer in model.layers for variable in layer.weights} == {"float64"}
    np.testing.assert_allclose(model(X), twin(X), rtol=max(1e-12, ROUNDING), atol=max(1e-12, ROUNDING))
    mixed = kb.convert(chain(kl.Dense(4, "tanh", dtype="mixed_bfloat16"), kl.Dense(2)), GENOME)
    assert [layer.connection.compute_dtype for layer in mixed.layers] == ["bfloat16", None]
    with pytest.raises(ValueError, match="`dtype` of layer 'inner' must keep synapses in float32"):
        kb.convert(chain(kl.Dense(4, dtype="float64", name="inner"), kl.Dense(2)), GENOME)


def test_frozen_layers_stay_frozen():
    twin = chain(kl.Dense(4, trainable=False), kl.Dense(2))
    assert [layer.trainable for layer in kb.convert(twin, GENOME).layers] == [False, True]


@pytest.mark.parametrize("axis", [[1, -1], [-1, 1], [2, 3]])
def test_scales_of_several_axes(axis, float64):
    twin = randomized(keras.Sequential([keras.Input((4, 3, 2)), kl.LayerNormalization(axis), kl.Flatten(), kl.Dense(2)]))
    assert_descends(twin, np.random.default_rng(0).standard_normal((6, 4, 3, 2)), Y)


ADAPTED = {
    "Normalization": (lambda: kl.Normalization(), 3.0 * X + 5.0),
    "Normalization over axes": (lambda: kl.Normalization(axis=None, invert=True), 3.0 * X + 5.0),
    "IntegerLookup": (lambda: kl.IntegerLookup(output_mode="multi_hot"), np.arange(30).reshape(6, 5) % 7),
    "Discretization": (lambda: kl.Discretization(num_bins=3), X),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_what_a_layer_adapted_to_goes_over_and_back(name):
    make, x = ADAPTED[name]
    layer = make()
    layer.adapt(x)
    twin = keras.Sequential([keras.Input((5,), dtype=x.dtype.name), layer, kl.Dense(2)])
    model = kb.convert(twin, GENOME)
    for other in (model, model.to_keras()):
        np.testing.assert_allclose(other(x), twin(x), rtol=1e-5, atol=1e-6)


def test_weights_of_a_copy_have_the_same_order():
    layers = [kl.Dense(4), kl.BatchNormalization(), kl.Dense(2)]
    model = kb.convert(chain(*layers), kb.genomes.load("fast"))
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    for found, wanted in zip(copy.weights, model.weights, strict=True):
        assert found.name == wanted.name
        np.testing.assert_array_equal(found, wanted)


def test_a_layer_with_two_nonlinearities_by_default_does_not_go_back():
    """Its uses are hidden and last."""
    for activation in (None, "tanh"):
        entry, layer = keras.Input((5,)), kb.layers.Dense(5, activation)
        model = kb.Model(entry, layer(layer(entry)), genome=GENOME)
        if activation is None:
            with pytest.raises(ValueError, match=r"must have an `activation` for .* Received: 'tanh' and 'linear'"):
                model.to_keras()
        else:
            np.testing.assert_allclose(model.to_keras()(X), model(X), rtol=1e-5, atol=1e-6)


def own_loss(y, prediction):
    return keras.ops.mean(keras.ops.square(prediction - y), axis=-1)


@pytest.mark.parametrize("nested", [False, True])
def test_a_compiled_model_with_functions_of_a_user(nested):
    """Their config has only names, which a clone could not be compiled from."""
    options = {"loss": own_loss, "metrics": [own_loss]}
    entry = keras.Input((5,))
    inner = chain(kl.Dense(4, "tanh"))
    functional = keras.Model(entry, kl.Dense(5)(inner(entry)))
    twin = keras.Model(entry, kl.Dense(2)(functional(entry))) if nested else functional
    for one in (inner, functional, twin):
        one.compile(**options)
    model = kb.convert(twin, GENOME)
    np.testing.assert_allclose(model(X), twin(X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.to_keras()(X), twin(X), rtol=1e-5, atol=1e-6)
    _, build = networks.builder(twin)
    assert build((5,), 2 if nested else 5).count_params() == twin.count_params()
    assert [twin.loss, inner.loss, model.compiled] == [own_loss, own_loss, False]
