"""What Keras's trainer on JAX asks of a model, and what it is told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

Array = Any


def apply_gradients(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """An optimizer's step; `apply` of one that scales losses assigns in a branch, which no program
    may."""
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer.apply(list(gradients), list(variables))
        return
    touched = [*variables, *optimizer.variables]
    before = [one.value for one in touched]
    own, state = optimizer.stateless_apply(before[len(variables) :], list(gradients), before[: len(variables)])
    for variable, value in zip(touched, [*own, *state], strict=True):
        variable.assign(value)


def training_elsewhere() -> bool:
    """Always `False`: JAX does not tell a function whether its gradient will be taken."""
    return False


def check_constants(genome: Mapping[str, Array]) -> None:
    """Raises a `ValueError` if a number of a model's genome is a variable, whose value a program
    would keep."""
    for name, value in genome.items():
        if isinstance(value, keras.Variable):
            raise ValueError(
                f"`{name}` of a model's genome must be an array, since programs on JAX do not follow a variable: set "
                f"`model.genome` when it changes. Received: {value!r}"
            )


def reducible(logs: Mapping[str, Array]) -> dict[str, Array]:
    """The logs themselves."""
    return dict(logs)


@contextlib.contextmanager
def symbolic_build(model: Any, iterator: Any, data_batch: Any) -> Iterator[tuple[Any, Any]]:
    """Nothing to prepare."""
    yield iterator, data_batch


def remember_logits(probabilities: Array, logits: Array) -> Array:
    """The probabilities themselves."""
    return probabilities


def with_logits(probabilities: Array) -> Array:
    """The probabilities: Keras's losses on JAX are computed from these alone."""
    return probabilities


def outside_of_programs() -> Any:
    """No scope is needed."""
    return contextlib.nullcontext()


def after(values: Sequence[Array]) -> Any:
    """No scope: a program is a function of its inputs."""
    return contextlib.nullcontext()
