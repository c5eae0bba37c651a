"""The Functional model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from keras_blur.models.base import BlurModel


@keras.saving.register_keras_serializable(package="keras_blur")
class Model(BlurModel):
    """A Functional model that learns with a genome, in place of `keras.Model`.

    Args:
        inputs: one Keras input, or a list or dict of them.
        outputs: the outputs of layers on these inputs. Layers with weights come from
            `keras_blur.layers`, all others from Keras. Keras layers before the first layer with
            synapses prepare the input and may be any layers without trainable weights. Feedback
            passes through later ones, so they must have no weights and draw no random numbers,
            except dropout.
        genome: the `Genome` that updates the synapses.
        name: name of the model.
        **kwargs: `dtype` and `trainable`, as for `keras.Model`.

    Raises:
        ValueError: if there is no genome, if it is a population, or if a layer cannot learn with a
            genome.

    Example:

    >>> import numpy as np
    >>> from keras_blur import Genome, Rule, layers
    >>> x = keras.Input((8, 8, 1))
    >>> h = layers.Conv2D(4, 3, activation="relu")(x)
    >>> y = layers.Dense(3)(keras.layers.Flatten()(h))
    >>> model = Model(x, y, genome=Genome.random(Rule(), seed=0))
    >>> model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = model.fit(np.ones((4, 8, 8, 1), "float32"), np.array([0, 1, 2, 0]), verbose=0)
    >>> model.predict(np.ones((1, 8, 8, 1), "float32"), verbose=0).shape
    (1, 3)

    Source: "Meta-Learning Bidirectional Update Rules" (2021), section 3.3.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Model:
        return keras.layers.Layer.__new__(cls)

    def __init__(self, inputs: Any, outputs: Any, genome: Any = None, *, name: str | None = None, **kwargs: Any):
        super().__init__(genome, name=name, **kwargs)
        self._plan(keras.Model(inputs, outputs, name=f"{self.name}_network"))

    def get_config(self) -> dict[str, Any]:
        return {**self._base_config(), "network": keras.saving.serialize_keras_object(self._network)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Model:
        config = dict(config)
        functional = keras.saving.deserialize_keras_object(config.pop("network"), custom_objects)
        return cls._from_base_config(config, functional._inputs_struct, functional._outputs_struct)
