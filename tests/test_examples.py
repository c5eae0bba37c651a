"""examples/: seeds are flags, arms see the same batches, references are strong. CI runs the
examples."""

import ast
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from absl import app

FOLDER = pathlib.Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
EXPERIMENTS = sorted(set((FOLDER / "paper").glob("*.py")) - {FOLDER / "paper" / "experiment.py"})


def flags_of(tree: ast.AST) -> dict[str, str]:
    """Variables of flags by the flags' names."""
    return {
        node.value.args[0].value: node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func).startswith("flags.DEFINE_")
    }


def uses(tree: ast.AST, what: str) -> int:
    return sum(ast.unparse(node) == what for node in ast.walk(tree) if isinstance(node, ast.Attribute))


@pytest.mark.parametrize("path", [*EXAMPLES, FOLDER / "paper" / "experiment.py"], ids=lambda path: path.stem)
def test_the_first_seed_is_a_flag_that_is_used(path):
    tree = ast.parse(path.read_text())
    assert "seed" in flags_of(tree)
    assert uses(tree, f"{flags_of(tree)['seed']}.value") >= 1


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_takes_its_seed_from_the_setting(path):
    assert uses(ast.parse(path.read_text()), "setting.seed") >= 1


@pytest.mark.parametrize("path", [*EXAMPLES, *EXPERIMENTS], ids=lambda path: path.stem)
def test_no_seed_is_wired_in(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.For, ast.comprehension)) and "seed" in ast.unparse(node.target):
            assert not ast.unparse(node.iter).startswith("range("), ast.unparse(node.iter)
        if isinstance(node, ast.keyword) and node.arg == "seed":
            assert not isinstance(node.value, ast.Constant), ast.unparse(node)


def test_there_are_examples():
    assert len(EXAMPLES) >= 7
    assert len(EXPERIMENTS) >= 12


def functions_of(name: str, *wanted: str) -> list:
    """Functions of an example, without its flags, which two examples cannot both define in one
    process."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    space: dict = {"np": np, "tf": tf}
    exec(compile(tree, name, "exec"), space)
    return [space[one] for one in wanted]


def test_arms_of_noisy_labels_share_the_order_of_batches():
    batches = module_of("noisy_labels").Batches
    x, y = np.arange(10, dtype="float32")[:, None], np.arange(10)

    def listed(epochs):
        found = batches(x, y, 3, epochs, 5)
        return [(a[:, 0].tolist(), b.tolist()) for a, b in (found[number] for number in range(found.num_batches))]

    whole, later = listed(range(4)), listed(range(2, 4))
    assert len(whole) == 4 * 3
    assert later == whole[6:]
    assert all(a == b for a, b in whole)
    for epoch in range(4):
        assert len({one for a, _ in whole[3 * epoch : 3 * epoch + 3] for one in a}) == 9
    assert whole[:3] != whole[3:6]


def test_passes_of_evograd_have_each_example_once_and_depend_on_the_seed_alone():
    batches = module_of("evograd").Batches
    x, y = np.arange(10, dtype="float32"), np.arange(10)
    one, same, other = (batches(x, y, 5, 3, seed) for seed in (0, 0, 1))
    seen = [one[number][1].tolist() for number in range(6)]
    assert seen == [same[number][0].tolist() for number in range(6)]
    assert seen != [other[number][1].tolist() for number in range(6)]
    for place in (0, 2, 4):
        assert sorted(seen[place] + seen[place + 1]) == list(range(10))
    assert seen[:2] != seen[2:4]


def test_a_picture_of_weights_needs_an_arm_that_learns_some(monkeypatch):
    flags = {"_QUICK": True, "_SEED": 0, "_NOISE": ["0.6"], "_PLOT": "p.png", "_ARMS": ["cross-entropy"], "_SEEDS": 2}
    with pytest.raises(app.UsageError, match=r"--plot needs an arm in --arms that learns weights\. Received: cross-entropy"):
        module_of("noisy_labels", **flags).main([])


@pytest.mark.parametrize(
    ("parts", "arms", "run"),
    [
        (None, None, ["sines", "seconds", "classes"]),
        (None, ["Leap"], ["classes"]),
        (None, ["first-order warps and Reptile"], ["sines", "seconds"]),
        (["seconds"], ["warps and Reptile"], ["seconds"]),
        (["sines"], ["Leap"], None),
        (None, ["Reptil"], None),
    ],
)
def test_arms_of_warpgrad_are_those_of_a_part(parts, arms, run):
    example = module_of("warpgrad", _PART=parts, _ARM=arms)
    if run is None:
        with pytest.raises(app.UsageError, match=f"--arm must be one of Reptile; .*Received: {arms[0]}$"):
            example.asked_parts()
    else:
        assert example.asked_parts() == run


@pytest.mark.parametrize("held_out", [None, "fashion_mnist"])
def test_meta_augmentation_reads_images_from_its_folder(monkeypatch, held_out):
    flags = {"_HELD_OUT": held_out, "_IMAGES": "mnist", "_DATA_DIR": "folder", "_SEED": 0, "_QUICK": True}
    asked = []

    def images(name, **options):
        asked.append(options["data_dir"])
        if len(asked) == 2:
            raise StopIteration
        return name

    monkeypatch.setattr("keras_blur.tasks.images", images)
    with pytest.raises((StopIteration, RuntimeError)):
        module_of("meta_augmentation", **flags).genomes(1, 1, 2)
    assert asked == ["folder", "folder"]


def test_hopfield_goes_on_from_where_one_step_leads():
    hopfield, nearest = functions_of("remember", "hopfield", "nearest")
    rng = np.random.default_rng(0)
    patterns = rng.choice([-1.0, 1.0], (400, 4, 16))
    shown = np.argsort(rng.random((400, 4, 16)), axis=-1) < 8
    shown = shown.astype(float)
    cue = patterns * shown

    def accuracy(found):
        return np.mean((found == patterns)[shown == 0])

    once, often = (hopfield(patterns, cue, shown, most) for most in (1, 20))
    assert np.array_equal(often * shown, cue)  # the cue is held
    assert set(np.unique(often)) == {-1.0, 1.0}
    assert 0.93 < accuracy(once) < accuracy(often) < accuracy(nearest(patterns, cue, shown))
    assert accuracy(nearest(patterns, cue, shown)) > 0.99


def module_of(name: str, **flags) -> SimpleNamespace:
    """An example as a module, with values in the place of its flags; see `functions_of`."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    defined = set(flags_of(tree).values())
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in defined) and not isinstance(node, ast.If)
    ]
    space: dict = {"__name__": name, **{key: SimpleNamespace(value=value) for key, value in flags.items()}}
    exec(compile(tree, name, "exec"), space)
    return SimpleNamespace(**space)


