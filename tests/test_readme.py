"""README.md: it is short, its python blocks run, its commands are those of CI."""

import pathlib
import re

import matplotlib

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_at_most_900_words():
    assert len(README.split()) <= 900


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict = {}
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "digits.keras").exists()
    assert "eq. 7" in capsys.readouterr().out
    assert names["model"].evaluate(names["x"][1437:], names["y"][1437:], verbose=0)[1] > 0.9


def test_first_example_is_short():
    first = blocks("python")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 16


def test_ci_runs_the_readme_commands():
    script = (ROOT / ".ci" / "run").read_text()
    for name in ("main", "test"):
        assert f"<!-- ci: {name} -->\n```sh\n" in README
        assert f"readme {name}" in script
