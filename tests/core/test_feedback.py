"""What the output layer receives: labels in every spelling, and written-out derivatives against
automatic ones."""

import json

import keras
import numpy as np
import pytest
from keras import losses, ops
from keras.src.saving import serialization_lib
from on_backend import JAX, compiled, slopes

from keras_blur.core import feedback

BATCH, UNITS = 6, 4

# loss, kind of labels, kind of predictions
CASES = {
    "squared": (losses.MeanSquaredError, {}, "values", "outputs"),
    "absolute": (losses.MeanAbsoluteError, {}, "values", "outputs"),
    "huber": (losses.Huber, {}, "values", "outputs"),
    "huber_narrow": (losses.Huber, {"delta": 0.3}, "values", "outputs"),
    "log_cosh": (losses.LogCosh, {}, "values", "outputs"),
    "hinge_indicators": (losses.Hinge, {}, "indicators", "outputs"),
    "hinge_signs": (losses.Hinge, {}, "signs", "outputs"),
    "squared_hinge_indicators": (losses.SquaredHinge, {}, "indicators", "outputs"),
    "squared_hinge_signs": (losses.SquaredHinge, {}, "signs", "outputs"),
    "poisson": (losses.Poisson, {}, "counts", "probabilities"),
    "categorical": (losses.CategoricalCrossentropy, {"from_logits": True}, "indicators", "outputs"),
    "categorical_smooth": (
        losses.CategoricalCrossentropy,
        {"from_logits": True, "label_smoothing": 0.2},
        "indicators",
        "outputs",
    ),
    "categorical_soft": (losses.CategoricalCrossentropy, {"from_logits": True}, "shares", "outputs"),
    "sparse": (losses.SparseCategoricalCrossentropy, {"from_logits": True}, "classes", "outputs"),
    "sparse_column": (losses.SparseCategoricalCrossentropy, {"from_logits": True}, "class_column", "outputs"),
    "binary": (losses.BinaryCrossentropy, {}, "indicators", "probabilities"),
    "binary_smooth": (losses.BinaryCrossentropy, {"label_smoothing": 0.1}, "indicators", "probabilities"),
    "binary_logits": (losses.BinaryCrossentropy, {"from_logits": True}, "indicators", "outputs"),
    "binary_logits_smooth": (
        losses.BinaryCrossentropy,
        {"from_logits": True, "label_smoothing": 0.1},
        "indicators",
        "outputs",
    ),
}
WEIGHTS = {"none": None, "row": (BATCH,), "column": (BATCH, 1)}


def draw(labels, predictions, dtype="float64"):
    rng = np.random.default_rng(0)
    y = {
        "values": rng.normal(size=(BATCH, UNITS)),
        "indicators": np.eye(UNITS)[rng.integers(UNITS, size=BATCH)],
        "signs": 2 * np.eye(UNITS)[rng.integers(UNITS, size=BATCH)] - 1,
        "counts": rng.uniform(0, 3, size=(BATCH, UNITS)),
        "shares": rng.dirichlet(np.ones(UNITS), size=BATCH),
        "classes": rng.integers(UNITS, size=BATCH),
        "class_column": rng.integers(UNITS, size=(BATCH, 1)),
    }[labels]
    p = rng.normal(0, 1.5, (BATCH, UNITS))
    if predictions == "probabilities":
        p = 1 / (1 + np.exp(-p))
    return y, ops.array(p, dtype)


def taped(loss, y, p, weight=None):
    return np.asarray(slopes(lambda p: loss(y, p, sample_weight=weight), [p])[0])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean", "sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("name", CASES)
def test_derivative_is_the_tape_s(name, reduction, weights):
    """The tape's own arithmetic is float32 where Keras makes it so, hence 1e-5."""
    kind, options, labels, predictions = CASES[name]
    loss = kind(**options, reduction=reduction)
    y, p = draw(labels, predictions, "float32")
    weight = None
    if WEIGHTS[weights]:
        weight = np.random.default_rng(1).uniform(0, 2, WEIGHTS[weights]).astype("float32")
    expected = taped(loss, y, p, weight)
    actual = feedback.error(loss, y, p, weight)
    assert actual.dtype == p.dtype
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [None, (2, 1), (2, 3), (2, 3, 1)])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("name", ["squared", "sparse", "sparse_column", "binary_logits_smooth", "dice"])
def test_positions_of_a_sequence_are_weighed_as_in_keras(name, reduction, weights):
    kind, options, labels, predictions = CASES.get(name, (losses.Dice, {}, "indicators", "probabilities"))
    loss = kind(**options, reduction=reduction)
    y, p = (np.asarray(one).reshape(2, 3, -1) for one in draw(labels, predictions, "float32"))
    y, p = (y[..., 0] if name == "sparse" else y), ops.array(p)
    weight = None if weights is None else np.random.default_rng(1).uniform(0, 2, weights).astype("float32")
    np.testing.assert_allclose(feedback.error(loss, y, p, weight), taped(loss, y, p, weight), rtol=1e-5, atol=1e-6)


