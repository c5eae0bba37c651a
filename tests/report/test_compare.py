"""A comparison is fair, tuned and finite; an evaluation."""

import dataclasses
import json
import pathlib
import shutil

import keras
import matplotlib.image
import numpy as np
import pytest
from keras import layers as kl

from keras_blur import Genome, Rule, backend, cli, genomes, tasks
from keras_blur.models import networks
from keras_blur.models.convert import convert
from keras_blur.models.networks import lenet, mlp, normalized, resnet
from keras_blur.report import comparison, decisions, envelopes, synapses
from keras_blur.report.baselines import OPTIMIZERS
from keras_blur.report.comparison import compare
from keras_blur.report.curves import format_compare, format_several, plot_compare
from keras_blur.report.evaluation import evaluate
from keras_blur.tasks.datasets import Images, load_images

RULE = Rule(last_activation="linear", normalize_activations="both", batch_reduction="mean")
GRIDS = {"SGD": (0.1, 1.0, 3e38), "Adam": (0.01, 0.1)}


def few() -> Images:
    whole = load_images()
    return Images("few", whole.x_train[:300], whole.y_train[:300], whole.x_test[:90], whole.y_test[:90], 10, 16.0)


@pytest.fixture(scope="module")
def result():
    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    return compare(genome, few(), (12,), steps=10, seeds=2, batch_size=32, grids=GRIDS)


def test_the_grid_runs_in_both_networks_and_with_both_schedules(result):
    assert result["steps"] == [0, 1, 2, 5, 10]
    settings = {(c["network"], c["optimizer"], c["rate"], c["schedule"]) for c in result["curves"].values() if "rate" in c}
    assert len(settings) == 2 * 5 * 2 == len(result["curves"]) - 2
    assert list(result["curves"])[:4] == ["genome", "genome, normalized", "SGD 0.1", "SGD 0.1, linear decay"]
    assert "Adam 0.1, linear decay, normalized" in result["curves"]


@pytest.mark.parametrize("variant", ["plain", "normalized"])
def test_an_envelope_is_the_best_of_the_leaders_on_all_seeds(result, variant):
    own = {n: c for n, c in result["curves"].items() if c.get("network") == variant}
    whole = {n: c for n, c in own.items() if len(c["accuracy"]) == 2}
    first = {n: np.array(c["accuracy"][0]) for n, c in own.items()}
    for place in range(1, 5):  # what leads on the first seed is run on all
        assert max(first, key=lambda n, place=place: first[n][place]) in whole
    envelope = result["envelopes"][variant]
    np.testing.assert_allclose(envelope["accuracy"], np.max([np.mean(c["accuracy"], 0) for c in whole.values()], axis=0))
    assert envelope["accuracy"][-1] > 0.5
    assert set(result["best"][variant]) == {"SGD", "Adam"}
    assert set(result["best"][variant].values()) <= set(whole)


def test_the_genome_learns_the_normalized_network_too(result):
    source, _ = comparison.source_of(few(), steps=10, seeds=2, batch_size=32, seed=0, split="test")
    start = comparison._Start(source, comparison.builder((12,))[1], "tanh")
    model = convert(start.network(0, "normalized"), Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01))
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for (x, y), _ in zip(source.batches(0), range(10), strict=False):
        model.train_on_batch(x, y)
    x, y = source.test(0)
    right = np.mean(np.argmax(model.predict(x, verbose=0), axis=-1) == y)
    assert result["curves"]["genome, normalized"]["accuracy"][0][-1] == pytest.approx(right, abs=1e-6)
    assert result["curves"]["genome, normalized"]["accuracy"] != result["curves"]["genome"]["accuracy"]


def test_divergence_is_the_worst_score(result):
    diverged = result["curves"]["SGD 3e+38"]
    assert diverged["accuracy"][0][-1] == 0.0
    assert diverged["loss"][0][-1] is None
    json.dumps(result, allow_nan=False)


def test_all_learners_of_a_network_start_alike(result):
    for variant in ("plain", "normalized"):
        own = [c for c in result["curves"].values() if c.get("network") == variant]
        assert len({c["accuracy"][0][0] for c in own}) == 1
        np.testing.assert_allclose([c["loss"][0][0] for c in own], own[0]["loss"][0][0], rtol=1e-5)


