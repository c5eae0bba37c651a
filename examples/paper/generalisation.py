"""
Title: What a genome of small MNIST images does on larger images, other images, other networks and
another kind of task
Description: A genome of the paper's three tasks and the zoo's `mnist-4state` beside SGD at 28x28,
in wider networks.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), section 4.2, Figure 5.

The paper meta-trains four states on three tasks (MNIST, its digits 0 to 4, its digits 5 to 9,
cropped to 20x20 and resized to 10x10), with an unroll that grows, and lets them learn 28x28 images
of several sets, and xor: faster than SGD within the unrolls of meta-training, while SGD catches up
after some 100 steps and keeps improving. Here one genome is made in that way with far fewer
meta-steps, and one, the zoo's, had more of them on more varied tasks: classes in another order in
each episode, four sizes, several networks. Of the paper's sets, MNIST, Fashion-MNIST and xor are
there, and half of the digits.

    python examples/paper/generalisation.py [--quick] [--data_dir DIR] [--out FOLDER]
"""

import numpy as np
from experiment import RULE, Outcome, Setting, accuracies, cell, main, meta_train, save, step_axis

from keras_blur import genomes, tasks
from keras_blur.report import style
from keras_blur.report.comparison import compare
from keras_blur.tasks.datasets import load_images

THREE, ZOO, SGD = "three MNIST tasks", "mnist-4state (zoo)", "SGD, best rate at each step"


def run(setting: Setting) -> Outcome:
    """Meta-trains on the three tasks, then lets both genomes and SGD learn each set in each
    network."""
    data_dir, members = setting.data_dir, setting.pick(2, 3)
    cut = setting.pick({}, {"crop": 20, "size": 10})
    halves = setting.pick([None], [None, range(5), range(5, 10)])
    families = [tasks.images(setting.data, classes=kept, data_dir=data_dir, **cut) for kept in halves]
    unroll, meta_steps = setting.pick(([2], 4), ([10, 20], 500))
    trained = meta_train(
        families, [(64, 32)], RULE.replace(states=4), steps=meta_steps, unroll=unroll, members=members, seed=setting.seed
    )
    own = trained.population.member(trained.best)
    wide, deep = setting.pick(((16,), (16,)), ((256,), (256, 128)))
    images = load_images(setting.data, data_dir)
    places = [(tasks.functions("xor"), (20,))]
    if not setting.quick:
        fashion = load_images("fashion_mnist", data_dir)
        half = tasks.images(setting.data, classes=range(5), data_dir=data_dir)
        places = [(images, wide), (images, deep), (fashion, wide), (fashion, deep), (half, wide), *places]
    steps, seeds, rates = setting.pick((2, 2, (0.1, 1.0)), (100, 5, (0.0316, 0.1, 0.316, 1.0)))

    rows, numbers, curves = [], {}, {}
    for data, hidden in places:
        found = compare(
            genomes.load("mnist-4state"), data, hidden, steps=steps, seeds=seeds, batch_size=128, seed=setting.seed,
            grids={"SGD": rates}, schedules=["constant"], normalize=False, tuning_seeds=seeds,
        )  # fmt: skip
        at, values = accuracies(own, data, hidden, steps=steps, seeds=seeds, batch_size=128, seed=setting.seed)
        grid = [np.array(curve["accuracy"]) for name, curve in found["curves"].items() if name != "genome"]
        best = [max(grid, key=lambda runs, i=i: runs[:, i].mean())[:, i] for i in range(len(at))]
        title = f"{data.name}, {hidden}"
        curves[title] = {THREE: values[0], ZOO: np.array(found["curves"]["genome"]["accuracy"]), SGD: np.stack(best, axis=1)}
        shown = [at.index(step) for step in setting.pick((1, 2), (1, 5, 10, 20, 50, 100))]
        rows += [[title, label, *(cell(v[:, i]) for i in shown)] for label, v in curves[title].items()]
        numbers[title] = {label: v.tolist() for label, v in curves[title].items()}

    def draw(path: str) -> None:
        columns = min(3, len(curves))
        figure, axes = style.figure(columns=columns, rows=-(-len(curves) // columns), width=3.6, height=2.8)
        for axis, (title, lines) in zip(axes.ravel(), curves.items(), strict=False):
            for index, (label, values) in enumerate(lines.items()):
                style.line(axis, index, at, values.mean(0), label, values.std(0, ddof=1))
            step_axis(axis, at)
            axis.set_title(title, fontsize=9)
            axis.set_ylabel("test accuracy")
        save(figure, axes[0][0], path)

    note = (
        f"Test accuracy with batches of 128: mean and deviation over {seeds} initial networks and orders (of tasks: "
        f"episodes). The genome of three tasks is the best of {members} by accuracy in {meta_steps} meta-steps (unroll "
        f"{', then '.join(map(str, unroll))}; the paper: 10,000 and more a stage); the zoo's had 7,000. SGD has the best of "
        f"the rates {', '.join(f'{rate:g}' for rate in rates)} at each step, on the cross-entropy, in plain networks; "
        "both genomes normalise sums over the batch."
    )
    header = ["set, hidden layers", "learner", *(f"step {at[i]}" for i in shown)]
    numbers = {"steps": at, "accuracy": numbers, "meta_training": trained.scores, "skipped": trained.skipped,
               "genome": own.to_dict()}  # fmt: skip
    return Outcome(header, rows, numbers, draw, note)


if __name__ == "__main__":
    main(run)
