"""
Title: Deeper and shallower networks than those of meta-training
Description: Genomes meta-trained on 1, 2 and 4 hidden layers learn in networks of 1 to 10, on small
MNIST images.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), section 4.5, Figure 10.

The paper finds that a genome of deep networks also works in shallower ones and not the other way
round: one of 2 layers diverges on 4, one of 4 trains even 10. Its text and its figure differ in the
depths of meta-training (2, 3, 4 or 1, 2, 4) and in the step of the score (10 or 50); here the
depths are the figure's, and both steps are scored. All hidden layers are equally wide, and
meta-training unrolls 10 steps, so step 50 also asks a genome to hold on.

    python examples/paper/depth.py [--quick] [--data_dir DIR] [--out FOLDER]
"""

import numpy as np
from experiment import RULE, Outcome, Setting, accuracies, cell, main, meta_train

from keras_blur import Genome, tasks
from keras_blur.report import style


def run(setting: Setting) -> Outcome:
    """Meta-trains at each depth, and scores at each depth."""
    members, steps, width = setting.pick((2, 20, 16), (3, 600, 32))
    trained_on, scored_on = setting.pick(((1,), (1, 2)), ((1, 2, 4), (1, 2, 4, 5, 10)))
    at_steps = setting.pick((1, 2), (10, 50))
    rule = RULE.replace(states=setting.pick(2, 4))
    size = setting.pick(None, 10)
    family = tasks.images(setting.data, size=size, relabel=True, data_dir=setting.data_dir)
    trained = {
        depth: meta_train(family, [(width,) * depth], rule, steps=steps, members=members, seed=setting.seed)
        for depth in trained_on
    }
    # All genomes have one rule, so that those of every depth learn side by side in one program.
    together = Genome.stack([one.population for one in trained.values()])
    images = tasks.images(setting.data, size=size, data_dir=setting.data_dir)
    found = {}
    for depth in scored_on:
        at, values = accuracies(
            together, images, (width,) * depth, steps=at_steps[-1], seeds=setting.pick(2, 5),
            batch_size=setting.pick(64, 128), seed=setting.seed,
        )  # fmt: skip
        found[depth] = values.reshape(len(trained_on), members, *values.shape[1:])

    rows = [
        [f"{own}", cell(trained[own].scores), str(step)]
        + [cell(found[depth][index, :, :, at.index(step)].mean(axis=1)) for depth in scored_on]
        for index, own in enumerate(trained_on)
        for step in at_steps
    ]
    header = ["meta-trained on", "meta-training", "step", *(f"{d} hidden" for d in scored_on)]
    numbers = {
        "steps": at,
        "accuracy": {str(depth): values.tolist() for depth, values in found.items()},
        "meta_trained_on": list(trained_on),
        "seconds_of_meta_training": [one.seconds for one in trained.values()],
        "meta_training": [one.scores for one in trained.values()],
        "skipped": [one.skipped for one in trained.values()],
    }

    def draw(path: str) -> None:
        figure, axes = style.figure(columns=len(at_steps))
        for axis, step in zip(axes[0], at_steps, strict=True):
            for index, own in enumerate(trained_on):
                values = np.stack([found[depth][index, :, :, at.index(step)].mean(axis=1) for depth in scored_on])
                style.line(axis, index, scored_on, values.mean(1), f"meta-trained on {own}", values.std(1, ddof=1))
            axis.set_xlabel("hidden layers")
            axis.set_xticks(scored_on)
            axis.set_ylabel(f"accuracy after {step} steps")
            axis.set_ylim(0.0, 1.0)
        axes[0][0].legend(fontsize=8)
        style.save(figure, path)

    note = (
        f"Test accuracy on {images.name}, hidden layers of {width}, {rule.states} states: mean and deviation over {members} "
        f"genomes from different random numbers, each the mean of {setting.pick(2, 5)} episodes. A genome had {steps} "
        "meta-steps of 10 unrolled steps; the paper's had 10,000 and more. The column meta-training is the running accuracy "
        "at its end."
    )
    return Outcome(header, rows, numbers, draw, note)


if __name__ == "__main__":
    main(run)
