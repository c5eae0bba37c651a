"""The notebooks of docs/tutorials: they run from top to bottom, and hold what they show, in a form
that diffs well."""

import contextlib
import io
import json
import pathlib
import re

import matplotlib
import matplotlib.pyplot as plt
import pytest
from marks import slow_but
from test_prose import WIDTH, in_markdown

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "tutorials"

# Code whose numbers another machine may round differently.
LEARNS = r"\.(?:fit|evaluate|predict)\(|accuracy_of\("

# What each one has reached at its end.
REACHED = {
    "learn_by_a_genome": lambda names: names["history"].history["val_accuracy"][-1] > 0.9 and names["difference"] < 1e-4,
    "meta_train_your_own": lambda names: names["accuracy"][-1] > 0.7 and names["accuracy"][0] < 0.2,
    "look_inside_a_genome": lambda names: names["whole"] > 0.7 and max(names["without"].values()) < 0.4,
    "any_keras_model": lambda names: names["even_accuracy"] > 0.9 and max(names["same"], names["back"]) < 1e-4,
}


def cells(name, kind):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    return [{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_all_are_here():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(REACHED)


@pytest.mark.parametrize("name", slow_but(["learn_by_a_genome"], REACHED))
def test_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict = {"__name__": name}
    for number, cell in enumerate(cells(name, "code")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(cell["source"], f"{name}, cell {number}", "exec"), names)
        stored = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
        now = printed.getvalue()
        if re.search(LEARNS, cell["source"]):  # the machine decides on the last digits
            stored, now = (re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "0", text).split() for text in (stored, now))
        assert stored == now, f"{name}, cell {number}: run docs/tutorials/run.py"
    plt.close("all")
    assert REACHED[name](names)


@pytest.mark.parametrize("name", REACHED)
def test_the_first_cell_installs_where_nothing_is(name, monkeypatch):
    commands = []
    first = cells(name, "code")[0]["source"]
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    exec(first, {})
    assert commands == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(first, {})
    assert [command[1:] for command in commands] == [["-m", "pip", "install", "-q", "../..[data,plot]"]]


@pytest.mark.parametrize("name", REACHED)
def test_what_is_stored(name):
    """Printed text and pictures; nothing that another run changes without need."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{number}" for number in range(len(notebook["cells"]))]
    pictures = 0
    for cell in cells(name, "code"):
        assert cell["metadata"] == {}
        assert cell["execution_count"] is None
        assert ("print(" in cell["source"]) == any(output["output_type"] == "stream" for output in cell["outputs"])
        shown = [output["data"] for output in cell["outputs"] if output["output_type"] == "display_data"]
        assert len(shown) == cell["source"].count("plt.subplots(")
        assert all(set(data) == {"image/png"} for data in shown)
        pictures += len(shown)
    assert pictures >= 1


@pytest.mark.parametrize("name", REACHED)
def test_prose_and_links(name):
    text = "\n".join(cell["source"] for cell in cells(name, "markdown"))
    assert [line for line in in_markdown(text) if len(line) > WIDTH] == []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (FOLDER / link).is_file(), link


def test_they_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for name in REACHED:
        assert re.search(rf": tutorials/{name}\.md$", navigation, re.M)
