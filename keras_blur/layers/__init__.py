"""Layers whose synapses learn with a genome. Each replaces the Keras layer of the same name."""

from keras_blur.layers.attention import MultiHeadAttention
from keras_blur.layers.convolution import (
    Conv1D,
    Conv2D,
    Conv2DTranspose,
    Conv3D,
    DepthwiseConv1D,
    DepthwiseConv2D,
    SeparableConv2D,
)
from keras_blur.layers.dense import Dense, EinsumDense
from keras_blur.layers.embedding import Embedding
from keras_blur.layers.normalization import (
    BatchNormalization,
    GroupNormalization,
    LayerNormalization,
    RMSNormalization,
)

__all__ = [
    "BatchNormalization",
    "Conv1D",
    "Conv2D",
    "Conv2DTranspose",
    "Conv3D",
    "Dense",
    "DepthwiseConv1D",
    "DepthwiseConv2D",
    "EinsumDense",
    "Embedding",
    "GroupNormalization",
    "LayerNormalization",
    "MultiHeadAttention",
    "RMSNormalization",
    "SeparableConv2D",
]
