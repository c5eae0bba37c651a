"""Functions used by several commands."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras_blur import genomes
from keras_blur.cli.flags import PICTURES, Flags, When, with_any, without
from keras_blur.cli.outputs import draft_json, interrupted, write_json, wrote
from keras_blur.cli.progress import ProgressLine
from keras_blur.report.baselines import OPTIMIZERS
from keras_blur.report.curves import plot_compare
from keras_blur.report.progress import Progress
from keras_blur.tasks import functions, images
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.datasets import Images, load_images

PREPARED = When("with --data other than digits", lambda flag: flag["data"] != "digits", ("data",))


def whole_numbers(name: str, texts: Sequence[str]) -> list[int]:
    """Parses a list of positive integers.

    Args:
        name: name of the flag, for messages.
        texts: the entries.

    Raises:
        ValueError: if an entry is not a positive integer.
    """
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ValueError(f"--{name} must be positive whole numbers, as in 256,128. Received: {','.join(texts)}")
    return numbers


def check_optimizers(names: Sequence[str]) -> None:
    """Raises a `ValueError` if --optimizers has an unknown name, or one twice."""
    unknown = [name for name in names if name not in OPTIMIZERS]
    if unknown:
        raise ValueError(f"--optimizers must be some of {', '.join(OPTIMIZERS)}. Received: {', '.join(unknown)}")
    if len(set(names)) != len(names):
        raise ValueError(f"--optimizers must name each optimizer once. Received: {', '.join(names)}")


def name_of(genome: str) -> str:
    """The name of a genome in results and figures."""
    return os.path.basename(genome).removesuffix(".json")


def define_data_flags(flags: Flags, when: Sequence[When] = ()) -> None:
    """Defines the flags for image sets."""
    flags.string("data", "digits", "'digits', or a prepared tensorflow_datasets image set.", when)
    flags.string(
        "data_dir",
        None,
        "Folder of prepared sets; by default TFDS_DATA_DIR, else the default of tensorflow_datasets.",
        [*when, PREPARED],
    )


def define_scoring_flags(flags: Flags, hidden_when: Sequence[When] = ()) -> None:
    """Defines the flags for data and learning of commands that score a genome."""
    flags.group("Data")
    define_data_flags(flags, [without("functions")])
    flags.integer(
        "size", None, "Side of the images in pixels; each seed is then an episode.", least=2, when=[without("functions")]
    )
    flags.words("functions", [], "Toy tasks instead of --data, each scored separately.")
    flags.choice(
        "split",
        "test",
        ["validation", "test"],
        "Split for reporting (test) or model selection (validation).",
        [with_any("size", "functions")],
    )
    flags.group("Learning")
    flags.string("genome", None, "'backprop', a name that keras-blur zoo lists, or a file; required.")
    flags.words("hidden", ["64", "64"], "Units of the hidden layers.", hidden_when)
    flags.integer("steps", 100, "Learning steps.", least=1)
    flags.words("score_at", [], "Steps that are scored, besides 0 and --steps; by default 1, 2, 5, 10, ..., 1000.")
    flags.integer("seeds", 5, "Number of initial networks and data orders, or of episodes.", least=2)
    flags.integer("batch_size", 64, "Examples per batch.", least=1)
    flags.integer("seed", 0, "First random seed.", least=0)


def define_scoring_outputs(flags: Flags) -> None:
    """Defines the output flags of commands that score a genome."""
    flags.group("Outputs")
    flags.output("json", None, "File for all curves.", (".json",))
    flags.output("plot", None, "File for the figure.", PICTURES)


def sources_of(flag: Mapping[str, Any]) -> list[Images | Tasks]:
    """The data selected by the scoring flags.

    Raises:
        ValueError: if a function is unknown or data are missing.
    """
    if flag["functions"]:
        return [functions(name) for name in flag["functions"]]
    if flag["size"]:
        return [images(flag["data"], size=flag["size"], data_dir=flag["data_dir"])]
    return [load_images(flag["data"], flag["data_dir"])]


def score_all(
    flag: Mapping[str, Any],
    score: Callable[..., dict[str, Any]],
    show: Callable[[dict[str, Any]], str],
    network: str | Sequence[int],
    **options: Any,
) -> tuple[list[dict[str, Any]], bool]:
    """Scores a genome on all selected data, and prints and writes the results.

    The curves so far are written to `--json` after each score of the genome, and at the start of
    each arm.

    Args:
        flag: the scoring flags.
        score: `report.compare` or `evaluate`.
        show: formats a result.
        network: the network, as `score` takes it.
        **options: further arguments of `score`.

    Returns:
        The results, and whether Ctrl-C ended the run. If so, the last result may be partial.

    Raises:
        ValueError: if several results are to be plotted, no genome is given, a name is unknown, or
            data are missing.
    """
    if not flag["genome"]:
        raise ValueError("--genome must be given: the name or file of a genome")
    if len(flag["functions"]) > 1 and flag["plot"]:
        raise ValueError("--plot draws one result: use it with --data or with a single function")
    genome, name = genomes.load(flag["genome"]), name_of(flag["genome"])
    sources = sources_of(flag)
    options |= {option: flag[option] for option in ("steps", "seeds", "batch_size", "seed", "split")}
    options["score_at"] = whole_numbers("score_at", flag["score_at"]) if flag["score_at"] else None
    results: list[dict[str, Any]] = []
    partial: list[dict[str, Any]] = []  # of the current source
    stopped = False

    def document(kept: Sequence[dict[str, Any]], whole: bool) -> dict[str, Any]:
        found = kept[0] if len(sources) == 1 else {"results": list(kept), **({} if whole else {"partial": True})}
        return {"genome": flag["genome"], **found}

    with ProgressLine() as line:
        arm = 0

        def watch(progress: Progress) -> None:
            nonlocal arm
            partial[:] = [{"name": name, **progress.result}] if progress.result else []
            task = f"{progress.data} ({len(results) + 1} of {len(sources)}): " if len(sources) > 1 else ""
            label = name if progress.arm == "genome" else progress.arm
            at = f"{progress.unit} {progress.done} of {progress.count}"
            line.show(f"{task}{label} ({progress.number} of {progress.arms})", at)
            if flag["json"] and partial and (progress.number != arm or progress.arm == "genome"):
                draft_json(flag["json"], document([*results, *partial], whole=False))
            arm = progress.number

        def keep(result: dict[str, Any]) -> None:
            results.append({"name": name, **result})
            line.clear()
            print(show(results[-1]), end="\n\n" if len(sources) > 1 else "\n", flush=True)

        try:
            for source in sources:
                keep(score(genome, source, network, watch=watch, **options))
                partial.clear()
        except KeyboardInterrupt:
            stopped = True
            if partial and len(results) < len(sources):
                keep(partial[0])
    if flag["json"] and results:
        write_json(flag["json"], document(results, whole=not stopped))
    if flag["plot"] and results:
        plot_compare(results[0], flag["plot"])
        wrote(flag["plot"])
    return results, stopped


def stopped_early(results: Sequence[Mapping[str, Any]]) -> int:
    """Reports what an interrupted scoring run kept. Returns the exit status."""
    curves = sum(len(result["curves"]) for result in results)
    if not curves:
        return interrupted("no score was taken yet, so nothing was kept")
    kept = f"kept the curves learned so far: {curves}"
    return interrupted(kept, f"{kept},")
