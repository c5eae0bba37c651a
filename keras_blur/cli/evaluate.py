"""`keras-blur evaluate`: how a genome learns, over seeds, and whether it keeps what it learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from keras_blur.cli.common import define_scoring_flags, score_all, values_of
from keras_blur.report.compare import evaluate, format_compare

USAGE = "--genome NAME_OR_FILE [flags]"

define_flags = define_scoring_flags


def run(values: flags.FlagValues, positional: Sequence[str]) -> int:
    """Evaluates, prints and writes."""
    del positional
    score_all(values_of(values), evaluate, _show)
    return 0


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
