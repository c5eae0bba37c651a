"""Data checks: each fault gives one sentence whatever holds the data and whatever takes them; no
sound data are refused."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from marks import slow_but

import keras_blur as kb
from keras_blur import bilevel, checks, learners, meta, random, tasks
from keras_blur.report import episodes as scoring
from keras_blur.report.evaluation import evaluate
from keras_blur.tasks.base import SPLITS
from keras_blur.tasks.datasets import Images

LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 4)).astype("float32")
Y = np.array([0, 1, 2, 0, 1, 2, 0, 1])


def model(loss=LOGITS, units=3, **options):
    made = kb.Sequential([keras.Input((4,)), kb.layers.Dense(units)], genome=kb.genomes.backprop(0.1))
    made.compile(loss=loss, jit_compile=False, **options)
    return made


def trainer(loss=LOGITS, units=3):
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units)])
    made = bilevel.BilevelTrainer(network, bilevel.SampleWeightNet(), bilevel.EvoGrad())
    made.compile(keras.optimizers.SGD(0.1), None, loss, run_eagerly=True)
    return made


class OneBatch(keras.utils.PyDataset):
    def __init__(self, *batch):
        super().__init__()
        self.batch = batch

    num_batches = 1

    def __getitem__(self, index):
        return self.batch


def as_dataset(x, *others):
    x = tuple(x) if isinstance(x, list) and not isinstance(x[0], (list, str)) else x
    return (tf.data.Dataset.from_tensors((x, *others)),)


SOURCES = {"array": lambda *parts: parts, "dataset": as_dataset, "PyDataset": lambda *parts: (OneBatch(*parts),)}
SHARED = {}


def shared(make):
    """One compiled model for all cases: none of them may change it."""
    return SHARED.setdefault(make, make())


def fit_validation(*data):
    shared(model).fit(X, Y, verbose=0, validation_data=data if len(data) > 1 else data[0])


def bilevel_trainer(*data):
    shared(trainer).fit(*data, meta_data=(X, Y), batch_size=8, verbose=0)


def bilevel_meta(*data):
    shared(trainer).fit(X, Y, meta_data=data if len(data) > 1 else data[0], batch_size=8, verbose=0)


CONSUMERS = {
    "fit": lambda *data: shared(model).fit(*data, verbose=0),
    "evaluate": lambda *data: shared(model).evaluate(*data, verbose=0),
    "BilevelTrainer.fit": bilevel_trainer,
    "BilevelTrainer.evaluate": lambda *data: shared(trainer).evaluate(*data, verbose=0),
}
WITHIN = {"validation_data": fit_validation, "meta_data": bilevel_meta}


def with_one(array, value, place=5):
    array = np.array(array, "float32")
    array.flat[place] = value
    return array


RAGGED = tf.RaggedTensor.from_row_lengths(X.reshape(-1), [4] * 6 + [3, 5])
FAULTS = {
    "NaN in x": (with_one(X, np.nan), Y, "x", "must be finite"),
    "infinity in x": (with_one(X, np.inf), Y, "x", "must be finite"),
    "NaN in y": (X, with_one(Y, np.nan), "y", "must be finite"),
    "label too large": (X, Y + 1, "y", "must hold integers from 0 to 2"),
    "label too large, unsigned": (X, (Y + 1).astype("uint64"), "y", "must hold integers from 0 to 2"),
    "label below 0": (X, Y - 1, "y", "must hold integers from 0 to 2"),
    "fractional label": (X, with_one(Y, 0.5), "y", "must hold integers from 0 to 2"),
    "one-hot labels": (X, np.eye(3)[Y], "y", r"must have shape \(batch,\) or \(batch, 1\) of integer labels"),
    "wrong width": (X[:, :3], Y, "x", r"must have shape \(batch, 4\)"),
    "wrong rank": (X[:, None], Y, "x", r"must have shape \(batch, 4\)"),
    "unbatched": (X[0], Y[0], "x", r"must have shape \(batch, 4\)"),
    "list of one input": ([X], Y, "x", r"must be one array of shape \(batch, 4\)"),
    "two inputs": ([X, X], Y, "x", r"must be one array of shape \(batch, 4\)"),
    "dict": ({"a": X}, Y, "x", r"must be one array of shape \(batch, 4\)"),
    "ragged": (RAGGED, Y, "x", r"must be one array of shape \(batch, 4\)"),
    "text": (np.full((8, 4), "a"), Y, "x", "must hold numbers"),
    "lengths": (X, Y[:6], "y", "must have as many examples as `x`, 8"),
    "no examples": (X[:0], Y[:0], "x", "must hold at least one example"),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gives_one_sentence_everywhere(fault, source):
    x, y, name, wanted = FAULTS[fault]
    data = SOURCES[source](x, y)
    for takes in CONSUMERS.values():
        with pytest.raises(ValueError, match=rf"^`{name}` {wanted}\. Received: [^\n]+$"):
            takes(*data)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("fault", ["NaN in x", "label too large", "wrong width", "list of one input"])
def test_other_arguments_are_named(fault, source):
    x, y, name, wanted = FAULTS[fault]
    for within, takes in WITHIN.items():
        with pytest.raises(ValueError, match=rf"^`{name}` of `{within}` {wanted}\. Received: [^\n]+$"):
            takes(*SOURCES[source](x, y))


def test_a_generator_is_checked_as_a_dataset_is():
    for fault in ("NaN in x", "label too large", "wrong width"):
        x, y, name, wanted = FAULTS[fault]
        for batches in ([(x, y)], [(X, Y), (x, y)]):
            with pytest.raises(ValueError, match=f"^`{name}` {wanted}"):
                model(run_eagerly=True).fit((one for one in batches), steps_per_epoch=len(batches), verbose=0)


def loader(name, module, *bases):
    return type(name, bases, {"__module__": module, "__iter__": lambda self: iter([(X, Y)])})


def test_loaders_of_other_libraries_pass_as_keras_knows_them():
    """Neither library is needed: like Keras, we look only at class names."""
    torch = loader("DataLoader", "torch.utils.data.dataloader")
    kinds = [torch, loader("Own", "mine", torch), loader("MapDataset", "grain._src.python.dataset.dataset")]
    for kind in kinds:
        one = kind()
        assert checks.checked(one, None, None, lambda: checks.Expected((4,), (3,), "classes", 3)) == (one, None, None)
        with pytest.raises(ValueError, match=r"^`y` must be left out where x gives batches"):
            model().fit(one, Y, verbose=0)
    for kind in (loader("DataLoader", "mine"), loader("Dataset", "torch.utils.data.dataset")):
        with pytest.raises(ValueError, match=r"^`x` must be one array"):
            model().fit(kind(), verbose=0)


def test_a_loader_whose_weights_cannot_be_compared_is_refused():
    torch = loader("DataLoader", "torch.utils.data.dataloader")
    several = checks.Expected(several=True, one_weight=True)
    with pytest.raises(ValueError, match=r"`x` must be arrays, .* Received: DataLoader"):
        checks.checked(torch(), None, None, lambda: several, learned=True)
    assert checks.checked(torch(), None, None, lambda: several)[1:] == (None, None)


def test_a_distributed_dataset_is_learned_from():
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    with strategy.scope():
        one = model(run_eagerly=False)
        start = one.get_weights()[0].copy()
        one.fit(strategy.experimental_distribute_dataset(as_dataset(X, Y)[0]), verbose=0)
    assert np.abs(one.get_weights()[0] - start).max() > 1e-4


def test_strings_are_taken_wherever_the_text_is_read():
    entry = keras.Input((1,), dtype="string")
    table = keras.layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")
    value = table(keras.layers.Identity()(entry))
    one = kb.Model(entry, kb.layers.Dense(3)(value), genome=kb.genomes.backprop())
    words = tf.constant([["a"], ["b"], ["c"]])
    found = one.predict(words, verbose=0)
    np.testing.assert_allclose(found, np.array(one.layers[-1].kernel)[0][[1, 2, 0]], rtol=1e-6)


def test_a_bad_batch_stops_before_its_step():
    """The steps before it are taken, and the batch itself changes nothing."""
    for source in ("dataset", "PyDataset"):
        one = model()
        before = [value.copy() for value in one.get_weights()]
        with pytest.raises(ValueError, match="`x` must be finite"):
            one.fit(*SOURCES[source](with_one(X, np.nan), Y), verbose=0)
        assert all(np.array_equal(a, b) for a, b in zip(before, one.get_weights(), strict=True))


def test_numbers_whose_sum_overflows_are_finite():
    """The quick look at a batch sums it up; a sum that overflows is no fault."""
    wide = tf.data.Dataset.from_tensors((np.full((8, 4), 3e38, "float32"), Y))
    check = checks.checked(wide, None, None, lambda: checks.Expected((4,), (3,), "classes", 3))[0]
    assert next(iter(check))[0].numpy().min() == np.float32(3e38)


def test_a_dataset_of_unknown_shapes_is_checked():
    def of(x, y):
        unknown = (tf.TensorSpec(None, tf.float32), tf.TensorSpec(None, tf.int64))
        data = tf.data.Dataset.from_generator(lambda: iter([(x, y)]), output_signature=unknown)
        return checks.checked(data, None, None, lambda: checks.Expected((4,), (3,), "classes", 3))[0]

    assert next(iter(of(X, Y)))[0].shape == (8, 4)
    for x, y, message in ((X[:, :3], Y, r"shape \(batch, 4\)"), (X, Y[:5], "as many examples"), (X, Y + 1, "integers")):
        with pytest.raises(ValueError, match=message), checks.plain_errors():
            next(iter(of(x, y)))


# Weights.

WEIGHTS = {
    "NaN": (with_one(np.ones(8), np.nan), "must be finite"),
    "negative": (with_one(np.ones(8), -1), "must be 0 or more"),
    "too few": (np.ones(6), "must have as many examples as `x`, 8"),
    "too many columns": (np.ones((8, 3)), r"must have shape \(batch,\) or \(batch, 1\)"),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("fault", WEIGHTS)
def test_weights_of_examples(fault, source):
    weight, wanted = WEIGHTS[fault]
    data = SOURCES[source](X, Y, weight)
    keys = dict(zip(("x", "y", "sample_weight"), data, strict=False))
    for takes in (shared(model).fit, shared(model).evaluate, shared(trainer).evaluate):
        with pytest.raises(ValueError, match=rf"^`sample_weight` {wanted}\. Received: [^\n]+$"):
            takes(**keys, verbose=0)
    validation = data if len(data) > 1 else data[0]
    for fit in (shared(model).fit, shared(trainer).fit):
        extra = {} if fit == shared(model).fit else {"meta_data": (X, Y), "batch_size": 8}
        with pytest.raises(ValueError, match=f"^`sample_weight` of `validation_data` {wanted}"):
            fit(X, Y, validation_data=validation, verbose=0, **extra)


@pytest.mark.parametrize(
    ("weights", "received"),
    [
        ({0: np.nan}, "weight nan for class 0"),
        ({1: -1.0}, "weight -1.0 for class 1"),
        ({0: "a"}, "weight 'a' for class 0"),
        ({3: 1.0}, "the class 3"),
        ({-1: 1.0}, "the class -1"),
        ({0.5: 1.0}, "the class 0.5"),
        ([1.0, 2.0, 1.0], re.escape("class_weight=[1.0, 2.0, 1.0]")),
        ({}, "class_weight={}"),
    ],
)
def test_weights_of_classes(weights, received):
    for data in ((X, Y), (tf.data.Dataset.from_tensors((X, Y)),)):
        with pytest.raises(ValueError, match=rf"^`class_weight` must map class numbers.*\. Received: {received}$"):
            shared(model).fit(*data, class_weight=weights, verbose=0)
    with pytest.raises(ValueError, match=r"^`class_weight` must map class numbers"):
        shared(model).train_on_batch(X, Y, class_weight=weights)


def test_sound_weights_count():
    """A weight of 2 is an example seen twice, for each of the forms."""
    plain = model(keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"))
    start = plain.get_weights()
    results = []
    for options in (
        {"sample_weight": np.full(8, 2.0)}, {"sample_weight": np.full((8, 1), 2)}, {"sample_weight": [2] * 8},
        {"class_weight": {0: 2.0, 1: 2, np.int64(2): np.float32(2)}},
    ):  # fmt: skip
        plain.set_weights(start)
        plain.fit(X, Y, batch_size=8, verbose=0, **options)
        results.append(plain.get_weights()[0])
    plain.set_weights(start)
    plain.fit(np.repeat(X, 2, 0), np.repeat(Y, 2), batch_size=16, verbose=0)
    for found in results:
        np.testing.assert_allclose(found, plain.get_weights()[0], rtol=1e-5)


def test_both_kinds_of_weights_and_labels_beside_a_dataset():
    with pytest.raises(ValueError, match="`class_weight` must be None where `sample_weight` is given"):
        shared(model).fit(X, Y, sample_weight=np.ones(8), class_weight={0: 1.0}, verbose=0)
    with pytest.raises(ValueError, match="`y` must be left out where x gives batches"):
        shared(model).fit(tf.data.Dataset.from_tensors((X, Y)), Y, verbose=0)
    with pytest.raises(ValueError, match=r"`x` must give batches \(x, y\)\. Received: batches of 3 parts"):
        bilevel_trainer(tf.data.Dataset.from_tensors((X, Y, np.ones(8))))
    with pytest.raises(ValueError, match=r"`validation_data` must be \(x, y\)"):
        shared(model).fit(X, Y, validation_data=(X,), verbose=0)
    with pytest.raises(ValueError, match=r"`x` must be one array.*Received: object"):
        shared(model).fit(object(), Y, verbose=0)


# Labels of other losses.


@pytest.mark.parametrize(
    ("loss", "targets", "y", "wanted"),
    [
        ("categorical_crossentropy", "auto", 2.0 * np.eye(3)[Y] - 1, "must hold numbers from 0 to 1"),
        ("binary_crossentropy", "auto", 255.0 * np.eye(3)[Y], "must hold numbers from 0 to 1"),
        ("hinge", "auto", 2.0 * np.eye(3)[Y], "must hold numbers from -1 to 1"),
        ("mean_squared_error", "signs", np.eye(3)[Y], r"must hold -1 and \+1 alone"),
        ("mean_squared_error", "auto", np.ones((8, 1)), r"must have shape \(batch, 3\)"),
    ],
)
@pytest.mark.parametrize("source", SOURCES)
def test_labels_written_for_another_loss(loss, targets, y, wanted, source):
    rule = kb.Rule(feedback="labels", batch_reduction="mean")
    one = kb.Sequential([keras.Input((4,)), kb.layers.Dense(3)], genome=kb.Genome.random(rule, seed=0))
    one.compile(loss=loss, targets=targets, run_eagerly=True)
    for takes in (one.fit, one.evaluate):
        with pytest.raises(ValueError, match=f"^`y` {wanted}"):
            takes(*SOURCES[source](X, y), verbose=0)
    if targets == "auto":
        with pytest.raises(ValueError, match=f"^`y` {wanted}"):
            trainer(loss).fit(*SOURCES[source](X, y), meta_data=(X, np.eye(3)[Y]), batch_size=8, verbose=0)


# What is sound is taken.


class Other:
    """An array of another library, as jax's and pandas' are."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)


INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i2", ">u8")
FLOATS = ("float16", "float32", "float64", ">f4", "longdouble")
LABELS = {
    **{dtype: Y.astype(dtype) for dtype in (*INTEGERS, *FLOATS)},
    "column": Y[:, None],
    "list": Y.tolist(),
    "tensor": tf.constant(Y),
    "other library": Other(Y),
    "bfloat16": tf.cast(Y, tf.bfloat16),
}
ROUND = np.round(4 * X) / 4  # whatever the dtype, the same numbers
INPUTS = {
    **{dtype: ROUND.astype(dtype) for dtype in FLOATS},
    "list": ROUND.tolist(),
    "rows": list(ROUND),
    "tensor": tf.constant(ROUND),
    "other library": Other(ROUND),
}


def of_all_sources(x, y):
    """The data as arrays, as a PyDataset, and as a dataset where TensorFlow has such a tensor."""
    forms = [(x, y), (OneBatch(x, y),)]
    native = all(tf.is_tensor(one) or (isinstance(one, np.ndarray) and one.dtype.isnative) for one in (x, y))
    if native and all(getattr(one, "dtype", None) != np.longdouble for one in (x, y)):
        forms.append((tf.data.Dataset.from_tensors((x, y)),))
    return forms


@pytest.mark.parametrize("name", slow_but(["uint8", "float32", "list", "bfloat16"], LABELS))
def test_labels_of_any_dtype_learn_the_same(name):
    x, y = X, LABELS[name]
    one = SHARED.setdefault("eager", model(run_eagerly=True, metrics=["accuracy"]))
    start = SHARED.setdefault("start", one.get_weights())
    if "learned" not in SHARED:
        one.fit(X, Y, batch_size=8, verbose=0)
        SHARED["learned"] = one.get_weights()[0], one.evaluate(X, Y, verbose=0)[1]
    for data in of_all_sources(x, y):
        one.set_weights(start)
        one.fit(*data, verbose=0)
        np.testing.assert_allclose(one.get_weights()[0], SHARED["learned"][0], rtol=1e-6)
        assert one.evaluate(*data, verbose=0)[1] == SHARED["learned"][1]
        bilevel_trainer(*data)


