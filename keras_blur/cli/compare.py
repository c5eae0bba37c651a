"""`keras-blur compare`: a genome beside tuned optimizers on an image set, or on toy tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence

from absl import flags

from keras_blur import genomes
from keras_blur.cli.common import check_folders, define_scoring_flags, sources_of, values_of, whole_numbers
from keras_blur.genome import write_text
from keras_blur.report.compare import compare, format_compare, format_several, plot_compare

USAGE = "--genome NAME_OR_FILE [flags]"

define_flags = define_scoring_flags


def run(values: flags.FlagValues, positional: Sequence[str]) -> int:
    """Compares, prints and writes."""
    del positional
    flag = values_of(values)
    check_folders(flag, "json", "plot")
    sources, hidden = sources_of(flag), whole_numbers("hidden", flag["hidden"])
    genome = genomes.load(flag["genome"])
    options = {name: flag[name] for name in ("steps", "seeds", "batch_size", "seed")}
    results = []
    for source in sources:
        results.append(compare(genome, source, hidden, **options))
        print(format_compare(results[-1]), end="\n\n" if len(sources) > 1 else "\n", flush=True)
    if len(sources) > 1:
        print(format_several(results))
    if flag["json"]:
        document = results[0] if len(results) == 1 else {"results": results}
        write_text(flag["json"], json.dumps({"genome": flag["genome"], **document}, indent=1) + "\n")
    if flag["plot"]:
        plot_compare(results[0], flag["plot"])
    return 0
