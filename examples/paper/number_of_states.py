"""
Title: How many states a neuron needs
Description: Genomes of 2, 4 and 8 states, meta-trained alike, on MNIST.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), section 4.5, Figure 13.

The paper meta-trains genomes of 2, 4, 8 and 16 states, finds that more states help, and leaves the
gain to future work. Here each number of states has the same meta-steps on small MNIST images, and
is scored on the test images at 28x28 with a network that is wider than those of meta-training.

    python examples/paper/number_of_states.py [--quick] [--data_dir DIR] [--out FOLDER]
"""

import numpy as np
from experiment import RULE, Outcome, Setting, accuracies, cell, main, meta_train, step_axis

from keras_blur import tasks
from keras_blur.report import style
from keras_blur.tasks.datasets import load_images


def run(setting: Setting) -> Outcome:
    """Meta-trains and scores each number of states."""
    members, steps = setting.pick((2, 20), (3, 800))
    sides = setting.pick((None,), (7, 10))
    families = [tasks.images(setting.data, size=side, relabel=True, data_dir=setting.data_dir) for side in sides]
    images = load_images(setting.data, setting.data_dir)
    hidden = setting.pick((32,), (128, 64))
    header, rows, numbers, curves = (
        ["states", "numbers", "meta-training", "step 5", "step 10", "step 20", "seconds"],
        [],
        {},
        {},
    )
    for states in setting.pick((2, 4), (2, 4, 8)):
        rule = RULE.replace(states=states)
        trained = meta_train(families, [(48, 32)], rule, steps=steps, members=members, seed=setting.seed)
        at, found = accuracies(
            trained.population, images, hidden, steps=20, seeds=setting.pick(2, 5), batch_size=128, seed=setting.seed
        )
        per_genome = found.mean(axis=1)
        size = sum(np.asarray(array)[0].size for array in trained.population.arrays.values())
        rows.append(
            [str(states), str(size), cell(trained.scores)]
            + [cell(per_genome[:, at.index(step)]) for step in (5, 10, 20)]
            + [f"{trained.seconds:.0f}"]
        )
        numbers[str(states)] = {"steps": at, "accuracy": found.tolist(), "meta_training": trained.scores,
                                "seconds": trained.seconds}  # fmt: skip
        curves[states] = (at, per_genome)

    def draw(path: str) -> None:
        figure, axes = style.figure()
        for index, (states, (at, values)) in enumerate(curves.items()):
            style.line(axes[0][0], index, at, values.mean(0), f"{states} states", values.std(0, ddof=1))
        step_axis(axes[0][0], at)
        axes[0][0].set_ylabel("test accuracy")
        axes[0][0].legend(fontsize=8)
        style.save(figure, path)

    note = (
        f"Mean and deviation over {members} genomes from different random numbers, {steps} meta-steps of 10 unrolled steps "
        f"each; test accuracy on {setting.data} with hidden layers {hidden}."
    )
    return Outcome(header, rows, numbers, draw, note)


if __name__ == "__main__":
    main(run)