def test_a_network_of_a_population_has_a_batch_of_its_own():
    for name, reduction in (("sparse", "sum_over_batch_size"), ("squared", "sum")):
        kind, options, labels, predictions = CASES[name]
        y, p = (np.stack([one, one[::-1]]) for one in draw(labels, predictions, "float32"))
        loss = kind(**options, reduction=reduction)
        both = feedback.error(loss, y, ops.array(p), population=1)
        for found, own_y, own_p in zip(both, y, p, strict=True):
            np.testing.assert_allclose(found, feedback.error(loss, own_y, ops.array(own_p)), rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_derivative_keeps_float64(name):
    kind, options, labels, predictions = CASES[name]
    y, p = draw(labels, predictions)
    actual = feedback.error(kind(**options), y, p)
    assert keras.backend.standardize_dtype(actual.dtype) == "float64"
    near = 1e-7 if JAX else 1e-9  # the mean in Keras's loss is computed in float32 on JAX: see `keras_blur.backend`
    np.testing.assert_allclose(actual, taped(kind(**options, dtype="float64"), y, p), rtol=near, atol=1e-12)


def test_crossentropy_with_labels_that_do_not_add_up_to_one():
    """The tape assumes that they do; the slope of the loss itself is a difference quotient."""
    loss = losses.CategoricalCrossentropy(from_logits=True, dtype="float64")
    y, p = draw("counts", "outputs")
    shift = np.zeros((BATCH, UNITS))
    shift[2, 1] = 1e-5
    quotient = (loss(y, p + shift) - loss(y, p - shift)) / 2e-5
    np.testing.assert_allclose(feedback.error(loss, y, p)[2, 1], quotient, rtol=1e-7)


@pytest.mark.parametrize("name", ["squared", "binary", "binary_logits", "hinge_indicators"])
def test_one_output_takes_flat_labels(name):
    kind, options, _, predictions = CASES[name]
    _, p = draw("values", predictions, "float32")
    y = np.array([0, 1, 1, 0, 1, 0])
    expected = taped(kind(**options), y[:, None].astype("float32"), p[:, :1])
    np.testing.assert_allclose(feedback.error(kind(**options), y, p[:, :1]), expected, rtol=1e-5, atol=1e-6)


def test_binary_crossentropy_is_flat_where_keras_clips():
    """Probabilities of exactly 0 and 1 have no slope in Keras, and none here; it is finite, too."""
    loss = losses.BinaryCrossentropy()
    y, p = np.array([[0.0, 1.0, 1.0, 0.0]], "float32"), ops.array([[0.0, 0.0, 1.0, 1.0]], "float32")
    np.testing.assert_array_equal(feedback.error(loss, y, p), np.zeros((1, 4)))
    np.testing.assert_allclose(taped(loss, y, p), np.zeros((1, 4)), atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "y", "named"),
    [
        (losses.Circle(), np.zeros((BATCH, UNITS)), "one of Binary.*Received: loss=Circle"),
        (losses.CosineSimilarity(axis=0), np.zeros((BATCH, UNITS)), r"Received: loss=CosineSimilarity\(axis=0\)"),
        (losses.CategoricalGeneralizedCrossEntropy(), np.zeros((BATCH, 1)), r"shape \(batch,\). Received shape \(6, 1\)"),
        (losses.MeanSquaredError(), np.zeros((BATCH, 3)), r"output layer has units \(4\). Received shape \(6, 3\)"),
        (losses.MeanSquaredError(), np.zeros(BATCH), r"output layer has units \(4\). Received shape \(6, 1\)"),
        (losses.CategoricalCrossentropy(), np.zeros((BATCH, UNITS)), "from_logits=True. Received: .*Categorical.*False"),
        (losses.SparseCategoricalCrossentropy(), np.zeros(BATCH), "from_logits=True. Received: .*Categorical.*False"),
        (losses.SparseCategoricalCrossentropy(from_logits=True), np.zeros((BATCH, UNITS)), r"\(6, 4\)"),
    ],
)
def test_error_names_what_it_cannot_do(loss, y, named):
    with pytest.raises(ValueError, match=named):
        feedback.error(loss, y, ops.zeros((BATCH, UNITS), "float32"))


