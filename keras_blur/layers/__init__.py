"""Layers whose synapses learn by a genome."""

from keras_blur.layers.dense import Dense

__all__ = ["Dense"]
