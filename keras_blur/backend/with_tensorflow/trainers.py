"""What Keras's trainer on TensorFlow asks of a model, and what it is told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record  # TensorFlow does not export whether a tape is recording

from keras_blur.backend.with_tensorflow.devices import _several_workers

Array = Any


def apply_gradients(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """An optimizer's step.

    Args:
        optimizer: any Keras optimizer, which was built for the variables.
        gradients: gradients, scaled as the optimizer's own; `None` for a variable that is not used.
        variables: Keras variables in the optimizer's order.
    """
    optimizer.apply(list(gradients), list(variables))


def training_elsewhere() -> bool:
    """Whether a gradient tape is recording, as in the training step of an optimizer."""
    return record.could_possibly_record()


def check_constants(genome: Mapping[str, Array]) -> None:
    """Nothing to check: programs follow the variables that they read."""


def reducible(logs: Mapping[str, Array]) -> dict[str, Array]:
    """A replica's logs for the `fit` of Keras, whose mean over several workers needs an axis to run
    over."""
    if not _several_workers():
        return dict(logs)
    return {name: value[None] for name, value in logs.items()}


@contextlib.contextmanager
def symbolic_build(model: Any, iterator: Any, data_batch: Any) -> Iterator[tuple[Any, Any]]:
    """The surroundings in which Keras builds metrics, and the data that it may look at."""
    strategy = model.distribute_strategy
    with strategy.scope():
        if iterator is not None and _several_workers():
            batch = next(iter(next(iter(iterator))[2]))
            local = tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], batch)
            yield None, local
        else:
            yield iterator, data_batch


def remember_logits(probabilities: Array, logits: Array) -> Array:
    """Probabilities that know their logits."""
    probabilities._blur_logits = logits
    return probabilities


def with_logits(probabilities: Array) -> Array:
    """Probabilities that Keras's losses replace with their logits, if these are known. Metrics get
    others: they would not ask which function made them."""
    logits = getattr(probabilities, "_blur_logits", None)
    if logits is None:
        return probabilities
    found = tf.identity(probabilities)
    found._keras_logits = logits
    if hasattr(probabilities, "_keras_mask"):
        found._keras_mask = probabilities._keras_mask
    return found


def outside_of_programs() -> Any:
    """A scope in which variables are made outside of the program that is being traced."""
    return tf.init_scope()


def after(values: Sequence[Array]) -> Any:
    """A scope whose assignments wait for values."""
    return tf.control_dependencies([value for value in values if tf.is_tensor(value)])
