"""Pictures show what is there: every rule can be drawn, and traces hold the numbers that numpy and
the learners give."""

import itertools
import struct

import keras
import numpy as np
import pytest
import rule_table
from keras import ops
from marks import slow_but
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rule_table import COVER, SINGLE

from keras_blur import Genome, Rule, genomes, random, tasks
from keras_blur.learners import BaselineLearner, Blur
from keras_blur.report.curves import plot_compare
from keras_blur.report.decisions import _tint, draw_decisions, trace_decisions
from keras_blur.report.genome import _short, draw_genome
from keras_blur.report.learning import plot_fits
from keras_blur.report.synapses import draw_synapses, learner_of, trace_synapses

MATRICES = ("nu", "mu", "nu_tilde", "mu_tilde")
STABLE = {
    **SINGLE["forward_update_stable"], "normalize_activations": "both", "normalize_synapses": "both",
    "rescale_synapses": True, "update_decay": "power",
}  # fmt: skip
DRAWN = {
    **SINGLE,
    **{f"cover_{name}": options for name, options in COVER.items()},
    **{f"stable_{states}": {**STABLE, "states": states} for states in (8, 9)},
    "stable_layers": {**STABLE, "layers": 2, "states": 3},
}
# Rules that differ in other things than their arrays have the same picture: one of each kind is
# drawn.
KINDS = {}
for name, options in DRAWN.items():
    KINDS.setdefault((tuple(Rule(**options).shapes().items()), Rule(**options).layers), name)