@pytest.mark.slow
def test_equal_seeds_give_equal_comparisons(result):
    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    again = compare(
        genome,
        few(),
        (12,),
        steps=10,
        seeds=2,
        batch_size=32,
        grids={"Adam": (0.01,)},
        schedules=["linear"],
        normalize=False,
    )
    assert again["curves"]["genome"]["accuracy"] == result["curves"]["genome"]["accuracy"]
    name = "Adam 0.01, linear decay"
    np.testing.assert_allclose(again["curves"][name]["loss"][0], result["curves"][name]["loss"][0], rtol=1e-5)


@pytest.mark.slow
def test_scores_may_be_few_and_are_the_same(result):
    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    options = {"seeds": 2, "batch_size": 32, "grids": {"Adam": (0.01,)}, "schedules": ["linear"], "normalize": False}
    few_scores = compare(genome, few(), (12,), steps=10, score_at=[5], **options)
    assert few_scores["steps"] == [0, 5, 10]
    for name in ("genome", "Adam 0.01, linear decay"):
        wanted = np.array(result["curves"][name]["loss"])[:, [result["steps"].index(step) for step in (0, 5, 10)]]
        np.testing.assert_allclose(few_scores["curves"][name]["loss"][: len(wanted)], wanted, rtol=1e-5)
    last = compare(genome, few(), (12,), steps=10, score_at=[], **options)
    assert last["steps"] == [0, 10]
    assert last["speedup"] == {"plain": {"steps": None, "seconds": None}}
    with pytest.raises(ValueError, match=r"must be a comparison with steps=\[0, 10\]"):
        compare(genome, few(), (12,), steps=10, score_at=[10], baselines=few_scores, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_starts_at_the_weights_of_its_seed(name):
    """Schedule-Free keeps a copy of the weights that it started with, and moves towards it."""
    source, _ = comparison.source_of(few(), steps=5, seeds=2, batch_size=32, seed=0, split="test")
    learner = comparison._Learner(comparison._Start(source, comparison.builder((4,))[1], "tanh"), "plain", optimizer=name)
    x, y = next(source.batches(1))
    for number in (0, 1, 0):
        learner.begin(number)
        start = [backend.numbers_of(one) for one in learner._fresh(number).variables]
        learner.step(x, y, 1e-9)
        for one, value in zip(learner.model.variables, start, strict=True):
            np.testing.assert_allclose(backend.numbers_of(one), value, atol=1e-6)
        learner.step(x, y, 0.1)


def test_a_decayed_rate_falls_to_its_horizon():
    """By hand: at horizon 2 the rates are r and r / 2, at horizon 5 r, 0.8 r, ..."""
    images, rate = few(), 0.5
    found = compare(
        genomes.backprop(0.3, "tanh"), images, (7,), steps=5, seeds=2, batch_size=32, grids={"SGD": (rate,)}, normalize=False
    )
    decayed = found["curves"]["SGD 0.5, linear decay"]
    start = comparison._Start(comparison.source_of(images, steps=5, seeds=2, batch_size=32, seed=0, split="test")[0],
                              comparison.builder((7,))[1], "tanh")  # fmt: skip
    for place, horizon in ((2, 2), (3, 5)):
        model = start.network(1)
        model.compile(keras.optimizers.SGD(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        batches_of = start.source.batches(1)
        for step in range(horizon):
            model.optimizer.learning_rate = rate * (1 - step / horizon)
            model.train_on_batch(*next(batches_of))
        x, y = start.source.test(1)
        assert decayed["accuracy"][1][place] == pytest.approx(np.mean(np.argmax(model.predict(x, verbose=0), -1) == y))


def test_batch_normalisation_is_scored_with_the_statistics_of_the_test_examples():
    source, _ = comparison.source_of(few(), steps=5, seeds=2, batch_size=32, seed=0, split="test")
    start = comparison._Start(source, comparison.builder((7,))[1], "relu")
    learner = comparison._Learner(start, "normalized", optimizer="Adam")
    learner.begin(0)
    for (x, y), _ in zip(source.batches(0), range(5), strict=False):
        learner.step(x, y, 0.03)
    x, y = source.test(0)
    wanted = np.mean(np.argmax(learner.model(x, training=True), axis=-1) == y)
    moving = np.mean(np.argmax(learner.model(x, training=False), axis=-1) == y)
    assert learner.score(0)[0] == pytest.approx(wanted)
    assert abs(wanted - moving) > 0.02  # it makes a difference


@pytest.mark.slow
def test_baselines_are_not_run_again(result):
    genome = Genome.random(RULE, seed=1, std=0.5, synapse_update=-0.01)
    told = []

    def watch(progress):
        told.append(progress.arm)

    marked = json.loads(json.dumps(result))
    marked["curves"]["SGD 1"]["accuracy"][0] = [0.5, 0.625, 0.75, 0.875, 1.0]  # a run would not give this
    again = compare(genome, few(), (12,), steps=10, seeds=2, batch_size=32, grids=GRIDS, baselines=marked, watch=watch)
    assert again["curves"]["SGD 1"]["accuracy"][0] == [0.5, 0.625, 0.75, 0.875, 1.0]
    assert again["curves"]["genome"]["loss"] != result["curves"]["genome"]["loss"]
    assert told.count("SGD") == 6
    with pytest.raises(ValueError, match="`baselines` must be a comparison with parameters="):  # a network of that name
        compare(genome, few(), (12,), steps=10, seeds=2, batch_size=32, grids=GRIDS, baselines={**result, "parameters": 5})
    with pytest.raises(ValueError, match="`baselines` must be a comparison with batch_size=16"):
        compare(genome, few(), (12,), steps=10, seeds=2, batch_size=16, grids=GRIDS, baselines=result)


def test_baselines_are_of_the_same_examples_and_layers(tmp_path):
    """Data of one name and shape; networks of one name and number of parameters."""
    x = np.random.default_rng(0).normal(size=(200, 4))
    own, other = (tasks.arrays(x, labels) for labels in (x[:, 0] > 0, x[:, 1] > 0))
    options = {"steps": 1, "batch_size": 8, "grids": {"SGD": (0.3,)}, "schedules": ["constant"], "normalize": False}

    def run(data, network=(3,), seeds=2, **others):
        return compare(genomes.backprop(0.3, "tanh"), data, network, seeds=seeds, **options, **others)

    def saved(activation):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation), keras.layers.Dense(2)])
        model.save(tmp_path / "own.keras")
        return str(tmp_path / "own.keras")

    before = json.loads(json.dumps(run(own)))
    more = run(own, seeds=3, baselines=before)
    assert more["curves"]["SGD 0.3"]["loss"][:2] == before["curves"]["SGD 0.3"]["loss"]
    with pytest.raises(ValueError, match="`baselines` must be a comparison on the same examples of arrays"):
        run(other, baselines=before)
    with pytest.raises(ValueError, match="`baselines` must be a comparison that describes its `examples`"):
        run(own, baselines={name: one for name, one in before.items() if name != "examples"})
    images = few()
    turned = dataclasses.replace(images, y_train=9 - images.y_train)
    with pytest.raises(ValueError, match="on the same examples of few"):
        run(turned, baselines=run(images))

    before = run(own, saved("tanh"))
    shutil.copy(tmp_path / "own.keras", tmp_path / "copy.keras")
    assert run(own, str(tmp_path / "copy.keras"), baselines=before)["network"] == "copy.keras"
    with pytest.raises(ValueError, match="`baselines` must be a comparison with layers="):
        run(own, saved("relu"), baselines=before)


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist"])
def test_the_stored_baselines_describe_their_examples(name):
    found = json.loads((pathlib.Path(__file__).parents[2] / f"benchmarks/results/compare_{name}.json").read_text())
    assert [one["inputs"]["elements"] for one in found["examples"]] == [70_000 * 784]
    assert found["layers"] is None


