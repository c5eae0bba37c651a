"""Multi-head attention: four dense connections around scaled dot-product attention.

Source: "Attention is all you need" (Vaswani et al., 2017). The dot products and their softmax have
no synapses. States other than state 1 go through the Jacobian at state 1 with respect to queries,
keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_blur import arguments
from keras_blur.core.equations import SharedBatch
from keras_blur.core.states import first_states
from keras_blur.core.weightless import Jacobian, drop_mask
from keras_blur.layers.base import BlurLayer, Plan, Shape, check_keywords, refuse_activity
from keras_blur.layers.dense import EinsumDense

Array = Any


class _DotProducts(Jacobian):
    """Dot-product attention of queries, keys and values, each `[batch, length, heads, size]`.

    Args:
        sources: feature shapes of queries, keys and values.
        causal: whether a position attends only to itself and earlier positions.
        rate: fraction of the attention weights to drop in training.
        draw: returns a new seed at each call.
    """

    def __init__(self, sources: Sequence[Shape], causal: bool, rate: float, draw: Callable[[], Array]):
        (queries, heads, _), (keys, _, _), (_, _, size) = sources
        super().__init__(lambda *three: three[0], sources, (queries, heads, size))
        self.causal, self.rate, self.draw = causal, rate, draw
        self.scores = (heads, queries, keys)

    def context(self, states: Sequence[Array], training: bool) -> Any:
        if not training or not self.rate:
            return None
        queries = self.sources[0]
        first = first_states(states[0], 1, len(queries))
        rows = ops.shape(ops.reshape(first, (-1, *queries)))[0]
        return drop_mask(self.draw(), self.rate, rows, self.scores, (None,) * 4, states[0].dtype)

    def _attend(self, mask: Array | None, *three: Array) -> Array:
        query, key, value = three
        # Not `ops.dot_product_attention`: on JAX it computes in float32 and needs values of the
        # same size as the keys.
        scale = 1.0 / math.sqrt(query.shape[-1])
        scores = ops.einsum("nqhd,nkhd->nhqk", query * ops.cast(scale, query.dtype), key)
        if self.causal:
            length, width = self.scores[1:]
            seen = ops.arange(length)[:, None] >= ops.arange(width)[None]
            scores = ops.where(seen, scores, ops.cast(-3e4, scores.dtype))
        weights = ops.softmax(scores)
        return ops.einsum("nhqk,nkhd->nqhd", weights if mask is None else weights * mask, value)

    def forward(self, states: Sequence[Array], context: Any, batch: SharedBatch | None = None) -> Array:
        return Jacobian(lambda *three: self._attend(context, *three), self.sources, self.target).forward(states, None)

    def backward(
        self, states: Sequence[Array], cotangent: Array, context: Any, batch: SharedBatch | None = None
    ) -> tuple[Array, ...]:
        linearised = Jacobian(lambda *three: self._attend(context, *three), self.sources, self.target)
        return linearised.backward(states, cotangent, None)


@keras.saving.register_keras_serializable(package="keras_blur")
class MultiHeadAttention(BlurLayer):
    """Attention that learns with a genome, in place of `keras.layers.MultiHeadAttention`.

    Args:
        num_heads: number of heads.
        key_dim: size of queries and keys in each head.
        value_dim: size of values in each head; `None` uses `key_dim`.
        dropout: fraction of the attention weights to drop in training, from 0 to 1.
        use_bias: whether the four projections have a bias.
        output_shape: size of the output features; `None` uses that of the query.
        kernel_initializer: Keras initializer of the projections' kernels.
        bias_initializer: Keras initializer of their biases.
        kernel_regularizer: as in `Dense`.
        bias_regularizer: as in `Dense`.
        activity_regularizer: must be `None`, since a genome learns from the loss alone.
        kernel_constraint: as in `Dense`.
        bias_constraint: as in `Dense`.
        seed: random seed of the dropout.
        **kwargs: as in `Dense`.

    Call arguments:
        query: `(batch_size, length, size)`.
        value: `(batch_size, value_length, value_size)`.
        key: `(batch_size, value_length, key_size)`; `None` uses `value`.
        use_causal_mask: whether a position attends only to itself and earlier positions.
        query_mask, value_mask, key_mask, attention_mask: must be `None`.
        return_attention_scores: must be `False`.
        training: whether to apply dropout.

    Output shape:
        `(batch_size, length, output_shape)`.

    Raises:
        ValueError: if an argument is unknown or invalid.

    Example:

    >>> import numpy as np
    >>> x = np.ones((2, 5, 8), "float32")
    >>> tuple(MultiHeadAttention(2, 4)(x, x).shape)
    (2, 5, 8)
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: int | None = None,
        *,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        check_keywords("MultiHeadAttention", kwargs, ("name", "dtype", "trainable"))
        refuse_activity(activity_regularizer)
        arguments.count("num_heads", num_heads)
        arguments.count("key_dim", key_dim)
        arguments.real("dropout", dropout, low=0.0, high=1.0)
        super().__init__(**kwargs)
        self.num_heads, self.key_dim = int(num_heads), int(key_dim)
        self.value_dim = self.key_dim if value_dim is None else int(value_dim)
        self.dropout, self.use_bias, self.seed = float(dropout), bool(use_bias), seed
        if isinstance(output_shape, (tuple, list)):
            if len(output_shape) != 1:
                raise ValueError(f"`output_shape` must be one size. {arguments.received('output_shape', output_shape)}")
            output_shape = output_shape[0]
        self.size = output_shape
        self._shared = {
            "kernel_initializer": kernel_initializer,
            "bias_initializer": bias_initializer,
            "kernel_regularizer": kernel_regularizer,
            "bias_regularizer": bias_regularizer,
            "kernel_constraint": kernel_constraint,
            "bias_constraint": bias_constraint,
        }
        self.query_dense = self._projection("query", self.key_dim)
        self.key_dense = self._projection("key", self.key_dim)
        self.value_dense = self._projection("value", self.value_dim)
        self.output_dense: Any = None
        if self.dropout:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def _options(self) -> dict[str, Any]:
        kinds = {"initializer": keras.initializers, "regularizer": keras.regularizers, "constraint": keras.constraints}
        made = {}
        for name, value in self._shared.items():
            kind = kinds[name.rpartition("_")[2]]
            value = kind.get(value)
            made[name] = None if value is None else type(value).from_config(value.get_config())
        return made

    def _projection(self, name: str, size: int) -> EinsumDense:
        return EinsumDense(
            "abc,cde->abde", (None, self.num_heads, size), "linear", "de" if self.use_bias else None,
            name=name, dtype=self.dtype_policy, trainable=self.trainable, **self._options(),
        )  # fmt: skip

    def build(self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None) -> None:
        key_shape = value_shape if key_shape is None else key_shape
        for name, shape in (("query", query_shape), ("value", value_shape), ("key", key_shape)):
            if len(shape) != 3:
                raise ValueError(
                    f"`{name}` of layer {self.name!r} must have shape (batch, length, size). Received shape {tuple(shape)}"
                )
        size = self.size or query_shape[-1]
        self.output_dense = EinsumDense(
            "abcd,cde->abe", (None, size), "linear", "e" if self.use_bias else None, name="attention_output",
            dtype=self.dtype_policy, trainable=self.trainable, **self._options(),
        )  # fmt: skip
        self.query_dense.build(query_shape)
        self.key_dense.build(key_shape)
        self.value_dense.build(value_shape)
        self.output_dense.build((*query_shape[:-1], self.num_heads, self.value_dim))
        self.built = True

    def _map(self, shapes: Sequence[Shape], causal: bool) -> _DotProducts:
        def draw() -> Array:
            return self.seed_generator.next()

        return _DotProducts(shapes, causal, self.dropout, draw)

    def call(
        self,
        query: Array,
        value: Array,
        key: Array | None = None,
        query_mask: None = None,
        value_mask: None = None,
        key_mask: None = None,
        attention_mask: None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Array:
        masks = {
            "query_mask": query_mask, "value_mask": value_mask, "key_mask": key_mask, "attention_mask": attention_mask,
        }  # fmt: skip
        for name, mask in masks.items():
            if mask is not None:
                raise ValueError(f"`{name}` in the call of layer {self.name!r} must be None. Received: a mask")
        if return_attention_scores:
            raise ValueError(f"`return_attention_scores` in the call of layer {self.name!r} must be False. Received: True")
        key = value if key is None else key
        three = self.query_dense(query), self.key_dense(key), self.value_dense(value)
        dots = self._map([tuple(one.shape[1:]) for one in three], use_causal_mask)
        states = tuple(one[None] for one in three)
        return self.output_dense(dots.forward(states, dots.context(states, bool(training)))[0])

    def trace(self, plan: Plan, *values: int, **arguments: Any) -> int:
        query, value, *others = values
        key = others[0] if others else value
        three = self.query_dense.trace(plan, query), self.key_dense.trace(plan, key), self.value_dense.trace(plan, value)
        dots = self._map([plan.shape(one) for one in three], bool(arguments.get("use_causal_mask")))
        return self.output_dense.trace(plan, plan.map(dots, *three))

    def compute_output_shape(self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None) -> Shape:
        return (*query_shape[:-1], self.size or query_shape[-1])

    def get_config(self) -> dict[str, Any]:
        config = self.query_dense.get_config()
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "output_shape": self.size,
            "seed": self.seed,
            **{name: config[name] for name in self._shared},
        }
