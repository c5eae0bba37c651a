"""`keras-blur meta-train`: finds a genome on tasks made of an image set, from random numbers."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from absl import flags

from keras_blur import genomes, learners, meta, tasks
from keras_blur.cli.common import check_folders, values_of, whole_numbers
from keras_blur.genome import Rule, write_text

USAGE = "[flags]"

# What learned best in trials: normalised sums on both passes and synapses of unit norm (sections 3.4 and C.6).
RULE = {
    "last_activation": "linear",
    "normalize_activations": "both",
    "normalize_synapses": "stored",
    "batch_reduction": "mean",
}


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    define: Any = {"flag_values": values}
    flags.DEFINE_string("data", "digits", "'digits', or a prepared tensorflow_datasets image set.", **define)
    flags.DEFINE_string("data_dir", None, "Folder of prepared sets; else TFDS_DATA_DIR, else tfds's default.", **define)
    flags.DEFINE_list("sizes", [], "Sides that images are resized to, one task family each; empty: as they are.", **define)
    flags.DEFINE_boolean("relabel", True, "Whether each episode has its classes in another order.", **define)
    flags.DEFINE_multi_string("hidden", ["64,64"], "Units of the hidden layers; repeat for several networks.", **define)
    flags.DEFINE_integer("states", 2, "States of a neuron.", lower_bound=2, **define)
    flags.DEFINE_list("rule", [], "Further options of the rule, as in oja=weights,update_decay=power.", **define)
    flags.DEFINE_list("unroll", ["10"], "Unrolled steps of each stage of the curriculum.", **define)
    flags.DEFINE_float("along", 1.0, "Weight of the loss along the way beside the query's.", lower_bound=0.0, **define)
    flags.DEFINE_integer("members", 4, "Genomes trained side by side.", lower_bound=1, **define)
    flags.DEFINE_integer("tasks_per_step", 1, "Episodes of a meta-step.", lower_bound=1, **define)
    flags.DEFINE_integer("batch_size", 64, "Images of a support batch.", lower_bound=1, **define)
    flags.DEFINE_integer("query_size", 128, "Images of the query.", lower_bound=1, **define)
    flags.DEFINE_float("learning_rate", 3e-3, "Rate of Adam on the genome.", lower_bound=0.0, **define)
    flags.DEFINE_float("clipnorm", 1.0, "Largest norm of a genome's gradient.", lower_bound=0.0, **define)
    flags.DEFINE_integer("epochs", 20, "Epochs, shared out evenly to the stages.", lower_bound=1, **define)
    flags.DEFINE_integer("steps_per_epoch", 100, "Meta-steps of an epoch.", lower_bound=1, **define)
    flags.DEFINE_string("start", None, "A genome to start from, by name or file; its rule is used.", **define)
    flags.DEFINE_integer("seed", 0, "Seed of everything.", lower_bound=0, **define)
    flags.DEFINE_string("checkpoint", None, "File (.weights.h5) to write after each epoch and to go on from.", **define)
    flags.DEFINE_string("genome", "genome.json", "File for the best genome, written after each epoch.", **define)
    flags.DEFINE_string("json", None, "File for the history.", **define)


def parse_rule(texts: Sequence[str], **options: Any) -> Rule:
    """A rule from `name=value` texts over given options."""
    kinds = {field.name: field.default for field in dataclasses.fields(Rule)}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in kinds:
            raise ValueError(f"--rule must be option=value pairs of {', '.join(kinds)}. Received: {text!r}")
        default = kinds[name]
        try:
            if isinstance(default, bool):
                options[name] = {"true": True, "false": False}[value.lower()]
            elif isinstance(default, (int, float)) or name == "layers":
                options[name] = float(value) if isinstance(default, float) else int(value)
            else:
                options[name] = value
        except (KeyError, ValueError) as error:
            raise ValueError(f"--rule: {name} cannot be {value!r}") from error
    return Rule(**options)


def run(values: flags.FlagValues, positional: Sequence[str]) -> int:
    """Meta-trains, prints how the best genome does on validation images, and writes it."""
    del positional
    flag = values_of(values)
    check_folders(flag, "genome", "json", "checkpoint")
    networks = [whole_numbers("hidden", text.split(",")) for text in flag["hidden"]]
    unrolls, sizes = whole_numbers("unroll", flag["unroll"]), whole_numbers("sizes", flag["sizes"])
    if flag["epochs"] < len(unrolls):
        raise ValueError(f"--epochs must be at least the number of stages of --unroll, {len(unrolls)}")
    start = genomes.load(flag["start"]) if flag["start"] else None
    rule = start.rule if start else parse_rule(flag["rule"], **{**RULE, "states": flag["states"]})
    sides: list[int | None] = [*sizes] or [None]
    families = [tasks.images(flag["data"], size=side, relabel=flag["relabel"], data_dir=flag["data_dir"]) for side in sides]
    trainer = meta.MetaTrainer(
        families,
        [learners.Blur(tuple(units), rule) for units in networks],
        meta.Unroll(unrolls[0], along=flag["along"]),
        members=flag["members"],
        tasks_per_step=flag["tasks_per_step"],
        batch_size=flag["batch_size"],
        query_size=flag["query_size"],
        clipnorm=flag["clipnorm"] or None,
        genome=start,
        seed=flag["seed"],
    )
    trainer.compile(keras.optimizers.Adam(flag["learning_rate"]))
    share = flag["epochs"] // len(unrolls)
    stages = [(index * share, steps) for index, steps in enumerate(unrolls)]
    callbacks = [meta.UnrollCurriculum(stages), meta.GenomeCheckpoint(flag["genome"])]
    begin = time.perf_counter()
    history = trainer.fit(
        flag["epochs"], flag["steps_per_epoch"], checkpoint=flag["checkpoint"], callbacks=callbacks
    ).history
    seconds = time.perf_counter() - begin
    trainer.genome.save(flag["genome"])
    scores = np.array(trainer.member_score.value).tolist()
    print(f"\nmeta-training: {seconds:.0f} s; running query accuracy of the members: "
          f"{', '.join(f'{score:.3f}' for score in scores)}; best: {trainer.best}")  # fmt: skip
    print(f"wrote {flag['genome']}")
    if flag["json"]:
        document = {
            "flags": flag,
            "seconds": seconds,
            "scores": scores,
            "history": {key: [float(value) for value in column] for key, column in history.items()},
        }
        write_text(flag["json"], json.dumps(document, indent=1) + "\n")
    return 0
