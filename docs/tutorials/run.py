"""Runs the notebooks from top to bottom and keeps their outputs, in a form that diffs well.

No times, counts of executions or versions of a kernel are kept, and cells are numbered.

    python docs/tutorials/run.py [NOTEBOOK ...]
"""

import pathlib
import sys
import tempfile

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},  # by which code is coloured
}


def run(path):
    """Runs a notebook in a folder of its own, where it may write files."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, resources={"metadata": {"path": folder}}, coalesce_streams=True).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [kept(output) for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata, notebook.nbformat, notebook.nbformat_minor = METADATA, 4, 5
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook) + "\n")


def kept(output):
    """What an output shows: printed text, or a picture without the text that stands for it."""
    if output.output_type == "stream":
        return output
    return nbformat.v4.new_output("display_data", {"image/png": output.data["image/png"]})


if __name__ == "__main__":
    for path in [pathlib.Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        run(path)
        print(path)
