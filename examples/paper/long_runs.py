"""
Title: Learning for 800 steps
Description: Normalised synapses and Oja's term in runs far past meta-training, with random labels
from step 500 on.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), section 3.4, appendices C.5 and C.6,
Figures 15 and 16.

The paper lets genomes with and without synapse normalisation and with and without Oja's term learn
MNIST for 800 steps, and from step 500 on gives them random labels: a network that still learns
loses what it knew, one that keeps it has stopped learning. It says that without Oja's term synapses
grow exponentially until they overflow.

The paper normalises synapses where they are used and lets the stored ones be; this package can also
normalise the stored ones at the start of each step, which bounds them by itself. Both are here
beside none, each with and without the term, whose multiplier is learned. Genomes are meta-trained
alike, at 10 unrolled steps. Accuracy is on test images with their true labels; the norm is that of
all forward kernels together, as a step leaves them.

    python examples/paper/long_runs.py [--quick] [--data_dir DIR] [--out FOLDER]
"""

import numpy as np
import tensorflow as tf
from experiment import RULE, Outcome, Setting, cell, main, meta_train

import keras_blur as kb
from keras_blur import learners, random, tasks
from keras_blur.backend import compiled
from keras_blur.report import style


def follow(
    population: kb.Genome, images: tasks.Tasks, hidden: tuple[int, ...], steps: int, switch: int, every: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scored steps, and by member and scored step the accuracy and the norm; of what is not
    finite, 0 and infinity."""
    learner = learners.Blur(hidden, population.rule)
    outer = {name: tf.constant(array) for name, array in population.arrays.items()}
    x, y = images.examples(random.seed_of(seed), steps * 64, "train")
    drawn = tf.one_hot(random.integers(random.seed_of(seed + 1), (steps * 64,), images.outputs), images.outputs)
    y = tf.where((tf.range(steps * 64) < switch * 64)[:, None], y, 2.0 * drawn - 1.0)
    x, y = tf.reshape(x, (steps, 64, -1)), tf.reshape(y, (steps, 64, -1))
    test_x, test_y = images.examples(random.seed_of(seed), min(5000, images.available("test")), "test")
    test_x = tf.reshape(test_x, (-1, images.features))
    state = learner.init(outer, random.seed_of(seed), images.features, images.outputs, (population.population[0],))

    def learn(outer: dict, state: tuple, x: tf.Tensor, y: tf.Tensor) -> tuple:
        def body(time: tf.Tensor, state: tuple) -> tuple:
            return time + 1, learner.step(outer, state, x[time], y[time])[0]

        return tf.while_loop(lambda time, _: time < every, body, (tf.constant(0), state), maximum_iterations=every)[1]

    def score(outer: dict, state: tuple) -> tuple:
        prediction = learner.predict(outer, state, test_x)
        correct = tf.reduce_mean(tf.cast(tf.equal(tf.argmax(prediction, -1), tf.argmax(test_y, -1)), tf.float32), -1)
        squares = tf.add_n([tf.reduce_sum(own["kernel"] ** 2, axis=(-3, -2, -1)) for own in state.synapses])
        finite = tf.reduce_all(tf.math.is_finite(prediction), axis=(-2, -1)) & tf.math.is_finite(squares)
        return tf.where(finite, correct, 0.0), tf.where(finite, tf.sqrt(squares), np.inf)

    learn, score = compiled(learn, jit_compile=False), compiled(score, jit_compile=False)
    taken = [score(outer, state)]
    for first in range(0, steps, every):
        state = learn(outer, state, x[first : first + every], y[first : first + every])
        taken.append(score(outer, state))
    accuracy, norm = (np.stack([np.array(pair[place].numpy(), float) for pair in taken], axis=1) for place in (0, 1))
    return np.arange(0, steps + 1, every), accuracy, norm


def run(setting: Setting) -> Outcome:
    """Meta-trains with each combination, and follows long runs."""
    members, meta_steps, steps, switch, every = setting.pick((2, 4, 40, 20, 10), (6, 400, 800, 500, 10))
    hidden = setting.pick((16,), (48,))
    size = setting.pick(None, 10)
    family = tasks.images(setting.data, size=size, relabel=True, data_dir=setting.data_dir)
    images = tasks.images(setting.data, size=size, data_dir=setting.data_dir)
    rows, numbers, found = [], {}, {}
    for norm in setting.pick(("none", "stored"), ("none", "effective", "stored")):
        for oja in ("none", "weights"):
            name = f"{norm}, {'Oja' if oja == 'weights' else 'no Oja'}"
            rule = RULE.replace(states=2, normalize_synapses=norm, oja=oja, oja_learned=oja != "none")
            trained = meta_train(
                family, [hidden], rule, steps=meta_steps, members=members, seed=setting.seed, jit_compile=False
            )
            at, accuracy, size_of = follow(trained.population, images, hidden, steps, switch, every, setting.seed)
            before = list(at).index(switch)
            best = accuracy[trained.best]
            over = int(np.isinf(size_of).any(axis=1).sum())
            last = np.isfinite(size_of[:, before])
            grown = f"{np.median(size_of[last, before] / size_of[last, 0]):.3g}" if last.any() else "overflow"
            rows.append(
                [name, cell(trained.scores), *(cell(accuracy[:, list(at).index(s)]) for s in (every, switch, steps))]
                + [f"{best[list(at).index(s)]:.3f}" for s in (every, switch, steps)]
                + [grown, f"{over} of {members}"]
            )
            numbers[name] = {
                "steps": at.tolist(),
                "accuracy": accuracy.tolist(),
                "norm": [[float(v) if np.isfinite(v) else None for v in one] for one in size_of],
                "meta_training": trained.scores,
                "skipped": trained.skipped,
                "seconds": trained.seconds,
            }
            found[name] = at, accuracy, size_of, best
    header = ["synapses normalised", "meta-training", *(f"step {s}" for s in (every, switch, steps))]
    header += [*(f"best: step {s}" for s in (every, switch, steps)), f"norm at {switch} over first", "overflow"]

    def draw(path: str) -> None:
        figure, axes = style.figure(columns=3, width=3.6)
        for index, (name, (at, accuracy, size_of, best)) in enumerate(found.items()):
            style.line(axes[0][0], index, at, best, name)
            style.line(axes[0][1], index, at, accuracy.mean(axis=0), name)
            middle = np.median(size_of, axis=0)
            style.line(axes[0][2], index, at, np.where(np.isfinite(middle), middle, np.nan), name)
        axes[0][2].set_yscale("log")
        axes[0][0].set_ylabel("test accuracy, true labels")
        for axis, title in zip(
            axes[0], ("best member in meta-training", "mean of members", "norm of kernels, median"), strict=True
        ):
            axis.axvline(switch, color="0.5", linewidth=0.8)
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("learning step")
        for axis in axes[0][:2]:
            axis.set_ylim(0.0, 1.0)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False, handlelength=3)
        style.save(figure, path)

    note = (
        f"Test accuracy on {images.name}, one hidden layer of {hidden[0]}, 2 states, batches of 64; labels are random after "
        f"step {switch}. Mean and deviation over {members} genomes from different random numbers, {meta_steps} meta-steps "
        "of 10 unrolled steps each; best: the genome with the highest accuracy at the end of meta-training; test images "
        "choose nothing. A run that is not finite has accuracy 0. The growth of the norm "
        "is the median of those that are finite; overflow counts the genomes that were not finite at some step. The "
        "column meta-training is the running accuracy at its end."
    )
    return Outcome(header, rows, numbers, draw, note)


if __name__ == "__main__":
    main(run)
