"""Bilevel optimisation: learning outer parameters within a single training run."""

from keras_blur.bilevel.evograd import EvoGrad
from keras_blur.bilevel.famus import GradientSampler, LayerwiseMetaGradient
from keras_blur.bilevel.hypergradient import FiniteDifference, OneStep
from keras_blur.bilevel.pseudo_clean import PseudoCleanSplit
from keras_blur.bilevel.trainer import BilevelTrainer
from keras_blur.bilevel.training_losses import Hyperparameters, LearnedRotation, SampleWeightNet, TrainingLoss, held

__all__ = [
    "BilevelTrainer",
    "EvoGrad",
    "FiniteDifference",
    "GradientSampler",
    "Hyperparameters",
    "LayerwiseMetaGradient",
    "LearnedRotation",
    "OneStep",
    "PseudoCleanSplit",
    "SampleWeightNet",
    "TrainingLoss",
    "held",
]
