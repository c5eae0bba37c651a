"""`keras-blur compare`: compares a genome with tuned optimizers on images or toy tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keras_blur.cli.common import define_scoring_flags, score_all, stopped_early
from keras_blur.report.comparison import compare, format_compare, format_several

USAGE = "--genome NAME_OR_FILE [flags]"
EXAMPLES = (
    "--genome mnist-4state --steps 50 --plot compare.png",
    "--genome functions --functions cross,triangle --hidden 20",
    "--genome mine.json --data mnist --data_dir DIR --hidden 256,128 --json compare.json",
)

define_flags = define_scoring_flags


def run(flag: Mapping[str, Any], positional: Sequence[str]) -> int:
    """Compares, prints and writes the results."""
    del positional
    results, stopped = score_all(flag, compare, format_compare)
    whole = [result for result in results if "envelope" in result]
    if len(whole) > 1:
        print(format_several(whole))
    return stopped_early(results) if stopped else 0
