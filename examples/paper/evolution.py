"""
Title: A genome by evolution
Description: CMA-ES on genomes of two states, scored by their accuracy after 15 batches of 14x14
MNIST.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), section 4.4, Figure 7.

The setting is the paper's: a population of 80, one hidden layer of 512, no curriculum; a candidate
learns from 15 batches of 128 and its fitness is the accuracy on as many images as 20 batches have.
The paper reports 0.84 after 400 steps of CMA-ES, and no significant decay up to 100 learning steps.
Fewer generations are the default here, for time. What the paper leaves open (size of the first
step, normalisation, scale of the initial synapses) is what this package has.

    python examples/paper/evolution.py [--quick] [--generations 400] [--data_dir DIR] [--out FOLDER]
"""

import time

import numpy as np
from absl import flags
from experiment import RULE, Outcome, Setting, accuracies, cell, main

from keras_blur import learners, meta, tasks
from keras_blur.report import style

_GENERATIONS = flags.DEFINE_integer("generations", 40, "Generations of a full run; the paper has 400.", lower_bound=2)
SHOWN = (1, 2, 5, 10, 20, 40, 100, 200, 400)


def run(setting: Setting) -> Outcome:
    """Searches, then lets the centre of the last distribution learn the test images."""
    generations, population, unroll = setting.pick((3, 8, 3), (_GENERATIONS.value, 80, 15))
    hidden, batch_size, query_size = setting.pick(((16,), 32, 64), ((512,), 128, 20 * 128))
    images = tasks.images(setting.data, size=setting.pick(None, 14), data_dir=setting.data_dir)
    trainer = meta.MetaTrainer(
        images, learners.Blur(hidden, RULE.replace(states=2)),
        meta.Evolution(unroll, trajectory_loss_weight=0.0, population=population),
        batch_size=batch_size, query_size=query_size, seed=setting.seed,
    )  # fmt: skip
    trainer.compile()
    begin = time.perf_counter()
    history = trainer.fit(generations, 1, verbose=0).history  # an epoch is a generation
    seconds = time.perf_counter() - begin
    at, values = accuracies(
        trainer.genome, images, hidden, steps=setting.pick(5, 100), seeds=setting.pick(2, 5), batch_size=batch_size,
        seed=setting.seed,
    )  # fmt: skip
    test = values[0]

    shown = sorted({g for g in SHOWN if g < generations} | {generations})
    rows = [
        [f"generation {g}", f"{history['accuracy'][g - 1]:.3f}", f"{history['best'][g - 1]:.3f}"]
        + [f"{history['sigma'][g - 1]:.3f}", f"{100 * history['skipped'][g - 1]:.0f} %"]
        for g in shown
    ]
    rows += [[f"centre, test, step {s}", cell(test[:, i]), "", "", ""] for i, s in enumerate(at) if s]

    def draw(path: str) -> None:
        figure, axes = style.figure(columns=2)
        numbers = np.arange(1, generations + 1)
        style.line(axes[0][0], 0, numbers, np.array(history["accuracy"]), "mean of the population")
        style.line(axes[0][0], 1, numbers, np.array(history["best"]), "best of the population")
        axes[0][0].set_xlabel("generation")
        axes[0][0].set_ylabel(f"accuracy after {unroll} steps")
        style.line(axes[0][1], 0, at, test.mean(0), "centre of the last distribution", test.std(0, ddof=1))
        axes[0][1].axvline(unroll, color="0.5", linewidth=1, linestyle=":", label="unroll of meta-training")
        axes[0][1].set_xlabel("learning step")
        axes[0][1].set_ylabel("test accuracy")
        for axis in axes[0]:
            axis.set_ylim(0.0, 1.0)
            axis.legend(fontsize=8, loc="lower right")
        style.save(figure, path)

    note = (
        f"{images.name}, hidden layer {hidden}: {generations} generations of {population}, {seconds / generations:.1f} s "
        f"each, accuracy on {query_size} images after {unroll} batches of {batch_size}; one run. Skipped are candidates "
        f"whose loss was not finite. Below, the centre genome on test images: mean and deviation over {len(test)} episodes."
    )
    numbers = {"history": {name: [float(v) for v in column] for name, column in history.items()}, "steps": at,
               "test": test.tolist(), "seconds": seconds, "genome": trainer.genome.to_dict()}  # fmt: skip
    return Outcome(["", "accuracy", "best", "sigma", "skipped"], rows, numbers, draw, note)


if __name__ == "__main__":
    main(run)
