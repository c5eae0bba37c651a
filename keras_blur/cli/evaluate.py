"""`keras-blur evaluate`: learning curves of a genome over seeds, and accuracy lost later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_blur import genomes
from keras_blur.cli.common import (
    define_scoring_flags,
    define_scoring_outputs,
    name_of,
    score_all,
    stopped_early,
    whole_numbers,
)
from keras_blur.cli.flags import PICTURES, Flags, with_any
from keras_blur.cli.outputs import wrote
from keras_blur.learners.blur import check_genome
from keras_blur.report.curves import format_compare, label_of
from keras_blur.report.evaluation import evaluate
from keras_blur.tasks import functions, images
from keras_blur.tasks.base import Tasks

USAGE = "--genome NAME_OR_FILE [flags]"
EXAMPLES = (
    "--genome mnist-4state --steps 1000",
    "--genome functions --functions cross,circle --hidden 20 --steps 20 --decisions decisions.png",
    "--genome mine.json --data mnist --data_dir DIR --size 14 --split validation",
)


def define_flags(flags: Flags) -> None:
    """Defines the command's flags."""
    define_scoring_flags(flags)
    define_scoring_outputs(flags)
    plane = [with_any("functions")]
    flags.output("decisions", None, "File for a figure of decision regions.", PICTURES, plane)
    flags.output("synapses", None, "File for a figure of kernel norms and spectra during learning.", PICTURES)


def run(flag: Mapping[str, Any], positional: Sequence[str]) -> int:
    """Evaluates, prints, writes and draws."""
    del positional
    if flag["synapses"] and len(flag["functions"]) > 1:
        raise ValueError("--synapses draws one network: use it with --data or with a single function")
    hidden = whole_numbers("hidden", flag["hidden"])
    if flag["decisions"]:
        _check_decisions(flag["functions"])
    if flag["genome"] and (flag["decisions"] or flag["synapses"]):
        check_genome(genomes.load(flag["genome"]), hidden)
    results, stopped = score_all(flag, evaluate, _show, hidden)
    if stopped:
        return stopped_early(results)
    if flag["decisions"] or flag["synapses"]:
        _draw(flag, results[0]["steps"])
    return 0


def _check_decisions(names: Sequence[str]) -> None:
    """Raises a `ValueError` unless decisions on these functions can be drawn."""
    if len(set(names)) != len(names):
        raise ValueError(f"--decisions draws each function once. Received: --functions={','.join(names)}")
    other = [name for name in names if (of := functions(name)).kind != "classes" or of.features != 2]
    if other:
        raise ValueError(f"--decisions draws 2-D functions of classes. Received: {', '.join(other)}")


def _draw(flag: Mapping[str, Any], at: Sequence[int]) -> None:
    """Draws one episode of learning, with the first seed."""
    from keras_blur.report.decisions import draw_decisions, trace_decisions
    from keras_blur.report.synapses import draw_synapses, trace_synapses

    genome, hidden, name = genomes.load(flag["genome"]), whole_numbers("hidden", flag["hidden"]), name_of(flag["genome"])
    if flag["decisions"]:
        several = [functions(one) for one in flag["functions"]]
        shown = [at[place] for place in np.unique(np.linspace(0, len(at) - 1, 7).astype(int))]
        trace = trace_decisions(
            {name: genome}, several, hidden, shown, flag["seed"], split=flag["split"], batch_size=flag["batch_size"]
        )
        draw_decisions(trace, flag["decisions"])
        wrote(flag["decisions"])
    if flag["synapses"]:
        task: Tasks
        if flag["functions"]:
            task = functions(flag["functions"][0])
        else:
            task = images(flag["data"], size=flag["size"], data_dir=flag["data_dir"])
        # Of a whole image set, networks learn the training images.
        split = flag["split"] if flag["functions"] or flag["size"] else "train"
        found = trace_synapses(genome, task, hidden, flag["steps"], flag["seed"], split=split, batch_size=flag["batch_size"])
        draw_synapses(found, flag["synapses"], title=f"{name} on {task.name}")
        wrote(flag["synapses"])


def _show(result: dict[str, Any]) -> str:
    """Formats the table, and how much accuracy each genome loses after its best score."""
    lines = [format_compare(result)]
    for name, curve in result["curves"].items():
        means = np.mean(curve["accuracy"], axis=0)
        bad = sum(loss is None for losses in curve["loss"] for loss in losses)
        lines.append(
            f"{label_of(result, name)}: best mean {means.max():.3f} at step {result['steps'][int(means.argmax())]}; "
            f"after it, at most {100 * (means.max() - means[means.argmax() :].min()):.1f} points lower; "
            f"scores that are not finite: {bad} of {np.size(curve['accuracy'])}"
        )
    return "\n".join(lines)
