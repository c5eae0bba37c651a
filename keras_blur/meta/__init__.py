"""Meta-training: learning the outer parameters of a learner."""

from keras_blur.meta.callbacks import MetaValidate, SaveLearned, UnrollCurriculum
from keras_blur.meta.cma import CMAES, CMAState
from keras_blur.meta.es import ES, PES
from keras_blur.meta.estimator import LOSSES, Estimate, Estimator
from keras_blur.meta.evolution import FITNESSES, Evolution
from keras_blur.meta.trainer import MetaTrainer
from keras_blur.meta.unroll import TruncatedUnroll, Unroll
from keras_blur.meta.warp_grad import STARTS, OfflineWarpGrad, TrajectoryBuffer, WarpGrad

__all__ = [
    "CMAES",
    "ES",
    "FITNESSES",
    "LOSSES",
    "PES",
    "STARTS",
    "CMAState",
    "Estimate",
    "Estimator",
    "Evolution",
    "MetaTrainer",
    "MetaValidate",
    "OfflineWarpGrad",
    "SaveLearned",
    "TrajectoryBuffer",
    "TruncatedUnroll",
    "Unroll",
    "UnrollCurriculum",
    "WarpGrad",
]
