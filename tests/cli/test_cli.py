"""The command line: what each command writes, its exit status, and one sentence for a mistake."""

import importlib
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import sys

import keras
import numpy as np
import pytest
from on_backend import JAX

from keras_blur import Genome, Rule, __version__, backend, cli, genomes
from keras_blur.cli.fit import _Tuned, build_pair
from keras_blur.cli.flags import Flags
from keras_blur.cli.outputs import Table, continued, of_same_run, write_json
from keras_blur.cli.progress import ProgressLine
from keras_blur.files import check_output
from keras_blur.report.baselines import OPTIMIZERS
from keras_blur.tasks.datasets import load_images

VECTORS = pathlib.Path(__file__).parents[1] / "conformance"


def mistake(capsys, *arguments: str) -> str:
    """The one line that a command prints for a mistake."""
    assert cli.run(arguments) == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("keras-blur: ")
    assert len(text.splitlines()) == 1
    assert "Traceback" not in text
    return text


def test_fit_writes_numbers_picture_and_model(tmp_path, capsys):
    paths = {name: str(tmp_path / file) for name, file in [("json", "f.json"), ("plot", "f.png"), ("save", "f.keras")]}
    asked = ["fit", "--genome=backprop", "--optimizers=SGD", "--learning_rate=0.1", "--hidden=32", "--epochs=4", "--seed=3"]
    assert cli.run([*asked, *(f"--{name}={path}" for name, path in paths.items())]) == 0
    shown = capsys.readouterr().out
    assert "test accuracy" in shown
    assert all(f"wrote {path}" in shown for path in paths.values())
    document = json.loads(pathlib.Path(paths["json"]).read_text())
    ours, theirs = document["results"].values()
    assert list(document["results"]) == document["shown"] == ["genome backprop", "Keras SGD 0.1"]
    assert len(ours["history"]["val_accuracy"]) == 4
    assert ours["history"]["val_accuracy"][-1] > 0.9
    assert ours["history"]["loss"] == pytest.approx(theirs["history"]["loss"], rel=1e-4)  # the same learning
    curve = ours["curve"]
    assert curve["steps"] == [0, 1, 2, 5, 10, 20, 45, 50, 90, 100, 135, 180]
    assert curve["accuracy"][-1] == pytest.approx(ours["history"]["val_accuracy"][-1])
    assert curve["seconds"][0] == 0.0
    assert np.all(np.diff(curve["seconds"]) > 0.0)
    assert document["flags"]["seed"] == 3
    assert pathlib.Path(paths["plot"]).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    images = load_images()
    model = keras.models.load_model(paths["save"])
    _, accuracy = model.evaluate(images.x_test, images.y_test, verbose=0)
    assert accuracy == pytest.approx(ours["history"]["val_accuracy"][-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "f.keras", "f.png"]  # no temporary left


@pytest.mark.slow
def test_fit_tunes_each_optimizer_from_the_same_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("keras_blur.cli.fit.GRIDS", {"SGD": (0.1, 1e-6), "Adam": (1e-7, 0.01, 3.0)})
    path = tmp_path / "f.json"
    assert cli.run(["fit", "--hidden=16", "--epochs=3", f"--json={path}"]) == 0
    document = json.loads(path.read_text())
    assert document["shown"] == ["genome fast", "Keras SGD 0.1", "Keras Adam 0.01"]
    results = document["results"]
    assert list(results) == [
        *document["shown"][:2],
        "Keras SGD 1e-06",
        "Keras Adam 1e-07",
        "Keras Adam 0.01",
        "Keras Adam 3",
    ]
    assert len({result["curve"]["accuracy"][0] for result in results.values()}) == 1  # before the first step
    assert results["Keras SGD 1e-06"]["curve"]["accuracy"][-1] == results["Keras SGD 0.1"]["curve"]["accuracy"][0]
    assert "  learning rate 1e-06    test accuracy " in capsys.readouterr().out


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fit_starts_each_rate_at_the_same_weights(name):
    """Schedule-Free keeps a copy of the weights that it started with, and moves towards it."""
    images, loss = load_images(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    _, twin = build_pair(images, genomes.backprop(0.1, "tanh"), (4,))
    start = [backend.numbers_of(one) for one in twin.variables]
    twin.set_weights([value + 1.0 for value in start])  # as an earlier run leaves it
    tuned = _Tuned(twin, start, name, loss)
    for rate in (0.3, 1e-9):
        tuned.begin(rate).train_on_batch(images.x_train[:16], images.y_train[:16])
    for one, value in zip(twin.variables, start, strict=True):
        np.testing.assert_allclose(backend.numbers_of(one), value, atol=1e-6)


def test_fit_by_a_genome_file_alone(tmp_path, capsys):
    path = tmp_path / "mine.json"
    genomes.backprop(0.05, "relu", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)).save(path)
    assert cli.run(["fit", f"--genome={path}", "--hidden=16,16", "--epochs=3", "--optimizers="]) == 0
    out = capsys.readouterr().out
    assert "genome mine" in out
    assert "Keras" not in out


@pytest.mark.slow
def test_reweight_learns_which_labels_are_wrong(tmp_path, capsys):
    paths = {
        "json": str(tmp_path / "r.json"),
        "save": str(tmp_path / "r.keras"),
        "checkpoint": str(tmp_path / "r.weights.h5"),
    }
    asked = ["reweight", "--epochs=12", "--seed=1", *(f"--{name}={path}" for name, path in paths.items())]
    assert cli.run(asked) == 0
    shown = capsys.readouterr().out
    assert "of their labels wrong; 200 clean ones" in shown
    assert all(f"wrote {path}" in shown for path in paths.values())
    results = json.loads(pathlib.Path(paths["json"]).read_text())["results"]
    plain, learned = (results[name]["history"]["val_accuracy"] for name in ("equal weights", "meta_weight_net"))
    assert len(plain) == len(learned) == 12
    assert learned[-1] > plain[-1]
    assert results["meta_weight_net"]["weights"]["correct"] > 2 * results["meta_weight_net"]["weights"]["wrong"]
    images = load_images()
    x_test = np.reshape(images.x_test, (len(images.x_test), -1)) / images.scale
    scores = keras.models.load_model(paths["save"]).predict(x_test, verbose=0)
    assert np.mean(scores.argmax(axis=1) == images.y_test) == pytest.approx(learned[-1])
    assert (tmp_path / "r.weights.h5").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reweight", "--clean=1437"], "--clean must leave at least one batch"),
        (["reweight", "--save=x.h5"], "--save must end with .keras"),
        (["reweight", "--noise=1.5"], "noise"),
        (["fit", "--hidden=a,b"], "--hidden must be positive whole numbers"),
        (["fit", "--hidden=0"], "--hidden must be positive whole numbers"),
        (["fit", "--epochs=0"], "epochs"),
        (["fit", "--learning_rate=0"], "--learning_rate must be above 0"),
        (["fit", "--optimizers=SGD,Sgd"], "--optimizers must be some of SGD, momentum,"),
        (["fit", "--nonsense=1"], "nonsense"),
        (["fit", "extra"], "takes flags only"),
        (["fit", "--genome=nowhere"], "Received: name='nowhere'"),
        (["fit", "--json=/no/such/folder/f.json"], "there is no folder '/no/such/folder'"),
        (["fit", "--save=model.h5"], "--save must end with .keras"),
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


def modules():
    return {name: importlib.import_module(f"keras_blur.cli.{name.replace('-', '_')}") for name in cli.COMMANDS}


def defined(command):
    flags = Flags()
    modules()[command].define_flags(flags)
    return flags


def test_help(capsys):
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    for title, commands in cli.GROUPS.items():
        paragraph = shown.split(f"\n\n{title}:\n")[1].split("\n\n")[0]
        assert re.findall(r"^  ([a-z-]+) +\w", paragraph, re.M) == list(commands)
    assert "130 interrupted" in shown
    assert cli.run(["help", "fit"]) == 0
    assert "--data_dir" in capsys.readouterr().out
    assert cli.run([]) == 2


def parse(command, text):
    """Flags and arguments of a command in a text, as the command itself would take them."""
    flags, module = defined(command), modules()[command]
    positional = flags.parse("keras-blur", shlex.split(text, comments=True))
    assert not positional or "..." in module.USAGE
    flag = flags.values()
    if hasattr(module, "complete"):
        module.complete(flag, flags.given())
    flags.check(flag)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_groups_and_examples_that_parse(command, capsys):
    assert cli.run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^([A-Z][a-z ]+):$", shown, re.M)[0] == "Examples"
    assert "Outputs:" in shown
    assert max(map(len, shown.splitlines())) < 130
    examples = re.findall(rf"^  keras-blur {command} ?(.*)$", shown, re.M)
    assert 2 <= len(examples) <= 4
    for example in examples:
        parse(command, example)


def test_examples_of_the_program_parse(capsys):
    cli.run(["--help"])
    examples = re.findall(r"^  keras-blur (\S+) (.*)$", capsys.readouterr().out, re.M)
    assert len(examples) == len(cli.EXAMPLES)
    for command, text in examples:
        parse(command, text)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_flag_of_a_command_is_in_its_help(command):
    flags = defined(command)
    shown = flags.help()
    assert all(f"--{name}" in shown.replace("[no]", "") for name in flags.values())


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"keras-blur {__version__} ({'JAX' if JAX else 'TensorFlow'} ")


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["keras_blur", "zoo"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("keras_blur", run_name="__main__")
    assert ended.value.code == 0
    assert "mnist-4state" in capsys.readouterr().out


# Flags.

IGNORED = [
    ("fit", "--data_dir=x", "--data_dir applies only with --data other than digits"),
    ("fit", "--genome=functions --optimizers= --learning_rate=0.1", "--learning_rate applies only to the backprop genome"),
    ("compare", "--size=6 --functions=xor", "--size applies only without --functions"),
    ("compare", "--data=mnist --functions=xor", "--data applies only without --functions"),
    ("compare", "--split=test", "--split applies only with --size or --functions"),
    ("evaluate", "--split=validation", "--split applies only with --size or --functions"),
    ("evaluate", "--decisions=x.png", "--decisions applies only with --functions"),
    ("reweight", "--noise=0 --noise_kind=flip", "--noise_kind applies only with --noise above 0"),
    ("reweight", "--data_dir=x", "--data_dir applies only with --data other than digits"),
    ("zoo", "--describe", "--describe needs the name of a genome"),
    ("zoo", "fast --describe --export=genomes", "--describe applies only without --export"),
    ("zoo", "fast --overwrite", "--overwrite applies only with --export or --json or --save or --plot"),
    ("fit", "--overwrite", "--overwrite applies only with --json or --plot or --save. Received: --overwrite"),
    ("meta-train", "--estimator=cma --loss=squared", "--loss applies only with --fitness=loss under --estimator=cma"),
    ("meta-train", "--estimator=cma --fitness=speed --loss=squared", "--loss applies only with --fitness=loss under"),
    (
        "meta-train",
        "--antithetic_pairs=4",
        "--antithetic_pairs applies only with --estimator=es or pes. Received: --antithetic_pairs=4, --estimator=unroll",
    ),
    ("meta-train", "--estimator=es --episode_steps=4", "--episode_steps applies only with --estimator=truncated or pes"),
    ("meta-train", "--population=9", "--population applies only with --estimator=cma"),
    ("meta-train", "--sigma=1", "--sigma applies only with"),
    ("meta-train", "--fitness=loss", "--fitness applies only with --estimator=cma"),
    ("meta-train", "--estimator=cma --members=3", "--members applies only without --estimator=cma"),
    ("meta-train", "--estimator=cma --learning_rate=1", "--learning_rate applies only without --estimator=cma"),
    ("meta-train", "--estimator=es --recompute", "--recompute applies only with --estimator=unroll or truncated"),
    ("meta-train", "--start_objective=maml", "--start_objective applies only with --estimator=warpgrad"),
    ("meta-train", "--first_order", "--first_order applies only with --method=maml"),
    ("meta-train", "--inner_learning_rate=1", "--inner_learning_rate applies only with --method=maml or warp"),
    ("meta-train", "--model=m.keras", "--model applies only without --method=blur"),
    ("meta-train", "--method=maml --genome=g.json", "--genome applies only with --method=blur"),
    ("meta-train", "--method=maml --states=3", "--states applies only with --method=blur"),
    ("meta-train", "--start=backprop --states=3", "--states must be 2, as in the genome of --start"),
    ("meta-train", "--learn=nu", "--learn applies only with --start"),
    ("meta-train", "--start=fast --learn=gate", "--learn must be some of nu, mu,"),
    (
        "meta-train",
        "--method=maml --estimator=es --first_order",
        "--first_order applies only with --method=maml under --estimator=unroll or truncated",
    ),
    ("meta-train", "--functions=sine --relabel", "--relabel applies only to --functions of classes. Received: sine"),
    ("meta-train", "--network=lenet --hidden=3", "--hidden applies only with mlp in --network"),
    ("meta-train", "--method=prototypes --network=lenet --hidden=3", "--hidden applies only with mlp in --network"),
    (
        "meta-train",
        "--estimator=cma --trajectory_loss_weight=2",
        "--trajectory_loss_weight applies only with --fitness=loss under --estimator=cma",
    ),
    ("meta-train", "--method=online --synthetic=remember --hidden=8", "--hidden applies only without --method=online"),
    ("meta-train", "--functions=xor --sizes=8", "--sizes applies only without --functions or --synthetic"),
    ("meta-train", "--synthetic=pose --data=mnist", "--data applies only without --functions or --synthetic"),
    ("meta-train", "--ways=2 --permute", "--permute applies only without --functions or --synthetic or --ways"),
    ("meta-train", "--ways=2 --project=9", "--project applies only without --functions or --synthetic or --ways"),
    ("meta-train", "--ways=2 --norelabel", "--norelabel applies only without --synthetic or --ways"),
    ("meta-train", "--shots=2", "--shots applies only with --ways or --synthetic=classes"),
    ("meta-train", "--noexclusive", "--noexclusive applies only with --ways"),
    ("meta-train", "--group=alphabet", "--group applies only with --ways"),
]


@pytest.mark.parametrize(("command", "arguments", "said"), IGNORED)
def test_a_flag_that_would_be_ignored_is_refused(capsys, command, arguments, said):
    assert said in mistake(capsys, command, *arguments.split())


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--epoch=3", "Unknown command line flag 'epoch'; did you mean --epochs?"),
        ("--zzz", "Unknown command line flag 'zzz' (keras-blur reweight --help lists the flags)"),
        ("--epochs=0", "--epochs must be a whole number from 1. Received: --epochs=0"),
        ("--epochs=1.5", "--epochs must be a whole number from 1. Received: --epochs=1.5"),
        ("--noise=1.5", "--noise must be a number from 0 to 1. Received: --noise=1.5"),
        ("--learning_rate=nan", "--learning_rate must be a number from 0. Received: --learning_rate=nan"),
        ("--method=sgd", "--method must be one of meta_weight_net, famus"),
        ("--plain=maybe", "--plain must be given without a value. Received: --plain=maybe"),
        ("--epochs", "Missing value for flag --epochs"),
    ],
)
def test_a_wrong_value_is_one_sentence(capsys, argument, said):
    assert said in mistake(capsys, "reweight", argument)


