"""What is learned: distributions of tasks, and the image sets beneath them."""

from keras_blur.tasks.base import Tasks
from keras_blur.tasks.episodes import episodes
from keras_blur.tasks.functions import functions
from keras_blur.tasks.images import images
from keras_blur.tasks.mixture import Mixture, mixture

__all__ = ["Mixture", "Tasks", "episodes", "functions", "images", "mixture"]
