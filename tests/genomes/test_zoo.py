"""The trained genomes of the package: they load, they have cards, they learn and keep what they
learned."""

import json
import re

import keras
import numpy as np
import pytest

from keras_blur import cli, genomes, tasks
from keras_blur.models import convert
from keras_blur.report.evaluation import evaluate
from keras_blur.tasks.datasets import load_images

NAMES = genomes.names()
CARD = ("Tasks", "Rule", "Outer steps", "Seed", "Seconds", "Scores", "Horizon", "Licence", "Command")


def test_there_are_some():
    assert {"functions", "mnist-4state", "mnist-orthogonal"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_card(name):
    card = genomes.card(name)
    for part in CARD:
        assert f"**{part}.**" in card, f"{name}: the card says nothing of {part}"
    genome = genomes.load(name)
    assert genome.rule.states >= 2
    assert set(re.findall(r"\b(\d+) numbers\b", card)) <= {str(genome.size)}
    assert genome.license == "Apache-2.0"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_holds_to_a_thousand_steps(name):
    of, hidden, floor = (tasks.functions("xor"), (20,), 0.8) if name == "functions" else (load_images(), (64, 64), 0.85)
    result = evaluate(genomes.load(name), of, hidden, steps=1000, seeds=3, batch_size=64)
    curve = result["curves"]["genome"]
    means = np.mean(curve["accuracy"], axis=0)
    assert all(loss is not None for losses in curve["loss"] for loss in losses)
    assert means.max() > floor
    assert means.max() - means[means.argmax() :].min() < 0.02


def test_the_command_on_the_card_makes_fast(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r'python -c "\n(.*?)"\n```', genomes.card("fast"), re.S)
    exec(code, {})
    assert genomes.load(tmp_path / "fast.json") == genomes.load("fast")


def test_fast_predicts_what_the_keras_model_does():
    """Before learning; and after it, once it is a plain Keras model again."""
    body = [keras.layers.Dense(6, activation="relu"), keras.layers.Dense(3, activation="softmax")]
    twin = keras.Sequential([keras.Input((4,)), *body])
    model = convert(twin, genomes.load())
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    np.testing.assert_allclose(model.predict(x, verbose=0), twin.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    model.compile(loss="sparse_categorical_crossentropy")
    model.fit(x, np.arange(16) % 3, epochs=2, verbose=0)
    back = model.to_keras()
    assert np.abs(back.predict(x, verbose=0) - twin.predict(x, verbose=0)).max() > 1e-2
    np.testing.assert_allclose(back.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


def test_shell(tmp_path, capsys):
    assert cli.run(["zoo"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMES)
    path, picture = tmp_path / "copy.json", tmp_path / "g.png"
    assert cli.run(["zoo", NAMES[0], "--describe", f"--save={path}", f"--plot={picture}"]) == 0
    shown = capsys.readouterr().out
    assert "**Tasks.**" in shown
    assert "eq. 7" in shown
    assert genomes.load(path) == genomes.load(NAMES[0])
    assert json.loads(path.read_text())
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_export_writes_genomes_with_their_cards(tmp_path, capsys):
    folder = tmp_path / "to" / "genomes"
    assert cli.run(["zoo", f"--export={folder}"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}{end}" for name in NAMES for end in (".json", ".md")
    )
    said = capsys.readouterr().out
    for name in NAMES:
        assert genomes.load(folder / f"{name}.json") == genomes.load(name)
        assert (folder / f"{name}.md").read_text() == genomes.card(name)
        assert f"wrote {folder}/{name}.json\nwrote {folder}/{name}.md" in said
    (folder / "fast.json").unlink()
    assert cli.run(["zoo", "fast", f"--export={folder}"]) == 2  # the card is there
    assert "--export must be a new file, unless --overwrite is given" in capsys.readouterr().err
    assert not (folder / "fast.json").exists()
    assert cli.run(["zoo", "fast", f"--export={folder}", "--overwrite"]) == 0


def test_facts_as_json(tmp_path):
    path = tmp_path / "zoo.json"
    assert cli.run(["zoo", f"--json={path}"]) == 0
    facts = {fact["name"]: fact for fact in json.loads(path.read_text())}
    assert list(facts) == NAMES
    assert facts["mnist-4state"]["states"] == 4
    assert facts["mnist-4state"]["numbers"] == genomes.load("mnist-4state").size
    assert {fact["license"] for fact in facts.values()} == {"Apache-2.0"}
    assert facts["fast"]["card"] == genomes.card("fast")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["no-such"], "Received: name='no-such'"), (["--save=x.json"], "need the name of one genome. Received: none")],
)
def test_shell_mistakes(capsys, arguments, said):
    assert cli.run(["zoo", *arguments]) == 2
    assert said in capsys.readouterr().err
