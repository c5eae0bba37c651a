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
    assert genomes.load(name).rule.states >= 2


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["no-such"], "Received: name='no-such'"), (["--save=x.json"], "need the name of one genome. Received: none")],
)
def test_shell_mistakes(capsys, arguments, said):
    assert cli.run(["zoo", *arguments]) == 2
    assert said in capsys.readouterr().err
