"""The optimizer baseline equals Keras's; a comparison is fair, tuned, and finite."""

import json

import keras
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf

from keras_blur import Genome, Rule, cli, genomes, random, tasks
from keras_blur.learners import BaselineLearner, Blur
from keras_blur.report.comparison import compare, evaluate, format_compare, format_several, plot_compare, steps_to
from keras_blur.tasks.datasets import Images, load_images

RULE = Rule(last_activation="linear", normalize_activations="both", batch_reduction="mean")
GRIDS = {"SGD": (0.1, 1.0, 3e38), "Adam": (0.01, 0.1)}


def batches(steps=6, leading=()):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((steps, *leading, 9, 5)).astype("float32")
    y = 2 * np.eye(3, dtype="float32")[rng.integers(0, 3, (steps, *leading, 9))] - 1
    return tf.constant(x), tf.constant(y)


MAKERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.01),
}


@pytest.mark.parametrize("name", MAKERS)
def test_optimizer_equals_keras_step_by_step(name):
    learner = BaselineLearner(MAKERS[name](), (7, 4))
    state = learner.init({}, random.seed_of(2), 5, 3)
    twin = keras.Sequential([keras.Input((5,)), *(keras.layers.Dense(u, "tanh") for u in (7, 4)), keras.layers.Dense(3)])
    twin.set_weights([np.array(w).reshape(v.shape) for w, v in zip(state.weights, twin.weights, strict=True)])
    twin.compile(MAKERS[name](), keras.losses.CategoricalCrossentropy(from_logits=True))
    xs, ys = batches()
    for x, y in zip(xs, ys, strict=True):
        state, prediction = learner.step({}, state, x, y)
        np.testing.assert_allclose(prediction, twin(x), rtol=1e-4, atol=1e-5)
        twin.train_on_batch(x, (y + 1) / 2)
    for own, wanted in zip(state.weights, twin.weights, strict=True):
        np.testing.assert_allclose(np.array(own).reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def test_leading_axes_are_separate_networks_with_their_own_rates():
    learner = BaselineLearner(keras.optimizers.Adam(), (6,))
    rates = tf.constant([[0.01], [0.1]])
    xs, ys = batches(leading=(2,))  # two tasks
    state = learner.init({}, random.seed_of(2), 5, 3, (2, 2))
    for x, y in zip(xs, ys, strict=True):
        state, _ = learner.step({"learning_rate": rates}, state, x[None], y[None])
    start = learner.init({}, random.seed_of(2), 5, 3, (2, 2))
    for member in range(2):
        for task in range(2):

            def own(leaf, member=member, task=task):
                return leaf if leaf.shape.rank == 0 else leaf[member, task]

            alone = tf.nest.map_structure(own, start)
            for x, y in zip(xs, ys, strict=True):
                alone, _ = learner.step({"learning_rate": rates[member, 0]}, alone, x[task], y[task])
            for one, other in zip(alone.weights, state.weights, strict=True):
                np.testing.assert_allclose(one, other[member, task], rtol=1e-4, atol=1e-5)


def test_learners_start_from_the_same_network():
    seed = random.seed_of(4)
    ours = Blur((7, 4), Rule(states=3)).init({}, seed, 5, 3)
    theirs = BaselineLearner(keras.optimizers.SGD(0.1), (7, 4)).init({}, seed, 5, 3)
    for index, layer in enumerate(ours.synapses):
        np.testing.assert_array_equal(layer["kernel"][0], theirs.weights[2 * index])


SGD, Adam, RMSprop = keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.RMSprop
DECAY = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
REFUSED = [keras.optimizers.Adagrad(), SGD(0.1, momentum=0.9, nesterov=True), SGD(DECAY), RMSprop(momentum=0.5)]
REFUSED += [Adam(clipnorm=1.0), Adam(gradient_accumulation_steps=2), Adam(weight_decay=0.1)]


@pytest.mark.parametrize("optimizer", REFUSED)
def test_other_optimizers_are_refused(optimizer):
    with pytest.raises(ValueError, match="`optimizer` must be a Keras SGD, Adam or RMSprop"):
        BaselineLearner(optimizer)


def test_learner_errors():
    with pytest.raises(ValueError, match=r"`activation` must be one of.*'swish'"):
        BaselineLearner(keras.optimizers.SGD(0.1), activation="swish")


@pytest.mark.parametrize("name", MAKERS)
def test_compiled_equals_eager(name):
    learner = BaselineLearner(MAKERS[name](), (7,))
    xs, ys = batches(1)
    state = learner.init({}, random.seed_of(2), 5, 3)
    eager, _ = learner.step({}, state, xs[0], ys[0])
    compiled, _ = tf.function(lambda s, x, y: learner.step({}, s, x, y), jit_compile=True)(state, xs[0], ys[0])
    for one, other in zip(eager.weights, compiled.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def few() -> Images:
    whole = load_images()
    return Images("few", whole.x_train[:300], whole.y_train[:300], whole.x_test[:90], whole.y_test[:90], 10, 16.0)


@pytest.fixture(scope="module")
def result():
    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    return compare(genome, few(), (12,), steps=10, seeds=2, batch_size=32, grids=GRIDS)


def test_every_curve_is_kept_and_the_envelope_is_the_best_of_them(result):
    assert result["steps"] == [0, 1, 2, 5, 10]
    assert list(result["curves"]) == ["genome", "SGD 0.1", "SGD 1", "SGD 3e+38", "Adam 0.01", "Adam 0.1"]
    means = [np.mean(curve["accuracy"], axis=0) for name, curve in result["curves"].items() if name != "genome"]
    np.testing.assert_allclose(result["envelope"]["accuracy"], np.max(means, axis=0))
    assert result["envelope"]["accuracy"][-1] > 0.5
    assert set(result["best"]) == {"SGD", "Adam"}


def test_divergence_is_the_worst_score(result):
    diverged = result["curves"]["SGD 3e+38"]
    assert diverged["accuracy"][0][-1] == 0.0
    assert diverged["loss"][0][-1] is None
    json.dumps(result, allow_nan=False)


def test_first_scores_are_those_of_the_initial_networks(result):
    accuracy = np.array([curve["accuracy"] for name, curve in result["curves"].items() if name != "genome"])[:, :, 0]
    assert (accuracy == accuracy[0]).all()


def test_equal_seeds_give_equal_comparisons(result):
    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    again = compare(genome, few(), (12,), steps=10, seeds=2, batch_size=32, grids={"Adam": (0.01,)})
    assert again["curves"]["genome"]["accuracy"] == result["curves"]["genome"]["accuracy"]
    np.testing.assert_allclose(again["curves"]["Adam 0.01"]["accuracy"], result["curves"]["Adam 0.01"]["accuracy"])


def test_table_and_picture(result, tmp_path):
    table = format_compare(result)
    assert "envelope" in table
    assert f"{result['envelope']['accuracy'][-1]:.3f}" in table
    plot_compare(result, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_shell(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("keras_blur.report.comparison.GRIDS", {"SGD": (0.3,)})
    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    genome.save(tmp_path / "g.json")
    arguments = ["compare", f"--genome={tmp_path / 'g.json'}", "--hidden=8", "--steps=2", "--seeds=2",
                 f"--json={tmp_path / 'c.json'}", f"--plot={tmp_path / 'c.png'}"]  # fmt: skip
    assert cli.run(arguments) == 0
    shown = capsys.readouterr()
    assert "best SGD 0.3" in shown.out
    assert f"wrote {tmp_path / 'c.png'}" in shown.out
    assert [line.split(",")[0] for line in shown.err.splitlines()] == ["g (1 of 2)", "SGD (2 of 2)"]
    assert json.loads((tmp_path / "c.json").read_text())["steps"] == [0, 1, 2]
    assert (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--genome must be given"),
        (["--genome=nowhere"], "Received: name='nowhere'"),
        (["--genome=backprop", "--plot=/no/such/folder/c.png"], "there is no folder"),
    ],
)
def test_shell_mistakes(capsys, arguments, said):
    assert cli.run(["compare", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_numbers_out_of_range():
    genome = Genome.random(RULE, seed=0)
    with pytest.raises(ValueError, match="`seeds` at least 2"):
        compare(genome, few(), (8,), steps=1, seeds=1)
    with pytest.raises(ValueError, match="batch_size=999"):
        compare(genome, few(), (8,), steps=1, seeds=2, batch_size=999)
    for grids in ({}, {"SGD": (0.1, 0.1)}, {"Adagard": (0.1,)}):
        with pytest.raises(ValueError, match="`grids` must give different rates"):
            compare(genome, few(), (8,), steps=1, seeds=2, grids=grids)
    for odd in (Genome.random(RULE, 0, population=(2,)), Genome.random(RULE.replace(layers=3), 0)):
        with pytest.raises(ValueError, match="`genome` must be a single one, for 2 layers"):
            compare(odd, few(), (8,), steps=1, seeds=2)


def test_backprop_is_sgd():
    """A genome that learns from errors stands beside the optimizers as any other, and this one is one of them."""
    found = compare(genomes.backprop(0.3, "tanh"), few(), (12,), steps=20, seeds=2, batch_size=16, grids={"SGD": (0.3,)})
    genome, sgd = (np.array(found["curves"][name]["loss"]) for name in ("genome", "SGD 0.3"))
    assert (genome[:, -1] < 0.8 * genome[:, 0]).all()
    np.testing.assert_allclose(genome, sgd, rtol=1e-4)


def test_a_population_learns_side_by_side():
    members = [Genome.random(RULE, seed=number, std=0.5, synapse_update=-0.01) for number in (1, 2, 3)]
    options = {"steps": 3, "seeds": 2, "batch_size": 16}
    found = evaluate(Genome.stack(members), few(), (8,), **options)
    assert list(found["curves"]) == ["genome 0", "genome 1", "genome 2"]
    for number, one in enumerate(members):
        alone = evaluate(one, few(), (8,), **options)["curves"]["genome"]
        np.testing.assert_allclose(found["curves"][f"genome {number}"]["loss"], alone["loss"], rtol=1e-4)
    assert "genome 2" in format_compare(found)


def test_toy_tasks_are_compared_on_an_episode_a_seed():
    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    of = tasks.functions("blobs3")
    result = compare(genome, of, (12,), steps=20, seeds=3, batch_size=32, grids={"Adam": (0.03, 0.1)})
    assert result["data"] == "blobs3"
    assert np.array(result["curves"]["genome"]["accuracy"]).shape == (3, len(result["steps"]))
    assert result["envelope"]["accuracy"][-1] > 0.9  # Adam learns clouds of points in twenty steps
    again = compare(genome, of, (12,), steps=20, seeds=3, batch_size=32, grids={"Adam": (0.03, 0.1)})
    assert again["curves"]["Adam 0.1"]["accuracy"] == result["curves"]["Adam 0.1"]["accuracy"]
    reached = steps_to(result, 0.9)["envelope"]
    place = result["steps"].index(reached)
    assert result["envelope"]["accuracy"][place] >= 0.9 > result["envelope"]["accuracy"][place - 1]
    table = format_several([result, result], step=5).splitlines()
    assert len(table) == 4
    assert table[1].split()[-2:] == table[2].split()[-2:]
    assert f"{result['envelope']['accuracy'][result['steps'].index(5)]:.3f}" in table[3]


def test_evaluation_is_the_genome_s_part_of_a_comparison(result):
    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    alone = evaluate(genome, few(), (12,), steps=10, seeds=2, batch_size=32)
    assert alone["curves"]["genome"]["accuracy"] == result["curves"]["genome"]["accuracy"]
    assert "envelope" not in alone
    assert len(format_compare(alone).splitlines()) == 3


def test_values_cannot_be_compared():
    genome = Genome.random(RULE, seed=0)
    with pytest.raises(ValueError, match=r"`data` must be tasks of classes\. Received: sine"):
        evaluate(genome, tasks.functions("sine"), (4,), steps=2, seeds=2, batch_size=8)


def test_shell_on_toy_tasks(tmp_path, capsys):
    path, numbers = tmp_path / "g.json", tmp_path / "n.json"
    Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01).save(path)
    size = [f"--genome={path}", "--hidden=6", "--steps=2", "--seeds=2", "--batch_size=8", f"--json={numbers}"]
    size.append("--overwrite")
    assert cli.run(["evaluate", *size, "--functions=xor,circle"]) == 0
    assert "scores that are not finite: 0 of 6" in capsys.readouterr().out
    assert [one["data"] for one in json.loads(numbers.read_text())["results"]] == ["xor", "circle"]
    assert cli.run(["evaluate", *size, "--functions=xor,circle", "--plot=x.png"]) == 2
    assert "--plot draws one result" in capsys.readouterr().err
    assert cli.run(["evaluate", *size, "--size=6"]) == 0
    assert "digits 6x6" in capsys.readouterr().out
    reported = json.loads(numbers.read_text())
    assert cli.run(["evaluate", *size, "--size=6", "--split=validation"]) == 0
    assert "validation accuracy by learning step" in capsys.readouterr().out
    chosen_by = json.loads(numbers.read_text())
    assert (reported["split"], chosen_by["split"]) == ("test", "validation")
    assert reported["curves"]["genome"]["loss"] != chosen_by["curves"]["genome"]["loss"]
    assert cli.run(["evaluate", *size, "--split=validation"]) == 2
    assert "--split applies only with --size or --functions" in capsys.readouterr().err
    assert cli.run(["evaluate", *size, "--functions=ring"]) == 2
    assert "`names` must be" in capsys.readouterr().err
    assert cli.run(["evaluate", "--functions=xor"]) == 2
    assert "--genome must be given" in capsys.readouterr().err


def test_shell_draws_one_genome(tmp_path, capsys):
    path = tmp_path / "g.json"
    Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01).save(path)
    pictures = {name: tmp_path / f"{name}.png" for name in ("plot", "decisions", "synapses")}
    flags = {name: f"--{name}={file}" for name, file in pictures.items()}
    size = [f"--genome={path}", "--hidden=6", "--steps=2", "--seeds=2", "--batch_size=8", "--overwrite"]
    assert cli.run(["evaluate", *size, "--functions=xor", *flags.values()]) == 0
    sizes = {name: matplotlib.image.imread(file).shape for name, file in pictures.items()}
    assert sizes["decisions"][0] < sizes["synapses"][0]  # one row of panels, and two
    assert f"wrote {pictures['decisions']}" in capsys.readouterr().out
    pictures["synapses"].unlink()
    assert cli.run(["evaluate", *size, flags["synapses"]]) == 0  # of the digits
    assert pictures["synapses"].exists()
    assert cli.run(["evaluate", *size, flags["decisions"]]) == 2
    assert "--decisions applies only with --functions" in capsys.readouterr().err
    assert cli.run(["evaluate", *size, "--functions=xor,circle", flags["synapses"]]) == 2
    assert "--synapses draws one network" in capsys.readouterr().err
    assert cli.run(["evaluate", *size, "--functions=xor", "--decisions=nowhere/x.png"]) == 2
    assert "--decisions must be a file in a folder that exists; there is no folder" in capsys.readouterr().err


def stopping(at):
    """A `watch` that keeps what it is told and ends the run when arm number and step are those."""
    told = []

    def watch(progress):
        told.append(progress)
        if (progress.number, progress.step) == at:
            raise KeyboardInterrupt

    return told, watch


def test_a_comparison_tells_how_far_it_is(result, tmp_path):
    told, watch = stopping(at=(3, 2))
    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    with pytest.raises(KeyboardInterrupt):
        compare(genome, few(), (12,), steps=10, seeds=2, batch_size=32, grids=GRIDS, watch=watch)
    assert [(one.arm, one.number, one.step) for one in told] == [
        *(("genome", 1, step) for step in (0, 0, 1, 2, 5, 10)), *(("SGD", 2, step) for step in (0, 0, 1, 2, 5, 10)),
        *(("Adam", 3, step) for step in (0, 0, 1, 2)),
    ]  # fmt: skip
    assert {one.arms for one in told} == {3}
    assert told[0].result is None
    begun, finished = told[3].result, told[-1].result
    assert begun["steps"] == [0, 1, 2]  # the first arm's scores so far
    assert begun["curves"]["genome"]["loss"] == [row[:3] for row in result["curves"]["genome"]["loss"]]
    assert list(finished["curves"]) == ["genome", "SGD 0.1", "SGD 1", "SGD 3e+38"]
    assert finished["curves"]["SGD 1"]["loss"] == result["curves"]["SGD 1"]["loss"]
    assert finished["best"] == {"SGD": result["best"]["SGD"]}
    assert "partial" not in result
    for partial in (begun, finished):
        assert partial["partial"]
        assert "interrupted" in format_compare(partial)
        assert "(interrupted)" in plot_compare(partial, tmp_path / "c.png").get_suptitle()


@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_ctrl_c_keeps_the_curves_so_far(tmp_path, capsys, monkeypatch, command):
    score = globals()[command]

    def ended(*arguments, watch, **options):
        def stop(progress):
            watch(progress)
            if progress.data == "circle" and progress.step == 1:
                raise KeyboardInterrupt

        return score(*arguments, watch=stop, **options)

    monkeypatch.setattr(f"keras_blur.cli.{command}.{command}", ended)
    monkeypatch.setattr("keras_blur.report.comparison.GRIDS", {"SGD": (0.3,)})
    path, numbers = tmp_path / "mine.json", tmp_path / "n.json"
    Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01).save(path)
    size = ["--hidden=6", "--steps=2", "--seeds=2", "--batch_size=8", f"--json={numbers}"]
    assert cli.run([command, f"--genome={path}", "--functions=xor,circle,square", *size]) == 130
    shown = capsys.readouterr()
    assert "interrupted; kept the curves learned so far" in shown.err
    assert "mine  " in shown.out  # the row has the genome's name
    document = json.loads(numbers.read_text())
    assert document["partial"]
    whole, begun = document["results"]
    assert (whole["data"], whole["steps"], "partial" in whole) == ("xor", [0, 1, 2], False)
    assert (begun["data"], begun["steps"], begun["partial"]) == ("circle", [0, 1], True)