def test_networks():
    for model in (mlp((8, 8, 1), 10, (6, 5)), lenet((8, 8, 1), 10)):
        twin = normalized(model)
        kinds = [type(layer).__name__ for layer in twin.layers]
        assert kinds.count("BatchNormalization") == len([one for one in model.layers if one.weights]) - 1
        for layer in model.layers:
            for one, other in zip(layer.weights, twin.get_layer(layer.name).weights, strict=True):
                np.testing.assert_array_equal(one, other)
        x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype("float32")
        shrunk = (1.0 + 1e-3) ** (-kinds.count("BatchNormalization") / 2)  # by the moving statistics at the start
        np.testing.assert_allclose(twin(x), shrunk * np.array(model(x)), rtol=1e-4, atol=1e-6)  # relu and no biases yet
    assert normalized(resnet((8, 8, 1), 10, (4,), 1)) is None  # it has some


@pytest.mark.slow
def test_models_inside_a_network_are_flattened():
    backbone = keras.Sequential(
        [keras.Input((8, 8, 1)), kl.Conv2D(3, 3, activation="relu"), kl.BatchNormalization(), kl.Flatten()], name="backbone"
    )
    head = keras.Sequential([keras.Input((108,)), kl.Dense(5, "tanh"), kl.Dense(10, "softmax")], name="head")
    model = keras.Sequential([keras.Input((8, 8, 1)), backbone, head])
    made = networks.flattened(model)
    kinds = [type(layer).__name__ for layer in made.layers]
    assert kinds == ["InputLayer", "Conv2D", "BatchNormalization", "Flatten", "Dense", "Dense"]
    x = np.random.default_rng(0).random((4, 8, 8, 1), "float32")
    np.testing.assert_allclose(made.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5)
    options = {"steps": 1, "seeds": 2, "batch_size": 32, "grids": {"SGD": (0.1,)}, "schedules": ("constant",)}
    for curve in compare(genomes.backprop(0.1, "relu"), tasks.images("digits"), model, **options)["curves"].values():
        assert 2.0 < curve["loss"][0][0] < 3.0  # of probabilities, as the last layer gives them
    plain = keras.Sequential([keras.Input((4,)), keras.Sequential([keras.Input((4,)), kl.Dense(5, "tanh")]), kl.Dense(3)])
    assert networks.normalized(networks.flattened(plain)).count_params() == 25 + 20 + 18


