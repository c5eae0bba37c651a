"""
Title: Meta-augmentation
Description: Labels that change from episode to episode keep a meta-learner from learning its
training tasks by heart.
Source: "Meta-Learning Requires Meta-Augmentation" (Rajendran, Irpan and Jang, NeurIPS 2020).

    python examples/meta_augmentation.py [--quick] [--part pose|classes|genome ...]
        [--plot FILE.png] [--json FILE] [--data omniglot] [--images mnist --held_out fashion_mnist]
        [--data_dir DIR] [--seeds 3] [--seed 0]
"""

import json
import os
import textwrap

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags

from keras_blur import Rule, files, learners, meta, tasks
from keras_blur.report import style
from keras_blur.report.episodes import memorization_gap, score_episodes
from keras_blur.report.evaluation import evaluate

_QUICK = flags.DEFINE_boolean("quick", False, "Small numbers everywhere.")
_PART = flags.DEFINE_multi_enum("part", None, ["pose", "classes", "genome"], "What to run; all by default.")
_PLOT = flags.DEFINE_string("plot", None, "File for the picture.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_DATA = flags.DEFINE_string("data", None, "Image set of the few-shot episodes; by default classes of Gaussian points.")
_IMAGES = flags.DEFINE_string("images", "digits", "Image set on which the genome is meta-trained.")
_HELD_OUT = flags.DEFINE_string("held_out", None, "Another, on which it is scored; by default other classes of the same.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each setting.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "The first seed; of the genomes, one more.", lower_bound=0)

"""
## Knowing the tasks instead of reading the support

An episode of `tasks.pose` is one object, seen from some angles; x is a code of the object and the
view, y the view turned by an angle that is the object's own. There are 80 objects to train on. A
network can learn their 80 angles, and needs no support to predict a query: on a new object it is
lost. What x tells of y has to be taken away. Turn all labels of an episode, support and query
alike, by one random angle, the key: now the code says nothing, and five support points say all.

How much does a network know by heart? Give it objects under a key under which it has never seen
them. If it takes the angle from the support alone, its error does not change. What the key adds to
the error on known objects, and not on new ones, is what the network knew of them.
"""


def trained(of, learner, steps, its, *, support, query, per_step, seed):
    """A learner that is meta-trained on tasks."""
    run = meta.MetaTrainer(
        of, learner, meta.Unroll(steps), meta_batch_size=per_step, batch_size=support, query_size=query, seed=seed
    )
    run.compile(keras.optimizers.Adam(1e-3), jit_compile=not _QUICK.value)
    run.fit(1, its, verbose=0)
    return run


def pose(seeds, its):
    """By arm and seed, errors on new and known objects, and what an unknown key costs on either."""
    found = {}
    for seed in seeds:
        plain = tasks.pose(seed=seed)
        arms = {
            "no key": plain,
            "a key for each episode": tasks.augment(plain, tasks.LabelRotation()),
            "a key for each point": tasks.augment(plain, tasks.LabelRotation(), shared=False),
        }
        for name, of in arms.items():
            run = trained(of, learners.NeuralProcess(), 1, its, support=5, query=10, per_step=32, seed=seed)
            own = found.setdefault(name, {"new": [], "known": [], "gap new": [], "gap known": []})
            for label, split in (("new", "test"), ("known", "train")):
                gap = memorization_gap(run.learner, run.learned, plain, tasks.LabelRotation(), split=split)
                own[label].append(gap["own"])
                own[f"gap {label}"].append(gap["gap"])
    return found


"""
## Classes in fixed groups

Five ways, one shot. In the *non-exclusive* setting an episode is one of ten fixed groups of five
classes, each class always at the same output. `LabelPermutation` shuffles the outputs of a group
(intra-shuffle); `ClassResample` draws any five of the fifty classes (inter-shuffle). New classes
are always drawn the second way. Prototypes have no outputs of their own that could be learned by
heart, so intra-shuffle has nothing to repair.
"""


def classes(seeds, its):
    """Test accuracy on new classes by learner, setting and seed."""
    settings = {
        "non-exclusive": tasks.Compose([]),
        "intra-shuffle": tasks.LabelPermutation(),
        "inter-shuffle": tasks.ClassResample(),
    }
    sgd = keras.optimizers.SGD(0.1)
    made = {
        "MAML": (lambda: learners.MAML(sgd, (64,)), 3),
        "first-order MAML": (lambda: learners.MAML(sgd, (64,), first_order=True), 3),
        "prototypes": (lambda: learners.Prototypes((64,)), 1),
    }
    found = {}
    for seed in seeds:
        if _DATA.value:
            plain = tasks.episodes(_DATA.value, 5, 1, size=14, exclusive=False, data_dir=_DATA_DIR.value)
        else:
            plain = tasks.classes(exclusive=False, seed=seed)
        for name, (make, steps) in made.items():
            for setting, augmentation in settings.items():
                of = tasks.augment(plain, augmentation)
                run = trained(of, make(), steps, its, support=5, query=25, per_step=4, seed=seed)
                shape = {"steps": steps, "batch_size": 5, "query_size": 25, "episodes": 400}
                score = score_episodes(run.learner, run.learned, of, **shape)["mean_accuracy"]
                found.setdefault(name, {}).setdefault(setting, []).append(score)
    return found


"""
## A genome

A genome has no weights for a class, so it cannot know one by heart, but it can know which outputs
an image set favours. Is that so? Meta-train genomes on the same images with their labels as they
are, and with the labels of each episode permuted; then let both learn a set that neither has seen.
For BLUR a key permutes labels of +1 and -1, in the feedback and in the query alike.
"""


def genomes(members, epochs, seeds):
    """Accuracy on unseen images by arm, `[members][seeds]`, after as many steps as meta-training
    unrolled."""
    if _HELD_OUT.value:
        both = (_IMAGES.value, _HELD_OUT.value)
        plain, other = (tasks.images(name, size=14, data_dir=_DATA_DIR.value) for name in both)
    else:
        plain, other = (
            tasks.images(_IMAGES.value, classes=some, data_dir=_DATA_DIR.value) for some in (range(5), range(5, 10))
        )
    rule = Rule(last_activation="linear", normalize_activations="both", normalize_synapses="stored", batch_reduction="mean")
    found = {}
    for name, augmentation in {"labels as they are": tasks.Compose([]), "permuted labels": tasks.LabelPermutation()}.items():
        run = meta.MetaTrainer(
            tasks.augment(plain, augmentation), learners.Blur((64,), rule), meta.Unroll(10, trajectory_loss_weight=1.0),
            members=members, clipnorm=1.0, seed=_SEED.value + 1,
        )  # fmt: skip
        run.compile(keras.optimizers.Adam(3e-3), jit_compile=not _QUICK.value)
        run.fit(epochs, 100, verbose=0)
        curves = evaluate(run.population, other, (64,), steps=10, seeds=seeds, batch_size=64)["curves"].values()
        found[name] = [[by_step[-1] for by_step in curve["accuracy"]] for curve in curves]
    return found


def said(values):
    """Mean and standard deviation."""
    return f"{np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}"


def main(argv):
    """Runs the parts, prints their numbers, and draws them."""
    del argv
    quick = _QUICK.value
    seeds = range(_SEED.value, _SEED.value + (2 if quick else _SEEDS.value))
    spoken = f"seeds {seeds[0]} to {seeds[-1]}"
    parts, document = _PART.value or ["pose", "classes", "genome"], {}
    if "pose" in parts:
        document["pose"] = pose(seeds, 50 if quick else 4000)
        print(f"pose: squared error on 200 new objects, on known ones, and what an unknown key adds to either; {spoken}")
        for name, own in document["pose"].items():
            columns = [said(own[key]) for key in ("new", "known", "gap new", "gap known")]
            print(f"  {name:<24} {'    '.join(columns)}", flush=True)
    if "classes" in parts:
        document["classes"] = classes(seeds, 50 if quick else 1500)
        print(f"5 ways, 1 shot, {_DATA.value or 'Gaussian classes'}: accuracy on new classes, {spoken}")
        for name, settings in document["classes"].items():
            print(f"  {name:<24} " + "    ".join(f"{setting} {said(values)}" for setting, values in settings.items()))
    if "genome" in parts:
        members = 2 if quick else 5
        document["genome"] = genomes(members, 1 if quick else 32, 2 if quick else 5)
        print(f"genomes meta-trained on {_IMAGES.value}: accuracy on what they have not seen after 10 steps")
        for name, values in document["genome"].items():
            by_member = np.mean(values, axis=1)
            print(f"  {name:<24} {said(by_member)} ({', '.join(f'{value:.3f}' for value in by_member)})")
    if _JSON.value:
        files.write_text(_JSON.value, json.dumps(document, indent=1) + "\n")
    if _PLOT.value:
        draw(document)


def draw(document):
    """A panel for each part: a point for each seed, or for each genome."""
    panels = []
    if "pose" in document:
        panels.append(
            ("pose: squared error, new objects", {name: own["new"] for name, own in document["pose"].items()}, "log")
        )
    for name, settings in document.get("classes", {}).items():
        panels.append((f"{name}: accuracy, new classes", settings, "linear"))
    if "genome" in document:
        values = {name: np.mean(values, axis=1) for name, values in document["genome"].items()}
        panels.append(("genomes: accuracy, new images", values, "linear"))
    figure, axes = style.figure(columns=len(panels), width=3.4)
    for axis, (title, rows, scale) in zip(axes[0], panels, strict=True):
        for index, values in enumerate(rows.values()):
            colour = style.COLOURS[index]
            axis.plot(np.full(len(values), index), values, "o", color=colour, alpha=0.6)
            axis.plot([index - 0.25, index + 0.25], [np.mean(values)] * 2, color=colour, linewidth=2)
        axis.set_xticks(range(len(rows)), [textwrap.fill(name, 12) for name in rows], fontsize=8)
        axis.set_xlim(-0.6, len(rows) - 0.4)
        axis.set_yscale(scale)
        axis.set_title(title, fontsize=9)
    style.save(figure, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
