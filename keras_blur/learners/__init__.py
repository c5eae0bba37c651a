"""How a learner learns inside a task."""

from keras_blur.learners.base import Learner
from keras_blur.learners.blur import Blur
from keras_blur.learners.optimizer import Optimizer

__all__ = ["Blur", "Learner", "Optimizer"]