@pytest.mark.parametrize(
    ("loss", "y", "weight", "named"),
    [
        (losses.MeanSquaredError(), np.zeros((2, 3, 4)), np.ones(2), r"must have 2 axes.*Received shape \(2,\)"),
        (
            losses.SparseCategoricalCrossentropy(from_logits=True),
            np.zeros(2),
            None,
            r"shape \(batch, 3\) or \(batch, 3, 1\)",
        ),
        (losses.CosineSimilarity(axis=1), np.zeros((2, 3, 4)), None, r"Received: loss=CosineSimilarity\(axis=1\) for"),
    ],
)
def test_error_names_what_it_cannot_do_with_positions(loss, y, weight, named):
    with pytest.raises(ValueError, match=named):
        feedback.error(loss, y, ops.zeros((2, 3, 4), "float32"), weight)


def test_sparse_loss_refuses_indicators_of_one_example():
    """One example, as in online learning: its three columns must not pass for three labels."""
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        feedback.error(loss, np.array([[0, 1, 0]]), ops.zeros((1, 3), "float32"))


SIGNS = [[-1, 1, -1], [-1, -1, 1], [1, -1, -1]]


@pytest.mark.parametrize(
    ("y", "units", "kind", "expected"),
    [
        ([1, 2, 0], 3, "classes", SIGNS),
        ([[1], [2], [0]], 3, "classes", SIGNS),
        (np.array([1.0, 2.0, 0.0]), 3, "classes", SIGNS),
        (np.array([1, 2, 0], "uint8"), 3, "classes", SIGNS),
        (np.eye(3)[[1, 2, 0]], 3, "indicators", SIGNS),
        (np.eye(3, dtype=bool)[[1, 2, 0]], 3, "indicators", SIGNS),
        (SIGNS, 3, "signs", SIGNS),
        (SIGNS, 3, "hinge", SIGNS),
        ([[0.0, 0.5, 1.0]], 3, "hinge", [[0.0, 0.5, 1.0]]),
        (np.eye(3, dtype=int)[[1, 2, 0]], 3, "hinge", SIGNS),
        ([0, 1, 1], 1, "classes", [[-1], [1], [1]]),
        ([[0], [1], [1]], 1, "classes", [[-1], [1], [1]]),
        ([0, 1, 1], 1, "indicators", [[-1], [1], [1]]),
        ([0, 1, 1], 1, "hinge", [[-1], [1], [1]]),
        ([-1, 1, 1], 1, "hinge", [[-1], [1], [1]]),
        ([0.25, 0.5], 1, "values", [[0.25], [0.5]]),
        ([[0.25, 0.5]], 2, "values", [[0.25, 0.5]]),
        ([[0.25, 1.0]], 2, "indicators", [[-0.5, 1.0]]),
    ],
)
def test_encode(y, units, kind, expected):
    encoded = feedback.encode(y, units, kind)
    assert keras.backend.standardize_dtype(encoded.dtype) == "float32"
    np.testing.assert_array_equal(encoded, expected)


def test_encode_inside_a_graph_tells_hinge_labels_from_the_batch():
    encode = compiled(lambda y: feedback.encode(y, 2, "hinge"))
    np.testing.assert_array_equal(encode(ops.array([[0.0, 1.0]], "float32")), [[-1, 1]])
    np.testing.assert_array_equal(encode(ops.array([[-1.0, 1.0]], "float32")), [[-1, 1]])


