"""One check for every layer, in the spirit of Keras's own (private) `run_layer_test`, on public API
only.

A layer that passes can be built, called, written to a config and to a file, read back, run in each
dtype policy and under the compiler, with the same numbers each time.
"""

import json

import keras
import numpy as np
from on_backend import in_a_graph

POLICIES = {"float32": 1e-6, "mixed_bfloat16": 2e-2, "float64": 1e-6}


def run_layer_test(layer_class, init_kwargs, input_shape, expected_output_shape, expected_num_weights, tmp_path):
    """Runs all checks on one layer.

    Args:
        layer_class: the layer's class.
        init_kwargs: its arguments.
        input_shape: shape of an input, with the batch.
        expected_output_shape: shape of the output, with the batch.
        expected_num_weights: number of weights of the built layer.
        tmp_path: a folder to save in.
    """
    x = np.random.default_rng(0).normal(size=input_shape).astype("float32")
    layer = layer_class(**init_kwargs)
    assert not layer.built
    y = keras.ops.convert_to_numpy(layer(x))
    assert layer.built
    assert y.shape == tuple(expected_output_shape)
    assert y.dtype == np.float32
    assert np.isfinite(y).all()
    assert len(layer.weights) == expected_num_weights

    _check_build(layer_class, init_kwargs, layer, input_shape)
    _check_shapes(layer, input_shape, y.shape)
    _check_config(layer_class, layer, x, y)
    _check_saving(layer, x, y, tmp_path)
    _check_policies(layer_class, init_kwargs, layer, x, y)
    _check_compiler(layer, x, y)


def _check_build(layer_class, init_kwargs, layer, input_shape):
    """`build` makes the weights that a call makes, with any batch size."""
    built = layer_class(**init_kwargs)
    built.build((None, *input_shape[1:]))
    assert built.built
    assert [w.shape for w in built.weights] == [w.shape for w in layer.weights]
    assert [w.name for w in built.weights] == [w.name for w in layer.weights]


def _check_shapes(layer, input_shape, output_shape):
    """The output shape is known from the input shape, with any batch size."""
    assert tuple(layer.compute_output_shape(input_shape)) == output_shape
    symbolic = layer(keras.Input(batch_shape=(None, *input_shape[1:])))
    assert tuple(symbolic.shape) == (None, *output_shape[1:])
    assert symbolic.dtype == layer.compute_dtype


def _check_config(layer_class, layer, x, y):
    """A config survives JSON and gives an equal layer; with the same weights it gives the same
    numbers."""
    config = layer.get_config()
    clone = layer_class.from_config(json.loads(json.dumps(config)))
    assert clone.get_config() == config
    whole = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(whole) is layer_class
    assert whole.get_config() == config
    clone.build(x.shape)
    clone.set_weights(layer.get_weights())
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(clone(x)), y)


def _check_saving(layer, x, y, tmp_path):
    """A `.keras` file of a model with the layer gives the layer back."""
    inputs = keras.Input(batch_shape=(None, *x.shape[1:]))
    model = keras.Model(inputs, layer(inputs))
    path = tmp_path / "layer.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert loaded.layers[-1].get_config() == layer.get_config()
    for old, new in zip(layer.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(loaded(x)), y)


def _check_policies(layer_class, init_kwargs, layer, x, y):
    """Each dtype policy has its variable and compute dtypes, and a result close to float32."""
    for name, tolerance in POLICIES.items():
        policy = keras.DTypePolicy(name)
        other = layer_class(**init_kwargs, dtype=policy)
        other.build(x.shape)
        other.set_weights(layer.get_weights())
        result = other(x.astype("float64") if name == "float64" else x)
        assert keras.backend.standardize_dtype(result.dtype) == policy.compute_dtype
        assert {w.dtype for w in other.weights} <= {policy.variable_dtype}
        result = keras.ops.convert_to_numpy(keras.ops.cast(result, "float32"))
        np.testing.assert_allclose(result, y, rtol=tolerance, atol=tolerance * max(1.0, np.abs(y).max()))


def _check_compiler(layer, x, y):
    """Inside a graph, compiled or not, the layer gives the eager result."""
    for jit in (False, True):
        result = in_a_graph(layer, jit)(keras.ops.convert_to_tensor(x))
        np.testing.assert_allclose(result, y, rtol=1e-5, atol=1e-6)
