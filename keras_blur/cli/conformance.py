"""`keras-blur conformance`: replays published numbers from files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from keras_blur import conformance
from keras_blur.cli.flags import Flags
from keras_blur.cli.outputs import Table, write_json

USAGE = "FILE_OR_DIR ... [flags]"
EXAMPLES = ("tests/conformance", "tests/conformance/oja_weights.npz --json conformance.json")


def define_flags(flags: Flags) -> None:
    """Defines the command's flags."""
    flags.group("Outputs")
    flags.output("json", None, "File for the numbers.", (".json",))


def run(flag: Mapping[str, Any], positional: Sequence[str]) -> int:
    """Replays each file. Returns 0 if all numbers agree, else 1.

    Raises:
        ValueError: if no file is given or a file cannot be replayed.
    """
    if not positional:
        raise ValueError("conformance needs at least one .npz file or a folder of them")
    reports = []
    files = conformance.find(positional)
    groups = conformance.GROUPS
    print(f"largest absolute error; agreement is {conformance.ATOL:g} + {conformance.RTOL:g} |expected|")
    table = Table({"case": 34, **dict.fromkeys(groups, -16), "": 0})
    for path in files:
        report = conformance.replay(path)
        reports.append(report)
        verdict = "agrees" if report.agrees else f"DIFFERS at {report.worst}"
        errors = [f"{report.errors[group]:.1e}" for group in groups]
        table.row(report.case, *errors, f"  {verdict}", marked=not report.agrees)
    failed = [report.case for report in reports if not report.agrees]
    print(f"{len(reports) - len(failed)} of {len(reports)} cases agree")
    if flag["json"]:
        write_json(flag["json"], [{**dataclasses.asdict(report), "agrees": report.agrees} for report in reports])
    return 1 if failed else 0
