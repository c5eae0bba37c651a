"""Damaged files and odd arguments: how many give a clear error, how many a correct result, and how
many anything else.

    python benchmarks/fuzz.py [--files 10000] [--arguments 2000] [--seed 0] [--show 10]
        [--json FILE]

Genome, checkpoint and vector files are damaged at random, as bytes and as documents that are well
formed but wrong (`fuzz_files.py`). Functions and classes of the public API are called with
arguments drawn from pools of odd values (`fuzz_arguments.py`). Each case ends in one of three ways:

- error: a `ValueError`, `TypeError`, `OSError` or `ImportError` of one line that names the file or
  one of the arguments;
- correct: a result that passes its check (the file's own numbers, or an object that works);
- other: everything else, such as an exception from a lower layer, a long message, or a wrong
  result.

The exit status is 1 if there is any of the last kind.
"""

from __future__ import annotations

import json
import os
from collections import Counter

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags
from fuzz_case import KINDS, judge

_FILES = flags.DEFINE_integer("files", 10_000, "Damaged files, a third of each kind.", lower_bound=0)
_ARGUMENTS = flags.DEFINE_integer("arguments", 2_000, "Combinations of arguments.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed.", lower_bound=0)
_SHOW = flags.DEFINE_integer("show", 10, "Cases of the third kind to print.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "File for the counts and all cases of the third kind.")


def main(_: list[str]) -> int:
    import fuzz_arguments
    import fuzz_files

    from keras_blur.files import write_text

    counts: dict[str, Counter[str]] = {}
    findings = []
    cases = (
        *((fuzz_files.cases(_FILES.value, _SEED.value),) if _FILES.value else ()),
        *((fuzz_arguments.cases(_ARGUMENTS.value, _SEED.value),) if _ARGUMENTS.value else ()),
    )
    for source in cases:
        for case in source:
            kind, said = judge(case)
            counts.setdefault(case.group, Counter())[kind] += 1
            if kind == "other":
                findings.append({"group": case.group, "case": case.text, "said": said})
    print(f"{'':<28}" + "".join(f"{kind:>9}" for kind in KINDS))
    for group, found in sorted(counts.items()):
        print(f"{group:<28}" + "".join(f"{found[kind]:>9}" for kind in KINDS))
    total = sum(counts.values(), Counter())
    print(f"{'all':<28}" + "".join(f"{total[kind]:>9}" for kind in KINDS))
    for finding in findings[: _SHOW.value]:
        print(f"\n{finding['group']}: {finding['case']}\n  {finding['said'][:2000]}")
    if _JSON.value:
        document = {"counts": {group: dict(found) for group, found in counts.items()}, "other": findings}
        write_text(_JSON.value, json.dumps(document, indent=1) + "\n")
    return 1 if findings else 0


if __name__ == "__main__":
    app.run(main)
