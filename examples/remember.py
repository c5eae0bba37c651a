"""
Title: A rule that learns to remember
Description: Neurons and synapses with vector states, updated by two small shared networks, store
patterns online.
Source: "Finding online neural update rules by learning to remember" (Gregor, 2020, arXiv
2003.03124).

    python examples/remember.py [--quick] [--plot FILE.png] [--json FILE] [--seeds 3] [--seed 0]
"""

import json
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags

from keras_blur import Rule, files, learners, meta, tasks
from keras_blur.report import style
from keras_blur.report.episodes import score_episodes

_QUICK = flags.DEFINE_boolean("quick", False, "Small numbers everywhere.")
_PLOT = flags.DEFINE_string("plot", None, "File for the picture.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Meta-trainings.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)

"""
## The task

Four patterns of sixteen random bits are shown, one after the other. Then all activations are wiped,
half the bits of a pattern are shown, and the other half is asked for. What was stored can only be
in the synapses. There is no label and no error: the rule that changes a synapse sees the states of
its two neurons and its own. A Hopfield network does this with one product a synapse. It recalls in
many steps, with the bits of the cue held. A list of the patterns, searched for the one nearest to
the cue, shows what the cue allows.

The rule here has about 1,200 numbers, however many units there are, and is meta-trained by the
gradient through the four items and the recall. The paper's sizes and scores were not at hand, so
there are none to compare with.
"""

SIZES = ((16, 4), (24, 4), (32, 4), (16, 6), (8, 4))  # units and patterns; the first is the one of meta-training


def trained(learner, seed, its):
    """A learner that is meta-trained to remember."""
    run = meta.MetaTrainer(
        tasks.remember(16), learner, meta.Unroll(4), meta_batch_size=32, batch_size=1, query_size=4, clipnorm=1.0, seed=seed
    )
    run.compile(keras.optimizers.Adam(3e-3), jit_compile=not _QUICK.value)
    begin = time.perf_counter()
    run.fit(1, its, verbose=0)
    return run, time.perf_counter() - begin


def recall(learner, learned, units, items):
    """Accuracy of the hidden bits on test patterns."""
    shape = {"steps": items, "batch_size": 1, "query_size": items, "episodes": 20 if _QUICK.value else 500}
    return score_episodes(learner, learned, tasks.remember(units), **shape)["mean_accuracy"]


def references(units, items):
    """The same of two methods that learn nothing beforehand, on the same patterns."""
    stream = tasks.remember(units).dataset(0, steps=items, batch=1, query=items, split="test").batch(500)
    drawn = {name: keras.ops.convert_to_numpy(value) for name, value in next(iter(stream)).items()}
    patterns, cue, shown = drawn["y"][:, :, 0], *np.split(drawn["query_x"], 2, axis=-1)
    return {
        name: float(np.mean((recalled(patterns, cue, shown) == drawn["query_y"])[shown == 0]))
        for name, recalled in {"Hopfield": hopfield, "nearest pattern": nearest}.items()
    }


def hopfield(patterns, cue, shown, most=20):
    """Synapses are outer products. Hidden bits change together, step by step, until none does or
    `most` steps are over."""
    synapses = np.einsum("epi,epj->eij", patterns, patterns) * (1 - np.eye(patterns.shape[-1]))
    states = cue
    for _ in range(most):
        field = np.einsum("eqi,eij->eqj", states, synapses)
        tied = np.where(states == 0, -1.0, states)
        before, states = states, np.where(shown > 0, cue, np.where(field == 0, tied, np.sign(field)))
        if np.array_equal(before, states):
            break
    return states


def nearest(patterns, cue, shown):
    """The pattern that agrees with most of the bits shown: it has all patterns at hand, not a
    square of synapses."""
    del shown
    chosen = np.einsum("eqi,epi->eqp", cue, patterns).argmax(axis=-1)
    return np.take_along_axis(patterns, chosen[..., None], axis=1)


"""
## Controls

With the synapse update off nothing is stored, and recall is a guess. A BLUR genome gets the same
patterns, as inputs and as labels, and the cue as an input: its network has a hidden layer and a
feedback path, and a step for each pattern too. It is meta-trained for as many meta-steps.
"""


def blur():
    """A learner with a genome; with one pattern a batch, activations are normalised over units."""
    rule = Rule(
        last_activation="linear", normalize_activations="both", normalization_axis="units", normalize_synapses="stored",
        batch_reduction="mean",
    )  # fmt: skip
    return learners.Blur((64,), rule)


def said(values):
    """Mean and standard deviation."""
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}"


def main(argv):
    """Meta-trains, prints recall at several sizes, and draws it."""
    del argv
    count, its = (2, 5) if _QUICK.value else (_SEEDS.value, 900)
    seeds = range(_SEED.value, _SEED.value + count)
    found = {
        f"{units} units, {items} patterns": {name: [value] for name, value in references(units, items).items()}
        for units, items in SIZES
    }
    first = next(iter(found))
    for seed in seeds:
        learner = learners.OnlineRule()
        run, seconds = trained(learner, seed, its)
        print(f"seed {seed}: meta-trained in {seconds:.0f} s", flush=True)
        for name, (units, items) in zip(found, SIZES, strict=True):
            found[name].setdefault("learned rule", []).append(recall(learner, run.learned, units, items))
        off = recall(learners.OnlineRule(plastic=False), run.learned, *SIZES[0])
        found[first].setdefault("synapses held", []).append(off)
        run, seconds = trained(blur(), seed, its)
        print(f"seed {seed}: a genome in {seconds:.0f} s", flush=True)
        found[first].setdefault("BLUR genome", []).append(recall(run.learner, run.learned, *SIZES[0]))
    print(f"accuracy of the recalled hidden bits, seeds {seeds[0]} to {seeds[-1]}")
    for name, rows in found.items():
        for learner, values in rows.items():
            print(f"  {name:<22} {learner:<16} {said(values) if len(values) > 1 else f'{values[0]:.3f}'}")
    if _JSON.value:
        files.write_text(_JSON.value, json.dumps(found, indent=1) + "\n")
    if _PLOT.value:
        draw(found)


def draw(found):
    """A column for each size, a point for each seed."""
    figure, axes = style.figure(width=7.0)
    axis, places = axes[0][0], {}
    for column, rows in enumerate(found.values()):
        for learner, values in rows.items():
            number = places.setdefault(learner, len(places))
            x = np.full(len(values), column + 0.15 * (number - 2))
            axis.plot(
                x, values, "ovs^D"[number], color=style.COLOURS[number], alpha=0.7, label=learner if column == 0 else None
            )
    axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(found)), [name.replace(", ", "\n") for name in found], fontsize=8)
    axis.set_ylabel("hidden bits recalled")
    axis.legend(fontsize=8, loc="center right")
    style.save(figure, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