@pytest.mark.parametrize("name", slow_but(["float64", "list", "tensor"], INPUTS))
def test_inputs_of_any_dtype_predict_the_same(name):
    x = INPUTS[name]
    one = SHARED.setdefault("eager", model(run_eagerly=True, metrics=["accuracy"]))
    for data in of_all_sources(x, Y):
        one.fit(*data, verbose=0)
        np.testing.assert_allclose(one.predict(data[0], verbose=0), one.predict(ROUND, verbose=0), rtol=1e-3)
    np.testing.assert_allclose(one.predict_on_batch(x), one.predict(ROUND, verbose=0), rtol=1e-3)


@pytest.mark.parametrize("source", SOURCES)
def test_boolean_labels(source):
    for loss, units in ((LOGITS, 2), (keras.losses.BinaryCrossentropy(from_logits=True), 1), ("mean_squared_error", 1)):
        y = Y > 0
        weights = []
        for labels in (y, y.astype(int)):
            keras.utils.set_random_seed(0)
            one = model(loss, units, run_eagerly=True, metrics=["accuracy"])
            one.fit(*SOURCES[source](X, labels), verbose=0)
            weights.append(one.get_weights()[0])
        np.testing.assert_array_equal(*weights)
    two = trainer(units=2)
    two.fit(*SOURCES[source](X, y), meta_data=SOURCES[source](X, y) if source == "array" else SOURCES[source](X, y)[0],
            batch_size=8, verbose=0, validation_data=(X, y))  # fmt: skip


