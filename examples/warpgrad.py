"""
Title: Warped gradient descent
Description: Layers that are held while a task is learned, and bend the surface on which the others descend.
Source: "Meta-Learning with Warped Gradient Descent" (Flennerhag et al., ICLR 2020).

    python examples/warpgrad.py [--quick] [--part sines|classes ...] [--plot FILE.png] [--json FILE]
        [--data omniglot] [--data_dir DIR] [--seeds 3] [--rates ...] [--test_rates ...]
"""

import functools
import itertools
import json
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags

from keras_blur import files, learners, meta, tasks
from keras_blur.report import style
from keras_blur.report.episodes import adaptation_curve

_QUICK = flags.DEFINE_boolean("quick", False, "Small numbers everywhere.")
_PART = flags.DEFINE_multi_enum("part", None, ["sines", "classes"], "What to run; all by default.")
_PLOT = flags.DEFINE_string("plot", None, "File for the picture.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_DATA = flags.DEFINE_string("data", "digits", "Image set of the few-shot episodes, such as omniglot.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets.")
_RATES = flags.DEFINE_list("rates", ["0.02", "0.04", "0.08", "0.16"], "Sines: rates of meta-training to choose from.")
_TEST_RATES = flags.DEFINE_list("test_rates", ["0.005", "0.01", "0.02", "0.04"], "Sines: rates on new tasks to choose from.")
_META_STEPS = flags.DEFINE_integer("meta_steps", 400, "Classes: meta-steps of an arm.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm.", lower_bound=2)

"""
## Sines

A task is a sine of random amplitude and phase, learned by 50 steps of SGD on batches of 16 points. Both arms learn the
start of the network by Reptile: after each run it moves three tenths of the way to where the run led. One arm has two linear
layers more, the warps, at first the identity and held while a task is learned; they learn from every theta that a run
passes, at no more memory for fifty steps than for one. Rates are chosen for each arm alone on validation tasks: that of
meta-training, and that of the tasks to come. Both are scored on other tasks.
"""


def meta_trained(of, hidden, activation, rate, *, warps, order, start, steps, its, batch, per_step,
                 start_optimizer, warp_rate, seed):  # fmt: skip
    """A learner with learned start, and with learned warps if there are any; and the seconds that took."""
    model, names = learners.warped(of.features, hidden, of.outputs, activation, warps=warps, seed=seed)
    learner = learners.Warp(model, names, sgd(rate), loss="squared" if of.kind == "values" else "cross_entropy")
    run = meta.MetaTrainer(
        of, learner, meta.WarpGrad(steps, order=order, start=start), tasks_per_step=per_step, batch_size=batch,
        query_size=100, seed=seed,
    )  # fmt: skip
    run.compile(keras.optimizers.Adam(warp_rate), start_optimizer=start_optimizer(), jit_compile=not _QUICK.value)
    begin = time.perf_counter()
    run.fit(1, its, verbose=0)
    return learner, run.learned, time.perf_counter() - begin


def sgd(rate):
    """Of the inner loop; the norm of a gradient is capped, which large amplitudes need at first."""
    return keras.optimizers.SGD(rate, global_clipnorm=10.0)


def tuned(of, arm, starts, rates, test_rates, at, batch, seed):
    """The curve on test episodes of the optimizer of the start and the rates that are best on validation episodes at the
    last step: with the smallest loss, of classes with the highest accuracy."""
    best, quality = None, "accuracy" if of.kind == "classes" else "r2"
    for (name, start_optimizer), rate in itertools.product(starts.items(), rates):
        learner, learned, seconds = meta_trained(
            of, rate=rate, seed=seed, batch=batch, start_optimizer=start_optimizer, **arm
        )
        for other in test_rates:
            again = learners.Warp(learner.model, learner.warp, sgd(other), loss=learner.loss)
            shape = {"at": at, "batch_size": batch, "query_size": 100, "episodes": 20 if _QUICK.value else 100}
            found = adaptation_curve(again, learned, of, split="validation", **shape)
            score = -found["mean_accuracy"][-1] if of.kind == "classes" else found["mean_loss"][-1]
            if best is None or score < best[0]:
                curve = adaptation_curve(again, learned, of, split="test", **shape)
                kept = {name: curve[name] for name in ("steps", "mean_loss", f"mean_{quality}", "area")}
                best = score, {**kept, "start": name, "rates": [rate, other], "seconds": seconds}
    return best[1]


def sines(seeds):
    """Test curves by arm and seed."""
    quick = _QUICK.value
    of, at = tasks.functions("sine"), [0, 1, 2, 5, 10, 20, 35, 50]
    at = [0, 2, 5] if quick else at
    common = {"hidden": (32, 32), "activation": "tanh", "start": "reptile", "steps": at[-1], "per_step": 8,
              "warp_rate": 3e-3}  # fmt: skip
    arms = {
        "Reptile": {"warps": False, "order": "exact"},
        "warps and Reptile": {"warps": True, "order": "exact"},
        "first-order warps and Reptile": {"warps": True, "order": "first"},
    }
    rates, test_rates = ([float(rate) for rate in flag.value] for flag in (_RATES, _TEST_RATES))
    rates, test_rates = ([0.02], [0.01, 0.02]) if quick else (rates, test_rates)
    its = 3 if quick else 400
    starts = {"SGD 0.3": functools.partial(keras.optimizers.SGD, 0.3)}
    return {
        name: [tuned(of, {**common, **arm, "its": its}, starts, rates, test_rates, at, 16, seed) for seed in range(seeds)]
        for name, arm in arms.items()
    }


"""
## Classes of an image set

Twenty ways and fifteen shots (on the digits two and five), a hundred steps: too many for a gradient through all of them.
Leap moves the start down the path of each run, Reptile to its end. The paper has a convolutional network at 28x28 on
Omniglot; here it is a dense one at 14x14, so that two cores are enough, and only the order of the arms can be compared. Each
arm chooses on validation classes: the optimizer of its start, the rate of meta-training and that on new classes.
"""


def classes(seeds):
    """Test curves by arm and seed."""
    quick = _QUICK.value
    ways, shots, size = (2, 5, None) if _DATA.value == "digits" else (20, 15, 14)
    of = tasks.episodes(_DATA.value, ways, shots, size=size, data_dir=_DATA_DIR.value)
    common = {"hidden": (64, 64), "activation": "relu", "order": "exact", "steps": 5 if quick else 100, "per_step": 4,
              "warp_rate": 1e-3, "its": 3 if quick else _META_STEPS.value}  # fmt: skip
    plain = {f"SGD {rate:g}": functools.partial(keras.optimizers.SGD, rate) for rate in (0.3, 1.0)}
    adam = {f"Adam {rate:g}": functools.partial(keras.optimizers.Adam, rate) for rate in (1e-3, 3e-3)}
    arms = {
        "Reptile": ({"warps": False, "start": "reptile"}, plain),
        "Leap": ({"warps": False, "start": "leap"}, adam),
        "Warp-Leap": ({"warps": True, "start": "leap"}, adam),
        "warps and Reptile": ({"warps": True, "start": "reptile"}, plain),
    }
    at = [0, 2, 5] if quick else [0, 1, 2, 5, 10, 20, 50, 100]
    rates, test_rates = ([0.1], [0.1]) if quick else ([0.1, 0.3], [0.1, 0.3])
    runs = {}
    for name, (arm, starts) in arms.items():
        chosen = dict(list(starts.items())[:1]) if quick else starts
        runs[name] = [tuned(of, {**common, **arm}, chosen, rates, test_rates, at, 20, seed) for seed in range(seeds)]
        last = [run["mean_accuracy"][-1] for run in runs[name]]
        print(f"  {name:<20} {said(last)}    {[(run['start'], *run['rates']) for run in runs[name]]}", flush=True)
    return runs


def said(values):
    """Mean and standard deviation."""
    return f"{np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}"


def main(argv):
    """Runs the parts, prints their numbers, and draws them."""
    del argv
    seeds = 2 if _QUICK.value else _SEEDS.value
    parts, document = _PART.value or ["sines", "classes"], {}
    if "sines" in parts:
        document["sines"] = sines(seeds)
        print(f"sines: squared error after the last step, area under the curve, rates, seconds; {seeds} seeds")
        for name, runs in document["sines"].items():
            last, area = said([run["mean_loss"][-1] for run in runs]), said([run["area"] for run in runs])
            print(f"  {name:<30} {last}    {area}    {[run['rates'] for run in runs]} {[round(r['seconds']) for r in runs]}")
    if "classes" in parts:
        print(f"{_DATA.value}: accuracy on new classes after the last step, what each seed chose; {seeds} seeds")
        document["classes"] = classes(seeds)
    if _JSON.value:
        files.write_text(_JSON.value, json.dumps(document, indent=1) + "\n")
    if _PLOT.value:
        draw(document)


def draw(document):
    """A panel for each part: curves of test episodes, means and deviations of seeds."""
    figure, axes = style.figure(columns=len(document), width=4.5)
    labels = {"sines": ("mean_loss", "squared error"), "classes": ("mean_accuracy", "accuracy")}
    for axis, (part, arms) in zip(axes[0], document.items(), strict=True):
        key, label = labels[part]
        for index, (name, runs) in enumerate(arms.items()):
            values = np.array([run[key] for run in runs])
            spread = None if part == "sines" else values.std(axis=0, ddof=1)
            style.line(axis, index, runs[0]["steps"], values.mean(axis=0), name, spread)
        if part == "sines":
            axis.set_yscale("log")
        axis.set_xlabel("steps on a new task")
        axis.set_ylabel(label)
        axis.legend(fontsize=8)
    style.save(figure, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
