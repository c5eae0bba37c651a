"""What several commands do with their flags."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from keras_blur import genomes
from keras_blur.files import is_remote, write_text
from keras_blur.report.compare import plot_compare
from keras_blur.tasks import functions, images
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.datasets import Images, load_images


def values_of(values: flags.FlagValues) -> dict[str, Any]:
    """The flags' values by name."""
    return {name: values[name].value for name in values if name != "help"}


def check_folders(flag: Mapping[str, Any], *names: str) -> None:
    """Raises a `ValueError` if a file that is to be written would have no folder."""
    for name in names:
        if flag[name] and not is_remote(flag[name]):
            folder = os.path.dirname(os.path.abspath(flag[name]))
            if not os.path.isdir(folder):
                raise ValueError(f"--{name}: there is no folder {folder!r}")


def whole_numbers(name: str, texts: Sequence[str]) -> list[int]:
    """The positive numbers of a list flag."""
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ValueError(f"--{name} must be positive whole numbers with commas, as in 256,128. Received: {','.join(texts)}")
    return numbers


def define_data_flags(values: flags.FlagValues) -> None:
    """Defines the flags that name an image set."""
    define: Any = {"flag_values": values}
    flags.DEFINE_string("data", "digits", "'digits', or a prepared tensorflow_datasets image set.", **define)
    flags.DEFINE_string("data_dir", None, "Folder of prepared sets; else TFDS_DATA_DIR, else tfds's default.", **define)


def define_scoring_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the commands that let a genome learn and score it."""
    define: Any = {"flag_values": values}
    flags.DEFINE_string("genome", None, "A genome's name, or a file of one.", **define)
    define_data_flags(values)
    flags.DEFINE_integer("size", None, "Side to resize images to; each seed is then an episode.", lower_bound=2, **define)
    flags.DEFINE_list("functions", [], "Toy tasks, one by one, in the place of --data.", **define)
    flags.DEFINE_list("hidden", ["64", "64"], "Units of the hidden layers.", **define)
    flags.DEFINE_integer("steps", 100, "Learning steps.", lower_bound=1, **define)
    flags.DEFINE_integer("seeds", 5, "Initial networks and orders of the images, or episodes.", lower_bound=2, **define)
    flags.DEFINE_integer("batch_size", 64, "Examples in a batch.", lower_bound=1, **define)
    flags.DEFINE_integer("seed", 0, "The first of the seeds.", lower_bound=0, **define)
    flags.DEFINE_enum(
        "split", "test", ["validation", "test"], "Episodes (--size, --functions) to report, or to choose by.", **define
    )
    flags.DEFINE_string("json", None, "File for the numbers, every curve.", **define)
    flags.DEFINE_string("plot", None, "File for the picture (.png, .pdf, .svg).", **define)


def sources_of(flag: Mapping[str, Any]) -> list[Images | Tasks]:
    """What the scoring flags ask to learn.

    Raises:
        ValueError: if a picture of several is asked for, no genome is given, or data are missing.
    """
    if not flag["genome"]:
        raise ValueError("--genome must be given: the name of a genome or a file of one")
    if len(flag["functions"]) > 1 and flag["plot"]:
        raise ValueError("--plot draws one result: give it with --data or with a single one of --functions")
    if flag["functions"]:
        return [functions(name) for name in flag["functions"]]
    if flag["size"]:
        return [images(flag["data"], size=flag["size"], data_dir=flag["data_dir"])]
    return [load_images(flag["data"], flag["data_dir"])]


def score_all(
    flag: Mapping[str, Any], score: Callable[..., dict[str, Any]], show: Callable[[dict[str, Any]], str]
) -> list[dict[str, Any]]:
    """Lets the genome learn what the scoring flags ask for, prints and writes it.

    Args:
        flag: the scoring flags.
        score: `report.compare.compare` or `evaluate`.
        show: a result as text.

    Returns:
        The results.
    """
    check_folders(flag, "json", "plot")
    sources, hidden = sources_of(flag), whole_numbers("hidden", flag["hidden"])
    genome = genomes.load(flag["genome"])
    options = {name: flag[name] for name in ("steps", "seeds", "batch_size", "seed", "split")}
    results = []
    for source in sources:
        results.append(score(genome, source, hidden, **options))
        print(show(results[-1]), end="\n\n" if len(sources) > 1 else "\n", flush=True)
    if flag["json"]:
        document = results[0] if len(results) == 1 else {"results": results}
        write_text(flag["json"], json.dumps({"genome": flag["genome"], **document}, indent=1) + "\n")
    if flag["plot"]:
        plot_compare(results[0], flag["plot"])
    return results