def test_images_of_bytes_and_many_classes():
    images = RNG.integers(0, 256, (8, 6, 6), dtype="uint8")
    labels = RNG.integers(0, 1000, 8).astype("uint16")
    network = kb.Sequential(
        [keras.Input((6, 6, 1)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), kb.layers.Dense(1000)],
        genome=kb.genomes.backprop(0.1),
    )
    network.compile(loss=LOGITS, run_eagerly=True)
    for x in (images, images[..., None]):  # Keras adds the last axis
        for data in ((x, labels), (tf.data.Dataset.from_tensors((x, labels)),), (OneBatch(x, labels),)):
            assert np.isfinite(network.fit(*data, verbose=0).history["loss"][0])


def test_a_single_feature_needs_no_column():
    one = kb.Sequential([keras.Input((1,)), kb.layers.Dense(3)], genome=kb.genomes.backprop(0.1))
    one.compile(loss=LOGITS, run_eagerly=True)
    one.fit(X[:, 0], Y, verbose=0)
    assert one.predict(X[:, 0], verbose=0).shape == (8, 3)


def test_a_class_to_ignore_and_maps_of_labels():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    network = keras.Sequential([keras.Input((5, 4)), keras.layers.Dense(3)])
    expected = checks.model_expects(network, loss)
    assert (expected.features, expected.outputs, expected.classes, expected.ignored) == ((5, 4), (5, 3), 3, -1)
    x, y = np.zeros((2, 5, 4), "float32"), np.array([[0, 1, 2, -1, 0]] * 2)
    for labels, weight in ((y, np.ones(2)), (y[..., None], np.ones((2, 5)))):
        checks.checked_arrays(x, labels, weight, expected)
        data = tf.data.Dataset.from_tensors((x, labels, weight))
        assert len(next(iter(checks.checked(data, None, None, lambda: expected)[0]))) == 3
    with pytest.raises(ValueError, match="labels from -2 to 2"):
        checks.checked_arrays(x, np.where(y < 0, -2, y), None, expected)


