"""
Title: Symmetry, channels, the backward update and the start
Description: 24 variants of the rule, and backpropagation's own among them, on MNIST and on few-shot
omniglot.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), section 4.5 and appendix C.7,
Figures 9 and 17.

The paper crosses three backward updates (additive, multiplicative, and multiplicative on all states
but the first), tied and untied directions, one channel of synapses for all states or one for each,
and a start from random numbers or from the transforms of backpropagation. It names three as the
best: tied directions and channels from backpropagation's transforms; tied directions and own
channels from random numbers; and the same with untied directions.

Here each of the twelve rules is meta-trained once with the genomes of both starts side by side, on
the same small MNIST tasks. Backpropagation's transforms have a little noise, or all genomes of that
start would be one. All neurons use tanh on every state, as the general rule of the paper does; one
more rule, marked (s, s'), has the value and the derivative in its two states and a linear feedback
path, as the paper's variant that is backpropagation has them.

    python examples/paper/symmetry.py [--quick] [--data_dir DIR] [--out FOLDER]
"""

import itertools

import numpy as np
from experiment import RULE, Outcome, Setting, accuracy_after, cell, main, meta_train

import keras_blur as kb
from keras_blur import genomes, tasks
from keras_blur.report import style

UPDATES = ("additive", "multiplicative", "multiplicative_after_first")
STARTS = ("random", "backprop")


def first_genomes(rule: kb.Rule, count: int, seed: int) -> kb.Genome:
    """As many genomes of each start, on one population axis; gates are the same, only the four
    transforms differ."""
    drawn = kb.Genome.random(rule, seed, std=0.5, synapse_update=-0.01, population=(count,))
    noise = kb.Genome.random(rule, seed + 1, std=0.05, population=(count,))
    known = genomes.backprop()
    near = {name: np.asarray(known.arrays[name]) + noise.arrays[name] for name in ("nu", "mu", "nu_tilde", "mu_tilde")}
    # Labels, unlike an error, point the way to go: the gate is positive where it follows them.
    return kb.Genome.stack([drawn, drawn.replace(**near, synapse_update=-drawn.synapse_update)])


def run(setting: Setting) -> Outcome:
    """Meta-trains each rule from both starts, and sorts by accuracy."""
    count, steps, score_at, seeds = setting.pick((2, 6, 5, 2), (3, 400, 10, 5))
    hidden = setting.pick((16,), (32,))
    size, batch = setting.pick((None, 16), (10, 50))
    base = RULE.replace(states=2)
    rules = {
        (update, directions, channels): base.replace(backward_update=update, directions=directions, channels=channels)
        for update, directions, channels in itertools.product(UPDATES, ("tied", "untied"), ("tied", "own"))
    }
    exact = {"derivative_state": True, "backward_activation": "linear"}
    rules[UPDATES[2] + " (s, s')", "tied", "tied"] = rules[UPDATES[2], "tied", "tied"].replace(**exact)
    rules = dict(list(rules.items())[:: setting.pick(12, 1)])
    family = tasks.images(setting.data, size=size, relabel=True, data_dir=setting.data_dir)
    images = tasks.images(setting.data, size=size, data_dir=setting.data_dir)
    # A batch is the whole support: 5 shots of each of 10 classes that no meta-training saw, and 15
    # more in the query.
    ways, query = setting.pick((2, 50), (10, 150))
    few = tasks.episodes(setting.pick("digits", "omniglot"), ways, 5, size=size, data_dir=setting.data_dir)
    results = []
    for names, rule in rules.items():
        trained = meta_train(
            family, [hidden], rule, steps=steps, members=2 * count, genome=first_genomes(rule, count, setting.seed),
            batch_size=32, query_size=64, seed=setting.seed, jit_compile=False,
        )  # fmt: skip
        scored = {"steps": score_at, "seeds": seeds, "seed": setting.seed}
        test = accuracy_after(
            trained.population, images, hidden, batch_size=batch, query_size=setting.pick(100, 2000), **scored
        ).mean(axis=1)
        shots = accuracy_after(trained.population, few, hidden, batch_size=ways * 5, query_size=query, **scored).mean(axis=1)
        for index, start in enumerate(STARTS):
            own = slice(index * count, (index + 1) * count)
            results.append({
                "update": names[0], "directions": names[1], "channels": names[2], "start": start,
                "accuracy": test[own].tolist(), "few_shot": shots[own].tolist(), "meta_training": trained.scores[own],
                "skipped": trained.skipped, "seconds": trained.seconds,
            })  # fmt: skip
    results.sort(key=lambda one: -np.mean(one["accuracy"]))
    kinds = ("update", "directions", "channels", "start")
    values = ("meta_training", "accuracy", "few_shot")
    rows = [[*(one[kind] for kind in kinds), *(cell(one[value]) for value in values)] for one in results]
    header = [*kinds, "meta-training", images.name, few.name]

    def draw(path: str) -> None:
        figure, axes = style.figure(columns=2, width=3.6, height=0.9 + 0.17 * len(results))
        place = np.arange(len(results))[::-1]
        for axis, value, title in zip(axes[0], values[1:], (images.name, few.name), strict=True):
            for start, mark, colour in zip(STARTS, "os", style.COLOURS, strict=False):
                some = np.array([one["start"] == start for one in results])
                found = np.array([one[value] for one in results])[some]
                axis.errorbar(
                    found.mean(1), place[some], xerr=found.std(1, ddof=1), fmt=mark, ms=4, color=colour,
                    mfc=colour if start == "random" else "white", linewidth=1, label=f"{start} start",
                )  # fmt: skip
            axis.set_xlim(0.0, 1.0)
            axis.set_title(title, fontsize=8)
            axis.set_xlabel(f"test accuracy after {score_at} steps", fontsize=8)
            axis.set_yticks(place, [])
        labels = [f"{one['update'].replace('_', ' ')}, {one['directions']}, {one['channels']}" for one in results]
        axes[0][0].set_yticks(place, labels, fontsize=7)
        axes[0][1].legend(fontsize=8)
        style.save(figure, path)

    note = (
        f"Sorted by test accuracy on {images.name}, after {score_at} steps of batches of {batch}; few shots: {few.name}, "
        f"classes of the test split, {score_at} steps on the whole support. Mean and deviation over {count} genomes, each "
        f"the mean of {seeds} episodes; a loss that is not finite counts as accuracy 0. One hidden layer of {hidden[0]}, "
        f"2 states, {steps} meta-steps of 10 unrolled steps of batches of 32. The column meta-training is the running "
        "accuracy at its end."
    )
    return Outcome(header, rows, numbers={"results": results}, draw=draw, note=note)


if __name__ == "__main__":
    main(run)
