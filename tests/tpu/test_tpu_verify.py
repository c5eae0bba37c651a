"""The check of TPU programs: it holds for a correct step, and refuses steps that are wrong on
purpose.

It needs the environment of tpu/requirements-verify.txt: `.venv-verify/bin/pytest -m tpu`.
"""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.tpu
TENSORFLOW = "--backend=tensorflow"


def verify(*flags):
    command = [sys.executable, str(ROOT / "tpu" / "verify.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_meta_step_on_four_cores_holds_on_jax(tmp_path):
    path = tmp_path / "report.json"
    done = verify("--case=unroll", "--cores=4", "--chip=v5e", "--chip=v6e", f"--json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())["unroll x 4"]
    assert report["from_one_device"][0] <= 1e-4
    for chip in ("v5e", "v6e"):
        assert report["chips"][chip]["reductions"] > 0
        assert report["chips"][chip]["flops"] > 0
        assert 0 < report["chips"][chip]["needed"] < report["chips"][chip]["available"]


@pytest.mark.parametrize(
    ("control", "said"),
    [
        ("unreduced", "from one device"),
        ("printing", "calls back to the host"),
        ("python", "calls back to the host"),
        ("large", "RESOURCE_EXHAUSTED"),
    ],
)
def test_a_wrong_step_is_refused_on_jax(control, said):
    done = verify(f"--case={control}", "--cores=4", "--chip=v5e", *(["--noexecute"] if control == "large" else []))
    assert done.returncode == 1
    assert "REFUSED" in done.stdout
    assert said in done.stdout


def test_a_meta_step_on_four_cores_holds(tmp_path):
    path = tmp_path / "report.json"
    done = verify(TENSORFLOW, "--case=unroll", "--cores=4", "--chip=v5e", f"--json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())["unroll x 4"]
    assert report["sums"] > 0
    assert report["from_mirrored"][0] <= 1e-6
    assert report["chips"]["v5e"]["reductions"] > 0
    assert 0 < report["chips"]["v5e"]["needed"] < report["chips"]["v5e"]["available"]


@pytest.mark.parametrize(
    ("control", "said"),
    [
        ("undivided", "from one device"),
        ("unreduced", "variables differ between cores"),
        ("printing", "No TPU kernel for StringFormat"),
        ("python", "No TPU kernel for EagerPyFunc"),
        ("large", "RESOURCE_EXHAUSTED"),
    ],
)
def test_a_wrong_step_is_refused(control, said):
    large = ["--noexecute"] if control == "large" else []
    done = verify(TENSORFLOW, f"--case={control}", "--cores=4", "--chip=v5e", *large)
    assert done.returncode == 1
    assert "REFUSED" in done.stdout
    assert said in done.stdout


def test_the_list_of_kernels_is_that_of_the_release(tmp_path):
    assert verify(f"--kernels={tmp_path / 'kernels.json'}").returncode == 0
    made = json.loads((tmp_path / "kernels.json").read_text())
    assert made == json.loads((ROOT / "keras_blur" / "tpu_kernels.json").read_text())
