"""The price of a learning step over the versions of the library, as a picture.

    python benchmarks/over_versions.py FILE.json ... --plot docs/over_versions.png

Each file is what `benchmarks/fit_step.py --json` wrote with one version. A release stores its files
in `benchmarks/results/fit_step/`. Ratios over Keras SGD of the same run are drawn, so that files of
different machines can stand side by side. There is one row of panels for time and one for memory,
and one column for each network and backend.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from packaging.version import Version

from keras_blur.report import style

_PLOT = flags.DEFINE_string("plot", "over_versions.png", "File for the picture.")
_RATIOS = {"ratio": "time over Keras SGD", "memory_ratio": "memory over Keras SGD"}


def by_panel(documents: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Ratios of each candidate but Keras SGD: by panel, candidate, version and name of the
    ratio."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for document in sorted(documents, key=lambda document: Version(document["version"])):
        panel = found.setdefault(f"{document['network']}, {document['backend']}", {})
        for row in document["rows"]:
            if row["name"] != "keras SGD":
                panel.setdefault(row["name"], {})[document["version"]] = {ratio: row[ratio] for ratio in _RATIOS}
    return found


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        raise app.UsageError("name the files that fit_step.py wrote")
    panels = by_panel([json.loads(pathlib.Path(path).read_text(encoding="utf-8")) for path in argv[1:]])
    made, axes = style.figure(columns=len(panels), rows=len(_RATIOS))
    for column, (title, candidates) in enumerate(panels.items()):
        versions = sorted({version for known in candidates.values() for version in known}, key=Version)
        for axis, (ratio, label) in zip(axes[:, column], _RATIOS.items(), strict=True):
            for index, (name, known) in enumerate(candidates.items()):
                places = [versions.index(version) for version in known]
                axis.plot(places, [row[ratio] for row in known.values()], color=style.COLOURS[index], marker="o", label=name)
            axis.set_xticks(range(len(versions)), versions)
            axis.set_ylim(bottom=0)
            axis.set_title(title, fontsize=9)
            axis.set_ylabel(label)
    style.legend(made, axes[0][0])
    style.save(made, _PLOT.value)
    print(f"wrote {_PLOT.value}")


if __name__ == "__main__":
    app.run(main)
