"""How the rule itself is learned."""

from keras_blur.meta.callbacks import GenomeCheckpoint, UnrollCurriculum
from keras_blur.meta.trainer import MetaTrainer
from keras_blur.meta.unroll import Unroll

__all__ = ["GenomeCheckpoint", "MetaTrainer", "Unroll", "UnrollCurriculum"]
