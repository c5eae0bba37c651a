"""Keras losses taken apart: each number is Keras's own, by a tape or by `fit`."""

import itertools

import keras
import losses as table
import numpy as np
import pytest
import tensorflow as tf

import keras_blur as kb
from keras_blur import bilevel
from keras_blur.core import feedback
from keras_blur.core.losses import ExampleLosses, as_keras, per_example


@pytest.mark.parametrize(("execution", "every"), [("eager", 31), ("graph", 701), ("xla", 997)])
def test_losses_are_keras_s_or_refused_by_name(execution, every):
    found = {cell: table.judge(cell, execution) for cell in itertools.islice(table.cells(), 3, None, every)}
    wrong = [f"{cell}: {kind}" for cell, kind in found.items() if kind not in ("equal", "refused", "refused by Keras")]
    assert not wrong
    assert sum(kind == "equal" for kind in found.values()) > len(found) / 4


def test_every_loss_of_keras_has_a_row():
    names = {row.name.split("(")[0] for row in table.rows()}
    classes = {name for name, one in vars(keras.losses).items() if isinstance(one, type)} - {"Loss"}
    assert classes <= names
    assert set(feedback.differentiable()) == classes - {"CTC", "Circle"}


def square(y, prediction):
    return keras.ops.square(y - prediction)


LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")


def masked_network(activation=None):
    last = keras.layers.Dense(3, activation, kernel_initializer="zeros")
    return keras.Sequential([keras.Input((5, 2)), keras.layers.Masking(), last])


def dense(units):
    return lambda: keras.Sequential([keras.Input((3,)), keras.layers.Dense(units, kernel_initializer="zeros")])


def sequences(rng):
    x = rng.normal(size=(12, 5, 2)).astype("float32")
    x[rng.random((12, 5)) < 0.4] = 0.0
    return x, rng.integers(0, 3, (12, 5))


def vectors(labels):
    def draw(rng):
        x = rng.normal(size=(12, 3)).astype("float32")
        return x, labels(rng)

    return draw


SPARSE = keras.losses.SparseCategoricalCrossentropy
FITS = {
    "a function, labels (n,)": (dense(1), vectors(lambda rng: rng.normal(size=12)), square),
    "a name": (dense(1), vectors(lambda rng: rng.normal(size=(12, 1))), "mae"),
    "a sum": (dense(3), vectors(lambda rng: rng.integers(0, 3, (12, 1))), LOGITS),
    "no reduction": (dense(3), vectors(lambda rng: rng.integers(0, 3, 12)), SPARSE(from_logits=True, reduction=None)),
    "an ignored class": (
        dense(3), vectors(lambda rng: rng.integers(-1, 3, 12)), SPARSE(from_logits=True, ignore_class=-1),
    ),
    "of the batch": (dense(1), vectors(lambda rng: rng.integers(0, 2, 12)), lambda y, p: keras.ops.mean(square(y, p))),
    "a mask": (masked_network, sequences, SPARSE(from_logits=True)),
    "a mask, a sum": (masked_network, sequences, LOGITS),
    "a mask, a function": (lambda: masked_network("softmax"), sequences, "sparse_categorical_crossentropy"),
}  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_bilevel_trainer_minimises_what_fit_does(name):
    network, draw, loss = FITS[name]
    x, y = draw(np.random.default_rng(0))
    plain, model = network(), network()
    plain.compile(keras.optimizers.SGD(0.05), loss)
    history = plain.fit(x, y, batch_size=12, epochs=3, shuffle=False, verbose=0).history
    trainer = bilevel.BilevelTrainer(model, bilevel.LearnedRotation())
    trainer._training_loss = bilevel.TrainingLoss().training_loss  # the plain mean
    trainer.compile(keras.optimizers.SGD(0.05), keras.optimizers.SGD(0.0), loss, jit_compile=False)
    found = trainer.fit(x, y, meta_data=(x, y), batch_size=12, epochs=3, verbose=0).history
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert max(np.abs(weights).max() for weights in plain.get_weights()) > 1e-3
    if name != "no reduction":  # Keras shows the mean and descends the sum
        np.testing.assert_allclose(found["loss"], history["loss"], rtol=1e-4)