def test_a_loss_of_another_origin_takes_any_labels():
    assert checks.label_kind(lambda y, p: p) is None
    assert checks.label_kind(keras.losses.CTC()) is None
    assert checks.label_kind("mse") == "values"
    assert checks.label_kind(keras.losses.sparse_categorical_crossentropy) == "classes"


def test_a_bilevel_trainer_takes_a_py_dataset_as_it_takes_a_dataset():
    class Parts(OneBatch):
        num_batches = 2

        def __getitem__(self, index):
            return X[index::2], Y[index::2]

    batches = tf.data.Dataset.from_tensors((X[::2], Y[::2])).concatenate(tf.data.Dataset.from_tensors((X[1::2], Y[1::2])))
    found = []
    for data in (Parts(), batches):
        keras.utils.set_random_seed(0)
        one = trainer()
        one.fit(data, meta_data=data, epochs=2, validation_data=data, verbose=0)
        assert int(one.meta_step.numpy()) == 4
        found.append(one.model.get_weights()[0])
    np.testing.assert_array_equal(*found)


def test_other_uses_of_data():
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top"), keras.layers.Dense(3)])
    warp = learners.Warp(network, ["top"], keras.optimizers.SGD(0.1))
    split = bilevel.PseudoCleanSplit()
    for fault in ("NaN in x", "fractional label", "wrong width", "lengths"):
        x, y, name, wanted = FAULTS[fault]
        with pytest.raises(ValueError, match=f"^`{name}` {wanted}"):
            split.split(network, x, y, LOGITS)
        with pytest.raises(ValueError, match=f"^`{name}` {wanted}"):
            warp.adapt(network, x, y, steps=1)
    assert tasks.noisy_labels(np.array([True, False]), 2, 1.0, "flip").tolist() == [False, True]
    assert tasks.noisy_labels(np.array([0.0, 2.0]), 3, 1.0, "flip").tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="`y` must be integer labels"):
        tasks.noisy_labels(np.array([0.5]), 3, 1.0)