@pytest.mark.parametrize(
    ("shape", "units", "kind", "named"),
    [
        ((5, 3), 3, "classes", r"shape \(batch,\) or \(batch, 1\). Received shape \(5, 3\)"),
        ((), 3, "classes", r"shape \(batch,\) or \(batch, 1\). Received shape \(\)"),
        ((5, 2), 3, "indicators", r"shape \(batch, 3\).*3 unit\(s\). Received shape \(5, 2\)"),
        ((5,), 3, "signs", r"shape \(batch, 3\).*For integer labels use a sparse loss, or targets='classes'"),
        ((5, 1, 1), 1, "values", r"shape \(batch, 1\).*Received shape \(5, 1, 1\)"),
        ((5, 4), 3, "hinge", r"shape \(batch, 3\).*Received shape \(5, 4\)"),
    ],
)
def test_encode_names_a_wrong_shape(shape, units, kind, named):
    with pytest.raises(ValueError, match=named):
        feedback.encode(np.zeros(shape, "int32"), units, kind)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sparse_categorical_crossentropy", "classes"),
        ("categorical_crossentropy", "indicators"),
        ("binary_crossentropy", "indicators"),
        ("categorical_focal_crossentropy", "indicators"),
        ("binary_focal_crossentropy", "indicators"),
        ("kl_divergence", "indicators"),
        ("dice", "indicators"),
        ("tversky", "indicators"),
        ("hinge", "hinge"),
        ("squared_hinge", "hinge"),
        ("categorical_hinge", "hinge"),
        ("mean_squared_error", "values"),
        ("mean_absolute_error", "values"),
        ("huber", "values"),
        ("log_cosh", "values"),
        ("poisson", "values"),
        ("cosine_similarity", "values"),
    ],
)
def test_loss_by_name(name, kind):
    loss = feedback.resolve_loss(name)
    assert isinstance(loss, losses.Loss)
    assert type(loss).__name__.lower() == name.replace("_", "")
    assert feedback.target_kind(loss) == kind
    assert type(feedback.resolve_loss(feedback.loss_text(name))) is type(loss)
    assert loss.reduction == "sum_over_batch_size"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("mse", losses.MeanSquaredError),
        ("MeanSquaredError", losses.MeanSquaredError),
        (losses.MeanSquaredError, losses.MeanSquaredError),
        (losses.mean_squared_error, losses.MeanSquaredError),
    ],
)
def test_loss_in_other_spellings(given, expected):
    assert type(feedback.resolve_loss(given)) is expected


def test_loss_instances_and_their_text():
    loss = losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.25, reduction="sum")
    assert feedback.resolve_loss(loss) is loss
    text = feedback.loss_text(loss)
    assert json.loads(text)["config"]["label_smoothing"] == 0.25
    again = feedback.resolve_loss(text)
    assert again.get_config() == loss.get_config()
    assert feedback.loss_text(again) == text == feedback.loss_text(text)


@pytest.mark.parametrize("name", CASES)
def test_text_of_a_loss_keeps_its_derivative(name):
    kind, options, labels, predictions = CASES[name]
    y, p = draw(labels, predictions, "float32")
    loss = kind(**options, reduction="sum")
    again = feedback.resolve_loss(feedback.loss_text(loss))
    np.testing.assert_allclose(feedback.error(again, y, p), taped(loss, y, p), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["no_such_loss", 3, None, len, "{", '{"class_name": "NoSuchLoss", "config": {}}'])
def test_what_is_no_loss_is_named(loss):
    with pytest.raises(ValueError, match=r"`loss` must be a keras\.losses\.Loss or its name.*\. Received: "):
        feedback.resolve_loss(loss)


def test_no_tape_is_needed_in_a_compiled_graph():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    y, p = draw("classes", "outputs", "float32")
    found = compiled(lambda y, p: feedback.error(loss, y, p))(ops.convert_to_tensor(y), p)
    np.testing.assert_allclose(found, feedback.error(loss, y, p), rtol=1e-5, atol=1e-7)


def test_text_of_a_loss_is_the_same_while_a_model_is_saved():
    """Keras adds a memory address to what it saves twice, and to what happens to lie where another
    object lay."""
    loss = losses.MeanSquaredError()
    expected = feedback.loss_text(loss)
    with serialization_lib.ObjectSharingScope():  # as inside `save` and `load_model`
        texts = [feedback.loss_text(loss) for _ in range(3)]
        serialized = [keras.losses.serialize(loss) for _ in range(2)]
    assert texts == [expected] * 3
    assert "shared_object_id" in serialized[-1]  # what Keras itself gives there
    assert feedback.loss_text(json.dumps(serialized[-1])) == expected