def size_of(path):
    """Width and height of a PNG, in pixels."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def overlaps(made, texts):
    """Pairs of texts that lie upon each other, and texts that reach out of the figure."""
    made.set_dpi(150)  # as it was saved, when all places were found
    renderer = FigureCanvasAgg(made).get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text().strip()]
    out = [said for said, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > made.bbox.x1 or box.y1 > made.bbox.y1]

    def upon(one, other):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        return width > 1 and height > 1

    return [(a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if upon(a[1], b[1])] + out


def words(made):
    """All texts of a figure but those inside its heat maps."""
    found = [made._suptitle] if made._suptitle else []
    for axis in made.axes:
        if axis.axison:
            found += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.get_xticklabels(), *axis.get_yticklabels()]
        found += [] if axis.images else axis.texts
    return [text for text in found if text.get_visible()]


# Genomes.


@pytest.mark.parametrize("name", slow_but(list(KINDS.values())[:8], KINDS.values()))
def test_every_kind_of_genome_is_drawn(name, tmp_path):
    rule = Rule(**DRAWN[name])
    genome = rule_table.draw_genome(rule)
    made = draw_genome(genome, tmp_path / "g.png")
    width, height = size_of(tmp_path / "g.png")
    assert 1000 < width < 2600
    assert 300 < height < 2600
    shown = [axis for axis in made.axes if axis.images and axis.get_title()]
    expected = [*MATRICES, *(["forward_nu_tilde", "forward_mu_tilde"] if rule.separate_forward_synapse else [])]
    layers = [genome] if rule.layers is None else [genome.layer(index) for index in range(rule.layers)]
    for axis, (own, matrix) in zip(shown, itertools.product(layers, expected), strict=True):
        values = own.arrays[matrix]
        np.testing.assert_array_equal(axis.images[0].get_array(), values)
        assert (
            axis.images[0].norm.vmin == -axis.images[0].norm.vmax == -max(np.abs(genome.arrays[n]).max() for n in expected)
        )
        assert {"nu": "eq. 5", "mu": "eq. 6"}.get(matrix, "eq. 7") in axis.get_title()
        assert ("after forward" in axis.get_title()) == matrix.startswith("forward_")
        axes = {axis.get_ylabel().splitlines()[-1], axis.get_xlabel()}
        assert axes == ({"source state", "target channel"} if "tilde" in matrix else {"source state", "target state"})
        cells = [text.get_text() for text in axis.texts]
        assert cells == ([_short(value) for value in values.ravel()] if rule.states <= 8 else [])
    tables = [axis for axis in made.axes if not axis.images and axis.texts]
    assert len(tables) == len(layers)
    for axis, own in zip(tables, layers, strict=True):
        written = [text.get_text() for text in axis.texts]
        for number in set(rule.shapes()) - set(expected):
            for value in np.atleast_1d(own.arrays[number]):
                assert f"{value:.4g}" in written
            if rule.shapes()[number] == ():
                assert number in written
    assert overlaps(made, words(made)) == []


def test_numbers_of_cells_are_short_and_correct():
    wanted = {0.0: "0", 0.125: "0.12", -1.996: "-2.00", 0.004: "4e-3", -12.34: "-12.3", 123.4: "123", -1e4: "-1e4"}
    assert {value: _short(value) for value in wanted} == wanted
    for value in np.random.default_rng(0).standard_normal(200) * 10.0 ** np.arange(-8, 12).repeat(10):
        size, shown = abs(value), _short(value)
        assert len(shown) <= 6
        if "e" in shown:  # one digit
            unit = 10.0 ** np.floor(np.log10(size))
        else:
            unit = 0.01 if size < 9.995 else 0.1 if size < 99.95 else 1.0
        assert abs(float(shown) - value) <= 0.5 * unit * (1 + 1e-9)


def test_a_genome_of_zeros_is_drawn(tmp_path):
    genome = Genome.random(Rule(), seed=0, std=0.0)
    draw_genome(genome, tmp_path / "g.png")
    assert size_of(tmp_path / "g.png")[0] > 1000


def test_a_population_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`genome` must be a single genome"):
        draw_genome(Genome.random(Rule(), seed=0, population=(2,)), tmp_path / "g.png")
    assert not list(tmp_path.iterdir())


# Synapses.


def kernels_of(genome, of, hidden, steps, batch):
    """The forward kernels by step and layer, learned eagerly."""
    learner, outer = learner_of(genome, hidden)
    episode = next(iter(of.dataset(3, steps=steps, batch=batch, query=1, split="test")))
    state = learner.init({}, random.seed_of(3), of.features, of.outputs)
    kept = [[ops.convert_to_numpy(own["kernel"]) for own in state.synapses]]
    for x, y in zip(episode["x"], episode["y"], strict=True):
        state, _ = learner.step(outer, state, x, y)
        kept.append([ops.convert_to_numpy(own["kernel"]) for own in state.synapses])
    return kept


@pytest.mark.parametrize("options", [{"states": 3, "oja": "weights", "layers": 3}, {"channels": "tied"}])
def test_traces_of_synapses_are_those_of_numpy(options):
    genome = Genome.random(Rule(batch_reduction="mean", **options), seed=1, std=0.4, synapse_update=-0.02)
    of = tasks.functions("blobs3")
    trace = trace_synapses(genome, of, (7, 5), steps=2, seed=3, batch_size=8)
    assert trace["steps"].tolist() == [0, 1, 2]
    for step, layers in enumerate(kernels_of(genome, of, (7, 5), 2, 8)):
        for layer, kernel in enumerate(layers):
            for channel, matrix in enumerate(kernel.astype(float)):
                values = np.linalg.svd(matrix, compute_uv=False)
                place = layer, channel, step
                np.testing.assert_allclose(trace["norm"][place], np.linalg.norm(matrix), rtol=1e-5)
                np.testing.assert_allclose(trace["singular_values"][place][: len(values)], values, rtol=1e-4, atol=1e-6)
                assert np.isnan(trace["singular_values"][place][len(values) :]).all()
                np.testing.assert_allclose(trace["largest"][place], np.linalg.norm(matrix, 2), rtol=1e-5)
                np.testing.assert_allclose(trace["smallest"][place], np.linalg.norm(matrix, -2), rtol=1e-4, atol=1e-6)
                rank = np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2
                np.testing.assert_allclose(trace["stable_rank"][place], rank, rtol=1e-4)
    assert trace["norm"].shape == (3, genome.rule.synapse_channels, 3)
    assert not np.allclose(trace["norm"][..., 0], trace["norm"][..., -1])


def test_synapses_are_drawn(tmp_path):
    values = np.sort(np.random.default_rng(0).uniform(0.1, 3.0, (2, 3, 21, 6)))[..., ::-1].copy()
    values[1, ..., 4:] = np.nan
    trace = {"steps": np.arange(21), "norm": np.sqrt(np.nansum(values**2, axis=-1)), "singular_values": values}
    made = draw_synapses(trace, tmp_path / "s.png", "xor")
    width, height = size_of(tmp_path / "s.png")
    assert 1000 < width < 2000
    assert 500 < height < 1500
    assert [axis.get_title() for axis in made.axes[:4]] == ["Frobenius norm", *(f"spectrum, step {s}" for s in (0, 10, 20))]
    assert len(made.axes) == 4 * 2
    assert all(axis.get_yscale() == "log" for axis in made.axes)
    assert all(len(axis.lines) == 3 for axis in made.axes)
    assert [text.get_text() for text in made.legends[0].texts] == ["channel 1", "channel 2", "channel 3"]
    np.testing.assert_allclose(made.axes[0].lines[2].get_ydata(), trace["norm"][0, 2])
    np.testing.assert_allclose(made.axes[3].lines[1].get_ydata(), values[0, 1, 20])
    np.testing.assert_allclose(made.axes[6].lines[0].get_ydata(), values[1, 0, 10, :4])
    assert overlaps(made, [axis.title for axis in made.axes] + [axis.xaxis.label for axis in made.axes]) == []


def test_divergence_is_drawn_as_what_it_is(tmp_path):
    genome = Genome.random(Rule(forward_activation="linear", last_activation="linear"), seed=0, synapse_update=10.0)
    trace = trace_synapses(genome, tasks.functions("xor"), (9,), steps=8, batch_size=8)
    assert np.isfinite(trace["norm"][..., 0]).all()
    assert np.isnan(trace["norm"][..., -1]).all()
    assert np.isnan(trace["smallest"][..., -1]).all()
    made = draw_synapses(trace, tmp_path / "s.png")
    assert [text.get_text() for text in made.axes[3].texts] == ["not finite"]


def test_backprop_descends_as_the_optimizer_does():
    trace = trace_synapses(genomes.backprop(0.3), tasks.functions("circle"), (6,), steps=5, seed=3, batch_size=8)
    learner = BaselineLearner(keras.optimizers.SGD(0.3), (6,))
    episode = next(iter(tasks.functions("circle").dataset(3, steps=5, batch=8, query=1, split="test")))
    state = learner.init({}, random.seed_of(3), 2, 2)
    for x, y in zip(episode["x"], episode["y"], strict=True):
        state, _ = learner.step({}, state, x, y)
    for layer in range(2):
        np.testing.assert_allclose(trace["norm"][layer, 0, -1], np.linalg.norm(state.weights[2 * layer]), rtol=1e-5)


@pytest.mark.parametrize("loss", ["mean_squared_error", "sparse", "hinge"])
def test_errors_of_other_losses(loss):
    chosen = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if loss == "sparse" else loss
    trace = trace_synapses(genomes.backprop(0.3, loss=chosen), tasks.functions("xor"), (6,), steps=3, batch_size=8)
    assert np.isfinite(trace["norm"]).all()
    assert (trace["norm"][..., 0] != trace["norm"][..., -1]).all()


def test_mistakes_about_synapses():
    genome, of = Genome.random(Rule(), seed=0), tasks.functions("xor")
    with pytest.raises(ValueError, match=r"`steps` must be at least 1\. Received: steps=0"):
        trace_synapses(genome, of, (4,), steps=0)
    several = Genome.random(Rule(), 0, population=(2,)), "`genome` must be a single genome. Received"
    for odd, message in (several, (Genome.random(Rule(layers=3), 0), "`genome` must be a single genome, for 2 layers")):
        with pytest.raises(ValueError, match=message):
            trace_synapses(odd, of, (4,), steps=2)
    with pytest.raises(ValueError, match="keep_neurons=False"):
        trace_synapses(Genome.random(Rule(keep_neurons=True), 0), of, (4,), steps=2)


# Decisions.

SMALL = {"steps": (0, 1, 3), "seed": 2, "resolution": 9, "batch_size": 8, "query": 40}


def told(learner, outer, state, x):
    return ops.convert_to_numpy(ops.argmax(learner.predict(outer, state, ops.array(x)), -1))


@pytest.mark.parametrize("name", ["backprop", "random", "optimizer"])
def test_decisions_are_those_of_predict(name):
    of = tasks.functions("two_moons")
    given = {
        "backprop": genomes.backprop(0.5),
        "random": Genome.random(Rule(batch_reduction="mean", states=3), seed=0, std=0.5, synapse_update=-0.1),
        "optimizer": BaselineLearner(keras.optimizers.Adam(0.1), (6,)),
    }[name]
    trace = trace_decisions(given, of, (6,), **SMALL)
    (row,) = trace["rows"]
    learner, outer = (given, {}) if name == "optimizer" else learner_of(given, (6,))
    episode = next(iter(of.dataset(2, steps=3, batch=8, query=40, split="test")))
    state = learner.init({}, random.seed_of(2), 2, 2)
    square = np.array([[(x, y) for x in trace["axis"]] for y in trace["axis"]], np.float32)
    for step in range(4):
        if step in SMALL["steps"]:
            place = SMALL["steps"].index(step)
            np.testing.assert_array_equal(
                row["regions"][place], told(learner, outer, state, square.reshape(-1, 2)).reshape(9, 9)
            )
            correct = told(learner, outer, state, row["query_x"]) == row["query_y"]
            assert row["accuracy"][place] == correct.mean()
        if step < 3:
            state, _ = learner.step(outer, state, episode["x"][step], episode["y"][step])


def test_networks_of_baseline_learners_may_be_functions():
    def build(shape, outputs):
        assert shape == (2,)
        return [keras.layers.Dense(6, "tanh"), keras.layers.Dense(outputs)]

    of = [tasks.functions("xor"), tasks.functions("blobs3")]
    rows = [
        trace_decisions(BaselineLearner(keras.optimizers.SGD(0.5), network), of, **SMALL)["rows"]
        for network in (build, (6,))
    ]
    for one, other in zip(*rows, strict=True):
        np.testing.assert_array_equal(one["regions"], other["regions"])


def test_backprop_decides_as_sgd_does():
    learners = {"backprop": genomes.backprop(0.5), "SGD": BaselineLearner(keras.optimizers.SGD(0.5), (6,))}
    rows = trace_decisions(learners, tasks.functions(["circle", "xor"]), (6,), **SMALL)["rows"]
    assert [(row["task"], row["learner"]) for row in rows] == list(itertools.product(["circle", "xor"], learners))
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        np.testing.assert_array_equal(one["regions"], other["regions"])
        np.testing.assert_array_equal(one["query_x"], other["query_x"])


def test_normalised_rules_decide_with_the_statistics_of_the_query():
    rule = Rule(normalize_activations="both", normalize_synapses="stored", batch_reduction="mean")
    genome, of = Genome.random(rule, seed=0, synapse_update=-0.1), tasks.functions("blobs3")
    wide = trace_decisions(genome, of, (8,), **SMALL)["rows"][0]
    fine = trace_decisions(genome, of, (8,), **{**SMALL, "resolution": 17})["rows"][0]
    # Other points beside it change nothing about a point: the coarse square is every second point
    # of the fine one.
    np.testing.assert_array_equal(wide["regions"], fine["regions"][:, ::2, ::2])
    learner, outer = learner_of(genome, (8,))
    state = learner.init({}, random.seed_of(2), 2, 3)
    assert wide["accuracy"][0] == (told(learner, outer, state, wide["query_x"]) == wide["query_y"]).mean()


def test_each_example_for_itself_where_units_are_normalised():
    rule = Rule(normalize_activations="both", normalization_axis="units", batch_reduction="mean")
    row = trace_decisions(Genome.random(rule, seed=0), tasks.functions("xor"), (8,), **SMALL)["rows"][0]
    assert set(np.unique(row["regions"])) <= {0, 1}


def test_decisions_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {
            "task": task, "learner": learner, "classes": classes, "accuracy": rng.uniform(0, 1, 3),
            "regions": rng.integers(0, classes, (3, 9, 9)), "query_x": rng.uniform(-1, 1, (40, 2)),
            "query_y": rng.integers(0, classes, 40),
        }
        for task, classes in (("xor", 2), ("blobs9", 9))
        for learner in ("trained", "Adam")
    ]  # fmt: skip
    trace = {"steps": np.array([0, 1, 3]), "axis": np.linspace(-1.05, 1.05, 9), "rows": rows}
    made = draw_decisions(trace, tmp_path / "d.png")
    width, height = size_of(tmp_path / "d.png")
    assert 600 < width < 1200
    assert 900 < height < 1400
    assert len(made.axes) == 4 * 3
    assert [axis.get_title().splitlines()[0] for axis in made.axes[:3]] == ["step 0", "step 1", "step 3"]
    shown = [float(axis.get_title().splitlines()[-1]) for axis in made.axes]
    np.testing.assert_allclose(shown, np.concatenate([row["accuracy"] for row in trace["rows"]]), atol=0.0051)
    labels = ["xor\ntrained", "xor\nAdam", "blobs9\ntrained", "blobs9\nAdam"]
    assert [axis.get_ylabel() for axis in made.axes[::3]] == labels
    assert [text.get_text() for text in made.legends[0].texts] == [f"class {number}" for number in range(1, 10)]
    points = sum(len(one.get_offsets()) for one in made.axes[0].collections if one.get_offsets().any())
    assert points == 40
    np.testing.assert_array_equal(made.axes[0].images[0].get_array(), trace["rows"][0]["regions"][0])
    assert overlaps(made, words(made) + made.legends[0].texts) == []
    one = draw_decisions({**trace, "rows": trace["rows"][:1]}, tmp_path / "one.png")
    assert overlaps(one, words(one) + one.legends[0].texts) == []
    assert one.axes[0].get_ylabel() == "xor"


def test_fills_differ_in_their_grey():
    greys = np.array([_tint(number, 9) for number in range(9)]) @ (0.299, 0.587, 0.114)
    np.testing.assert_allclose(greys, np.linspace(0.95, 0.80, 9))


def test_what_is_not_finite_is_not_decided(tmp_path):
    genome = Genome.random(Rule(forward_activation="linear", last_activation="linear"), seed=0, synapse_update=1e6)
    trace = trace_decisions(genome, tasks.functions("xor"), (6,), **{**SMALL, "steps": (9,)})
    assert (trace["rows"][0]["regions"] == -1).all()
    assert trace["rows"][0]["accuracy"].tolist() == [0.0]
    draw_decisions(trace, tmp_path / "d.png")
    assert size_of(tmp_path / "d.png")[0] > 200


@pytest.mark.parametrize("steps", [(), (0, 0), (2, 1), (-1, 3)])
def test_steps_increase(steps):
    with pytest.raises(ValueError, match="`steps` must be one or more increasing numbers"):
        trace_decisions(Genome.random(Rule(), seed=0), tasks.functions("xor"), steps=steps)


def test_mistakes_about_decisions():
    genome, xor = Genome.random(Rule(), seed=0), tasks.functions("xor")
    for odd in (tasks.functions("sine"), tasks.images(), [xor, "circle"]):
        with pytest.raises(ValueError, match="`tasks` must be 2-D tasks of classes"):
            trace_decisions(genome, odd)
    for odd in ([], [xor, tasks.functions(["circle", "xor"])]):
        with pytest.raises(ValueError, match="`tasks` must be one or more different functions"):
            trace_decisions(genome, odd)
    for odd in ({}, "functions", None):
        with pytest.raises(ValueError, match="`learners` must be a genome, a BaselineLearner, or several by name"):
            trace_decisions(odd, xor)
    for odd in (Blur((4,)), "functions"):
        with pytest.raises(ValueError, match="`learners` must be genomes and BaselineLearners"):
            trace_decisions({"one": odd}, xor)
    for name in ("resolution", "batch_size", "query"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least"):
            trace_decisions(genome, xor, **{name: 0})
    with pytest.raises(ValueError, match="`genome` must be a single genome, for 2 layers"):
        trace_decisions(Genome.random(Rule(layers=3), 0), xor)


# Curves.


def comparison(optimizers=True, steps=(0, 1, 2, 5, 10, 20, 50, 100)):
    """A result in which every curve is near its upper end."""
    rng = np.random.default_rng(0)
    names = ["genome", *(["SGD 0.1", "Adam 0.01"] if optimizers else [])]
    seconds = [0.01 * s for s in steps]
    curves = {n: {"accuracy": rng.choice([0.0, 0.9, 1.0], (3, len(steps))).tolist(), "seconds": seconds} for n in names}
    best = {"best": {"plain": {name.split()[0]: name for name in names[1:]}}}
    best["envelopes"] = {variant: {"accuracy": [1.0] * len(steps)} for variant in ("plain", "normalized")}
    best["by_seconds"] = {"seconds": seconds} | dict.fromkeys(("plain", "normalized"), [1.0] * len(steps))
    return {"name": "mnist-4state", "data": "digits", "network": "hidden 64,64", "seeds": 3, "split": "test",
            "steps": list(steps), "curves": curves, **(best if optimizers else {})}  # fmt: skip


def covered(made):
    """Panels that a legend reaches into, those of panels themselves included."""
    made.set_dpi(150)
    renderer = FigureCanvasAgg(made).get_renderer()
    legends = [*made.legends, *(axis.get_legend() for axis in made.axes if axis.get_legend())]
    boxes = [legend.get_window_extent(renderer) for legend in legends]
    return [axis for axis in made.axes for box in boxes if axis.get_window_extent(renderer).overlaps(box)]


CURVE = {"steps": [0, 1, 2], "seconds": [0.0, 0.1, 0.2], "accuracy": [0.1, 0.4, 0.7]}


def test_legends_stand_beside_the_curves(tmp_path):
    made = plot_compare(comparison(), tmp_path / "c.png")
    names = ["mnist-4state", "SGD 0.1", "Adam 0.01", "best optimizer at each step", "the same with batch normalisation"]
    assert [text.get_text() for text in made.legends[0].texts] == names
    fits = plot_fits({"genome mine": CURVE, "Keras SGD 0.1": CURVE}, tmp_path / "f.png", "digits")
    assert [text.get_text() for text in fits.legends[0].texts] == ["genome mine", "Keras SGD 0.1"]
    assert [axis.get_xlabel() for axis in fits.axes] == ["learning step", "time to learn (s)"]
    with np.errstate(divide="ignore"):
        assert fits.axes[1].xaxis.get_transform().transform([0.0])[0] == -np.inf  # not drawn
    for figure in (made, fits):
        assert covered(figure) == []
        labels = [label for axis in figure.axes for label in (axis.xaxis.label, axis.yaxis.label)]
        assert overlaps(figure, [figure._suptitle, *labels, *figure.legends[0].texts]) == []


def test_one_curve_has_no_legend(tmp_path):
    made = plot_compare(comparison(optimizers=False), tmp_path / "c.png")
    assert made.legends == []
    assert made.get_suptitle().startswith("mnist-4state on digits, hidden 64,64")
    values = np.sort(np.random.default_rng(0).uniform(0.1, 3.0, (2, 1, 21, 6)))[..., ::-1].copy()
    trace = {"steps": np.arange(21), "norm": np.sqrt(np.sum(values**2, axis=-1)), "singular_values": values}
    assert draw_synapses(trace, tmp_path / "s.png").legends == []


def test_bands_of_accuracies_stay_between_0_and_1(tmp_path):
    made = plot_compare(comparison(), tmp_path / "c.png")
    for axis in made.axes:
        ends = np.concatenate([path.vertices[:, 1] for band in axis.collections for path in band.get_paths()])
        assert ends.min() >= 0.0
        assert ends.max() == 1.0


@pytest.mark.parametrize(
    ("last", "wanted"),
    [(100, ["0", "1", "10", "100"]), (1000, ["0", "1", "10", "100", "1000"]), (10, ["0", "1", "2", "5", "10"])],
)
def test_ticks_of_steps_are_plain_numbers(tmp_path, last, wanted):
    steps = [step for step in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if step <= last]
    made = plot_compare(comparison(steps=steps), tmp_path / "c.png")
    FigureCanvasAgg(made).draw()
    assert [label.get_text() for label in made.axes[0].get_xticklabels()] == wanted
    assert [axis.get_xlabel() for axis in made.axes] == ["learning step", "time to learn one network (s)"]
    assert not any("$" in label.get_text() for axis in made.axes for label in axis.get_xticklabels())


def test_ticks_of_many_decades_are_plain_numbers(tmp_path):
    values = np.geomspace(1e3, 1e-1, 6) * np.ones((2, 2, 21, 6))
    trace = {"steps": np.arange(21), "norm": np.sqrt(np.sum(values**2, axis=-1)), "singular_values": values}
    made = draw_synapses(trace, tmp_path / "s.png")
    FigureCanvasAgg(made).draw()
    labels = [label.get_text() for label in made.axes[1].get_yticklabels()]
    assert {"0.1", "1", "10", "100", "1000"} <= set(labels)


def test_a_curve_of_one_point_is_seen(tmp_path):
    made = plot_fits({"mine": {key: values[:1] for key, values in CURVE.items()}}, tmp_path / "f.png", "digits")
    assert all(line.get_marker() == "o" for axis in made.axes for line in axis.lines)


DRAWINGS = {
    "draw_genome": lambda path: draw_genome(Genome.random(Rule(), 0), path),
    "draw_synapses": lambda path: draw_synapses({}, path),
    "draw_decisions": lambda path: draw_decisions({}, path),
    "plot_compare": lambda path: plot_compare({}, path),
    "plot_fits": lambda path: plot_fits({}, path, "digits"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_paths_are_checked_before_anything_is_drawn(name, tmp_path):
    ending = r"must end with \.png, \.pdf or \.svg"
    for path, said in [("x.jpg", ending), ("no/x.png", "there is no folder"), ("", "be a file")]:
        with pytest.raises(ValueError, match=said):
            DRAWINGS[name](tmp_path / path)


def test_the_title_of_a_genome_is_its_name(tmp_path):
    made = draw_genome(genomes.load("functions"), tmp_path / "g.svg", "functions")
    assert made.get_suptitle().startswith("functions: ")
    assert (tmp_path / "g.svg").read_text().startswith("<?xml")