# Task distributions of one's own.


class Own(tasks.Tasks):
    name, shape, outputs = "own", (2,), 2

    def __init__(self, change=lambda x, y: (x, y), **attributes):
        self.change = change
        vars(self).update(attributes)

    def available(self, split):
        return 1000

    def examples(self, seed, count, split):
        x = random.normal(seed, (count, self.features))
        return self.change(x, 2.0 * tf.one_hot(tf.cast(x[:, 0] > 0, tf.int32), 2) - 1.0)


def meta_trainer(own):
    return meta.MetaTrainer(own, learners.Blur((4,), kb.Rule(batch_reduction="mean")), batch_size=4, query_size=4)


def compared(own):
    genome = kb.Genome.random(kb.Rule(batch_reduction="mean"), seed=0)
    evaluate(genome, own, (4,), steps=1, seeds=2, batch_size=4)


def scored(own):
    learner = learners.MAML(keras.optimizers.SGD(0.1), (4,))
    start = {name: value[0] for name, value in learner.draw(0, 1, 2, 2).items()}
    scoring.score_episodes(learner, learner.learned(start), own, episodes=2)


BAD_TASKS = {
    "0 and 1": (Own(lambda x, y: (x, (y + 1) / 2)), r"must give labels \+1 and -1 for kind='classes'"),
    "two right": (Own(lambda x, y: (x, tf.ones_like(y))), r"must give one label \+1 in each row"),
    "NaN": (Own(lambda x, y: (x * np.nan, y)), "must give finite numbers. Received: NaN or infinite numbers in `x`"),
    "width": (Own(lambda x, y: (x[:, :1], y)), r"must give examples with `x` of shape \(\d+, 2\)"),
    "labels": (Own(lambda x, y: (x, y[:, 0])), r"must give examples with `y` of shape \(\d+, 2\)"),
    "text": (Own(lambda x, y: (x, tf.strings.as_string(y))), "must give examples with `y` of numbers"),
    "one part": (Own(lambda x, y: x), r"must give examples \(x, y\)"),
    "no features": (Own(shape=(0,)), r"must have `shape`, a tuple of positive integers. Received: shape=\(0,\)"),
    "a number as shape": (Own(shape=2), "must have `shape`, a tuple of positive integers. Received: shape=2"),
}


