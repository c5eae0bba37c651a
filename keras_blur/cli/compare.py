"""`keras-blur compare`: compares a genome with tuned optimizers on images or toy tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from keras_blur.cli.common import (
    check_optimizers,
    define_scoring_flags,
    define_scoring_outputs,
    score_all,
    stopped_early,
    whole_numbers,
)
from keras_blur.cli.flags import Flags, When
from keras_blur.files import read_text
from keras_blur.models.networks import NETWORKS
from keras_blur.report.baselines import GRIDS, OPTIMIZERS
from keras_blur.report.comparison import SCHEDULES, compare
from keras_blur.report.curves import format_compare, format_several

USAGE = "--genome NAME_OR_FILE [flags]"
EXAMPLES = (
    "--genome mnist-4state --steps 50 --optimizers SGD,Adam --plot compare.png",
    "--genome mine.json --data mnist --data_dir DIR --network lenet --json compare.json",
    "--genome other.json --data mnist --data_dir DIR --network lenet --baselines compare.json",
    "--genome fast --steps 500 --score_at 500 --schedules linear",
)

_MLP = When("to --network mlp", lambda flag: flag["network"] == "mlp", ("network",))
_ONE = When("with one set of data", lambda flag: len(flag["functions"]) < 2, ("functions",))


def define_flags(flags: Flags) -> None:
    """Defines the command's flags."""
    define_scoring_flags(flags, [_MLP])
    flags.group("Network and baselines")
    flags.string("network", "mlp", "'mlp' (see --hidden), 'lenet', 'resnet20', or a .keras file.")
    flags.words("optimizers", list(OPTIMIZERS), "Keras optimizers to compare with.")
    flags.words("schedules", list(SCHEDULES), "Schedules of their rates: 'constant', 'linear' (decay).")
    flags.switch("normalize", True, "Whether to compare with batch normalisation, too.")
    flags.integer("tuning_seeds", 1, "Number of seeds, from the first, on which all learning rates are run.", least=1)
    flags.string("baselines", None, "Earlier --json file whose optimizer runs are reused.", [_ONE])
    define_scoring_outputs(flags)


def run(flag: Mapping[str, Any], positional: Sequence[str]) -> int:
    """Compares, prints and writes the results."""
    del positional
    check_optimizers(flag["optimizers"])
    if flag["network"] not in NETWORKS and not flag["network"].endswith(".keras"):
        raise ValueError(f"--network must be mlp, lenet, resnet20 or a .keras file. Received: {flag['network']}")
    network = whole_numbers("hidden", flag["hidden"]) if flag["network"] == "mlp" else flag["network"]
    results, stopped = score_all(
        flag, compare, format_compare, network,
        grids={name: GRIDS[name] for name in flag["optimizers"]}, schedules=flag["schedules"], normalize=flag["normalize"],
        tuning_seeds=flag["tuning_seeds"], baselines=_baselines(flag["baselines"]),
    )  # fmt: skip
    whole = [result for result in results if "envelopes" in result]
    if len(whole) > 1:
        print(format_several(whole))
    return stopped_early(results) if stopped else 0


def _baselines(path: str | None) -> dict[str, Any] | None:
    """Reads an earlier result."""
    if path is None:
        return None
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"--baselines must be a file that `compare --json` wrote. Received: {path} ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("curves"), dict):
        raise ValueError(f"--baselines must be a file that `compare --json` wrote, of one set. Received: {path}")
    return found
