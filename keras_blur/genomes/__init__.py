"""Ready-made genomes: backpropagation, and those that the package ships as files."""

from __future__ import annotations

import os
from importlib import resources
from typing import Any

from keras_blur import arguments
from keras_blur.core.genome import Genome
from keras_blur.core.rule import ACTIVATIONS, Rule
from keras_blur.files import exists


def backprop(
    learning_rate: float = 0.1,
    activation: str = "tanh",
    last_activation: str = "linear",
    loss: Any = None,
) -> Genome:
    """The genome whose learning is gradient descent: the special case of the rule that is
    backpropagation.

    There are two states, the value and the derivative (eq. 1). The forward pass leaves (s(z),
    s'(z)). The backward pass multiplies the second by the weighted sum from above (eq. 2, eq. 6),
    so it becomes dL/dz. The Hebbian product of the input's state 1 and the output's state 2 (eq. 3,
    eq. 7) is then the gradient. This needs one kernel for both directions and both states, or
    separate ones that start equal and receive equal terms. Otherwise, learning departs from
    gradient descent after the first step.

    Args:
        learning_rate: the rate, a positive number; the synapse update gate is its negative.
        activation: nonlinearity of hidden layers.
        last_activation: nonlinearity of the output layer.
        loss: the Keras loss (an instance or its name) to descend if `compile` is given none, or
            `None`.

    Returns:
        A `Genome`.

    Source: "Meta-Learning Bidirectional Update Rules" (2021), section 3.1, eq. 1 to 4, and appendix
    C.7.

    Example:

    >>> genome = backprop(learning_rate=0.5, activation="relu", loss="mean_squared_error")
    >>> float(genome.synapse_update)
    -0.5
    """
    arguments.positive("learning_rate", learning_rate)
    arguments.choice("activation", activation, ACTIVATIONS)
    rule = Rule(
        states=2,
        forward_activation=activation,
        backward_activation="linear",
        last_activation=last_activation,
        derivative_state=True,
        backward_update="multiplicative_after_first",
        directions="tied",
        channels="tied",
        feedback="error",
        loss=loss,
    )
    return Genome(
        rule,
        {
            "nu": [[1.0, 1.0], [0.0, 0.0]],  # both states see the value from below (eq. 4), [source, target]
            "mu": [[1.0, 0.0], [0.0, 1.0]],
            "nu_tilde": [[1.0, 0.0], [0.0, 1.0]],
            "mu_tilde": [[0.0, 1.0], [1.0, 0.0]],  # input state 1 times output state 2
            "neuron_keep": 1.0,
            "neuron_update": 1.0,
            "synapse_keep": 1.0,
            "synapse_update": -float(learning_rate),
            "temperature": 1.0,
        },
    )


def names() -> list[str]:
    """Names of the ready-made genomes in the package."""
    folder = resources.files("keras_blur.genomes")
    return sorted(entry.name[: -len(".json")] for entry in folder.iterdir() if entry.name.endswith(".json"))


def load(name: str | os.PathLike[str] = "fast") -> Genome:
    """A genome by name or from a file.

    Args:
        name: `"backprop"`, a name of `names()`, or a path of a file that `Genome.save` wrote. The
            default, `"fast"`, suits any network and has nothing to tune.

    Returns:
        A `Genome`.

    Raises:
        ValueError: if there is neither such a genome nor such a file, or the file is damaged.

    Example:

    >>> load("backprop").rule.states
    2
    """
    arguments.instance("name", name, (str, os.PathLike), "the name of a genome or a path")
    text = os.fspath(name)
    if text == "backprop":
        return backprop()
    if text in names():
        content = (resources.files("keras_blur.genomes") / f"{text}.json").read_text(encoding="utf-8")
        return Genome.from_json(content, source=f"Genome {text!r}")
    if text and not os.path.isdir(text) and exists(text):
        return Genome.load(text)
    raise ValueError(
        f"`name` must be {', '.join(['backprop', *names()])} or the path of a genome file. Received: name={text!r}"
    )


def card(name: str) -> str:
    """What is known about a ready-made genome: tasks, rule, cost, scores, limits, and the command
    that made it.

    Args:
        name: one of `names()`.

    Returns:
        The card, as Markdown text.

    Raises:
        ValueError: if there is no such genome in the package.
    """
    if name not in names():
        raise ValueError(f"`name` must be one of {', '.join(names())}. Received: name={name!r}")
    return (resources.files("keras_blur.genomes") / f"{name}.md").read_text(encoding="utf-8")
