"""
Title: Normalised activations
Description: Genomes with no, backward, forward and both normalisations, on other depths and
resolutions.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), section 3.4, Figure 8.

The paper brings the summed input of each neuron to a learned mean and deviation before the
nonlinearity, on the forward pass, the backward pass or both, and says that genomes without this
generalise worse to deeper networks and to other resolutions. Here each of the four choices is
meta-trained alike in networks of two hidden layers on images of 10x10, and is scored in networks of
one to three hidden layers on test images of 10x10 and of 28x28.

Everything else of the rule is the same for all four, the unit norm of the stored synapses too. That
norm alone bounds the sums of a forward pass, so the rule without normalised activations has a help
here that the paper's may not have had.

    python examples/paper/normalisation.py [--quick] [--data_dir DIR] [--out FOLDER]
"""

import numpy as np
from experiment import RULE, Outcome, Setting, accuracy_after, cell, main, meta_train, save

from keras_blur import tasks
from keras_blur.report import style

CHOICES = ("none", "backward", "forward", "both")


def run(setting: Setting) -> Outcome:
    """Meta-trains with each choice, and scores at each depth and resolution."""
    members, steps, seeds, width = setting.pick((2, 10, 2, 16), (3, 500, 5, 48))
    small, score_at = setting.pick((6, 5), (10, 10))
    batch_size = setting.pick(16, 128)
    depths = setting.pick((1, 2), (1, 2, 3))
    family = tasks.images(setting.data, size=small, relabel=True, data_dir=setting.data_dir)
    sets = [tasks.images(setting.data, size=size, data_dir=setting.data_dir) for size in (small, None)]
    names = [one.name.split(",")[0].split()[-1] for one in sets]  # 10x10 and 28x28
    rows, numbers, found = [], {}, {}
    choices = setting.pick(CHOICES[::3], CHOICES)
    for choice in choices:
        rule = RULE.replace(states=2, normalize_activations=choice)
        trained = meta_train(
            family, [(width, width)], rule, steps=steps, members=members, seed=setting.seed, jit_compile=False
        )
        for depth in depths:
            for name, images in zip(names, sets, strict=True):
                values = accuracy_after(
                    trained.population, images, (width,) * depth, steps=score_at, seeds=seeds,
                    batch_size=batch_size, query_size=setting.pick(100, 2000), seed=setting.seed,
                )  # fmt: skip
                found[choice, depth, name] = values.mean(axis=1)  # of each genome
        rows.append(
            [choice, cell(trained.scores), f"{trained.skipped:.3f}"]
            + [cell(found[choice, depth, name]) for name in names for depth in depths]
        )
        numbers[choice] = {
            "accuracy": {
                f"{name}, {depth} hidden": found[choice, depth, name].tolist() for name in names for depth in depths
            },
            "meta_training": trained.scores,
            "skipped": trained.skipped,
            "seconds": trained.seconds,
        }
    header = ["normalised", "meta-training", "skipped"] + [f"{name}, {depth} hidden" for name in names for depth in depths]

    def draw(path: str) -> None:
        figure, axes = style.figure(columns=len(names))
        for axis, name in zip(axes[0], names, strict=True):
            for index, choice in enumerate(choices):
                values = np.stack([found[choice, depth, name] for depth in depths])
                # Side by side, not on one another: a band around each of four lines would hide the
                # others.
                place = np.array(depths) + 0.06 * (index - 1.5)
                style.line(axis, index, place, values.mean(1), f"normalised: {choice}")
                axis.errorbar(place, values.mean(1), values.std(1, ddof=1), color=style.COLOURS[index], fmt="o", ms=4)
            axis.set_title(name, fontsize=9)
            axis.set_xticks(depths)
            axis.set_xlabel("hidden layers")
            axis.set_ylim(0.0, 1.0)
        axes[0][0].set_ylabel(f"test accuracy after {score_at} steps")
        save(figure, axes[0][0], path)

    note = (
        f"Test accuracy on {setting.data} after {score_at} steps of batches of {batch_size}: mean and deviation over "
        f"{members} genomes from different random numbers, each the mean of {seeds} episodes. Hidden layers of {width}, "
        f"2 states; {steps} meta-steps of 10 unrolled steps with two hidden layers at {names[0]}. The column meta-training "
        "is the running accuracy at its end; skipped, the fraction of meta-steps whose gradient was not finite."
    )
    return Outcome(header, rows, numbers, draw, note)


if __name__ == "__main__":
    main(run)
