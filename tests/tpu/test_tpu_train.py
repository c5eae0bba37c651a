"""The launcher for a TPU, without one: it trains, stops on SIGTERM, goes on to the same result,
names mistakes."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import train

from keras_blur import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUN = (
    "--tpu=none", "--functions=xor", "--hidden=8", "--epochs=3", "--steps_per_epoch=160", "--members=2", "--unroll=3",
    "--nojit_compile",
)  # fmt: skip


BACKENDS = ["jax", "tensorflow"]


def command(*flags):
    return [sys.executable, str(ROOT / "tpu" / "train.py"), *flags]


def environment():
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_trains_stops_on_sigterm_and_goes_on_to_the_same_result(tmp_path, backend):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = (f"--backend={backend}", *RUN)
    subprocess.run(command(*flags, f"--out={whole}"), env=environment(), check=True, capture_output=True)
    first = subprocess.Popen(command(*flags, f"--out={broken}"), env=environment(), stdout=subprocess.PIPE, text=True)
    while True:  # until the second epoch is on its way
        text = first.stdout.read(200)
        assert text, "it ended before it was stopped"
        if "Epoch 2/3" in text or (broken / "run.weights.h5").exists():
            break
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert first.returncode == 143
    assert not (broken / "result.json").exists()
    subprocess.run(command(*flags, f"--out={broken}"), env=environment(), check=True, capture_output=True)
    assert (broken / "genome.json").read_bytes() == (whole / "genome.json").read_bytes()
    history = [json.loads((folder / "result.json").read_text())["history"] for folder in (broken, whole)]
    assert 1 <= len(history[0]["loss"]) <= 3
    for name, values in history[1].items():
        assert history[0][name] == values[-len(history[0][name]) :]
    assert (broken / "history.csv").read_text().count("\n") == 4  # every epoch once, under a line of names


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tpu=local"], "needs a TPU in this machine; there is none"),
        (["--tpu=local", "--devices=2"], "--devices must be 1 with a TPU"),
        (["--tpu=none", "--hidden=0"], "--hidden must be positive whole numbers"),
        (["--out=nowhere://bucket/run"], "nowhere://bucket/run: File system scheme 'nowhere' not implemented"),
    ],
)
def test_mistakes_are_named(flags, said, capsys):
    assert cli.call(train, "tpu/train.py", "meta-train a genome on a TPU", flags) == 2
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text


def test_a_mistake_ends_the_process():
    done = subprocess.run(command("--cores=4"), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Unknown command line flag 'cores'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_jax_without_tpu_is_named():
    code = "import train; train.DEVICES = (train.__file__,); train.scope_of(NAME)"
    for name, said in (("local", "finds no TPU: pip install 'jax\\[tpu\\]'"), ("other", "must be local or none on JAX")):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("NAME", repr(name))], capture_output=True, text=True, check=False,
            env={**environment(), "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT / "tpu")},
        )  # fmt: skip
        assert re.search(said, done.stderr.splitlines()[-1]), done.stderr


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [([], "jax"), (["--backend=tensorflow"], "tensorflow"), (["--epochs=1", "--backend", "tensorflow"], "tensorflow")],
)
def test_the_backend_is_known_before_keras_is_imported(arguments, backend):
    assert train.backend_of(arguments) == backend


def test_a_tensorflow_without_tpu_is_named(monkeypatch):
    monkeypatch.setattr(train, "DEVICES", (__file__,))  # a chip seems to be there
    with pytest.raises(ValueError, match=r"--tpu local: this TensorFlow .* has no TPU support"):
        train.scope_of("local")


def test_the_setup_script_says_what_it_would_do_and_what_is_wrong():
    script = str(ROOT / "tpu" / "setup_vm.sh")
    done = subprocess.run(
        ["bash", script, "--python", sys.executable, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no TPU in this machine" in done.stderr
    done = subprocess.run(["bash", script, "--flag"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown option --flag" in done.stderr
