"""
Title: Is the update the gradient of some loss?
Description: How far the Jacobian of the synapses' update is from symmetric, for several genomes.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), section 3.5 and appendix A,
Figure 2.

If an update is the gradient of some loss by the weights, its Jacobian by the weights is a matrix of
second derivatives, and so symmetric. The paper takes a two-state genome, a boolean function of two
inputs, two output neurons and one hidden layer of 20, which has 204 forward weights and biases, and
finds a Jacobian that is clearly not symmetric. Here it is the exact Jacobian of one learning step
less the weights, in double precision, and its asymmetry is |J - J'| / |J + J'| in Frobenius norms:
0 for the gradient of a loss, about 1 for a matrix of independent numbers.

Directions are tied, so that the forward weights are all there are and a step depends on nothing
else. Random and meta-trained genomes have the rule of equations 5 to 7 with tanh and no stabiliser.
The control is the genome that is backpropagation, with the squared error: its two states have one
common channel, so it has 102 weights, and its asymmetry must be rounding error only. Two genomes
stand between these: the control with labels instead of the error, which is the gradient of a linear
loss, and the same with a channel for each state.

    python examples/paper/jacobian.py [--quick] [--data_dir DIR] [--out FOLDER]
"""

import numpy as np
import tensorflow as tf
from experiment import Outcome, Setting, cell, main, meta_train

import keras_blur as kb
from keras_blur import genomes, learners, random, tasks
from keras_blur.backend import compiled
from keras_blur.core import feedback, network
from keras_blur.report import style

RULE = kb.Rule(last_activation="linear", directions="tied", batch_reduction="mean")
HIDDEN = (20,)


def jacobian(genome: kb.Genome, seed: int, before: int) -> np.ndarray:
    """The Jacobian of the update of all weights by all weights, after some steps on xor; network
    and points by the seed."""
    rule = genome.rule
    genome = kb.Genome(rule, {name: np.asarray(array, np.float64) for name, array in genome.arrays.items()})
    learner = learners.Blur(HIDDEN, rule)
    x, y = (tf.cast(v, tf.float64) for v in tasks.functions("xor").examples(random.seed_of(seed), 64, "test"))
    graph = learner.plan(x.shape[-1], y.shape[-1]).graph

    def signal(prediction: tf.Tensor) -> tf.Tensor:
        return feedback.error(rule.keras_loss, y, prediction) if rule.feedback == "error" else y

    def stepped(synapses: tuple) -> tuple:
        return network.step(genome, graph, network.NetworkState(synapses), x, signal).state.synapses

    def flat(synapses: tuple) -> tf.Tensor:
        return tf.concat([tf.reshape(leaf, (-1,)) for leaf in tf.nest.flatten(synapses)], axis=0)

    state = learner.init({}, random.seed_of(seed), x.shape[-1], y.shape[-1]).synapses
    state = tf.nest.map_structure(lambda leaf: tf.cast(leaf, tf.float64), state)
    for _ in range(before):
        state = stepped(state)
    like = tf.nest.flatten(state)

    def exact(weights: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(weights)
            parts = tf.split(weights, [int(np.prod(leaf.shape)) for leaf in like])
            leaves = [tf.reshape(part, leaf.shape) for part, leaf in zip(parts, like, strict=True)]
            change = flat(stepped(tf.nest.pack_sequence_as(state, leaves))) - weights
        return tape.jacobian(change, weights)

    return compiled(exact, jit_compile=False)(flat(state)).numpy()


def asymmetry(matrix: np.ndarray) -> float:
    """0 for a symmetric matrix, about 1 for one of independent numbers."""
    return float(np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix + matrix.T))


def run(setting: Setting) -> Outcome:
    """Meta-trains, and measures each genome before learning and after ten steps."""
    count, steps, before = setting.pick((2, 10, (0,)), (5, 1000, (0, 10)))
    names = setting.pick(("xor", "and"), ("xor", "and", "or", "nxor", "nand"))
    trained = meta_train(
        tasks.functions(names, relabel=True), [HIDDEN], RULE, steps=steps, members=count, seed=setting.seed,
        jit_compile=not setting.quick,
    )  # fmt: skip
    exact = genomes.backprop(loss="mean_squared_error")
    linear = exact.with_rule(exact.rule.replace(feedback="labels", loss=None))
    drawn = kb.Genome.random(RULE, setting.seed + 1, population=(count,))
    kinds = {
        "backpropagation": [exact] * count,
        "labels for the error": [linear] * count,
        "and a channel for each state": [linear.with_rule(linear.rule.replace(channels="own"))] * count,
        "random": [drawn.member(number) for number in range(count)],
        "meta-trained": [trained.population.member(number) for number in range(count)],
    }
    found = {
        name: np.array([[jacobian(own, setting.seed + n, steps) for steps in before] for n, own in enumerate(some)])
        for name, some in kinds.items()
    }
    measured = {name: np.array([[asymmetry(one) for one in some] for some in found[name]]) for name in kinds}

    def shown(values: np.ndarray) -> str:
        """Rounding cannot be seen with three digits."""
        return f"at most {values.max():.0e}" if values.max() < 1e-3 else cell(values)

    rows = [
        [name, str(found[name].shape[-1])] + [shown(measured[name][:, index]) for index in range(len(before))]
        for name in kinds
    ]
    header = ["genome", "weights", *(f"asymmetry after {steps} steps" for steps in before)]
    numbers = {
        "steps": list(before),
        "asymmetry": {name: values.tolist() for name, values in measured.items()},
        "meta_training": trained.scores,
        "seconds_of_meta_training": trained.seconds,
    }

    def draw(path: str) -> None:
        panels = ("backpropagation", "random", "meta-trained")
        figure, axes = style.figure(columns=len(panels), width=3.0, height=3.0)
        for axis, name in zip(axes[0], panels, strict=True):
            matrix = found[name][0, 0]
            difference = np.abs(matrix - matrix.T) / np.abs(matrix).max()
            image = axis.imshow(np.log10(np.maximum(difference, 1e-18)), vmin=-18, vmax=0, cmap="cividis")
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("weight")
            axis.grid(visible=False)
        axes[0][0].set_ylabel("weight")
        figure.colorbar(image, ax=list(axes[0]), label="log10 of |J - J'| over the largest |J|", shrink=0.8)
        style.save(figure, path)

    note = (
        f"Asymmetry |J - J'| / |J + J'| of the update on 64 points of xor, one hidden layer of {HIDDEN[0]}: mean and "
        f"deviation over {count} initial networks, each with points and, where they differ, a genome of its own. "
        f"Meta-training: {steps} meta-steps of 10 unrolled steps on {', '.join(names)}; accuracy at its end "
        f"{cell(trained.scores)}. Picture: the first network before learning."
    )
    return Outcome(header, rows, numbers, draw, note)


if __name__ == "__main__":
    main(run)
