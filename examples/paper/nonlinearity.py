"""
Title: The nonlinearity of either pass
Description: Genomes with five forward nonlinearities, and a linear or equal feedback path, on small
MNIST images.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), appendix C.2, Figure 12.

The paper meta-trains two hidden layers with each forward nonlinearity, and the same or none in the
feedback path, with two to eight states. It finds little effect of the feedback path. Networks
without any nonlinearity gain nothing from more states, while the others do. Here both feedback
paths are tried with two states, and equal nonlinearities also with four. The normalisation of sums
(section 3.4) is not linear, so `linear` means no nonlinearity besides it.

    python examples/paper/nonlinearity.py [--quick] [--data_dir DIR] [--out FOLDER]
"""

import numpy as np
from experiment import RULE, Outcome, Setting, accuracies, cell, main, meta_train

from keras_blur import tasks
from keras_blur.report import style

NONLINEARITIES = ("linear", "relu", "relu_tanh", "tanh", "sigmoid")
LINEAR_BACK, SAME_2, SAME_4 = "linear back, 2 states", "same back, 2 states", "same back, 4 states"


def run(setting: Setting) -> Outcome:
    """Meta-trains and scores each pair of nonlinearities."""
    members, steps, unroll = setting.pick((2, 3, 1), (3, 400, 10))
    size, hidden = setting.pick((None, (8,)), (10, (32, 16)))
    family = tasks.images(setting.data, size=size, relabel=True, data_dir=setting.data_dir)
    images = tasks.images(setting.data, size=size, data_dir=setting.data_dir)
    kinds = setting.pick((LINEAR_BACK, SAME_2), (LINEAR_BACK, SAME_2, SAME_4))
    found: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in kinds}
    numbers = {}
    for kind, scores in found.items():
        for forward in setting.pick(("tanh",), NONLINEARITIES):
            if kind == LINEAR_BACK and forward == "linear":
                continue  # the same as the same back
            backward = "linear" if kind == LINEAR_BACK else forward
            rule = RULE.replace(states=4 if kind == SAME_4 else 2, forward_activation=forward, backward_activation=backward)
            trained = meta_train(
                family, [hidden], rule, steps=steps, unroll=unroll, members=members, batch_size=32, query_size=64,
                seed=setting.seed,
            )  # fmt: skip
            _, accuracy = accuracies(
                trained.population, images, hidden, steps=unroll, seeds=setting.pick(2, 5), batch_size=setting.pick(32, 128),
                seed=setting.seed,
            )  # fmt: skip
            scores[forward] = accuracy[:, :, -1].mean(axis=1)
            numbers[f"{forward}, {kind}"] = {"accuracy": scores[forward].tolist(), "meta_training": trained.scores,
                                             "skipped": trained.skipped, "seconds": trained.seconds}  # fmt: skip
    if "linear" in found[SAME_2]:
        found[LINEAR_BACK]["linear"] = found[SAME_2]["linear"]
    names = [name for name in NONLINEARITIES if name in found[SAME_2]]
    rows = [[name, *(cell(scores[name]) for scores in found.values())] for name in names]

    def draw(path: str) -> None:
        figure, axes = style.figure(width=6.5)
        place = np.arange(len(names))
        for index, (kind, scores) in enumerate(found.items()):
            values = np.stack([scores[name] for name in names])
            x = place + 0.2 * (index - 1)
            axes[0][0].errorbar(
                x, values.mean(1), values.std(1, ddof=1), fmt="_", markersize=14, color=style.COLOURS[index], capsize=3
            )
            axes[0][0].plot(
                np.repeat(x, members), values.ravel(), "os^"[index], markersize=4, color=style.COLOURS[index], label=kind
            )
        axes[0][0].set_xticks(place, names)
        axes[0][0].set_xlim(-0.5, len(names) - 0.5)
        axes[0][0].set_xlabel("nonlinearity forward")
        axes[0][0].set_ylabel(f"accuracy after {unroll} steps")
        axes[0][0].legend(fontsize=8)
        style.save(figure, path)

    note = (
        f"Test accuracy on {images.name}, hidden layers {hidden}, after {unroll} steps of batches of "
        f"{setting.pick(32, 128)}: mean and deviation over {members} genomes from different random numbers, each the mean "
        f"of {setting.pick(2, 5)} episodes. A genome had {steps} meta-steps of {unroll} unrolled steps of batches of 32. "
        "The picture has a mark for each genome."
    )
    return Outcome(["forward", *found], rows, numbers, draw, note)


if __name__ == "__main__":
    main(run)
