"""The feedback into the outputs of a network: loss, labels and weights of each output, and the
passage through its head.

Source: "Meta-Learning Bidirectional Update Rules" (2021), section 3.3, for labels; the chain rule
for errors. A head is a chain of maps after an output, which turns the output into the prediction.
The derivative of a loss goes back through it. If a head ends in a softmax or a sigmoid and the loss
is a cross-entropy of probabilities, both are replaced by the cross-entropy of the logits. It has
the same gradient, also where probabilities round to 0 or 1 and Keras on JAX has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_blur import backend
from keras_blur.core import feedback
from keras_blur.core.derivatives import vjp
from keras_blur.core.losses import ignored_class
from keras_blur.core.weightless import Sigmoid, Softmax, WeightlessMap

Array = Any
Head = Sequence[WeightlessMap]


class Wanted(NamedTuple):
    """The target of one output.

    Attributes:
        loss: its loss, or `None`.
        share: weight of the loss among the outputs.
        head: the maps after it.
        labels: labels as the loss takes them.
        weights: a weight for each example or position, or `None`.
    """

    loss: keras.losses.Loss | None
    share: float
    head: Head
    labels: Any
    weights: Array | None


def losses_of(loss: Any, loss_weights: Any, names: Sequence[str]) -> list[tuple[keras.losses.Loss | None, float]]:
    """The loss of each output and its weight; an output may have none.

    Args:
        loss: a Keras loss, or a list or dict of them.
        loss_weights: a list or dict of numbers, or `None`.
        names: names of the outputs.

    Raises:
        ValueError: if the losses or weights do not fit the outputs.

    Example:

    >>> [weight for _, weight in losses_of(keras.losses.MeanSquaredError(), None, ["y"])]
    [1.0]
    """
    if isinstance(loss, keras.losses.Loss):
        if len(names) > 1:
            raise ValueError(
                f"`loss` must be a list or dict of losses, one for each of the {len(names)} outputs. Received: {loss!r}"
            )
        return [(loss, 1.0)]
    losses = _by_output("loss", loss, names, None)
    weights = [1.0] * len(names) if loss_weights is None else _by_output("loss_weights", loss_weights, names, 1.0)
    return list(zip(losses, weights, strict=True))


def _by_output(name: str, value: Any, names: Sequence[str], missing: Any) -> list[Any]:
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - set(names))
        if unknown:
            raise ValueError(f"`{name}` must have keys among the outputs {list(names)}. Received: {unknown}")
        return [value.get(one, missing) for one in names]
    if len(value) != len(names):
        raise ValueError(f"`{name}` must have {len(names)} entries, one for each output. Received: {len(value)}")
    return list(value)


def labels_of(y: Any, names: Sequence[str]) -> list[Any]:
    """Flattens labels of any structure to the order of the outputs. An output may have none.

    Example:

    >>> labels_of({"b": 1, "a": 2}, ["a", "b"])
    [2, 1]
    """
    if len(names) == 1 and not isinstance(y, (Mapping, list, tuple)):
        return [y]
    if isinstance(y, Mapping):
        return keras.tree.flatten(y) if len(names) == 1 else _by_output("y", y, names, None)
    return list(y)


def weights_of(sample_weight: Any, names: Sequence[str], dtype: str) -> list[Array | None]:
    """Flattens sample weights of any structure to the order of the outputs."""
    if isinstance(sample_weight, Mapping):
        found = _by_output("sample_weight", sample_weight, names, None)
    else:
        found = list(sample_weight) if isinstance(sample_weight, (list, tuple)) else [sample_weight] * len(names)
    return [None if one is None else ops.cast(one, dtype) for one in found]


def one_weight(wanted: Sequence[Wanted]) -> Array | None:
    """The weight of each example, `[batch]`, where outputs with a loss have the same; `None` if
    they have none.

    Raises:
        ValueError: if some of these outputs have weights and others have none.
    """
    given = [one.weights for one in wanted if one.loss is not None]
    if any(one is None for one in given) and any(one is not None for one in given):
        raise ValueError(
            "`sample_weight` must be the same for each output with a loss, where a rule with feedback='labels' learns from "
            "several. Received: weights of some and none of others"
        )
    return ops.reshape(given[0], (-1,)) if given and given[0] is not None else None


def teaching(wanted: Sequence[Wanted], outputs: Sequence[Any], dtype: str) -> Array | None:
    """Which examples teach something: 1 for those with a nonzero weight in some output or position,
    else 0; `None` if all do.

    Args:
        wanted: what each output is to learn.
        outputs: the Keras tensors of the outputs.
        dtype: dtype of the result, `[batch]`.
    """
    found = []
    for one, output in zip(wanted, outputs, strict=True):
        if one.loss is None:
            continue
        ignored, counts = ignored_class(one.loss), []
        if one.weights is not None:
            counts.append(ops.not_equal(_by_position(one.weights, output), 0.0))
        if ignored is not None:
            counts.append(ops.not_equal(_by_position(one.labels, output), ignored))
        if not counts:
            return None
        both = counts[0] if len(counts) == 1 else ops.logical_and(*counts)
        found.append(ops.any(ops.reshape(both, (ops.shape(both)[0], -1)), axis=-1))
    return ops.cast(ops.any(ops.stack(found), axis=0), dtype) if found else None


def _by_position(value: Array, output: Any) -> Array:
    """Weights or integer labels as `[batch, *positions]`, where sizes may be 1."""
    value, rank = ops.convert_to_tensor(value), len(output.shape) - 1
    if len(value.shape) > rank:
        return value[..., 0]
    return ops.reshape(value, (*ops.shape(value), *(1,) * (rank - len(value.shape))))


# For each map that gives probabilities, the losses of which Keras takes the logits.
_OF_PROBABILITIES: dict[Any, tuple[type[keras.losses.Loss], ...]] = {
    Softmax: (keras.losses.SparseCategoricalCrossentropy, keras.losses.CategoricalCrossentropy),
    Sigmoid: (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy),
}


def at_logits(loss: keras.losses.Loss, head: Head) -> tuple[keras.losses.Loss, Head]:
    """A loss and the head for its derivative. A cross-entropy of probabilities after a softmax
    becomes one of logits, and the softmax or sigmoid is removed from the head.

    Raises:
        ValueError: if the loss takes logits and the head gives probabilities.
    """
    if not suits(loss, head):
        return loss, head
    return check_probabilities(loss, type(head[-1]).__name__.lower()), head[:-1]


def suits(loss: keras.losses.Loss | None, head: Head) -> bool:
    """Whether a loss is the cross-entropy of what a head ends in."""
    return bool(head) and type(loss) in _OF_PROBABILITIES.get(type(head[-1]), ())


def check_probabilities(loss: keras.losses.Loss, ending: str) -> keras.losses.Loss:
    """The cross-entropy of logits in place of one of probabilities.

    Raises:
        ValueError: if the loss takes logits itself, which outputs with that ending are not.
    """
    logits = of_logits(loss)
    if logits is None:
        raise ValueError(
            f"`loss` must take probabilities, from_logits=False, since the outputs are those of a {ending}. "
            f"Received: loss={type(loss).__name__}(from_logits=True)"
        )
    return logits


def of_logits(loss: keras.losses.Loss) -> keras.losses.Loss | None:
    """Turns a cross-entropy of probabilities into one of logits; `None` for any other loss.

    Example:

    >>> of_logits(keras.losses.CategoricalCrossentropy()).get_config()["from_logits"]
    True
    """
    known = any(type(loss) in kinds for kinds in _OF_PROBABILITIES.values())
    if not known or loss.get_config().get("from_logits"):
        return None
    return type(loss).from_config({**loss.get_config(), "from_logits": True})


def through(head: Head, value: Array) -> Array:
    """The prediction: an output `[batch, *features]` after its head."""
    for one in head:
        value = one.forward((value[None],), None)[0]
    return value


def takes_probabilities(loss: keras.losses.Loss | None) -> bool:
    """Whether a loss is a cross-entropy of the probabilities, or logits, of a sigmoid."""
    return type(loss) in _OF_PROBABILITIES[Sigmoid]


def predicted(head: Head, value: Array) -> Array:
    """The prediction, which knows its logits if the head ends in a softmax or a sigmoid."""
    if not head or type(head[-1]) not in _OF_PROBABILITIES:
        return through(head, value)
    logits = through(head[:-1], value)
    return backend.remember_logits(through(head[-1:], logits), logits)


def errors(wanted: Sequence[Wanted], outputs: Sequence[Array], total: Callable[[Array], Array] | None) -> list[Array]:
    """The derivative of each loss with respect to its output.

    Args:
        wanted: what each output is to learn.
        outputs: the outputs before their heads.
        total: a function that returns the sum of a number over devices, or `None`.
    """
    signals = []
    for one, output in zip(wanted, outputs, strict=True):
        if one.loss is None:
            signals.append(ops.zeros_like(output))
            continue
        loss, head = at_logits(one.loss, one.head)
        if head:
            prediction, pull = vjp(lambda value, maps=head: through(maps, value), output)
            signal = pull(feedback.error(loss, one.labels, prediction, one.weights, total))[0]
        else:
            signal = feedback.error(loss, one.labels, output, one.weights, total)
        signals.append(one.share * signal)
    return signals


def signs(wanted: Sequence[Wanted], outputs: Sequence[Array], kind_of: Callable[[Any], str]) -> list[Array]:
    """The labels of each output as +1 and -1, passed back through the shape-changing maps of its
    head.

    Args:
        wanted: what each output is to learn.
        outputs: the outputs before their heads.
        kind_of: a function from a loss to the kind of its labels.
    """
    signals = []
    for one, output in zip(wanted, outputs, strict=True):
        if one.loss is None:
            signals.append(ops.zeros_like(output))
            continue
        values = [output]
        for step in one.head:
            values.append(through([step], values[-1]))
        signal = feedback.encode(one.labels, values[-1].shape[-1], kind_of(one.loss))
        for step, value in zip(reversed(one.head), reversed(values[:-1]), strict=True):
            if step.target != step.sources[0]:
                signal = step.backward((value[None],), ops.cast(signal, value.dtype)[None], None)[0][0]
        signals.append(one.share * signal)
    return signals
