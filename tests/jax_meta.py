"""Meta-trains in a process of its own, on either backend: `python jax_meta.py JSON`; prints one
line of JSON.

The JSON gives `case`, an estimator; how it is run: nothing, `devices` (all that JAX has, under
`keras.distribution`), or `worker`, `workers` and `port` (processes of one device each); `epochs`,
and `checkpoint`.
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
    "cma": lambda: meta.Evolution(3, population=8, fitness="loss"),
}


def lay():
    """Lays tasks over devices, as asked."""
    if "workers" in asked:
        keras.distribution.initialize(f"127.0.0.1:{asked['port']}", asked["workers"], asked["worker"])
    if "workers" in asked or "devices" in asked:
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices()))


def trainer():
    """A trainer with tasks for four devices."""
    evolution = asked["case"] == "cma"
    made = meta.MetaTrainer(
        tasks.images("digits", size=4, relabel=True), learners.Blur((8,), RULE), ESTIMATORS[asked["case"]](),
        members=1 if evolution else 2, meta_batch_size=4, batch_size=8, query_size=16, seed=3,
    )  # fmt: skip
    # Not Adam, whose first steps are the signs of gradients: there rounding decides where one is
    # zero.
    made.compile(None if evolution else keras.optimizers.SGD(0.01, momentum=0.9))
    return made


if __name__ == "__main__":
    asked.update(json.loads(sys.argv[1]))
    lay()
    made = trainer()
    history = made.fit(asked["epochs"], 2, checkpoint=asked.get("checkpoint"), verbose=0).history
    found = {name: value.tolist() for name, value in made.strategy.population().items()}
    print(json.dumps({"history": history, "outer": found, "score": np.array(made.member_score.value).tolist(),
                      "devices": made.runner.shares}))  # fmt: skip
