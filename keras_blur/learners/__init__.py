"""Learners: algorithms that learn a single task."""

from keras_blur.learners.base import Learner, MetaLearner
from keras_blur.learners.baseline import BaselineLearner
from keras_blur.learners.blur import Blur
from keras_blur.learners.maml import MAML
from keras_blur.learners.neural_process import NeuralProcess
from keras_blur.learners.online import OnlineCell, OnlineRule
from keras_blur.learners.prototypes import Prototypes
from keras_blur.learners.warp import Warp, warped

__all__ = [
    "MAML",
    "BaselineLearner",
    "Blur",
    "Learner",
    "MetaLearner",
    "NeuralProcess",
    "OnlineCell",
    "OnlineRule",
    "Prototypes",
    "Warp",
    "warped",
]
