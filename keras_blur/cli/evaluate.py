"""`keras-blur evaluate`: how a genome learns, over seeds, and whether it keeps what it learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from keras_blur import genomes
from keras_blur.cli.common import check_folders, define_scoring_flags, score_all, values_of, whole_numbers
from keras_blur.report.compare import evaluate, format_compare
from keras_blur.tasks import functions, images
from keras_blur.tasks.base import Tasks

USAGE = "--genome NAME_OR_FILE [flags]"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    define: Any = {"flag_values": values}
    define_scoring_flags(values)
    flags.DEFINE_string("decisions", None, "File for a picture of the regions that it decides on --functions.", **define)
    flags.DEFINE_string("synapses", None, "File for a picture of norms and spectra of the kernels as it learns.", **define)


def run(values: flags.FlagValues, positional: Sequence[str]) -> int:
    """Evaluates, prints, writes and draws."""
    del positional
    flag = values_of(values)
    check_folders(flag, "decisions", "synapses")
    if flag["decisions"] and not flag["functions"]:
        raise ValueError("--decisions draws the plane: give it with --functions")
    if flag["synapses"] and len(flag["functions"]) > 1:
        raise ValueError("--synapses draws one network: give it with --data or with a single one of --functions")
    results = score_all(flag, evaluate, _show)
    if flag["decisions"] or flag["synapses"]:
        _draw(flag, results[0]["steps"])
    return 0


def _draw(flag: Mapping[str, Any], at: Sequence[int]) -> None:
    """The pictures of one episode of learning, the first seed's."""
    from keras_blur.report.decisions import draw_decisions, trace_decisions
    from keras_blur.report.synapses import draw_synapses, trace_synapses

    genome, hidden = genomes.load(flag["genome"]), whole_numbers("hidden", flag["hidden"])
    if flag["decisions"]:
        several = [functions(name) for name in flag["functions"]]
        shown = [at[place] for place in np.unique(np.linspace(0, len(at) - 1, 7).astype(int))]
        trace = trace_decisions(genome, several, hidden, shown, flag["seed"], batch_size=flag["batch_size"])
        draw_decisions(trace, flag["decisions"])
        print(f"wrote {flag['decisions']}")
    if flag["synapses"]:
        task: Tasks
        if flag["functions"]:
            task = functions(flag["functions"][0])
        else:
            task = images(flag["data"], size=flag["size"], data_dir=flag["data_dir"])
        found = trace_synapses(genome, task, hidden, flag["steps"], flag["seed"], batch_size=flag["batch_size"])
        draw_synapses(found, flag["synapses"], title=task.name)
        print(f"wrote {flag['synapses']}")


def _show(result: dict[str, Any]) -> str:
    """The table, and what each genome loses after its best score."""
    lines = [format_compare(result)]
    for name, curve in result["curves"].items():
        means = np.mean(curve["accuracy"], axis=0)
        bad = sum(loss is None for losses in curve["loss"] for loss in losses)
        lines.append(
            f"{name}: best mean {means.max():.3f} at step {result['steps'][int(means.argmax())]}; after it, at most "
            f"{100 * (means.max() - means[means.argmax() :].min()):.1f} points lower; "
            f"scores that are not finite: {bad} of {np.size(curve['accuracy'])}"
        )
    return "\n".join(lines)
