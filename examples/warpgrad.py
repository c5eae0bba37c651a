"""
Title: Warped gradient descent
Description: Layers that are held while a task is learned, and bend the surface on which the others
descend.
Source: "Meta-Learning with Warped Gradient Descent" (Flennerhag et al., ICLR 2020).

    python examples/warpgrad.py [--quick] [--part sines|seconds|classes ...] [--arm NAME ...]
        [--plot FILE.png] [--json FILE] [--data omniglot] [--data_dir DIR] [--seeds 3] [--seed 0]
        [--rates ...] [--test_rates ...] [--meta_steps 1600]
"""

import functools
import itertools
import json
import math
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
_PART = flags.DEFINE_multi_enum("part", None, ["sines", "seconds", "classes"], "What to run; all by default.")
_PLOT = flags.DEFINE_string("plot", None, "File for the picture.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers; what it has already is not run again.")
_DATA = flags.DEFINE_string("data", "digits", "Image set of the few-shot episodes, such as omniglot.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets.")
_ARM = flags.DEFINE_multi_string("arm", None, "Arms to run, by name; all by default.")
_RATES = flags.DEFINE_list("rates", ["0.04", "0.08", "0.16", "0.32"], "Sines: rates of meta-training to choose from.")
_TEST_RATES = flags.DEFINE_list("test_rates", ["0.02", "0.04", "0.08", "0.16"], "Sines: rates on new tasks to choose from.")
_META_STEPS = flags.DEFINE_integer("meta_steps", 1600, "Sines: steps of meta-training.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)

"""
## Sines

A task is a sine of random amplitude and phase, learned by 50 steps of SGD on batches of 16 points.
All arms learn the start of the network by Reptile: after each run it moves three tenths of the way
to where the run led. Two arms add two linear layers, the warps. They start as the identity and
stay fixed while a task is learned. They are trained on every set of weights along a run, at no more
memory for fifty steps than for one. Rates are chosen for each arm alone on validation tasks: that
of meta-training, and that of the tasks to come; once for the error after the last step and once for
the area under the curve, since those want different rates. All are scored on other tasks.

A meta-step with warps takes longer than one without. So Reptile alone is also run for four times
the meta-steps, and the seconds of meta-training at the chosen rate are printed beside each arm.
They hold the compilation, and whatever else the machine did meanwhile. How much longer a compiled
meta-step takes is measured side by side, as a part of its own.
"""

LONGER = 4  # times the meta-steps
ARMS = {
    "Reptile": (False, "exact", 1),
    "Reptile, four times the meta-steps": (False, "exact", LONGER),
    "warps and Reptile": (True, "exact", 1),
    "first-order warps and Reptile": (True, "first", 1),
}  # of the sines: whether there are warps, their gradient, times the meta-steps
SGDS = {rate: {f"SGD {rate:g}": functools.partial(keras.optimizers.SGD, rate)} for rate in (0.01, 0.05, 0.5, 1.0)}
ADAM = {"Adam 0.003": functools.partial(keras.optimizers.Adam, 3e-3)}
CLASS_ARMS = {
    "Reptile": (False, "reptile", SGDS[0.5] | SGDS[1.0], [0.1, 0.3], 1),
    "Reptile, four times the meta-steps": (False, "reptile", SGDS[0.5] | SGDS[1.0], [0.1, 0.3], LONGER),
    "Leap": (False, "leap", SGDS[0.01] | SGDS[0.05] | ADAM, [0.1, 0.3], 1),
    "Warp-Leap": (True, "leap", ADAM, [0.1], 1),
    "warps and Reptile": (True, "reptile", SGDS[1.0], [0.1], 1),
}  # of the classes: whether there are warps, how the start is learned, its optimizers, rates, times the meta-steps
PARTS = {
    "sines": list(ARMS),
    "seconds": [name for name, (*_, times) in ARMS.items() if times == 1],
    "classes": list(CLASS_ARMS),
}


def sgd(rate):
    """Of the inner loop; the norm of a gradient is capped, which large amplitudes need at first."""
    return keras.optimizers.SGD(rate, global_clipnorm=10.0)


def tuned(of, network, loss, estimator, runs, start_optimizers, rates, test_rates, at, seed, *,
          batch, per_step, warp_rate, measures, jit_compile):  # fmt: skip
    """By measure, the curve on test episodes of the optimizer of the start and the rates that are
    best on validation episodes: by the quality or the loss after the last step (`last`), or the
    area under the curve of the loss (`area`).

    A network is meta-trained for each optimizer of the start and each rate, on so many runs of
    `per_step` tasks.
    """
    quality = "accuracy" if of.kind == "classes" else "r2"
    shape = {"at": at, "batch_size": batch, "query_size": 100, "episodes": 20 if _QUICK.value else 100}
    shape["jit_compile"] = jit_compile
    best = {}
    for (name, start_optimizer), rate in itertools.product(start_optimizers.items(), rates):
        model, warps = network(seed)
        learner = learners.Warp(model, warps, sgd(rate), loss=loss)
        trainer = meta.MetaTrainer(
            of, learner, estimator, meta_batch_size=per_step, batch_size=batch, query_size=100, seed=seed
        )
        trainer.compile(keras.optimizers.Adam(warp_rate), start_optimizer=start_optimizer(), jit_compile=jit_compile)
        begin = time.perf_counter()
        trainer.fit(1, runs * estimator.windows, verbose=0)
        seconds = time.perf_counter() - begin
        for other in test_rates:
            again = learners.Warp(model, warps, sgd(other), loss=loss)
            found = adaptation_curve(again, trainer.learned, of, split="validation", **shape)
            last = -found["mean_accuracy"][-1] if of.kind == "classes" else found["mean_loss"][-1]
            for measure, score in (("last", last), ("area", found["area"])):
                if measure in measures and (measure not in best or score < best[measure][0]):
                    chosen = {"start": name, "rates": [rate, other], "seconds": seconds}
                    best[measure] = score, again, trainer.learned, chosen
    curves = {}
    for measure, (_, learner, learned, chosen) in best.items():
        curve = adaptation_curve(learner, learned, of, split="test", **shape)
        kept = {name: curve[name] for name in ("steps", "mean_loss", f"mean_{quality}", "area")}
        curves[measure] = {**kept, **chosen}
    return curves


def asked(arms):
    """The arms that are to be run."""
    return {name: arm for name, arm in arms.items() if not _ARM.value or name in _ARM.value}


def asked_parts():
    """The parts that are to be run: of those named, all that have a named arm."""
    parts = {part: PARTS[part] for part in _PART.value or PARTS}
    known = dict.fromkeys(itertools.chain(*parts.values()))
    if unknown := [name for name in _ARM.value or () if name not in known]:
        raise app.UsageError(f"--arm must be one of {'; '.join(known)}. Received: {'; '.join(unknown)}")
    return [part for part, arms in parts.items() if asked(dict.fromkeys(arms))]


def every(part, arms, run, seeds):
    """Test curves by arm, seed and measure, saved one by one."""
    document, found = saved(), {}
    for name, arm in arms.items():
        known = document.setdefault(part, {}).setdefault(name, [])
        while len(known) < seeds:
            seed = _SEED.value + len(known)
            known.append(run(*arm, seed))
            if _JSON.value:
                files.write_text(_JSON.value, json.dumps(document, indent=1) + "\n")
            print(f"  {part}: {name}, seed {seed}, {known[-1]['last']['seconds']:.0f} s of meta-training", flush=True)
        found[name] = known[:seeds]
    return found


def saved():
    """What the file of numbers has, with the settings that they are from."""
    settings = {flag.name: flag.value for flag in (_QUICK, _DATA, _RATES, _TEST_RATES, _META_STEPS, _SEED)}
    try:
        return files.read_numbers(_JSON.value, settings)
    except ValueError as error:
        raise app.UsageError(f"--json: {error}") from error


def sines(seeds):
    """Test curves by arm, seed and measure."""
    quick = _QUICK.value
    of, at = tasks.functions("sine"), [0, 2, 5] if quick else [0, 1, 2, 5, 10, 20, 35, 50]
    rates, test_rates = ([float(rate) for rate in flag.value] for flag in (_RATES, _TEST_RATES))
    rates, test_rates = ([0.02], [0.02]) if quick else (rates, test_rates)
    starts = {"SGD 0.3": functools.partial(keras.optimizers.SGD, 0.3)}

    def run(warps, order, times, seed):
        def network(seed):
            return learners.warped(1, (32, 32), 1, "tanh", warps=warps, seed=seed)

        estimator = meta.WarpGrad(at[-1], order=order, start="reptile")
        return tuned(
            of, network, "squared", estimator, times * (3 if quick else _META_STEPS.value), starts, rates, test_rates, at,
            seed, batch=16, per_step=8, warp_rate=3e-3, measures=("last", "area"), jit_compile=not quick,
        )  # fmt: skip

    return every("sines", asked(ARMS), run, seeds)


def side_by_side():
    """By arm of the sines, the time of a meta-step over that of Reptile, which always runs; arms
    take turns, ten steps each."""
    quick, seconds, trainers = _QUICK.value, {}, {}
    for name in dict.fromkeys(["Reptile", *asked(dict.fromkeys(PARTS["seconds"]))]):
        warps, order, _ = ARMS[name]
        model, names = learners.warped(1, (32, 32), 1, "tanh", warps=warps, seed=_SEED.value)
        trainer = trainers[name] = meta.MetaTrainer(
            tasks.functions("sine"), learners.Warp(model, names, sgd(0.02), loss="squared"),
            meta.WarpGrad(5 if quick else 50, order=order, start="reptile"),
            meta_batch_size=8, batch_size=16, query_size=100, seed=_SEED.value,
        )  # fmt: skip
        start = keras.optimizers.SGD(0.3)
        trainer.compile(keras.optimizers.Adam(3e-3), start_optimizer=start, jit_compile=not quick)
        trainer.meta_train_step()  # compiles
        seconds[name] = []
    for _ in range(1 if quick else 60):
        for name, trainer in trainers.items():
            begin = time.perf_counter()
            for _ in range(2 if quick else 10):
                trainer.meta_train_step()
            seconds[name].append(time.perf_counter() - begin)
    return {name: np.divide(found, seconds["Reptile"]).tolist() for name, found in seconds.items()}


"""
## Classes of an image set

Twenty ways and fifteen shots (on the digits two and five), a hundred steps: too many for a gradient
through all of them. As in the paper a task is an alphabet of Omniglot, twenty of its characters,
and alphabets of testing are new; the network is a convolutional one with a warp after each block;
and warps learn offline: a run fills a buffer, of which ten outer steps use ten places each. Images
are 14x14 and there are three blocks of 32 filters in place of four of 64 at 28x28, so that two
cores are enough, and every arm sees 60 times four tasks in place of 1,000 times twenty: only the
order of arms can be compared.

Leap moves the start down the path of each run, Reptile to its end. Arms without warps choose on
validation alphabets the optimizer of their start, the rate of meta-training and that on new tasks;
those with warps, whose meta-training takes six times as long, only the last, and begin from the
settings that their start chose most often without warps. Here too Reptile alone has an arm with
four times the meta-steps.
"""


def convolutional(features, ways, *, warps, seed):
    """Blocks of convolution, pooling, normalisation and ReLU, a linear warp at first the identity
    after each; and the warps' names."""
    side, filters, names = math.isqrt(features), 8 if _QUICK.value else 32, []
    made = [keras.Input((features,)), keras.layers.Reshape((side, side, 1))]
    for block in range(3):
        drawn = keras.initializers.GlorotUniform(seed * 1000 + block)
        made += [
            keras.layers.Conv2D(filters, 3, padding="same", kernel_initializer=drawn, name=f"task_{block}"),
            keras.layers.MaxPooling2D(2, padding="same"),
            keras.layers.BatchNormalization(momentum=0.9),  # or a hundred steps would not forget how it began
            keras.layers.ReLU(),
        ]
        if warps:
            names.append(f"warp_{block}")
            made.append(keras.layers.Conv2D(filters, 3, padding="same", name=names[-1]))
    drawn = keras.initializers.GlorotUniform(seed * 1000 + 99)
    model = keras.Sequential([*made, keras.layers.Flatten(), keras.layers.Dense(ways, kernel_initializer=drawn)])
    for name in names:
        kernel = np.zeros((3, 3, filters, filters), "float32")
        kernel[1, 1] = np.eye(filters)
        model.get_layer(name).set_weights([kernel, np.zeros(filters, "float32")])
    return model, names


def classes(seeds):
    """Test curves by arm, seed and measure."""
    quick = _QUICK.value
    ways, shots, size = (2, 5, None) if _DATA.value == "digits" else (20, 15, 14)
    group = "alphabet" if _DATA.value == "omniglot" else None
    of = tasks.episodes(_DATA.value, ways, shots, size=size, group=group, data_dir=_DATA_DIR.value)
    at = [0, 2, 4] if quick else [0, 1, 2, 5, 10, 20, 50, 100]

    def run(warps, start, start_optimizers, rates, times, seed):
        def network(seed):
            return convolutional(of.features, ways, warps=warps, seed=seed)

        thetas = 2 if quick else 10
        estimator = meta.OfflineWarpGrad(at[-1], start=start, thetas=thetas) if warps else meta.WarpGrad(at[-1], start=start)
        start_optimizers = dict(list(start_optimizers.items())[:1]) if quick else start_optimizers
        return tuned(
            of, network, "cross_entropy", estimator, times * (2 if quick else 60), start_optimizers,
            rates[:1] if quick else rates, [0.1] if quick else [0.1, 0.3], at, seed, batch=20, per_step=4,
            warp_rate=1e-3, measures=("last",),
            jit_compile=False,  # on a CPU, XLA's convolutions are slow
        )  # fmt: skip

    return every("classes", asked(CLASS_ARMS), run, seeds)


def said(values):
    """Mean and standard deviation."""
    return f"{np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}"


def main(argv):
    """Runs the parts, prints their numbers, and draws them."""
    del argv
    seeds = 2 if _QUICK.value else _SEEDS.value
    spoken = f"seeds {_SEED.value} to {_SEED.value + seeds - 1}"
    parts, document = asked_parts(), {}
    if "sines" in parts:
        document["sines"] = sines(seeds)
        print("sines: squared error after the last step, area under the curve, median seconds of meta-training at the "
              f"chosen rate; {spoken}")  # fmt: skip
        for name, runs in document["sines"].items():
            last, area = [run["last"] for run in runs], [run["area"] for run in runs]
            print(f"  {name:<36} {said([run['mean_loss'][-1] for run in last])}    {said([run['area'] for run in area])}    "
                  f"{np.median([run['seconds'] for run in last]):.0f} s")  # fmt: skip
            print(f"    rates chosen for the error and for the area: {[run['rates'] for run in last]} "
                  f"{[run['rates'] for run in area]}")  # fmt: skip
            first = document["sines"].get("Reptile", runs)
            errors = [one["last"]["mean_loss"][-1] / run["mean_loss"][-1] for one, run in zip(first, last, strict=True)]
            areas = [1 - run["area"] / one["area"]["area"] for one, run in zip(first, area, strict=True)]
            print(f"    by seed, error of Reptile over this one's: {', '.join(f'{error:.1f}' for error in errors)}; "
                  f"area lower by {', '.join(f'{share:.0%}' for share in areas)}")  # fmt: skip
    if "seconds" in parts:
        print("sines: time of a meta-step over Reptile's, taking turns; median and quantiles of 10 and 90 %")
        for name, ratios in side_by_side().items():
            low, high = np.quantile(ratios, [0.1, 0.9])
            print(f"  {name:<36} {np.median(ratios):.2f} ({low:.2f}-{high:.2f})")
    if "classes" in parts:
        document["classes"] = classes(seeds)
        print(f"{_DATA.value}: accuracy on new classes after the last step, median seconds of meta-training, what each seed "
              f"chose; {spoken}")  # fmt: skip
        for name, runs in document["classes"].items():
            last = [run["last"] for run in runs]
            print(f"  {name:<36} {said([run['mean_accuracy'][-1] for run in last])}    "
                  f"{np.median([run['seconds'] for run in last]):.0f} s    "
                  f"{[(run['start'], *run['rates']) for run in last]}")  # fmt: skip
    if _PLOT.value and document:
        draw(document)


def draw(document):
    """A panel for each part: curves of test episodes, means and deviations of seeds."""
    figure, axes = style.figure(columns=len(document), width=4.5)
    labels = {"sines": ("mean_loss", "squared error"), "classes": ("mean_accuracy", "accuracy")}
    for axis, (part, arms) in zip(axes[0], document.items(), strict=True):
        key, label = labels[part]
        for index, (name, runs) in enumerate(arms.items()):
            values = np.array([run["last"][key] for run in runs])
            spread = None if part == "sines" else values.std(axis=0, ddof=1)
            style.line(axis, index, runs[0]["last"]["steps"], values.mean(axis=0), name, spread)
        if part == "sines":
            axis.set_yscale("log")
        axis.set_xlabel("steps on a new task")
        axis.set_ylabel(label)
        axis.legend(fontsize=8)
    style.save(figure, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