def test_errors_of_many_lines_are_shortened(capsys, monkeypatch):
    def fail(flag, positional):
        raise ValueError("The first line says it:\n  the second says what.\n\nThirty\nmore\nlines")

    monkeypatch.setattr(modules()["zoo"], "run", fail)
    assert mistake(capsys, "zoo") == "keras-blur: The first line says it: the second says what."


def lack_of_memory(text):
    """What a program of the backend raises where an array is too large."""
    if JAX:
        return importlib.import_module("jax").errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}")
    return importlib.import_module("tensorflow").errors.ResourceExhaustedError(None, None, text)


def test_a_lack_of_memory_is_one_sentence_and_a_fault_of_a_program_is_none(capsys, monkeypatch):
    def fail(flag, positional):
        raise raised

    monkeypatch.setattr(modules()["zoo"], "run", fail)
    raised = lack_of_memory("Out of memory on the device.")
    text = mistake(capsys, "zoo")
    assert "out of memory; use a smaller batch or network" in text
    assert "Out of memory on the device." in text
    raised = RuntimeError("a fault")
    with pytest.raises(RuntimeError, match="a fault"):
        cli.run(["zoo"])


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"null", b'{"format": "other"}'])
@pytest.mark.parametrize("command", ["fit", "compare", "evaluate", "meta-train"])
def test_no_genome_in_a_file(tmp_path, capsys, command, content):
    path = tmp_path / "g.json"
    path.write_bytes(content)
    assert str(path) in mistake(capsys, command, f"--{'start' if command == 'meta-train' else 'genome'}={path}")