PATHS = {"_MOMENTUM": 0.5, "_DECAY": 1e-3, "_JIT": False}


def path_setting(arm):
    """The example on feedback paths, a model of an arm, a batch, and images of 20 by 20."""
    example = module_of("feedback_paths", **PATHS)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (example.BATCH, 20, 20, 1)).astype("uint8"), rng.integers(0, 10, example.BATCH)
    images = SimpleNamespace(x_train=x, y_train=y, classes=10, scale=255.0)
    return example, example.network(arm, 0.1, 0, images), x, y, images


@pytest.mark.parametrize("arm", ["direct errors", "direct labels"])
def test_direct_paths_bring_the_output_s_error_or_labels_through_frozen_kernels(arm):
    """Each hidden kernel changes by the gradient of its layer's sum with what the frozen kernel
    brings it, by a tape."""
    example, model, x, y, images = path_setting(arm)
    plain = example.network("backpropagation", 0.1, 0, images)
    prediction = model.predict(x, verbose=0)
    logits = prediction[0] if isinstance(prediction, list) else prediction
    np.testing.assert_allclose(logits, plain.predict(x, verbose=0), rtol=1e-5, atol=1e-6)  # forward it does nothing
    wanted = tf.nn.softmax(logits) if arm == "direct errors" else np.full((len(x), 10), 0.1)
    signal = (np.asarray(wanted) - np.eye(10)[y]).astype("float32") / len(x)

    value = tf.constant(x, "float32") / 255.0
    expected = []
    for name in example.HIDDEN:
        layer, back = model.get_layer(name), model.get_layer(f"{name}_back").synapses["kernel"][0]
        kernel = tf.Variable(layer.synapses["kernel"][0])
        with tf.GradientTape() as tape:
            if name.startswith("hidden"):
                neurons = tf.tanh(value @ kernel)
            else:
                neurons = tf.tanh(tf.nn.conv2d(value, kernel, 1, layer.padding.upper()))
            received = tf.reshape(signal @ tf.transpose(back), neurons.shape)
            total = tf.reduce_sum(neurons * received)
        expected.append(-0.1 * 1.5 * tape.gradient(total, kernel).numpy())
        value = neurons if name.startswith("hidden") else tf.nn.avg_pool2d(neurons, 2, 2, "VALID")
        value = value if name in example.HIDDEN[:1] else tf.reshape(value, (len(x), -1))

    before = [variable.numpy() for variable in model.weights]
    found = example.changes(model, x, y)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[0], other, rtol=1e-3, atol=1e-3 * np.abs(other).max())
        assert np.abs(other).max() > 1e-5
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    model.train_on_batch(x, example.labels_for(model, y))
    for name in example.HIDDEN:
        kernel = model.get_layer(f"{name}_back").synapses["kernel"]
        (old,) = (value for variable, value in zip(model.weights, before, strict=True) if variable is kernel)
        np.testing.assert_array_equal(kernel.numpy(), old)


@pytest.mark.slow
def test_arms_of_feedback_paths_start_equal_and_backpropagation_agrees_with_itself():
    example, exact, x, y, images = path_setting("backpropagation")
    outputs = []
    for arm in example.ARMS:
        model = example.network(arm, 0.1, 0, images)
        found = model.predict(x, verbose=0)
        outputs.append(found[0] if isinstance(found, list) else found)
        if arm in ("backpropagation", "fixed random"):
            aligned = example.cosines(model, exact, x, y)
            assert len(aligned) == 4
            assert (min(aligned) > 1 - 1e-5) == (arm == "backpropagation")
    for one in outputs[1:]:
        np.testing.assert_allclose(one, outputs[0], rtol=1e-5, atol=1e-6)
    before = [variable.numpy() for variable in model.weights]
    model.train_on_batch(x, example.labels_for(model, y))
    example.restart(model, arm, 0, images)
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