@pytest.mark.parametrize("takes", [meta_trainer, compared, scored])
@pytest.mark.parametrize("fault", BAD_TASKS)
def test_tasks_are_checked_where_they_are_taken(fault, takes):
    own, message = BAD_TASKS[fault]
    with pytest.raises(ValueError, match=rf"^`tasks` \(own\) {message}"):
        takes(own)


def test_what_is_no_task_distribution():
    for takes, name in ((meta_trainer, "tasks"), (compared, "data"), (scored, "tasks")):
        for wrong in (None, "digits", X):
            with pytest.raises(ValueError, match=f"`{name}` must be .*task distribution"):
                takes(wrong)
    with pytest.raises(ValueError, match="`tasks` must be one or more task distributions"):
        meta_trainer([])


def test_an_unknown_kind_and_bits():
    with pytest.raises(ValueError, match=r"must have a `kind`, one of 'classes'.*Received: kind='labels'"):
        checks.tasks.check_tasks(Own(kind="labels"), 4, 4)
    checks.tasks.check_tasks(Own(lambda x, y: (x, y * [1.0, 0.0]), kind="bits"), 4, 4)
    with pytest.raises(ValueError, match=r"must give labels \+1, -1 and 0 \(unscored\)"):
        checks.tasks.check_tasks(Own(lambda x, y: (x, y * 0.5), kind="bits"), 4, 4)


def test_tasks_in_double_precision_are_cast():
    double = Own(lambda x, y: (tf.cast(x, tf.float64), tf.cast(y, tf.int8)))
    single = Own()
    for split in SPLITS:
        one, other = (next(iter(t.dataset(0, steps=1, batch=4, query=4, split=split))) for t in (double, single))
        for name, value in one.items():
            assert value.dtype == tf.float32
            np.testing.assert_array_equal(value, other[name])
    meta_trainer(double)


def test_images_of_a_comparison():
    genome = kb.Genome.random(kb.Rule(batch_reduction="mean"), seed=0)
    x = RNG.integers(0, 256, (40, 3, 3, 1)).astype("float32")
    y = np.arange(40) % 3
    for bad_x, bad_y, message in (
        (with_one(x, np.nan), y, "`x` of `data` must be finite"),
        (x, y + 1, "`y` of `data` must hold"),
    ):
        data = Images("own", bad_x, bad_y, x, y, 3, 255.0)
        with pytest.raises(ValueError, match=message):
            evaluate(genome, data, (4,), steps=1, seeds=2, batch_size=4)
