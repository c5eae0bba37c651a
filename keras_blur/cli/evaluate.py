"""`keras-blur evaluate`: how a genome learns, over seeds, and whether it keeps what it learned."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from absl import flags

from keras_blur import genomes
from keras_blur.cli.common import check_folders, define_scoring_flags, sources_of, values_of, whole_numbers
from keras_blur.genome import write_text
from keras_blur.report.compare import evaluate, format_compare, plot_compare

USAGE = "--genome NAME_OR_FILE [flags]"

define_flags = define_scoring_flags


def run(values: flags.FlagValues, positional: Sequence[str]) -> int:
    """Evaluates, prints and writes."""
    del positional
    flag = values_of(values)
    check_folders(flag, "json", "plot")
    sources, hidden = sources_of(flag), whole_numbers("hidden", flag["hidden"])
    genome = genomes.load(flag["genome"])
    options = {name: flag[name] for name in ("steps", "seeds", "batch_size", "seed")}
    results = []
    for source in sources:
        result = evaluate(genome, source, hidden, **options)
        results.append(result)
        print(format_compare(result))
        curve = result["curves"]["genome"]
        means = np.mean(curve["accuracy"], axis=0)
        bad = sum(loss is None for losses in curve["loss"] for loss in losses)
        print(
            f"best mean {means.max():.3f} at step {result['steps'][int(means.argmax())]}; after it, at most "
            f"{100 * (means.max() - means[means.argmax() :].min()):.1f} points lower; "
            f"scores that are not finite: {bad} of {np.size(curve['accuracy'])}",
            flush=True,
        )
    if flag["json"]:
        document = results[0] if len(results) == 1 else {"results": results}
        write_text(flag["json"], json.dumps({"genome": flag["genome"], **document}, indent=1) + "\n")
    if flag["plot"]:
        plot_compare(results[0], flag["plot"])
    return 0
