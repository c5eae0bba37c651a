"""
Title: Toy tasks in the plane: do genomes that learn better also learn other things better?
Description: Genomes of 2 and 4 states, found by evolution on five functions, on these and on three
others.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), section 4.1, Figures 3 and 4.

The paper meta-trains on xor, and, two moons "and several others", validates on five blobs, a cross
and a triangle, and finds over its runs that accuracy on the one goes with accuracy on the other,
both after 10 steps. Here the others are a circle and a slice of the plane. Its genomes have two
states and come from the gradient; here there are genomes of four states too, and all come from
evolution, as in its section 4.4. Every network has one hidden layer of 20.

    python examples/paper/toy_tasks.py [--quick] [--out FOLDER]
"""

import numpy as np
from experiment import RULE, Outcome, Setting, accuracies, cell, main

import keras_blur as kb
from keras_blur import learners, meta, tasks
from keras_blur.report import style

TRAINED_ON = ("xor", "and", "two_moons", "circle", "angular_slice")
HELD_OUT = ("blobs5", "cross", "triangle")
HIDDEN, UNROLL = (20,), 10


def found_by_evolution(rule: kb.Rule, seed: int, generations: int, episodes: int) -> kb.Genome:
    """The centre of the last distribution: nothing is selected. Classes change places, so that no
    one knows theirs."""
    trainer = meta.MetaTrainer(
        tasks.functions(TRAINED_ON, relabel=True), learners.Blur(HIDDEN, rule),
        meta.Evolution(UNROLL, trajectory_loss_weight=1.0, population=16, fitness="loss"),
        meta_batch_size=episodes, batch_size=64, query_size=128, seed=seed,
    )  # fmt: skip
    trainer.compile()
    trainer.fit(1, generations, verbose=0)
    return trainer.genome


def run(setting: Setting) -> Outcome:
    """Meta-trains some genomes of each number of states, and scores each on each function."""
    genomes, generations, episodes, seeds = setting.pick((2, 3, 2, 2), (5, 300, 8, 10))
    functions = setting.pick((*TRAINED_ON[:1], *HELD_OUT[:1]), (*TRAINED_ON, *HELD_OUT))
    trained, held = [n for n in functions if n in TRAINED_ON], [n for n in functions if n in HELD_OUT]
    scores: dict[int, dict[str, np.ndarray]] = {}
    for states in setting.pick((2,), (2, 4)):
        rule = RULE.replace(states=states)
        population = kb.Genome.stack(
            [found_by_evolution(rule, setting.seed + n, generations, episodes) for n in range(genomes)]
        )
        scores[states] = {}
        for name in functions:
            _, accuracy = accuracies(
                population, tasks.functions(name), HIDDEN, steps=UNROLL, seeds=seeds, batch_size=64, seed=setting.seed
            )
            scores[states][name] = accuracy[:, :, -1].mean(axis=1)

    def mean_over(states: int, names: list[str]) -> np.ndarray:
        return np.mean([scores[states][name] for name in names], axis=0)

    pairs = {states: (mean_over(states, trained), mean_over(states, held)) for states in scores}
    both = np.concatenate(list(pairs.values()), axis=1)
    related = {str(states): float(np.corrcoef(*pair)[0, 1]) for states, pair in pairs.items()}
    related["all"] = float(np.corrcoef(*both)[0, 1])
    kinds = {name: "meta-training" if name in trained else "held out" for name in functions}
    rows = [[name, kind, *(cell(scores[states][name]) for states in scores)] for name, kind in kinds.items()]
    rows += [
        ["mean", kind, *(cell(pairs[states][i]) for states in pairs)] for i, kind in enumerate(("meta-training", "held out"))
    ]
    rows.append(["correlation", "of the two means", *(f"{related[str(states)]:.2f}" for states in scores)])

    def draw(path: str) -> None:
        figure, axes = style.figure(columns=2)
        place = np.arange(len(functions))
        for index, (states, pair) in enumerate(pairs.items()):
            colour, mark, label = style.COLOURS[index], "os"[index], f"{states} states"
            values = np.stack([scores[states][name] for name in functions])
            axes[0][0].errorbar(
                place + 0.2 * index - 0.1,
                values.mean(1),
                values.std(1, ddof=1),
                fmt=mark,
                color=colour,
                capsize=3,
                label=label,
            )
            axes[0][1].plot(*pair, mark, color=colour, label=f"{label}, correlation {related[str(states)]:.2f}")
        axes[0][0].set_xticks(place, [f"{n}\n(held out)" if n in held else n for n in functions], rotation=50, fontsize=8)
        axes[0][0].set_ylabel(f"accuracy after {UNROLL} steps")
        axes[0][1].set_xlabel("mean over meta-training functions")
        axes[0][1].set_ylabel("mean over held-out functions")
        for axis in axes[0]:
            axis.legend(fontsize=8)
        style.save(figure, path)

    note = (
        f"Accuracy after {UNROLL} steps of batches of 64: mean and deviation over {genomes} genomes from different random "
        f"numbers, each the mean of {seeds} episodes. A genome had {generations} generations of CMA-ES, 16 candidates on "
        f"{episodes} episodes. The correlation is over genomes (all together: {related['all']:.2f}): with so few of them it "
        "is a rough number."
    )
    numbers = {
        "accuracy": {str(states): {name: v.tolist() for name, v in found.items()} for states, found in scores.items()},
        "correlation": related,
    }
    return Outcome(["function", "", *(f"{states} states" for states in scores)], rows, numbers, draw, note)


if __name__ == "__main__":
    main(run)