SMOOTH = {
    "classes": (SPARSE(from_logits=True), lambda y: y, keras.losses.CategoricalCrossentropy, 4),
    "columns of classes": (SPARSE(from_logits=True), lambda y: y[:, None], keras.losses.CategoricalCrossentropy, 4),
    "indicators": (
        keras.losses.CategoricalCrossentropy(from_logits=True), lambda y: np.eye(4)[y],
        keras.losses.CategoricalCrossentropy, 4,
    ),
    "binary": (
        keras.losses.BinaryCrossentropy(from_logits=True), lambda y: y % 2, keras.losses.BinaryCrossentropy, 1,
    ),
    "binary, columns": (
        keras.losses.BinaryCrossentropy(from_logits=True), lambda y: (y[:, None] + np.arange(4)) % 2,
        keras.losses.BinaryCrossentropy, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
def test_label_smoothing_is_that_of_keras(name):
    loss, labels, smoothed, columns = SMOOTH[name]
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 10)
    p = tf.constant(rng.normal(size=(10, columns)), tf.float32)
    target = np.eye(4)[y] if "classes" in name else labels(y).reshape(10, columns)
    wanted = per_example(smoothed(from_logits=True, label_smoothing=0.3), tf.constant(target), p)
    found = ExampleLosses(loss).smoothed(tf.constant(labels(y)), p, tf.constant(0.3))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_label_smoothing_leaves_ignored_labels_out():
    loss = SPARSE(from_logits=True, ignore_class=1)
    p = tf.constant(np.random.default_rng(0).normal(size=(4, 3)), tf.float32)
    found = ExampleLosses(loss).smoothed(tf.constant([0, 1, 2, 1]), p, tf.constant(0.3))
    assert found.numpy()[[1, 3]].tolist() == [0.0, 0.0]
    assert found.numpy()[[0, 2]].min() > 0.0


def weights_of(loss, units, y, count=2):
    made = bilevel.Hyperparameters(class_weights=count)
    made.class_logits.assign(np.log(np.arange(1.0, count + 1)))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(units, kernel_initializer="zeros")])
    x = np.zeros((len(y), 3), "float32")
    return float(made.training_loss(model, x, tf.constant(y), ExampleLosses(as_keras(loss))))


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float32"])
def test_class_weights_are_of_any_shape_of_labels(dtype):
    """Predictions of 0, so that each loss is log 2; weights of 2/3 and 4/3."""
    y, binary = np.array([0, 1, 1], dtype), keras.losses.BinaryCrossentropy(from_logits=True)
    wanted = np.log(2) * (2 / 3 + 4 / 3 + 4 / 3) / 3
    sparse, columns = SPARSE(from_logits=True), keras.losses.CategoricalCrossentropy(from_logits=True)
    for loss, units, labels in (
        (sparse, 2, y), (sparse, 2, y[:, None]), (columns, 2, np.eye(2, dtype=dtype)[y.astype(int)]),
        (binary, 1, y), (binary, 1, y[:, None]),
    ):  # fmt: skip
        assert weights_of(loss, units, labels) == pytest.approx(wanted, rel=1e-5)


def test_class_weights_name_what_does_not_fit():
    sparse = SPARSE(from_logits=True)
    with pytest.raises(ValueError, match=r"`class_weights` must be the number of classes, 3.*class_weights=2"):
        weights_of(sparse, 3, np.array([0, 1]))
    with pytest.raises(ValueError, match=r"`class_weights` must go with labels.*shape \(2, 1, 1\)"):
        weights_of(sparse, 2, np.zeros((2, 1, 1), int))
    with pytest.raises(ValueError, match="`loss` must give a number for each example"):
        weights_of(lambda y, p: keras.ops.mean(p), 2, np.array([0, 1]))


def test_pseudo_clean_split_takes_any_rank_of_labels_and_losses():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 1)).astype("float32")
    y = 2.0 * x[:, 0] + np.where(np.arange(60) < 20, 3.0, 0.0)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer=keras.initializers.Constant(2.0))])
    for loss, labels in itertools.product((square, "mse", keras.losses.Huber(10.0)), (y, y[:, None])):
        clean = bilevel.PseudoCleanSplit().split(model, x, labels, loss, batch_size=16)
        assert clean.tolist() == [False] * 20 + [True] * 40


def test_a_loss_that_is_none_is_named():
    class Own(keras.losses.Loss):
        def __call__(self, y, prediction, sample_weight=None):
            return 0.0

    trainer = bilevel.BilevelTrainer(dense(1)(), bilevel.Hyperparameters(weight_decay=0.1))
    for loss in ("crossentropy", 3, len, [square]):
        with pytest.raises(ValueError, match=r"`loss` must be a keras.losses.Loss or its name, or a function"):
            trainer.compile("sgd", "sgd", loss)
    with pytest.raises(ValueError, match="not a `__call__`, of its own"):
        trainer.compile("sgd", "sgd", Own())


def test_zero_weights_give_no_feedback():
    for reduction in ("mean", "mean_with_sample_weight"):
        loss = keras.losses.MeanSquaredError(reduction=reduction)
        found = feedback.error(loss, np.ones((2, 3)), tf.zeros((2, 3)), np.zeros(2))
        np.testing.assert_array_equal(found, np.zeros((2, 3)))


def test_sequential_shows_any_function_and_saves_it_as_keras_does():
    model = kb.Sequential([keras.Input((3,)), kb.layers.Dense(2)], genome=kb.Genome.random(kb.Rule(), seed=0))
    model.compile(loss=lambda y, p: keras.ops.square(y - p), jit_compile=False)
    y = np.array([[1.0, -1.0]] * 4)
    history = model.fit(np.zeros((4, 3), "float32"), y, verbose=0).history
    assert history["loss"] == pytest.approx([1.0])


@pytest.mark.parametrize("genome", [kb.genomes.backprop(), kb.Genome.random(kb.Rule(), seed=0)], ids=["error", "labels"])
def test_sequential_leaves_ignored_labels_out(genome):
    """An ignored example changes nothing, and the others weigh as if it were not there."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)).astype("float32"), np.array([0, 1, -1, 2, -1, 1])
    found = []
    for kept, ignored in ((slice(None), -1), (y >= 0, None)):
        keras.utils.set_random_seed(0)
        model = kb.Sequential([keras.Input((3,)), kb.layers.Dense(3)], genome=genome)
        model.compile(loss=SPARSE(from_logits=True, ignore_class=ignored), jit_compile=False)
        model.fit(x[kept], y[kept], batch_size=6, epochs=2, shuffle=False, verbose=0)
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_sequential_refuses_a_layer_that_masks():
    with pytest.raises(ValueError, match=r"Layer .masking.*makes a mask"):
        kb.Sequential([keras.Input((3,)), keras.layers.Masking(), kb.layers.Dense(2)], genome=kb.genomes.backprop())
