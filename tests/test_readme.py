"""README.md: its python blocks run, its commands exist."""

import pathlib
import re

import matplotlib

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict = {}
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "digits.keras").exists()
    assert (tmp_path / "genome.json").exists()
    assert "eq. 7" in capsys.readouterr().out


def test_first_example_is_short_and_learns():
    first = blocks("python")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 16


def test_pictures_exist():
    root = pathlib.Path(__file__).parent.parent
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (root / picture).stat().st_size > 1000


def test_ci_runs_the_readme_commands():
    script = (pathlib.Path(__file__).parent.parent / ".ci" / "run").read_text()
    for name in ("main", "test"):
        assert f"<!-- ci: {name} -->\n```sh\n" in README
        assert f"readme {name}" in script
