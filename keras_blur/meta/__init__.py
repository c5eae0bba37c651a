"""How the rule itself is learned."""

from keras_blur.meta.bilevel import BilevelTrainer
from keras_blur.meta.callbacks import MetaValidate, SaveLearned, UnrollCurriculum
from keras_blur.meta.es import ES, PES
from keras_blur.meta.estimator import LOSSES, Estimate, Estimator
from keras_blur.meta.evograd import EvoGrad
from keras_blur.meta.evolution import Evolution
from keras_blur.meta.famus import GradientSampler, LayerwiseMetaGradient
from keras_blur.meta.hypergradient import FiniteDifference, OneStep
from keras_blur.meta.pseudo_clean import PseudoCleanSplit
from keras_blur.meta.trainer import MetaTrainer
from keras_blur.meta.training_losses import Hyperparameters, LearnedRotation, SampleWeightNet, TrainingLoss
from keras_blur.meta.unroll import TruncatedUnroll, Unroll
from keras_blur.meta.warp_grad import STARTS, OfflineWarpGrad, TrajectoryBuffer, WarpGrad

__all__ = [
    "ES",
    "LOSSES",
    "PES",
    "STARTS",
    "BilevelTrainer",
    "Estimate",
    "Estimator",
    "EvoGrad",
    "Evolution",
    "FiniteDifference",
    "GradientSampler",
    "Hyperparameters",
    "LayerwiseMetaGradient",
    "LearnedRotation",
    "MetaTrainer",
    "MetaValidate",
    "OfflineWarpGrad",
    "OneStep",
    "PseudoCleanSplit",
    "SampleWeightNet",
    "SaveLearned",
    "TrainingLoss",
    "TrajectoryBuffer",
    "TruncatedUnroll",
    "Unroll",
    "UnrollCurriculum",
    "WarpGrad",
]
