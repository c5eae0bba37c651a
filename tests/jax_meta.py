"""Meta-trains in a process of its own, on either backend: `python jax_meta.py JSON`; prints one
line of JSON.

The JSON gives `cases`, names of estimators; how they are run: nothing, `devices` (all that JAX has,
under `keras.distribution`), or `worker`, `workers` and `port` (processes of one device each);
`tasks` and `members`, of a step; `epochs`, and `checkpoint`; `copies`, whether members are copies
from the second epoch on.
"""

import json
import sys

import keras
import numpy as np

from keras_blur import Rule, learners, meta, tasks

asked: dict = {}  # the JSON
RULE = Rule(batch_reduction="mean", last_activation="linear", normalize_activations="both", normalize_synapses="stored")
ESTIMATORS = {
    "unroll": lambda: meta.Unroll(3, trajectory_loss_weight=0.5),
    "recomputed": lambda: meta.Unroll(4, trajectory_loss_weight=0.5, recompute=True),
    "truncated": lambda: meta.TruncatedUnroll(2, episode_steps=4),
    "es": lambda: meta.ES(3, antithetic_pairs=4),
    "pes": lambda: meta.PES(2, episode_steps=4, antithetic_pairs=4),
    "cma": lambda: meta.Evolution(3, population=9, fitness="loss"),  # no multiple of four
    "warpgrad": lambda: meta.WarpGrad(3, start="leap"),
    "offline": lambda: meta.OfflineWarpGrad(4, thetas=2, start="reptile"),
}


def lay():
    """Distributes tasks over devices, as the JSON asks."""
    if "workers" in asked:
        keras.distribution.initialize(f"127.0.0.1:{asked['port']}", asked["workers"], asked["worker"])
    if "workers" in asked or "devices" in asked:
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices()))


def warp():
    """A learner whose networks learn one after another. Its weights are not drawn by the
    backend."""
    model, names = learners.warped(16, (6,), 10)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if layer.weights and layer.name not in names:
            layer.set_weights([0.3 * rng.standard_normal(value.shape) for value in layer.get_weights()])
    return learners.Warp(model, names, keras.optimizers.SGD(0.1, momentum=0.9))


def trainer(case):
    """A trainer with tasks, or members, for four devices."""
    evolution, warps = case == "cma", case in ("warpgrad", "offline")
    made = meta.MetaTrainer(
        tasks.images("digits", size=4, relabel=True), warp() if warps else learners.Blur((8,), RULE),
        ESTIMATORS[case](), members=1 if evolution else asked.get("members", 2),
        meta_batch_size=asked.get("tasks", 4), batch_size=8, query_size=16, seed=3,
    )  # fmt: skip
    # Not Adam, whose first steps are the signs of gradients, which depend on rounding if a gradient
    # is zero.
    made.compile(None if evolution else keras.optimizers.SGD(0.01, momentum=0.9))
    return made


def noted(runner, seen):
    """Records for how many tasks and members, or candidates of CMA-ES, a device computes."""
    split, each = runner.split, runner.each

    def noting(function, *trees):
        def of_part(tasks, members, common, numbered, episodes, kept):
            seen.add((episodes["x"].shape[0], next(iter(numbered[0].values())).shape[0]))
            return function(tasks, members, common, numbered, episodes, kept)

        return split(of_part, *trees)

    def noting_each(function, common, candidates):
        def of_part(common, candidates):
            seen.add((common[0]["x"].shape[0], candidates.shape[0]))
            return function(common, candidates)

        return each(of_part, common, candidates)

    runner.split, runner.each = noting, noting_each


if __name__ == "__main__":
    asked.update(json.loads(sys.argv[1]))
    lay()
    found = {}
    for case in asked["cases"]:
        made, seen = trainer(case), set()
        noted(made.runner, seen)
        callbacks = [meta.UnrollCurriculum([(0, 3), (1, 2)])] if asked.get("copies") else []
        history = made.fit(asked["epochs"], 2, checkpoint=asked.get("checkpoint"), callbacks=callbacks, verbose=0).history
        outer = {name: value.tolist() for name, value in made.strategy.population().items()}
        found[case] = {"history": history, "outer": outer, "score": np.array(made.member_score.value).tolist(),
                       "devices": made.runner.shares, "work": sorted(seen)}  # fmt: skip
    print(json.dumps(found))
