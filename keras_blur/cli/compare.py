"""`keras-blur compare`: a genome beside tuned optimizers on an image set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from absl import flags

from keras_blur import genomes
from keras_blur.cli.common import check_folders, values_of, whole_numbers
from keras_blur.genome import write_text
from keras_blur.report.compare import compare, format_compare, plot_compare
from keras_blur.tasks.datasets import load_images

USAGE = "--genome NAME_OR_FILE [flags]"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    define: Any = {"flag_values": values}
    flags.DEFINE_string("genome", None, "A genome's name, or a file of one.", **define)
    flags.DEFINE_string("data", "digits", "'digits', or a prepared tensorflow_datasets image set.", **define)
    flags.DEFINE_string("data_dir", None, "Folder of prepared sets; else TFDS_DATA_DIR, else tfds's default.", **define)
    flags.DEFINE_list("hidden", ["64", "64"], "Units of the hidden layers.", **define)
    flags.DEFINE_integer("steps", 100, "Learning steps.", lower_bound=1, **define)
    flags.DEFINE_integer("seeds", 5, "Initial networks and orders of the images.", lower_bound=2, **define)
    flags.DEFINE_integer("batch_size", 64, "Images in a batch.", lower_bound=1, **define)
    flags.DEFINE_integer("seed", 0, "The first of the seeds.", lower_bound=0, **define)
    flags.DEFINE_string("json", None, "File for the numbers, every curve of every grid.", **define)
    flags.DEFINE_string("plot", None, "File for the picture (.png, .pdf, .svg).", **define)


def run(values: flags.FlagValues, positional: Sequence[str]) -> int:
    """Compares, prints and writes."""
    del positional
    flag = values_of(values)
    check_folders(flag, "json", "plot")
    if not flag["genome"]:
        raise ValueError("--genome must be given: the name of a genome or a file of one")
    genome = genomes.load(flag["genome"])
    hidden = whole_numbers("hidden", flag["hidden"])
    images = load_images(flag["data"], flag["data_dir"])
    result = compare(
        genome, images, hidden, steps=flag["steps"], seeds=flag["seeds"], batch_size=flag["batch_size"], seed=flag["seed"]
    )
    print(format_compare(result))
    if flag["json"]:
        write_text(flag["json"], json.dumps({"genome": flag["genome"], **result}, indent=1) + "\n")
    if flag["plot"]:
        plot_compare(result, flag["plot"])
    return 0
