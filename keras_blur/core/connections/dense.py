"""The dense connection: a matrix product, its transpose, and `x^T y`.

Source: "Meta-Learning Bidirectional Update Rules" (2021), equations 5 to 7.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from keras import ops

from keras_blur.core.connection import Connection
from keras_blur.core.rule import Rule

Array = Any

_LEAST = 1e-30  # stands for zero in a divisor


@dataclasses.dataclass(frozen=True)
class DenseConnection(Connection):
    """The pure operations of `Dense`."""

    def shapes(self, rule: Rule, inputs: int, *, feeds_back: bool) -> dict[str, tuple[int, ...]]:
        channels = rule.synapse_channels
        shapes: dict[str, tuple[int, ...]] = {"kernel": (channels, inputs, self.units)}
        if self.use_bias:
            shapes["bias"] = (channels, 1, self.units)
        if feeds_back and rule.stores_backward:
            shapes["backward_kernel"] = (channels, inputs, self.units)
        return shapes

    def linear(self, kernel: Array, x: Array) -> Array:
        return self._product(x, kernel, transpose=False)

    def linear_transpose(self, kernel: Array, y: Array) -> Array:
        return self._product(y, kernel, transpose=True)

    def outer(self, pre: Array, post: Array) -> Array:
        left, right = self._rounded(pre), self._rounded(post)
        return ops.matmul(ops.swapaxes(left, -1, -2), right)

    def _product(self, x: Array, kernel: Array, *, transpose: bool) -> Array:
        x, kernel = self._rounded(x), self._rounded(kernel)
        if transpose:
            kernel = ops.swapaxes(kernel, -1, -2)
        if kernel.shape[-3] == 1 and x.shape[-3] != 1:
            # One channel serves all states: they are one taller batch, and the product one matrix product.
            shape = ops.shape(x)
            tall = ops.reshape(x, (*shape[:-3], 1, shape[-3] * shape[-2], shape[-1]))
            product = ops.matmul(tall, kernel)
            return ops.reshape(product, (*ops.shape(product)[:-3], shape[-3], shape[-2], kernel.shape[-1]))
        return ops.matmul(x, kernel)

    def _rounded(self, factor: Array) -> Array:
        """A factor as the compute type has it, its sums still to be formed in the type of the states."""
        if self.compute_dtype is None or self.compute_dtype == keras.backend.standardize_dtype(factor.dtype):
            return factor
        if self.compute_dtype != "float16":
            return ops.cast(ops.cast(factor, self.compute_dtype), factor.dtype)
        # float16 holds 6e-8 to 65504 only: the factor is brought to a largest entry near 1 first, by a power of 2.
        largest = ops.max(ops.abs(factor), axis=(-2, -1), keepdims=True)
        scale = ops.stop_gradient(ops.exp2(ops.floor(ops.log2(ops.maximum(largest, _LEAST)))))
        return ops.cast(ops.cast(factor / scale, self.compute_dtype), factor.dtype) * scale