def seeded():
    """A model whose initializers have seeds, also inside another model and in a list of layers."""
    one, two = keras.initializers.GlorotUniform(1), keras.initializers.HeNormal(2)
    inner = keras.Sequential([keras.Input((4,)), kl.Dense(5, "tanh", kernel_initializer=one, name="inner")], name="block")
    outer = kl.TimeDistributed(kl.Dense(2, kernel_initializer=two, bias_initializer="ones", name="wrapped"), name="outer")
    layers = [kl.Reshape((5, 1)), outer, kl.Flatten(), kl.Dropout(0.5, seed=3, name="drop")]
    return keras.Sequential([keras.Input((4,)), inner, *layers, kl.Dense(2, kernel_initializer=one, name="last")])


def test_the_networks_of_seeds_differ_where_a_model_has_seeds(tmp_path):
    path = str(tmp_path / "network.keras")
    seeded().save(path)
    for given in (seeded(), path):
        build = networks.builder(given)[1]
        made = []
        for seed in (1, 1, 2):
            keras.utils.set_random_seed(seed)
            made.append(build((4,), 2))
        for name, drawn in (("inner", [0]), ("outer", [0]), ("last", [0])):
            one, again, other = (model.get_layer(name).get_weights() for model in made)
            for place, value in enumerate(one):
                np.testing.assert_array_equal(again[place], value)
                assert np.array_equal(other[place], value) == (place not in drawn)
        assert np.all(made[0].get_layer("outer").get_weights()[1] == 1.0)
        assert made[0].get_layer("drop").seed == 3
        assert made[0].get_layer("inner").activation is keras.activations.tanh


def test_models_inside_a_network_must_have_names_and_no_mode():
    twice = [keras.Sequential([keras.Input((4,)), kl.Dense(4, name="one")], name=name) for name in "ab"]
    with pytest.raises(ValueError, match="layers with different names"):
        networks.flattened(keras.Sequential([keras.Input((4,)), *twice]))
    entry = keras.Input((4,))
    with pytest.raises(ValueError, match="without `training`"):
        networks.flattened(keras.Model(entry, kl.Dense(2)(twice[0](entry, training=False))))


def test_few_shot_tasks_are_scored_with_batches_below_a_support():
    few = tasks.augment(tasks.episodes("digits", ways=2, shots=5), tasks.LabelPermutation())
    found = evaluate(genomes.backprop(0.1), few, (8,), steps=2, seeds=2, batch_size=5)
    assert np.shape(found["curves"]["genome"]["accuracy"]) == (2, 3)


