"""The embedding layer.

Source: "Meta-Learning Bidirectional Update Rules" (2021), equations 5 to 7, on one-hot inputs.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_blur import arguments
from keras_blur.core.connection import Connection
from keras_blur.core.connections.embedding import EmbeddingConnection
from keras_blur.layers.base import Plan, Shape, SynapticLayer, refuse_outer_training

Array = Any


@keras.saving.register_keras_serializable(package="keras_blur")
class Embedding(SynapticLayer):
    """An embedding that learns with a genome, in place of `keras.layers.Embedding`.

    Args:
        input_dim: number of vectors, one for each integer.
        output_dim: size of a vector.
        embeddings_initializer: Keras initializer of each channel of the vectors.
        embeddings_regularizer: as `kernel_regularizer` of `Dense`.
        embeddings_constraint: as `kernel_constraint` of `Dense`.
        mask_zero: must be `False`, since networks that learn with a genome do not propagate masks.
        **kwargs: as in `Dense`.

    Input shape:
        `(batch_size, ...)`, integers from 0 to `input_dim - 1`.

    Output shape:
        `(batch_size, ..., output_dim)`.

    Raises:
        ValueError: if an argument is unknown or invalid.

    Example:

    >>> import numpy as np
    >>> tuple(Embedding(10, 4)(np.array([[1, 2, 9]])).shape)
    (1, 3, 4)
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        embeddings_initializer: Any = "uniform",
        embeddings_regularizer: Any = None,
        embeddings_constraint: Any = None,
        mask_zero: bool = False,
        **kwargs: Any,
    ):
        arguments.count("input_dim", input_dim)
        arguments.count("output_dim", output_dim)
        if mask_zero:
            raise ValueError("`mask_zero` must be False, since no mask passes through. Received: mask_zero=True")
        super().__init__(
            activation="linear",
            use_bias=False,
            kernel_initializer=embeddings_initializer,
            kernel_regularizer=embeddings_regularizer,
            kernel_constraint=embeddings_constraint,
            **kwargs,
        )
        self.input_dim, self.output_dim = int(input_dim), int(output_dim)
        self.autocast = False  # half precision rounds large indices

    def make_connection(self, source: Shape) -> Connection:
        return EmbeddingConnection(self.output_dim, False, "linear", entries=self.input_dim, positions=tuple(source))

    def call(self, inputs: Array) -> Array:
        if self._rule is not None:
            refuse_outer_training(self)
        return ops.take(ops.cast(self.predicting()["kernel"], self.compute_dtype)[0], ops.cast(inputs, "int32"), axis=0)

    def trace(self, plan: Plan, *values: int, **arguments: Any) -> int:
        return plan.connect(self, values[0], "linear")

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        parts = ("initializer", "regularizer", "constraint")
        return {
            **{name: config[name] for name in ("name", "trainable", "dtype")},
            **{f"embeddings_{part}": config[f"kernel_{part}"] for part in parts},
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
        }
