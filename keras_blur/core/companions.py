"""Arrays that a rule keeps beside synapses: traces of their terms, and averages over the steps.

The name of a companion is that of its synapse array with a suffix, so it travels wherever synapses
do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_blur.core import equations
from keras_blur.core.genome import Genome
from keras_blur.core.rule import Rule

if TYPE_CHECKING:
    from jaxtyping import Int

Array = Any
Synapses = Mapping[str, Array]

TRACE, AVERAGE = "_trace", "_average"


def companions(rule: Rule, names: tuple[str, ...]) -> dict[str, str]:
    """Names of the arrays that a rule keeps beside synapses, and the array that each is like.

    A trace starts at zero. An average, which `predict` reads, starts with the values of its
    synapses.
    """
    traces = {name + TRACE: name for name in names if rule.momentum != "none" and rule.changes(name)}
    read = [name for name in names if rule.slow_synapses and not name.startswith("backward")]
    return {**traces, **{name + AVERAGE: name for name in read}}


def averaged(genome: Genome, synapses: Synapses, step: Int[Array, ""] | int, learns: bool) -> Synapses:
    """The synapses after a step, with their averages moved towards them.

    If a layer does not learn, the first step sets its averages to its synapses, and they stay
    there.
    """
    moved = dict(synapses)
    for name, old in synapses.items():
        if name.endswith(AVERAGE):
            own = synapses[name.removesuffix(AVERAGE)]
            if not learns:
                moved[name] = ops.where(ops.equal(step, 0), own, old)
                continue
            share = equations.averaging_share(genome, step)
            share = equations.per_state(share, old, len(old.shape) - len(share.shape))
            moved[name] = old + (own - old) * share
    return moved


def slow(rule: Rule, synapses: Synapses, steps: Int[Array, ""] | int) -> Synapses:
    """The synapses that `predict` reads: the averages, once there are any.

    Args:
        rule: the rule.
        synapses: the synapses and their companions.
        steps: 0 until the averages hold: the learning step, or a layer's `averaged`.
    """
    if not rule.slow_synapses:
        return synapses
    learned = ops.convert_to_tensor(steps) > 0
    read = dict(synapses)
    for name in synapses:
        if name.endswith(AVERAGE):
            own = name.removesuffix(AVERAGE)
            read[own] = ops.where(learned, synapses[name], synapses[own])
    return read
