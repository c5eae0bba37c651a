"""Task distributions and the data sets behind them."""

from keras_blur.tasks.arrays import arrays
from keras_blur.tasks.augment import (
    Augmentation,
    ClassResample,
    Compose,
    LabelOffset,
    LabelPermutation,
    LabelRotation,
    augment,
)
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.episodes import episodes
from keras_blur.tasks.functions import functions
from keras_blur.tasks.images import images
from keras_blur.tasks.mixture import Mixture, mixture
from keras_blur.tasks.noise import noisy_labels
from keras_blur.tasks.remember import remember
from keras_blur.tasks.synthetic import classes, pose, sines

__all__ = [
    "Augmentation",
    "ClassResample",
    "Compose",
    "LabelOffset",
    "LabelPermutation",
    "LabelRotation",
    "Mixture",
    "Tasks",
    "arrays",
    "augment",
    "classes",
    "episodes",
    "functions",
    "images",
    "mixture",
    "noisy_labels",
    "pose",
    "remember",
    "sines",
]
