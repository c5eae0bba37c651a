"""
Title: A genome against SGD at every rate
Description: The zoo's `mnist-4state` beside SGD with and without momentum, rates over four orders
of magnitude, on MNIST.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), section 4.3, Figure 6.

The paper lets a genome of four states learn MNIST beside SGD with and without momentum, at rates of
four orders of magnitude, for 100 steps. Here all start from the same networks and see the same
batches. SGD is scored as if the best rate for each step were known beforehand, which no single run
could be: to be above it is to be above every rate. A genome's step does more work than one of SGD,
so the time of a step stands beside the accuracies. The genome normalises its sums over the batch
and SGD trains a plain network, so a lead here is not one over SGD in a network with batch
normalisation.

    python examples/paper/against_sgd.py [--quick] [--data_dir DIR] [--out FOLDER]
"""

import numpy as np
from experiment import Outcome, Setting, cell, main, save, step_axis

from keras_blur import genomes
from keras_blur.report import style
from keras_blur.report.comparison import compare
from keras_blur.tasks.datasets import load_images

GENOME = "mnist-4state"
LABELS = {"SGD": "SGD", "momentum": "SGD, momentum 0.9"}


def run(setting: Setting) -> Outcome:
    """Compares, and takes from the grid what is best at each step."""
    decades = setting.pick((-2.0, 0.0, 1.0), (-3.5, 0.5, 0.5))  # the first exponent of ten, the last, and the distance
    rates = [float(f"{10.0**exponent:.3g}") for exponent in np.arange(decades[0], decades[1] + 0.01, decades[2])]
    hidden = setting.pick((32,), (256, 128))
    result = compare(
        genomes.load(GENOME), load_images(setting.data, setting.data_dir), hidden, steps=setting.pick(5, 100),
        seeds=(seeds := setting.pick(2, 5)), batch_size=128, seed=setting.seed, grids=dict.fromkeys(LABELS, rates),
        schedules=["constant"], normalize=False, tuning_seeds=seeds,
    )  # fmt: skip
    curves, at = result["curves"], result["steps"]
    columns = [index for index, step in enumerate(at) if step]
    scores = {name: np.array(curve["accuracy"]) for name, curve in curves.items()}
    ratios = {name: curve["seconds"][-1] / curves[f"SGD {rates[0]:g}"]["seconds"][-1] for name, curve in curves.items()}

    rows = [[GENOME, *(cell(scores["genome"][:, i]) for i in columns), f"{ratios['genome']:.1f}"]]
    best: dict[str, list[str]] = {}
    for optimizer, label in LABELS.items():
        own = [name for name, curve in curves.items() if curve.get("optimizer") == optimizer]
        best[optimizer] = [max(own, key=lambda name, i=i: scores[name][:, i].mean()) for i in range(len(at))]
        chosen = [best[optimizer][i] for i in columns]
        cells = [f"{cell(scores[name][:, i])} ({name.rsplit(' ', 1)[1]})" for i, name in zip(columns, chosen, strict=True)]
        rows.append([f"{label}, best rate at each step", *cells, f"{ratios[own[0]]:.1f}"])
        last = best[optimizer][-1]
        rows.append([
            f"{label} at {last.rsplit(' ', 1)[1]}, best at the last", *(cell(scores[last][:, i]) for i in columns),
            f"{ratios[last]:.1f}",
        ])  # fmt: skip

    def draw(path: str) -> None:
        figure, axes = style.figure(columns=2, height=3.6)
        for panel, axis in enumerate(axes[0]):
            places = {name: at if panel == 0 else curve["seconds"] for name, curve in curves.items()}
            for name, curve in curves.items():  # the whole grid, faintly
                if "optimizer" in curve:
                    colour = style.COLOURS[1 + list(LABELS).index(curve["optimizer"])]
                    axis.plot(places[name], scores[name].mean(0), color=colour, alpha=0.25, linewidth=0.8)
            spread = scores["genome"].std(0, ddof=1)
            style.line(axis, 0, places["genome"], scores["genome"].mean(0), GENOME, spread)
            for index, (optimizer, label) in enumerate(LABELS.items(), start=1):
                values = [scores[name][:, i].mean() for i, name in enumerate(best[optimizer])]
                style.line(axis, index, places[best[optimizer][-1]], values, f"{label}: best rate at each step")
            axis.set_ylabel("test accuracy")
            axis.set_ylim(0.0, 1.0)
        step_axis(axes[0][0], at)
        axes[0][1].set_xscale("log", nonpositive="mask")
        axes[0][1].set_xlabel("seconds of learning, one network")
        save(figure, axes[0][0], path)

    note = (
        f"Test accuracy on {setting.data}, hidden layers {hidden}, batches of 128: mean and deviation over "
        f"{result['seeds']} initial networks and orders of the images; rates in brackets, of {len(rates)} from {rates[0]:g} "
        f"to {rates[-1]:g}. The last column is the wall clock of a step over one of SGD. SGD descends the cross-entropy in "
        "plain networks of the genome's own nonlinearity; the genome normalises sums over the batch."
    )
    header = ["learner", *(f"step {at[i]}" for i in columns), "time of a step"]
    return Outcome(header, rows, {"result": result, "time_over_sgd": ratios}, draw, note)


if __name__ == "__main__":
    main(run)
