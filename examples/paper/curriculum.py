"""
Title: A curriculum of unrolls
Description: The same number of meta-steps at 10 unrolled steps, at a growing number, and at the
last number.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), section 4.2 and appendix C.4,
Figure 14.

The paper meta-trains 8 genomes for 10,000 meta-steps at 10 unrolled steps, then with 5 more in each
further 10,000, and makes all genomes equal at each switch; here the best is copied to the others.
The question is what the curriculum is worth beside its two ends: all meta-steps at 10 unrolled
steps, which costs less, and all at the last number, which costs more.

At each switch the best genome of a meta-training is copied to the others, which then learn on
initial networks of their own but see the same tasks. So the deviation of the table is not one of
members: it is over independent meta-trainings, each with its own random numbers and tasks, of which
the best member by its accuracy in meta-training is scored.

    python examples/paper/curriculum.py [--quick] [--data_dir DIR] [--out FOLDER]
"""

import numpy as np
from experiment import RULE, Outcome, Setting, accuracies, cell, main, meta_train, step_axis

import keras_blur as kb
from keras_blur import tasks
from keras_blur.report import style


def run(setting: Setting) -> Outcome:
    """Meta-trains with each schedule from several seeds, and follows test accuracy past the
    unroll."""
    runs, members, steps, seeds = setting.pick((2, 2, 6, 2), (3, 3, 400, 5))
    stages = setting.pick((2, 3), (10, 15, 20, 25, 30))
    score_at = setting.pick((2, 5), (10, 20, 50, 100))
    hidden = setting.pick((16,), (32,))
    schedules = {
        f"all {stages[0]}": stages[0],
        f"{stages[0]} to {stages[-1]}": stages,
        f"all {stages[-1]}": stages[-1],
    }
    schedules = dict(list(schedules.items())[: setting.pick(2, 3)])
    rule = RULE.replace(states=2)
    size = setting.pick(None, 10)
    family = tasks.images(setting.data, size=size, relabel=True, data_dir=setting.data_dir)
    images = tasks.images(setting.data, size=size, data_dir=setting.data_dir)
    trained = {
        name: [
            meta_train(
                family, [hidden], rule, steps=steps, unroll=unroll, members=members, seed=setting.seed + number,
                jit_compile=False,
            )
            for number in range(runs)
        ]
        for name, unroll in schedules.items()
    }  # fmt: skip
    best = kb.Genome.stack([one.population.member(one.best) for some in trained.values() for one in some])
    at, found = accuracies(best, images, hidden, steps=score_at[-1], seeds=seeds, batch_size=64, seed=setting.seed)
    curves = dict(zip(trained, found.mean(axis=1).reshape(len(trained), runs, len(at)), strict=True))
    rows = [
        [name, cell([one.scores[one.best] for one in some])]
        + [cell(curves[name][:, at.index(step)]) for step in score_at]
        + [f"{np.mean([one.seconds for one in some]):.0f}", f"{np.mean([one.skipped for one in some]):.3f}"]
        for name, some in trained.items()
    ]
    header = ["unrolled steps", "meta-training", *(f"step {step}" for step in score_at), "seconds", "skipped"]
    numbers = {
        "steps": at,
        "stages": list(stages),
        "accuracy": {name: curve.tolist() for name, curve in curves.items()},
        "meta_training": {name: [one.scores for one in some] for name, some in trained.items()},
        "seconds_of_meta_training": {name: [one.seconds for one in some] for name, some in trained.items()},
        "skipped": {name: [one.skipped for one in some] for name, some in trained.items()},
    }

    def draw(path: str) -> None:
        figure, axes = style.figure()
        axis = axes[0][0]
        for index, (name, curve) in enumerate(curves.items()):
            style.line(axis, index, at, curve.mean(0), name, curve.std(0, ddof=1))
        step_axis(axis, at)
        axis.set_ylim(0.0, 1.0)
        axis.set_ylabel("test accuracy")
        axis.legend(fontsize=8, title="unrolled steps", title_fontsize=8)
        style.save(figure, path)

    note = (
        f"Test accuracy on {images.name}, one hidden layer of {hidden[0]}, 2 states: mean and deviation over {runs} "
        f"independent meta-trainings, of each the best of {members} members on {seeds} episodes. {steps} meta-steps in all; "
        f"stages of the curriculum: {', '.join(map(str, stages))} unrolled steps. Seconds: of one meta-training by the "
        "clock, with what is built at each switch, on a core that other work may have shared. The column meta-training is "
        "the running accuracy at its end, after as many steps as were unrolled; skipped, the fraction of meta-steps whose "
        "gradient was not finite."
    )
    return Outcome(header, rows, numbers, draw, note)


if __name__ == "__main__":
    main(run)