ROOT = pathlib.Path(__file__).parents[2]
PUBLISHED = sorted(
    {
        command
        for path in [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md"), *(ROOT / "keras_blur" / "genomes").glob("*.md")]
        for command in re.findall(
            r"(?:^|&& \.venv/bin/)keras-blur ([a-z]+[a-z-]* .*)$", path.read_text().replace("\\\n", " "), re.M
        )
    }
)


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_commands_have_flags_that_apply(text):
    command, _, rest = text.partition(" ")
    parse(command, re.sub(r"\$(common|small|large)\b", "", rest))


def test_published_commands_are_found():
    assert len(PUBLISHED) > 15
    assert "fit --plot fit.png" in PUBLISHED


# Outputs.

NEEDED = {"compare": ["--genome=functions"], "evaluate": ["--genome=functions", "--functions=xor"]}
OUTPUTS = [
    (command, output.flag, output.endings[0], output.resumed)
    for command in cli.COMMANDS
    for output in defined(command).outputs()
]


def needed(command, flag):
    if command == "zoo":
        return ["functions"]
    if command == "conformance":
        return [str(VECTORS / "default_2state.npz")]
    return ["--method=maml"] if (command, flag) == ("meta-train", "model") else NEEDED.get(command, [])


def test_every_command_that_writes_is_tried():
    found: dict[str, set[str]] = {}
    for command, flag, *_ in OUTPUTS:
        found.setdefault(command, set()).add(flag)
    assert found == {
        "fit": {"json", "plot", "save"},
        "meta-train": {"genome", "model", "checkpoint", "json", "csv"},
        "reweight": {"checkpoint", "json", "save"},
        "evaluate": {"json", "plot", "decisions", "synapses"},
        "compare": {"json", "plot"},
        "zoo": {"json", "save", "plot"},
        "conformance": {"json"},
    }


@pytest.mark.parametrize(("command", "flag", "ending", "resumed"), OUTPUTS)
def test_output_paths_are_checked_before_any_work(tmp_path, monkeypatch, capsys, command, flag, ending, resumed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(modules()[command], "run", lambda flag, positional: 7)
    (tmp_path / f"folder{ending}").mkdir()
    (tmp_path / f"there{ending}").write_text("old")
    asked = [command, *needed(command, flag)]
    assert cli.run([*asked, f"--{flag}=new{ending}"]) == 7
    for path, said in [
        (f"absent/x{ending}", "there is no folder"),
        (f"there{ending}/x{ending}", "there is no folder"),
        ("x.exe", "must end with"),
        ("x", "must end with"),
        (f"folder{ending}", "must be a file, not a folder"),
        ("", "must be the path of a file"),
        (f"{'x' * 300}{ending}", "File name too long"),
    ]:
        text = mistake(capsys, *asked, f"--{flag}={path}")
        assert text.startswith(f"keras-blur: --{flag} must ")
        assert said in text
    if not resumed:
        assert f"unless --overwrite is given; 'there{ending}' exists" in mistake(capsys, *asked, f"--{flag}=there{ending}")
        assert cli.run([*asked, f"--{flag}=there{ending}", "--overwrite"]) == 7
    else:
        assert cli.run([*asked, f"--{flag}=there{ending}"]) == 7
    assert (tmp_path / f"there{ending}").read_text() == "old"


def test_matplotlib_is_needed_before_any_work(tmp_path, monkeypatch, capsys):
    drawn = [(command, flag) for command, flag, ending, _ in OUTPUTS if ending == ".png"]
    assert len(drawn) == 6
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command, flag in drawn:
        monkeypatch.setattr(modules()[command], "run", lambda flag, positional: 7)
        text = mistake(capsys, command, *needed(command, flag), f"--{flag}=x.png")
        assert text.endswith("Pictures need matplotlib, which is not installed: pip install 'keras_blur[plot]'")
        assert cli.run([command, *needed(command, flag), "--json=x.json"]) == 7


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--functions=xor,xor --decisions=d.png", "--decisions draws each function once. Received: --functions=xor,xor"),
        ("--functions=xor,sine --decisions=d.png", "--decisions draws 2-D functions of classes. Received: sine"),
        ("--functions=xor --decisions=d.png --genome=two.json", "`genome` must be a single genome"),
        ("--synapses=d.png --genome=two.json", "`genome` must be a single genome"),
    ],
)
def test_what_cannot_be_drawn_is_known_before_the_evaluation(tmp_path, monkeypatch, capsys, asked, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(modules()["evaluate"], "score_all", None)
    Genome.random(Rule(), seed=0, population=(2,)).save("two.json")
    genome = [] if "--genome" in asked else ["--genome=functions"]
    assert said in mistake(capsys, "evaluate", *asked.split(), *genome)


@pytest.mark.parametrize("estimator", ["pes", "truncated"])
def test_a_curriculum_that_its_estimator_cannot_follow(tmp_path, monkeypatch, capsys, estimator):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(modules()["meta-train"], "_families", None)
    said = mistake(capsys, "meta-train", f"--estimator={estimator}", "--unroll=10,20")
    assert f"--unroll must be one number with --estimator={estimator}" in said
    assert said.endswith("Received: --unroll=10,20")


def test_a_default_output_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(modules()["meta-train"], "run", lambda flag, positional: 7)
    assert cli.run(["meta-train"]) == 7
    (tmp_path / "genome.json").write_text("old")
    assert "--genome must be a new file, unless --overwrite is given" in mistake(capsys, "meta-train")
    assert cli.run(["meta-train", "--overwrite"]) == 7
    assert cli.run(["meta-train", "--method=maml"]) == 7  # writes model.keras
    assert "--genome must be a new file" in mistake(capsys, "meta-train", "--checkpoint=run.weights.h5")
    (tmp_path / "run.weights.h5").write_text("weights")
    assert cli.run(["meta-train", "--checkpoint=run.weights.h5"]) == 7  # goes on with what it wrote


def test_two_outputs_on_one_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for other in ("x.png", "./x.png", "link/x.png"):
        asked = ["--genome=functions", "--functions=xor", "--plot=x.png", f"--decisions={other}"]
        assert "--decisions must be a different file from --plot" in mistake(capsys, "evaluate", *asked)


def test_a_folder_that_takes_no_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("keras_blur.files.tempfile.TemporaryFile", full)
    with pytest.raises(ValueError, match=r"`path` must be a file in a folder that can be written.*Permission denied"):
        check_output("path", tmp_path / "x.json")


def test_symbolic_links_and_devices(tmp_path):
    (tmp_path / "later.json").symlink_to(tmp_path / "target.json")
    (tmp_path / "lost.json").symlink_to(tmp_path / "absent" / "target.json")
    check_output("path", tmp_path / "later.json", (".json",), overwrite=False)
    with pytest.raises(ValueError, match="there is no folder"):
        check_output("path", tmp_path / "lost.json", (".json",))
    for endings in ((".json",), (".png", ".pdf", ".svg"), ()):
        check_output("path", "/dev/null", endings, overwrite=False)
    with pytest.raises(ValueError, match=r"`path` must end with \.keras"):
        check_output("path", "/dev/null", (".keras",))
    check_output("path", "CURVES.PNG", (".png",))
    for odd in (None, 3, "", "a\0b.json"):
        with pytest.raises(ValueError, match="`path` must be the path of a file"):
            check_output("path", odd)


def test_functions_that_write_check_their_path(tmp_path):
    genome = Genome.random(Rule(), seed=0)
    for path, said in [("x.txt", r"must end with \.json"), ("absent/x.json", "there is no folder")]:
        with pytest.raises(ValueError, match=said):
            genome.save(tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_null(tmp_path):
    write_json(str(tmp_path / "n.json"), {"a": [float("nan"), 1.0, (float("-inf"), 2)], "b": "NaN"})
    assert json.loads((tmp_path / "n.json").read_text()) == {"a": [None, 1.0, [None, 2]], "b": "NaN"}


# Ctrl-C.


@pytest.fixture
def ctrl_c_after_an_epoch(monkeypatch):
    whole = keras.callbacks.History.on_epoch_end

    def ended(self, epoch, logs=None):
        whole(self, epoch, logs)
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.callbacks.History, "on_epoch_end", ended)


@pytest.mark.usefixtures("ctrl_c_after_an_epoch")
def test_fit_keeps_what_was_learned(tmp_path, capsys):
    paths = {name: tmp_path / f"f.{ending}" for name, ending in [("json", "json"), ("plot", "svg"), ("save", "keras")]}
    asked = ["--hidden=8", "--epochs=3", *(f"--{name}={path}" for name, path in paths.items())]
    assert cli.run(["fit", *asked]) == 130
    shown = capsys.readouterr()
    assert "after 1 of 3 epochs" in shown.out
    assert shown.err.startswith("keras-blur: interrupted; kept what was learned in ")
    document = json.loads(paths["json"].read_text())
    (result,) = document["results"].values()
    assert document["partial"]
    assert result["partial"]
    assert len(result["history"]["loss"]) == 1
    images = load_images()
    _, accuracy = keras.models.load_model(paths["save"]).evaluate(images.x_test, images.y_test, verbose=0)
    assert accuracy == pytest.approx(result["history"]["val_accuracy"][0])
    assert paths["plot"].exists()


def test_fit_loses_nothing_to_a_later_failure(tmp_path, monkeypatch):
    def fail(name):
        if name == "Adam":
            raise RuntimeError("a fault")
        return whole(name)

    whole = modules()["fit"].optimizer_of
    monkeypatch.setattr("keras_blur.cli.fit.optimizer_of", fail)
    path, model = tmp_path / "f.json", tmp_path / "f.keras"
    asked = ["--hidden=4", "--epochs=1", "--learning_rate=0.1", "--genome=backprop", f"--json={path}", f"--save={model}"]
    with pytest.raises(RuntimeError, match="a fault"):
        cli.run(["fit", *asked])
    document = json.loads(path.read_text())
    assert document["partial"]
    assert list(document["results"]) == ["genome backprop", "Keras SGD 0.1"]
    assert model.exists()


def test_ctrl_c_while_a_figure_is_drawn(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("keras_blur.cli.evaluate._draw", stop)
    path = tmp_path / "e.json"
    asked = ["--genome=functions", "--functions=xor", "--hidden=4", "--seeds=2", "--steps=1"]
    assert cli.run(["evaluate", *asked, f"--json={path}", f"--decisions={tmp_path / 'd.png'}"]) == 130
    assert capsys.readouterr().err.endswith(f"keras-blur: interrupted; kept what was learned in {path}\n")


@pytest.mark.slow
def test_evaluate_saves_each_score(tmp_path, monkeypatch):
    """As a process that is killed leaves it."""
    path, kept = tmp_path / "e.json", []
    whole = ProgressLine.show

    def show(self, stage, detail):
        if path.exists():
            kept.append(json.loads(path.read_text()))
        whole(self, stage, detail)

    monkeypatch.setattr(ProgressLine, "show", show)
    asked = ["--genome=mnist-4state", "--hidden=8", "--seeds=2", "--steps=4", "--score_at=2,3", f"--json={path}"]
    assert cli.run(["evaluate", *asked]) == 0
    assert [(one["steps"], one["partial"]) for one in kept] == [([0], True), ([0, 2], True), ([0, 2, 3], True)]
    result = json.loads(path.read_text())
    assert result["steps"] == [0, 2, 3, 4]
    assert "partial" not in result


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c_after_an_epoch")
def test_reweight_keeps_what_was_learned(tmp_path, capsys):
    paths = {name: tmp_path / f"r.{name}" for name in ("json", "keras")}
    asked = ["reweight", "--hidden=8", "--epochs=3", f"--json={paths['json']}", f"--save={paths['keras']}", "--noplain"]
    assert cli.run(asked) == 130
    assert f"kept what was learned in {paths['json']}, {paths['keras']}" in capsys.readouterr().err
    assert json.loads(paths["json"].read_text())["partial"]
    assert keras.models.load_model(paths["keras"]).count_params() == 64 * 8 + 8 + 80 + 10
    assert cli.run([*asked[:3], "--plain"]) == 130
    assert "no output file was asked for" in capsys.readouterr().err


@pytest.mark.usefixtures("ctrl_c_after_an_epoch", "eagerly")
def test_meta_train_keeps_what_was_learned(tmp_path, capsys):
    paths = {"genome": tmp_path / "g.json", "json": tmp_path / "n.json"}
    size = ["--functions=xor", "--hidden=4", "--unroll=2", "--epochs=3", "--steps_per_epoch=2", "--members=1"]
    outputs = [f"--{name}={path}" for name, path in paths.items()]
    assert cli.run(["meta-train", *size, *outputs]) == 130
    assert f"interrupted; kept what was learned in {paths['genome']}" in capsys.readouterr().err
    assert genomes.load(paths["genome"]).rule.states == 2
    document = json.loads(paths["json"].read_text())
    assert document["partial"]
    assert len(document["history"]["loss"]) == 1


@pytest.mark.usefixtures("eagerly")
def test_a_finished_run_leaves_its_numbers(tmp_path, capsys):
    path = tmp_path / "n.json"
    size = ["--functions=xor", "--hidden=4", "--unroll=2", "--steps_per_epoch=1", "--members=1"]
    outputs = [f"--genome={tmp_path / 'g.json'}", f"--checkpoint={tmp_path / 'c.weights.h5'}", f"--json={path}"]

    def run(epochs):
        assert cli.run(["meta-train", *size, *outputs, f"--epochs={epochs}"]) == 0
        return path.read_text(), capsys.readouterr().out

    whole, _ = run(1)
    again, said = run(1)
    assert again == whole
    assert f"left {path} unchanged: no epoch was done" in said
    document = json.loads(run(2)[0])
    assert document["epochs"] == [1, 2]  # those before the resume are kept
    assert document["history"]["loss"][0] == json.loads(whole)["history"]["loss"][0]
    assert len(document["history"]["loss"]) == 2
    assert document["seconds"] > json.loads(whole)["seconds"]


def test_a_history_goes_on_only_where_the_run_does():
    def part(epochs, **history):
        return {"epochs": epochs, "history": history}

    before, after = part([1, 2], loss=[4.0, 3.0]), part([3], loss=[2.0])
    whole = part([1, 2, 3], loss=[4.0, 3.0, 2.0])
    assert continued(before, after) == whole
    assert continued(part([1, 2, 3], loss=[4.0, 3.0, 9.0]), after) == whole  # the checkpoint was of epoch 2
    assert continued(before, part([])) == before
    for other in (None, [], {}, part([]), part([1], loss=[4.0]), part([4], loss=[1.0])):
        assert continued(other, after) == after
    assert continued(before, part([3], loss=[2.0], val=[1.0])) == part(
        [1, 2, 3], loss=[4.0, 3.0, 2.0], val=[None, None, 1.0]
    )


def test_numbers_of_another_run_are_not_continued():
    flag = {"epochs": 9, "json": "a.json", "rates": (1.0, float("inf")), "plain": True}
    document = {"flags": {"epochs": 4, "json": "b.json", "rates": [1.0, None], "plain": True}, "epochs": [1]}
    assert of_same_run(document, flag, ("json",)) is document
    assert of_same_run(document, flag, ()) is None
    assert of_same_run(document, {**flag, "rates": (2.0,)}, ("json",)) is None
    assert of_same_run(document, {**flag, "plain": False}, ("json",)) is None
    for other in (None, [], {"epochs": [1]}, {"flags": None}):
        assert of_same_run(other, flag, ("json",)) is None


@pytest.mark.parametrize("plain", [True, False])
def test_a_second_checkpoint_counts_where_there_is_a_second_arm(plain, tmp_path, capsys):
    """It makes a run one that resumes, which may replace other outputs."""
    (tmp_path / "c.plain.weights.h5").write_text("")
    (tmp_path / "r.json").write_text("")
    asked = [f"--checkpoint={tmp_path / 'c.weights.h5'}", f"--json={tmp_path / 'r.json'}", "--data=nothing"]
    assert cli.run(["reweight", *asked, *([] if plain else ["--noplain"])]) == 2
    assert ("--overwrite" in capsys.readouterr().err) is not plain


def test_no_member_was_finite(tmp_path, monkeypatch, capsys):
    """Then the genome stays as it is, and Ctrl-C does not say otherwise."""
    monkeypatch.setattr("keras_blur.meta.MetaTrainer.sound", False)

    def stop(self, *_, **__):
        self.meta_step.assign(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("keras_blur.meta.MetaTrainer.fit", stop)
    (tmp_path / "g.json").write_text("old")
    asked = ["--functions=xor", "--hidden=4", "--unroll=2", "--members=1", f"--genome={tmp_path / 'g.json'}", "--overwrite"]
    assert cli.run(["meta-train", *asked]) == 130
    shown = capsys.readouterr()
    assert "g.json unchanged: no member was finite" in shown.out
    assert shown.err == "keras-blur: interrupted; no member was finite, so nothing was kept\n"
    assert (tmp_path / "g.json").read_text() == "old"


@pytest.mark.slow
def test_an_interrupted_reweighting_resumes_both_arms(tmp_path, monkeypatch, capsys):
    begun: list[int] = []
    whole = keras.callbacks.History.on_epoch_begin

    def count(self, epoch, logs=None):
        if len(begun) == stop_at:
            raise KeyboardInterrupt
        begun.append(epoch)
        return whole(self, epoch, logs)

    monkeypatch.setattr(keras.callbacks.History, "on_epoch_begin", count)
    path, plain, learned = (tmp_path / name for name in ("r.json", "c.plain.weights.h5", "c.weights.h5"))
    asked = ["reweight", "--hidden=4", "--epochs=2", f"--checkpoint={learned}"]

    def run(at, *more):
        nonlocal stop_at
        stop_at = at
        begun.clear()
        status = cli.run([*asked, *more])
        shown = capsys.readouterr()
        return status, shown.out.splitlines()[-1] + shown.err

    stop_at = 1
    numbers = f"--json={path}"
    assert run(1, numbers) == (130, f"wrote {path}keras-blur: interrupted; kept what was learned in {plain}, {path}\n")
    assert not learned.exists()
    assert run(2, numbers)[0] == 130  # one more of equal weights, one of the other; --json needs no --overwrite
    assert begun == [1, 0]
    assert run(9, numbers)[0] == 0
    assert begun == [1]
    results = json.loads(path.read_text())["results"]
    for name in ("equal weights", "meta_weight_net"):
        assert results[name]["epochs"] == [1, 2]
        assert len(results[name]["history"]["val_accuracy"]) == 2
        assert "partial" not in results[name]
    path.unlink()
    begun.clear()
    stop_at = 9
    assert cli.run(asked) == 0
    assert begun == []
    accuracy = results["equal weights"]["history"]["val_accuracy"][-1]
    assert f"equal weights        test accuracy {accuracy:.4f}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_finished_reweighting_leaves_its_numbers(tmp_path):
    path = tmp_path / "r.json"
    asked = ["reweight", "--hidden=4", "--epochs=1", "--noplain", f"--checkpoint={tmp_path / 'r.weights.h5'}"]
    assert cli.run([*asked, f"--json={path}"]) == 0
    whole = path.read_text()
    assert json.loads(whole)["results"]["meta_weight_net"]["epochs"] == [1]
    assert cli.run([*asked, f"--json={path}"]) == 0
    assert path.read_text() == whole


def test_ctrl_c_before_any_result(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("keras_blur.cli.fit.load_images", stop)
    assert cli.run(["fit"]) == 130
    assert capsys.readouterr().err == "keras-blur: interrupted; nothing was kept\n"


class Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def flush(self):
        pass

    def write(self, text):
        self.text += text


class Pipe(Terminal):
    def isatty(self):
        return False


def test_progress_is_one_line_on_a_terminal():
    out = Terminal()
    with ProgressLine(out) as line:
        line.show("SGD (1 of 2)", "step 0 of 9")
        line.show("SGD (1 of 2)", "step 9 of 9")
    assert "\n" not in out.text
    assert out.text.count("\r") == 3
    assert "\rSGD (1 of 2), step 9 of 9, 0 s\x1b[K" in out.text
    assert out.text.endswith("\r\x1b[K")


def test_a_table_is_styled_on_a_terminal_alone(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    rows = [("agrees", "1"), ("differs by far too much", "2")]

    def printed(out):
        table = Table({"case": 10, "error": -6}, out)
        for cells in rows:
            table.row(*cells, marked=cells[1] == "2")
        return out.text

    rule = "\u2500" * 20
    cut = "differs by far too \u2026"
    assert printed(Pipe()) == "case       error\nagrees         1\ndiffers by far too much     2\n"
    assert printed(Terminal()) == f"\x1b[1mcase       error\x1b[0m\n{rule}\nagrees         1\n\x1b[31m{cut}\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(Terminal()) == f"case       error\n{rule}\nagrees         1\n{cut}\n"


def test_a_closed_pipe_is_no_mistake(monkeypatch, capsys):
    def broken(flag, positional):
        raise BrokenPipeError

    monkeypatch.setattr(modules()["zoo"], "run", broken)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert cli.run(["zoo"]) == 0
    assert not capsys.readouterr().err


def test_command_line_fits_a_shipped_genome_to_integer_labels(capsys):
    assert cli.run(["fit", "--genome=mnist-orthogonal", "--hidden=16", "--epochs=1", "--optimizers="]) == 0
    accuracy = capsys.readouterr().out.split("test accuracy")[1].split()[0]
    assert float(accuracy) > 0.8


def test_of_several_processes_one_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend.Runner, "writes_files", False)
    small = ["--functions=xor", "--hidden=4", "--unroll=1", "--epochs=1", "--steps_per_epoch=1", "--nojit_compile"]
    files = ["--genome=g.json", "--csv=g.csv", "--json=r.json", "--checkpoint=c.weights.h5"]
    assert cli.run(["meta-train", *small, *files]) == 0
    assert not list(tmp_path.iterdir())
