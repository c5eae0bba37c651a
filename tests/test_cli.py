"""The shell: what each command writes, its exit status, and one sentence for a mistake."""

import json
import pathlib
import shutil

import keras
import numpy as np
import pytest

from keras_blur import cli, genomes
from keras_blur.tasks.datasets import load_images

VECTORS = pathlib.Path(__file__).parent / "conformance"


def mistake(capsys, *arguments: str) -> str:
    """The one line that a command prints for a mistake."""
    assert cli.run(arguments) == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("keras-blur: ")
    assert "Traceback" not in text
    return text


def test_fit_writes_numbers_picture_and_model(tmp_path, capsys):
    paths = {name: str(tmp_path / file) for name, file in [("json", "f.json"), ("plot", "f.png"), ("save", "f.keras")]}
    asked = ["fit", "--hidden=32", "--epochs=4", "--seed=3", *(f"--{name}={path}" for name, path in paths.items())]
    assert cli.run(asked) == 0
    assert "test accuracy" in capsys.readouterr().out
    document = json.loads(pathlib.Path(paths["json"]).read_text())
    ours, theirs = document["results"].values()
    assert len(ours["history"]["val_accuracy"]) == 4
    assert ours["history"]["val_accuracy"][-1] > 0.9
    assert ours["history"]["loss"] == pytest.approx(theirs["history"]["loss"], rel=1e-4)  # the same learning
    assert document["flags"]["seed"] == 3
    assert pathlib.Path(paths["plot"]).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    images = load_images()
    model = keras.models.load_model(paths["save"])
    _, accuracy = model.evaluate(images.x_test, images.y_test, verbose=0)
    assert accuracy == pytest.approx(ours["history"]["val_accuracy"][-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "f.keras", "f.png"]  # no temporary left


def test_fit_by_a_genome_file_without_twin(tmp_path, capsys):
    path = tmp_path / "mine.json"
    genomes.backprop(0.05, "relu", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)).save(path)
    assert cli.run(["fit", f"--genome={path}", "--hidden=16,16", "--epochs=3", "--notwin"]) == 0
    out = capsys.readouterr().out
    assert "genome mine.json" in out
    assert "Keras SGD" not in out


def test_reweight_learns_which_labels_are_wrong(tmp_path, capsys):
    paths = {
        "json": str(tmp_path / "r.json"),
        "save": str(tmp_path / "r.keras"),
        "checkpoint": str(tmp_path / "r.weights.h5"),
    }
    asked = ["reweight", "--epochs=12", "--seed=1", *(f"--{name}={path}" for name, path in paths.items())]
    assert cli.run(asked) == 0
    assert "of their labels wrong; 200 clean ones" in capsys.readouterr().out
    results = json.loads(pathlib.Path(paths["json"]).read_text())["results"]
    plain, learned = (results[name]["history"]["val_accuracy"] for name in ("equal weights", "meta_weight_net"))
    assert len(plain) == len(learned) == 12
    assert learned[-1] > plain[-1]
    assert results["meta_weight_net"]["weights"]["right"] > 2 * results["meta_weight_net"]["weights"]["wrong"]
    images = load_images()
    x_test = np.reshape(images.x_test, (len(images.x_test), -1)) / images.scale
    scores = keras.models.load_model(paths["save"]).predict(x_test, verbose=0)
    assert np.mean(scores.argmax(axis=1) == images.y_test) == pytest.approx(learned[-1])
    assert (tmp_path / "r.weights.h5").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reweight", "--clean=1437"], "--clean must leave a batch"),
        (["reweight", "--save=x.h5"], "--save must name a .keras file"),
        (["reweight", "--noise=1.5"], "noise"),
        (["fit", "--hidden=a,b"], "--hidden must be positive whole numbers"),
        (["fit", "--hidden=0"], "--hidden must be positive whole numbers"),
        (["fit", "--epochs=0"], "epochs"),
        (["fit", "--learning_rate=0"], "--learning_rate must be above 0"),
        (["fit", "--nonsense=1"], "nonsense"),
        (["fit", "extra"], "takes flags only"),
        (["fit", "--genome=nowhere"], "Received: name='nowhere'"),
        (["fit", "--json=/no/such/folder/f.json"], "there is no folder '/no/such/folder'"),
        (["fit", "--save=model.h5"], "--save must name a .keras file"),
        (["fit", "--data=mnist", "--data_dir=/no/such/folder"], "not prepared in '/no/such/folder'"),
        (["conformance"], "needs at least one .npz file"),
        (["conformance", "/no/such/file.npz"], "There is no file or folder"),
        (["juggle"], "unknown command 'juggle'"),
    ],
)
def test_mistakes_end_with_one_sentence(capsys, arguments, said):
    assert said in mistake(capsys, *arguments)


def test_damaged_genome_file(tmp_path, capsys):
    path = tmp_path / "g.json"
    genomes.backprop().save(path)
    path.write_text(path.read_text().replace("-0.1", "-0.2"))
    assert "damaged" in mistake(capsys, "fit", f"--genome={path}")


def test_conformance_agrees_and_writes_json(tmp_path, capsys):
    out = tmp_path / "c.json"
    assert cli.run(["conformance", str(VECTORS / "default_2state.npz"), f"--json={out}"]) == 0
    assert "1 of 1 cases agree" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())
    assert row["agrees"]
    assert set(row["errors"]) == {"neurons", "synapses", "prediction", "meta-gradients"}
    assert max(row["errors"].values()) < 1e-5


def test_conformance_fails_on_one_changed_number(tmp_path, capsys):
    arrays = dict(np.load(VECTORS / "oja_weights.npz"))
    arrays["step1/synapse/0/forward"][0, 0, 2, 3, 1] += 1e-3
    np.savez(tmp_path / "changed.npz", **arrays)
    shutil.copy(VECTORS / "default_2state.npz", tmp_path)
    assert cli.run(["conformance", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS at step1/synapse/0/forward" in out
    assert "1 of 2 cases agree" in out


def test_conformance_on_a_damaged_file(tmp_path, capsys):
    path = tmp_path / "cut.npz"
    path.write_bytes((VECTORS / "default_2state.npz").read_bytes()[:5000])
    assert "damaged" in mistake(capsys, "conformance", str(path))


def test_help(capsys):
    assert cli.run(["--help"]) == 0
    assert "conformance" in capsys.readouterr().out
    assert cli.run(["fit", "--help"]) == 0
    assert "--data_dir" in capsys.readouterr().out.replace("[no]", "")
    assert cli.run([]) == 2
