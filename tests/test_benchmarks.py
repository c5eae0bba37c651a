"""benchmarks/over_versions.py: ratios of each version in their order."""

import json
import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parent.parent / "benchmarks" / "over_versions.py"


def document(version, network, **ratios):
    rows = [{"name": name, "ratio": value, "memory_ratio": 2.0 * value} for name, value in ratios.items()]
    return {"version": version, "network": network, "backend": "jax", "rows": [{"name": "keras SGD"}, *rows]}


def test_versions_are_in_the_order_of_their_numbers(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import over_versions

    given = [document(version, "mlp", genome=size) for version, size in (("0.10.0", 3.0), ("0.10.0rc1", 2.0))]
    given.append(document("0.9.1", "mlp", genome=1.5, other=1.0))
    found = over_versions.by_panel([*given, document("0.9.1", "lenet", genome=2.0)])
    assert list(found) == ["mlp, jax", "lenet, jax"]
    assert list(found["mlp, jax"]["genome"]) == ["0.9.1", "0.10.0rc1", "0.10.0"]
    assert found["mlp, jax"]["genome"]["0.10.0"] == {"ratio": 3.0, "memory_ratio": 6.0}
    assert list(found["mlp, jax"]["other"]) == ["0.9.1"]


def test_the_picture_is_drawn(tmp_path):
    for version in ("0.1.0", "0.2.0"):
        (tmp_path / f"{version}.json").write_text(json.dumps(document(version, "mlp", genome=1.5)))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, sorted(tmp_path.glob("*.json"))), f"--plot={tmp_path / 'drawn.png'}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "drawn.png").stat().st_size > 5000
