"""The Sequential model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from keras_blur import arguments, backend
from keras_blur.layers.base import BlurLayer
from keras_blur.models.base import BlurModel
from keras_blur.models.reading import check_weightless


@keras.saving.register_keras_serializable(package="keras_blur")
class Sequential(BlurModel):
    """A stack of layers that learns with a genome, in place of `keras.Sequential`.

    Args:
        layers: a list of `keras_blur` layers, which hold synapses, and Keras layers without
            weights. Keras layers before the first `keras_blur` layer prepare the input. Feedback
            passes through later ones, so they must draw no random numbers, except dropout. The list
            may start with a `keras.Input`.
        genome: the `Genome` that updates the synapses.
        name: name of the model.
        **kwargs: `dtype` and `trainable`, as for `keras.Model`.

    Raises:
        ValueError: if there is no genome, it is a population, a layer cannot be used, or an
            argument is unknown.

    Example:

    >>> import numpy as np
    >>> from keras_blur import Genome, Rule, layers
    >>> model = Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(3)], genome=Genome.random(Rule(), seed=0))
    >>> model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    >>> history = model.fit(np.eye(4, dtype="float32"), np.array([0, 1, 2, 0]), verbose=0)
    >>> model.predict(np.eye(4, dtype="float32"), verbose=0).shape
    (4, 3)

    Source: "Meta-Learning Bidirectional Update Rules" (2021), section 3.3.
    """

    def __init__(
        self,
        layers: Iterable[Any] | None = None,
        genome: Any = None,
        *,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(genome, name=name, **kwargs)
        self._chain: list[keras.Layer] = []
        self._input_batch_shape: tuple[int | None, ...] | None = None
        self._input_type: str | None = None
        if layers is not None and not isinstance(layers, Iterable):
            raise ValueError(f"`layers` must be a list of Keras layers. {arguments.received('layers', layers)}")
        for layer in layers or ():
            self.add(layer)
        if self._input_batch_shape is not None and self._chain:
            self.build(self._input_batch_shape)

    def add(self, layer: Any) -> None:
        """Adds a layer at the end. A `keras.Input` must come first.

        Raises:
            ValueError: if the model is built, the layer is not a Keras layer, its name is taken, or
                a `keras.Input` is not the first.
        """
        if hasattr(layer, "_keras_history"):
            layer = layer._keras_history[0]
        if isinstance(layer, keras.layers.InputLayer):
            if self._chain or self._input_batch_shape is not None:
                raise ValueError("`keras.Input` must be the first entry of `layers`, and the only one.")
            self._input_batch_shape, self._input_type = tuple(layer.batch_shape), layer.dtype
            return
        if not isinstance(layer, keras.Layer):
            raise ValueError(f"`layers` must hold Keras layers. Received: {layer!r}")
        if any(layer.name == other.name for other in self._chain):
            raise ValueError(f"Layers must have different names. Received two layers named {layer.name!r}.")
        if self.built:
            raise ValueError(
                "The model is built, so no layer can be added. Give all layers at once, or add them without a keras.Input."
            )
        if not isinstance(layer, (BlurLayer, keras.Model)):
            check_weightless(layer)
        self._chain.append(layer)

    def pop(self) -> keras.Layer:
        """Removes the last layer and returns it.

        Raises:
            ValueError: if the model is built or has no layers.
        """
        if self.built or not self._chain:
            raise ValueError("A layer can be removed only if the model has layers and is not built yet.")
        return self._chain.pop()

    @property
    def layers(self) -> list[keras.Layer]:
        """The layers, without the input."""
        return list(self._chain)

    def build(self, input_shape: tuple[int | None, ...] | None = None) -> None:
        """Creates the synapses.

        Args:
            input_shape: shape of the input, `(batch or None, *features)`.

        Raises:
            ValueError: if the shape is unknown or not that of the `keras.Input`, or no layer has
                synapses.
        """
        if self.built:
            return
        shape = tuple(input_shape or self._input_batch_shape or ())
        if not shape:
            raise ValueError("The input shape is not known: start `layers` with a keras.Input, or call the model on data.")
        if self._input_batch_shape is not None and shape[1:] != self._input_batch_shape[1:]:
            raise ValueError(f"The model's input has shape {self._input_batch_shape}. Received shape {shape}.")
        if self._input_batch_shape is None:
            self._input_batch_shape = (None, *shape[1:])
        if not any(isinstance(layer, (BlurLayer, keras.Model)) for layer in self._chain):
            last = f"Received {self._chain[-1].name!r}." if self._chain else "Received no layers."
            raise ValueError(f"A layer must hold synapses: use keras_blur.layers.Dense. {last}")
        with backend.outside_of_programs():  # `predict` and others may build the model during tracing
            value = first = keras.Input(batch_shape=self._input_batch_shape, dtype=self._input_type)
            for layer in self._chain:
                value = layer(value)
            self._plan(keras.Model(first, value, name=f"{self.name}_network"))

    def _build_for(self, x: Any) -> None:
        self.build((None, *x.shape[1:]))

    def _first_shape(self) -> tuple[Any, ...] | None:
        return self._input_batch_shape

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        shape = tuple(input_shape)
        for layer in self._chain:
            shape = tuple(layer.compute_output_shape(shape))
        return shape

    def get_config(self) -> dict[str, Any]:
        return {
            **self._base_config(),
            "input_batch_shape": self._input_batch_shape,
            "input_dtype": self._input_type,
            "layers": [keras.saving.serialize_keras_object(layer) for layer in self._chain],
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Sequential:
        config = dict(config)
        shape, kind = config.pop("input_batch_shape"), config.pop("input_dtype")
        layers = [keras.saving.deserialize_keras_object(layer, custom_objects) for layer in config.pop("layers")]
        if shape is not None:
            layers.insert(0, keras.layers.InputLayer(batch_shape=tuple(shape), dtype=kind))
        return cls._from_base_config(config, layers)
