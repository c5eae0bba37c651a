"""How the rule itself is learned."""

from keras_blur.meta.callbacks import MetaValidate, SaveLearned, UnrollCurriculum
from keras_blur.meta.es import ES, PES
from keras_blur.meta.estimator import LOSSES, Estimate, Estimator
from keras_blur.meta.evolution import Evolution
from keras_blur.meta.trainer import MetaTrainer
from keras_blur.meta.unroll import TruncatedUnroll, Unroll

__all__ = [
    "ES",
    "LOSSES",
    "PES",
    "Estimate",
    "Estimator",
    "Evolution",
    "MetaTrainer",
    "MetaValidate",
    "SaveLearned",
    "TruncatedUnroll",
    "Unroll",
    "UnrollCurriculum",
]
