"""Keras models that learn with a genome."""

from keras_blur.models.convert import convert
from keras_blur.models.model import Model
from keras_blur.models.sequential import Sequential

__all__ = ["Model", "Sequential", "convert"]
