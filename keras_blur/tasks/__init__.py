"""What is learned: distributions of tasks, and the image sets beneath them."""

from keras_blur.tasks.base import Tasks
from keras_blur.tasks.functions import functions
from keras_blur.tasks.images import images

__all__ = ["Tasks", "functions", "images"]