def test_a_network_of_a_file_keeps_its_activations(tmp_path):
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(6, "gelu"), keras.layers.Dense(10)]
    )
    model.save(tmp_path / "own.keras")
    found = compare(
        genomes.backprop(0.3), few(), str(tmp_path / "own.keras"), steps=2, seeds=2, batch_size=32, grids={"SGD": (0.3,)},
        schedules=["constant"],
    )  # fmt: skip
    assert found["network"] == "own.keras"
    np.testing.assert_allclose(found["curves"]["genome"]["loss"], found["curves"]["SGD 0.3"]["loss"], rtol=1e-4)
    assert set(found["envelopes"]) == {"plain", "normalized"}
    with pytest.raises(ValueError, match=r"`network` must take examples of \(2,\) and have 3 outputs"):
        compare(genomes.backprop(0.3), tasks.functions("blobs3"), model, steps=1, seeds=2, batch_size=8)
    with pytest.raises(ValueError, match="`network` must be a Keras model that an optimizer trains"):
        compare(genomes.backprop(0.3), few(), convert(model, genomes.backprop(0.3)), steps=1, seeds=2, batch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("last", ["activation", "layer"])
def test_probabilities_are_scored_as_their_logits(last):
    """Both learn by the cross-entropy of what they give, so they learn the same."""

    def network(softmax):
        ends = {"activation": [keras.layers.Dense(10, "softmax")], "layer": [keras.layers.Dense(10), keras.layers.Softmax()]}
        inner = [keras.layers.Flatten(), keras.layers.Dense(6, "tanh")]
        return keras.Sequential([keras.Input((8, 8, 1)), *inner, *(ends[last] if softmax else [keras.layers.Dense(10)])])

    options = {
        "steps": 5,
        "seeds": 2,
        "batch_size": 32,
        "grids": {"SGD": (0.3,)},
        "schedules": ["constant"],
        "normalize": False,
    }
    genome = genomes.backprop(0.3, "tanh")
    one, other = (compare(genome, few(), network(softmax), **options)["curves"] for softmax in (True, False))
    for name in ("genome", "SGD 0.3"):
        np.testing.assert_allclose(one[name]["loss"], other[name]["loss"], rtol=1e-4)


@pytest.mark.slow
def test_a_convolutional_and_a_residual_network_are_compared():
    options = {"steps": 2, "seeds": 2, "batch_size": 32, "grids": {"SGD": (0.3,)}, "schedules": ["constant"]}
    genome = genomes.backprop(0.3, "tanh")
    found = compare(genome, few(), "lenet", normalize=False, **options)
    np.testing.assert_allclose(found["curves"]["genome"]["loss"], found["curves"]["SGD 0.3"]["loss"], rtol=1e-4)
    found = compare(genome, few(), resnet((8, 8, 1), 10, (4,), 1), **options)
    assert list(found["envelopes"]) == ["plain"]  # it has batch normalisation


def test_table_and_picture(result, tmp_path):
    table = format_compare(result)
    for variant in ("plain", "normalized"):
        assert f"envelope, {variant}" in table
        assert f"{result['envelopes'][variant]['accuracy'][-1]:.3f}" in table
    assert "of the fastest plain optimizer's time" in table
    assert "(interquartile mean): genome, normalized against the normalized envelope: " in table
    plot_compare(result, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000


def curve(accuracy, seconds, **about):
    return {"accuracy": [accuracy], "seconds": [seconds * step for step in (0, 1, 3, 7)], **about}


@pytest.fixture
def made():
    sgd = {"optimizer": "SGD", "network": "plain", "schedule": "constant"}
    return {"steps": [0, 1, 3, 7], "curves": {
        "genome": curve([0.1, 0.4, 0.7, 0.8], 2.0), "SGD 1": curve([0.1, 0.2, 0.5, 0.8], 1.0, rate=1.0, **sgd),
        "SGD 2": curve([0.1, 0.3, 0.4, 0.5], 1.0, rate=2.0, **sgd),
    }}  # fmt: skip


def test_envelopes_by_hand(made):
    """Steps 0, 1, 3, 7 are 0, 1, 2, 3 on the axis log2(1 + step), so that all can be read off."""
    found = envelopes.summary(made)
    assert found["envelopes"]["plain"]["accuracy"] == [0.1, 0.3, 0.5, 0.8]
    assert found["envelopes"]["plain"]["which"] == ["SGD 1", "SGD 2", "SGD 1", "SGD 1"]
    assert found["best"] == {"plain": {"SGD": "SGD 1"}}
    assert found["edges"] == {"plain": ["SGD 2", "SGD 1"]}
    assert found["by_seconds"]["seconds"] == [0.0, 1.0, 3.0, 7.0]
    halfway = np.log2(1 + 0.5)  # the genome at half a step
    np.testing.assert_allclose(found["by_seconds"]["genome"][1], 0.1 + 0.3 * halfway)
    np.testing.assert_allclose(found["by_seconds"]["plain"], [0.1, 0.3, 0.5, 0.8])
    assert envelopes.steps_to(made, made["curves"]["genome"], 0.55) == pytest.approx(2**1.5 - 1)
    assert envelopes.steps_to(made, made["curves"]["SGD 2"], 0.6) == np.inf
    # From 0.4 to 0.8: by SGD 1 at (target - 0.2) / 0.3 + 1 and more, by the genome at (target -
    # 0.4) / 0.3 + 1 and more.
    targets = np.linspace(0.4, 0.8, 51)[1:]
    theirs = np.where(targets < 0.5, (targets - 0.2) / 0.3 + 1, (targets - 0.5) / 0.3 + 2)
    ours = np.where(targets < 0.7, (targets - 0.4) / 0.3 + 1, (targets - 0.7) / 0.1 + 2)
    ratios = np.sort((2**theirs - 1) / (2**ours - 1))[12:-12]
    assert found["speedup"]["plain"]["steps"] == pytest.approx(ratios.mean())
    assert found["speedup"]["plain"]["seconds"] == pytest.approx(ratios.mean() / 2)


def test_the_normalized_genome_has_a_speedup_of_its_own(made):
    other = {"optimizer": "SGD", "network": "normalized", "schedule": "constant", "rate": 1.0}
    made["curves"]["SGD 1, normalized"] = curve([0.1, 0.4, 0.7, 0.8], 1.0, **other)
    made["curves"]["genome, normalized"] = curve([0.1, 0.4, 0.7, 0.8], 4.0)
    found = envelopes.summary(made)
    assert found["normalized_speedup"] == {"steps": pytest.approx(1.0), "seconds": pytest.approx(0.25)}
    assert found["by_seconds"]["genome, normalized"][-1] == pytest.approx(0.4 + 0.3 * (np.log2(1 + 7 / 4) - 1))
    del made["curves"]["genome, normalized"]
    assert "normalized_speedup" not in envelopes.summary(made)


def test_no_accuracy_in_common_is_no_speedup(made):
    made["curves"]["genome"]["accuracy"] = [[0.1, 0.9, 0.95, 0.99]]
    assert envelopes.summary(made)["speedup"] == {"plain": {"steps": None, "seconds": None}}


@pytest.mark.slow
def test_shell(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("keras_blur.cli.compare.GRIDS", {"SGD": (0.3,)})
    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    genome.save(tmp_path / "g.json")
    arguments = ["compare", f"--genome={tmp_path / 'g.json'}", "--hidden=8", "--steps=2", "--seeds=2", "--optimizers=SGD",
                 "--nonormalize", f"--json={tmp_path / 'c.json'}", f"--plot={tmp_path / 'c.png'}"]  # fmt: skip
    assert cli.run(arguments) == 0
    shown = capsys.readouterr()
    assert "best SGD 0.3" in shown.out
    assert f"wrote {tmp_path / 'c.png'}" in shown.out
    arms = [line.rsplit(", ", 1)[0] for line in shown.err.splitlines()]
    assert arms == ["seconds of a step (1 of 4)", "g (2 of 4)", "SGD (3 of 4)", "leaders, plain (4 of 4)"]
    first = json.loads((tmp_path / "c.json").read_text())
    assert first["steps"] == [0, 1, 2]
    assert (tmp_path / "c.png").exists()
    again = [*arguments[:-2], f"--json={tmp_path / 'd.json'}", f"--baselines={tmp_path / 'c.json'}"]
    assert cli.run(again) == 0
    second = json.loads((tmp_path / "d.json").read_text())
    assert second["curves"]["SGD 0.3"]["loss"] == first["curves"]["SGD 0.3"]["loss"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--genome must be given"),
        (["--genome=nowhere"], "Received: name='nowhere'"),
        (["--genome=backprop", "--plot=/no/such/folder/c.png"], "there is no folder"),
        (["--genome=backprop", "--network=vgg"], "--network must be mlp, lenet, resnet20 or a .keras file"),
        (["--genome=backprop", "--network=lenet", "--hidden=8"], "--hidden applies only to --network mlp"),
        (["--genome=backprop", "--optimizers=Adagard"], "--optimizers must be some of SGD"),
        (["--genome=backprop", "--optimizers=SGD,SGD"], "--optimizers must name each optimizer once. Received: SGD, SGD"),
        (["--genome=backprop", "--baselines=nowhere.json"], "--baselines must be a file that `compare --json` wrote"),
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
    with pytest.raises(ValueError, match="`genome` must be a single genome"):
        compare(Genome.random(RULE, 0, population=(2,)), few(), (8,), steps=1, seeds=2)
    with pytest.raises(ValueError, match="`tuning_seeds` must be from 1 to 2"):
        compare(genome, few(), (8,), steps=1, seeds=2, tuning_seeds=3)
    for score_at, said in ([[20], "at most 10"], [[0], "a sequence of positive integers"], [5, "a sequence of positive"]):
        with pytest.raises(ValueError, match=f"`score_at` must be {said}"):
            compare(genome, few(), (8,), steps=10, seeds=2, score_at=score_at)
    with pytest.raises(ValueError, match="`schedules` must be some of constant, linear"):
        compare(genome, few(), (8,), steps=1, seeds=2, schedules=["cosine"])
    with pytest.raises(ValueError, match="`schedules` must be some of constant, linear, each once"):
        compare(genome, few(), (8,), steps=1, seeds=2, schedules=["constant", "constant"])
    with pytest.raises(ValueError, match="`genome` must be a single genome or a population on one axis, for 2 layers"):
        evaluate(Genome.random(RULE.replace(layers=3), 0), few(), (8,), steps=1, seeds=2)


def test_backprop_is_sgd():
    """A genome that learns from errors stands beside the optimizers as any other, and this one is
    one of them."""
    found = compare(
        genomes.backprop(0.3, "tanh"), few(), (12,), steps=20, seeds=2, batch_size=16, grids={"SGD": (0.3,)},
        schedules=["constant"], normalize=False,
    )  # fmt: skip
    genome, sgd = (np.array(found["curves"][name]["loss"]) for name in ("genome", "SGD 0.3"))
    assert (genome[:, -1] < 0.8 * genome[:, 0]).all()
    np.testing.assert_allclose(genome, sgd, rtol=1e-4)


@pytest.mark.slow
def test_a_population_learns_side_by_side():
    members = [Genome.random(RULE, seed=number, std=0.5, synapse_update=-0.01) for number in (1, 2, 3)]
    options = {"steps": 3, "seeds": 2, "batch_size": 16}
    found = evaluate(Genome.stack(members), few(), (8,), **options)
    assert list(found["curves"]) == ["genome 0", "genome 1", "genome 2"]
    for number, one in enumerate(members):
        alone = evaluate(one, few(), (8,), **options)["curves"]["genome"]
        np.testing.assert_allclose(found["curves"][f"genome {number}"]["loss"], alone["loss"], rtol=1e-4)
    assert "genome 2" in format_compare(found)


@pytest.mark.slow
def test_toy_tasks_are_compared_on_an_episode_a_seed():
    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    options = {"steps": 20, "seeds": 3, "batch_size": 32, "grids": {"Adam": (0.03, 0.1)}, "schedules": ["constant"]}
    result = compare(genome, tasks.functions("blobs3"), (12,), normalize=False, tuning_seeds=3, **options)
    assert result["data"] == "blobs3"
    assert np.array(result["curves"]["genome"]["accuracy"]).shape == (3, len(result["steps"]))
    envelope = result["envelopes"]["plain"]["accuracy"]
    assert envelope[-1] > 0.9  # Adam learns clouds of points in twenty steps
    table = format_several([result, result], step=5).splitlines()
    assert len(table) == 4
    assert table[1] == table[2]
    assert f"{envelope[result['steps'].index(5)]:.3f}" in table[3]


def test_values_cannot_be_compared():
    genome = Genome.random(RULE, seed=0)
    with pytest.raises(ValueError, match=r"`data` must be tasks of classes\. Received: sine"):
        evaluate(genome, tasks.functions("sine"), (4,), steps=2, seeds=2, batch_size=8)


@pytest.mark.slow
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


@pytest.mark.slow
def test_shell_draws_the_split_that_it_scores(tmp_path, monkeypatch):
    seen = []
    for module, name in ((decisions, "trace_decisions"), (synapses, "trace_synapses")):
        whole = getattr(module, name)

        def trace(*args, _whole=whole, **options):
            seen.append(options["split"])
            return _whole(*args, **options)

        monkeypatch.setattr(module, name, trace)
    asked = ["evaluate", "--genome=functions", "--hidden=8", "--steps=2", "--seeds=2", "--batch_size=16"]
    toy = [*asked, "--functions=xor", "--split=validation", f"--decisions={tmp_path / 'd.png'}"]
    assert cli.run([*toy, f"--synapses={tmp_path / 's.png'}"]) == 0
    assert cli.run([*asked, "--data=digits", f"--synapses={tmp_path / 't.png'}"]) == 0
    assert seen == ["validation", "validation", "train"]


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


@pytest.mark.slow
def test_a_comparison_tells_how_far_it_is(result, tmp_path):
    told = []

    def watch(progress):
        told.append(progress)
        if progress.arm == "Adam" and progress.done == 1:
            raise KeyboardInterrupt

    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    with pytest.raises(KeyboardInterrupt):
        compare(genome, few(), (12,), steps=10, seeds=2, batch_size=32, grids=GRIDS, watch=watch)
    arms = list(dict.fromkeys((one.arm, one.number, one.count) for one in told))
    assert arms == [("seconds of a step", 1, 8), ("genome", 2, 4), ("SGD", 3, 6), ("Adam", 4, 4)]
    assert [one.done for one in told if one.arm == "SGD"] == list(range(6))
    assert {one.arms for one in told} == {8}
    assert told[0].result is None
    partial = told[-1].result
    assert len(partial["curves"]) == 2 + 6 + 1
    assert partial["curves"]["SGD 1"]["loss"][0] == pytest.approx(result["curves"]["SGD 1"]["loss"][0], rel=1e-5)
    assert "partial" not in result
    assert partial["partial"]
    assert "interrupted" in format_compare(partial)
    assert "(interrupted)" in plot_compare(partial, tmp_path / "c.png").get_suptitle()


@pytest.mark.slow
def test_an_evaluation_tells_how_far_it_is():
    told = []
    genome = Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01)
    whole = evaluate(genome, few(), (12,), steps=10, seeds=2, batch_size=32, watch=told.append)
    assert [(one.arm, one.done) for one in told] == [("genome", step) for step in (0, 0, 1, 2, 5, 10)]
    assert told[0].result is None
    begun = told[3].result
    assert begun["steps"] == [0, 1, 2]
    assert begun["curves"]["genome"]["loss"] == [row[:3] for row in whole["curves"]["genome"]["loss"]]
    assert begun["partial"]
    few_scores = evaluate(genome, few(), (12,), steps=10, seeds=2, batch_size=32, score_at=(2,))
    assert few_scores["steps"] == [0, 2, 10]
    wanted = [[row[place] for place in (0, 2, 4)] for row in whole["curves"]["genome"]["loss"]]
    np.testing.assert_allclose(few_scores["curves"]["genome"]["loss"], wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_ctrl_c_keeps_the_curves_so_far(tmp_path, capsys, monkeypatch, command):
    score = globals()[command]

    def ended(*arguments, watch, **options):
        def stop(progress):
            watch(progress)
            if progress.data == "circle" and progress.done == 1 and progress.arm == "genome":
                raise KeyboardInterrupt

        return score(*arguments, watch=stop, **options)

    monkeypatch.setattr(f"keras_blur.cli.{command}.{command}", ended)
    monkeypatch.setattr("keras_blur.cli.compare.GRIDS", {"SGD": (0.3,)})
    path, numbers = tmp_path / "mine.json", tmp_path / "n.json"
    Genome.random(RULE, seed=0, std=0.5, synapse_update=-0.01).save(path)
    size = ["--hidden=6", "--steps=2", "--seeds=2", "--batch_size=8", f"--json={numbers}"]
    size += ["--optimizers=SGD", "--nonormalize"] if command == "compare" else []
    assert cli.run([command, f"--genome={path}", "--functions=xor,circle,square", *size]) == 130
    shown = capsys.readouterr()
    assert "interrupted; kept the curves learned so far" in shown.err
    assert "mine  " in shown.out  # the row has the genome's name
    document = json.loads(numbers.read_text())
    assert document["partial"]
    whole, begun = document["results"]
    assert (whole["data"], whole["steps"], "partial" in whole) == ("xor", [0, 1, 2], False)
    assert (begun["data"], begun["partial"], list(begun["curves"])) == ("circle", True, ["genome"])
    if command == "compare":
        assert np.shape(begun["curves"]["genome"]["accuracy"]) == (1, 3)  # one seed of two
    else:
        assert begun["steps"] == [0, 1]
