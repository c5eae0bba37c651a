"""Estimators of the hypergradient for tables of tests: each once."""

from keras_blur import bilevel

ESTIMATORS = {
    "one step": bilevel.OneStep(rate=0.1),
    "difference": bilevel.FiniteDifference(rate=0.1),
    "evograd": bilevel.EvoGrad(4, sigma=0.05),
    "cut": bilevel.LayerwiseMetaGradient("last:1", rate=0.1),
    "sampler": bilevel.LayerwiseMetaGradient(None, bilevel.GradientSampler(target=1), rate=0.1),
}
