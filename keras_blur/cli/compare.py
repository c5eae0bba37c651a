"""`keras-blur compare`: a genome beside tuned optimizers on an image set, or on toy tasks."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from keras_blur.cli.common import define_scoring_flags, score_all, values_of
from keras_blur.report.compare import compare, format_compare, format_several

USAGE = "--genome NAME_OR_FILE [flags]"

define_flags = define_scoring_flags


def run(values: flags.FlagValues, positional: Sequence[str]) -> int:
    """Compares, prints and writes."""
    del positional
    results = score_all(values_of(values), compare, format_compare)
    if len(results) > 1:
        print(format_several(results))
    return 0
