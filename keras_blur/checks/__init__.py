"""Checks of data, labels and weights, before a model or a task distribution uses them."""

from keras_blur.checks.data import (
    CheckedModel,
    Expected,
    check_class_weight,
    checked,
    checked_arrays,
    checked_validation,
    is_loader,
    label_kind,
    model_expects,
    plain_errors,
)

__all__ = [
    "CheckedModel",
    "Expected",
    "check_class_weight",
    "checked",
    "checked_arrays",
    "checked_validation",
    "is_loader",
    "label_kind",
    "model_expects",
    "plain_errors",
]
