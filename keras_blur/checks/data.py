"""Data checks: arrays, PyDatasets and generators, before a model uses them; `tf.data` in
`datasets.py`.

Each check raises a `ValueError`: one sentence with the argument, the expected value and the
received one. Arrays are checked before any work, batches of a stream as they arrive. This module
does not import TensorFlow. If a value is one of TensorFlow's, TensorFlow is imported already.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import inspect
import itertools
import math
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import backend
from keras_blur.core import feedback as feedbacks
from keras_blur.core.losses import ignored_class

Array = Any
Shape = tuple[int | None, ...]

ROUNDING = 1e-3  # tolerance for soft labels rounded to half precision


@dataclasses.dataclass(frozen=True)
class Expected:
    """The data that a model takes.

    Attributes:
        features: shape of one input without the batch; `None` if unknown.
        outputs: shape of one output without the batch; `None` if unknown.
        labels: `"classes"`, `"indicators"`, `"signs"`, `"hinge"` or `"values"`, as in
            `feedback.target_kind`; `None` for a loss that may take labels of any shape.
        classes: number of classes of integer labels; `None` if unknown.
        ignored: the label that the loss ignores (`ignore_class`); `None` for none.
        text: whether inputs may be strings.
        several: whether there are several inputs or outputs, whose structure Keras checks.
        one_weight: whether an example has one weight in all outputs that a model learns from.
    """

    features: Shape | None = None
    outputs: Shape | None = None
    labels: str | None = None
    classes: int | None = None
    ignored: int | None = None
    text: bool = False
    several: bool = False
    one_weight: bool = False


def label_kind(loss: Any) -> str | None:
    """The kind of labels that a loss takes, as in `Expected.labels`; `None` if it is unknown.

    Args:
        loss: a `keras.losses.Loss`, a function or a name. Only Keras's own losses are known.
    """
    try:
        loss = feedbacks.resolve_loss(loss)
    except ValueError:
        return None
    name = type(loss).__name__
    known = getattr(keras.losses, name, None) is type(loss) and name not in ("CTC", "Circle")
    return feedbacks.target_kind(loss) if known else None


def model_expects(model: keras.Model, loss: Any) -> Expected:
    """The data that a Keras model takes under a loss.

    Args:
        model: the model. With several inputs or outputs nothing is known.
        loss: as in `label_kind`.
    """
    features, outputs = (getattr(model, name, None) for name in ("input_shape", "output_shape"))
    if not all(shape is None or isinstance(shape, tuple) for shape in (features, outputs)):
        return Expected()
    return Expected(
        None if features is None else tuple(features[1:]),
        None if outputs is None else tuple(outputs[1:]),
        label_kind(loss),
        outputs[-1] if outputs and len(outputs) > 1 else None,
        ignored_class(loss),
        text=any(tensor.dtype == "string" for tensor in getattr(model, "inputs", None) or ()),
    )


def checked(
    x: Any,
    y: Any,
    sample_weight: Any,
    expected: Callable[[], Expected],
    *,
    within: str | None = None,
    labelled: bool = True,
    learned: bool = False,
) -> tuple[Any, Any, Any]:
    """Checks data for a Keras model: arrays at once, batches of other sources as they arrive.

    Args:
        x: an array or nested list `[n, ...]`, a `tf.data.Dataset`, a `PyDataset`, or a generator of
            batches. Other sources that Keras takes pass unchecked; see `is_loader`.
        y: labels or targets `[n, ...]`; `None` if `x` gives batches.
        sample_weight: weights `[n, ...]`, or `None`.
        expected: returns the data that the model takes. It is called at each check, since the first
            batch may build the model.
        within: the argument that holds `x`, such as `"validation_data"`, for messages; `None` if
            `x` is an argument itself.
        labelled: whether the data must have labels.
        learned: whether the model learns from the data.

    Returns:
        `x`, `y` and `sample_weight` for Keras. Lists become arrays; booleans and small integers get
        a dtype that losses and metrics take. A source of batches is wrapped, and `y` and
        `sample_weight` are `None`.

    Raises:
        ValueError: if shapes, dtypes, numbers, labels or weights do not fit. A batch of a stream
            raises it when it arrives. TensorFlow may turn that error into an `OpError`, which
            `plain_errors` turns back.
    """
    check = Check(expected, within, labelled, learned)
    dataset, loader = backend.is_dataset(x), is_loader(x)
    if not dataset and not loader and not isinstance(x, keras.utils.PyDataset) and not inspect.isgenerator(x):
        if not expected().several:
            return check.arrays(x, y, sample_weight)
        check.structures(x, y, sample_weight)
        return x, y, sample_weight
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise ValueError(
                f"{check.named(name)} must be left out where x gives batches, which hold it. Received: x={type(x).__name__} "
                f"and {name}={type(value).__name__}"
            )
    if loader:
        if learned and expected().one_weight:
            check.refuse(
                "x",
                "be arrays, a tf.data.Dataset, a PyDataset or a generator, whose weights can be compared, where a rule with "
                "feedback='labels' learns from several outputs",
                type(x).__name__,
            )
        return x, None, None
    if dataset and expected().several:
        check.one_weight(keras.utils.unpack_x_y_sample_weight(x.element_spec)[2])
        return x, None, None
    if dataset:
        from keras_blur.checks.datasets import checked_dataset  # it imports TensorFlow

        return checked_dataset(check, x), None, None
    if isinstance(x, keras.utils.PyDataset):
        if x.num_batches == 0:
            check.refuse("x", "hold at least one example", "a PyDataset without batches")
        return _CheckedDataset(x, check), None, None
    return check.batches(x), None, None


_LOADERS = {
    "torch.utils.data": ("DataLoader",),
    "grain": ("MapDataset", "IterDataset", "DataLoader"),
    "tensorflow.python": ("DistributedDataset", "DistributedDatasetsFromFunction"),
}


def is_loader(x: Any) -> bool:
    """Whether a value is another source of batches that Keras knows by its class: a PyTorch
    `DataLoader`, a dataset or loader of Grain, or a dataset of `tf.distribute`.

    Example:

    >>> is_loader(np.ones(3))
    False
    """
    return any(
        kind.__module__.startswith(module) and kind.__name__ in names
        for kind in type(x).__mro__
        for module, names in _LOADERS.items()
    )


def checked_arrays(
    x: Any, y: Any, sample_weight: Any, expected: Expected, within: str | None = None
) -> tuple[Any, Any, Any]:
    """As `checked`, for labelled arrays only."""
    return Check(lambda: expected, within, labelled=True).arrays(x, y, sample_weight)


def checked_validation(data: Any, expected: Callable[[], Expected]) -> Any:
    """Checks the argument `validation_data` as `checked` does.

    Args:
        data: arrays `(x, y)` or `(x, y, sample_weight)`, or a source of batches.
        expected: as in `checked`.

    Raises:
        ValueError: as in `checked`, or if a tuple has another length.
    """
    if not isinstance(data, (tuple, list)):
        return checked(data, None, None, expected, within="validation_data")[0]
    if not 2 <= len(data) <= 3:
        raise ValueError(
            f"`validation_data` must be (x, y), (x, y, sample_weight) or a dataset. Received: a tuple of {len(data)}"
        )
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    x, y, weight = checked(x, y, weight, expected, within="validation_data")
    return (x, y) if weight is None else (x, y, weight)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns the error that TensorFlow raises for a bad batch back into the `ValueError`."""
    try:
        yield
    except _stream_errors() as error:
        text = f"{StreamError.__name__}: {error}" if isinstance(error, StreamError) else str(error)
        found = re.search(rf"{StreamError.__name__}: ([^\n]*)", text)
        if not found:
            raise
        raise ValueError(found[1]) from None


def check_class_weight(class_weight: Any, sample_weight: Any, expected: Expected) -> None:
    """Checks the argument `class_weight`.

    Args:
        class_weight: a mapping from class numbers to weights, or `None`.
        sample_weight: weights of examples, or `None`.
        expected: the data that the model takes.

    Raises:
        ValueError: if `class_weight` does not map known classes to finite weights of 0 or more, or
            both kinds of weights are given.
    """
    if class_weight is None:
        return
    if sample_weight is not None:
        raise ValueError("`class_weight` must be None where `sample_weight` is given. Received: both")
    if expected.outputs is not None and len(expected.outputs) > 1:
        raise ValueError(
            "`class_weight` must be None where outputs have positions: give a `sample_weight` for each position. Received: "
            f"class_weight={class_weight!r} for outputs of shape {text_of(expected.outputs)}"
        )
    wanted = "`class_weight` must map class numbers to finite weights of 0 or more."
    if not isinstance(class_weight, Mapping) or not class_weight:
        raise ValueError(f"{wanted} Received: class_weight={class_weight!r}")
    for label, weight in class_weight.items():
        whole = isinstance(label, numbers.Real) and float(label).is_integer() and float(label) >= 0
        if not whole or (expected.classes is not None and label >= expected.classes):
            limit = "" if expected.classes is None else f" below {expected.classes}"
            raise ValueError(f"{wanted[:-1]}, with class numbers{limit}. Received: the class {label!r}")
        try:
            sound = math.isfinite(weight) and weight >= 0
        except TypeError:
            sound = False
        if not sound:
            raise ValueError(f"{wanted} Received: weight {weight!r} for class {label!r}")


class CheckedModel(keras.Model):
    """A Keras model that checks its data. A subclass defines `_expected`."""

    @abc.abstractmethod
    def _expected(self) -> Expected:
        """The data that the model takes."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras. The data are checked first, as in `fit`."""
        given = inspect.signature(keras.Model.evaluate).bind(self, *args, **kwargs).arguments
        del given["self"]
        others = given.pop("kwargs", {})
        if not others.get("_use_cached_eval_dataset"):  # `fit` checked it
            data = checked(given.get("x"), given.get("y"), given.get("sample_weight"), self._expected)
            given["x"], given["y"], given["sample_weight"] = data
        with plain_errors():
            return super().evaluate(**given, **others)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Keras. The inputs are checked first, as in `fit`."""
        x = checked(x, None, None, self._expected, labelled=False)[0]
        with plain_errors():
            return super().predict(x, *args, **kwargs)

    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, class_weight: Any = None, **kwargs: Any
    ) -> Any:
        """As in Keras. The data are checked first, as in `fit`."""
        x, y, sample_weight = checked(x, y, sample_weight, self._expected, learned=True)
        check_class_weight(class_weight, sample_weight, self._expected())
        return super().train_on_batch(x, y, sample_weight, class_weight, **kwargs)

    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any) -> Any:
        """As in Keras. The data are checked first, as in `fit`."""
        return super().test_on_batch(*checked(x, y, sample_weight, self._expected), **kwargs)

    def predict_on_batch(self, x: Any) -> Any:
        """As in Keras. The inputs are checked first, as in `fit`."""
        return super().predict_on_batch(checked(x, None, None, self._expected, labelled=False)[0])


def _stream_errors() -> tuple[type[BaseException], ...]:
    """The exceptions that a bad batch of a stream can raise, with and without TensorFlow."""
    tensorflow = sys.modules.get("tensorflow")
    return (StreamError,) if tensorflow is None else (tensorflow.errors.OpError, StreamError)


def _tensorflow_kind(value: Any) -> str | None:
    """`"ragged"` or `"sparse"` for such a tensor or its spec, else `None`."""
    name = type(value).__name__
    kinds = {"RaggedTensor": "ragged", "RaggedTensorSpec": "ragged", "SparseTensor": "sparse", "SparseTensorSpec": "sparse"}
    return kinds.get(name) if type(value).__module__.startswith("tensorflow") else None


class StreamError(ValueError):
    """The error of a bad batch of a stream. TensorFlow keeps its name and message as text."""


class Check:
    """The checks of one source of data."""

    def __init__(self, expected: Callable[[], Expected], within: str | None, labelled: bool, learned: bool = False):
        self.expected, self.within, self.labelled, self.learned = expected, within, labelled, learned

    def named(self, name: str) -> str:
        """The name of an argument in messages."""
        return f"`{name}` of `{self.within}`" if self.within else f"`{name}`"

    def refuse(self, name: str, wanted: str, received: str) -> None:
        raise ValueError(f"{self.named(name)} must {wanted}. Received: {received}")

    # Sources.

    def arrays(self, x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        """Arrays of any kind, checked and ready for Keras."""
        expected = self.expected()
        x_array = self._array("x", x, expected)
        y_array = self._array("y", y, expected) if self.labelled else None
        weight = None if sample_weight is None else self._array("sample_weight", sample_weight, expected)
        self.check_shapes(expected, *(None if one is None else one.shape for one in (x_array, y_array, weight)))
        self._values(expected, x_array, y_array, weight)
        # A tensor stays on its device unless its values must change.
        pairs = ((x, x_array), (y, y_array), (sample_weight, weight))
        kept = [value if ops.is_tensor(value) else array for value, array in pairs]
        return ready(expected, *kept) if self.labelled else (ready(expected, kept[0], None, None)[0], y, kept[2])

    def structures(self, x: Any, y: Any, sample_weight: Any) -> None:
        """Checks that the arrays of several inputs or outputs are finite and of equal length. Keras
        checks their structure."""
        length = None
        for name, value in (("x", x), ("y", y), ("sample_weight", sample_weight)):
            for array in keras.tree.flatten(value):
                if not isinstance(array, np.ndarray) or not array.ndim:
                    continue
                if _floating(array.dtype) and not np.isfinite(array).all():
                    self.refuse(name, "be finite", "an array with NaN or infinite numbers")
                length = len(array) if length is None else length
                if len(array) != length:
                    self.refuse(name, f"have as many examples as the first array, {length}", f"an array of {len(array)}")
        self.one_weight(sample_weight)

    def one_weight(self, sample_weight: Any) -> None:
        """Checks that weights of several outputs are equal, where a model learns and needs that.
        Specs in place of arrays count as different."""
        arrays = keras.tree.flatten(sample_weight)
        listed = not any(hasattr(one, "shape") for one in arrays)  # numbers of one array, or none
        if listed or len(arrays) == 1 or not (self.learned and self.expected().one_weight):
            return
        known = all(hasattr(one, "__array__") for one in arrays)
        if not known or any(not np.array_equal(np.asarray(one), np.asarray(arrays[0])) for one in arrays[1:]):
            wanted = "be one array, or the same for each output, where a rule with feedback='labels' learns from several"
            self.refuse("sample_weight", wanted, f"{len(arrays)} arrays")

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields the batches of a generator and checks each one."""
        empty = True
        for batch in batches:
            empty = False
            yield self.batch(batch)
        if empty:
            self.refuse("x", "hold at least one example", "a generator without batches")

    def batch(self, batch: Any) -> Any:
        """Checks a batch of a stream and returns it ready for Keras."""
        try:
            parts = self.parts(batch)
            if self.expected().several:
                self.structures(*parts)
                return batch
            if not self.labelled:
                return (self.arrays(parts[0], None, None)[0],)
            x, y, weight = self.arrays(*parts)
        except ValueError as error:
            raise StreamError(str(error)) from None
        return (x, y) if weight is None else (x, y, weight)

    def parts(self, batch: Any) -> tuple[Any, Any, Any]:
        if isinstance(batch, (tuple, list)) and not 1 <= len(batch) <= 3:
            self.refuse("x", "give batches (x, y) or (x, y, sample_weight)", f"batches of {len(batch)} parts")
        return keras.utils.unpack_x_y_sample_weight(batch)

    # Checks of form.

    def _array(self, name: str, value: Any, expected: Expected) -> np.ndarray:
        """Converts an argument to a numpy array and checks its dtype."""
        if value is None:
            self.refuse(name, "be given", f"{name}=None")
        wanted = f"be one array{f' of shape {text_of(expected.features)}' if name == 'x' and expected.features else ''}"
        several = isinstance(value, (list, tuple)) and self._is_several(name, value, expected)
        if several or isinstance(value, Mapping) or _tensorflow_kind(value):
            self.refuse(name, wanted, described(value))
        try:
            array = np.asarray(value)
        except (ValueError, TypeError):
            self.refuse(name, wanted, described(value))
        if array.ndim == 0 and array.dtype.kind == "O":
            self.refuse(name, wanted, described(value))
        self.check_dtype(name, array.dtype, expected)
        return array

    def _is_several(self, name: str, value: Any, expected: Expected) -> bool:
        """Whether a list holds whole inputs rather than examples."""
        if name != "x" or not expected.features:
            return False
        return bool(value) and all(len(getattr(one, "shape", ())) > len(expected.features) for one in value)

    def check_dtype(self, name: str, dtype: Any, expected: Expected) -> None:
        if name == "x" and expected.text and dtype.kind in "USO":
            return
        if dtype.kind not in "biuf" and dtype.name != "bfloat16":
            self.refuse(name, "hold numbers", f"{dtype if dtype.kind != 'O' else 'objects or strings'}")

    def check_shapes(self, expected: Expected, x: Any, y: Any = None, weight: Any = None) -> None:
        """Checks shapes. An unknown size is `None`; so is the shape of an array that is absent or
        of unknown rank."""
        if x is not None and not (x and _fits(x[1:], *_input_shapes(expected.features))):
            self.refuse("x", f"have shape {text_of(expected.features)}", f"an array of shape {_plain(x)}")
        if x is not None and x[0] == 0:
            self.refuse("x", "hold at least one example", f"an array of shape {_plain(x)}")
        if y is not None and not (y and _fits(y[1:], *_label_shapes(expected))):
            forms = _label_shapes(expected)
            wanted = " or ".join(dict.fromkeys(text_of(form) for form in forms))
            kind = " of integer labels" if expected.labels == "classes" else ""
            hint = ""
            if expected.labels not in (None, "classes") and y and len(y) <= 2 and y[1:] in ((), (1,)):
                hint = "; integer labels need a sparse loss"
            self.refuse("y", f"have shape {wanted}{kind}", f"an array of shape {_plain(y)}{hint}")
        if weight is not None and not (weight and _fits(weight[1:], *_weight_shapes(expected))):
            wanted = " or ".join(dict.fromkeys(text_of(form) for form in _weight_shapes(expected)))
            self.refuse("sample_weight", f"have shape {wanted}", f"an array of shape {_plain(weight)}")
        for name, shape in (("y", y), ("sample_weight", weight)):
            if x and shape and None not in (x[0], shape[0]) and x[0] != shape[0]:
                self.refuse(name, f"have as many examples as `x`, {x[0]}", f"an array of shape {_plain(shape)}")

    # Checks of values.

    def _values(self, expected: Expected, x: Array, y: Array, weight: Array) -> None:
        for name, value in (("x", x), ("y", y), ("sample_weight", weight)):
            if value is not None and _floating(value.dtype) and not np.isfinite(value).all():
                self.refuse(name, "be finite", "an array with NaN or infinite numbers")
        if weight is not None and weight.size and weight.min() < 0:
            self.refuse("sample_weight", "be 0 or more", f"a weight of {weight.min()}")
        if y is not None and y.size:
            self._labels(expected, y)

    def _labels(self, expected: Expected, y: np.ndarray) -> None:
        low, high = y.min(), y.max()
        if expected.labels == "classes":
            counted = y if expected.ignored is None else y[y != expected.ignored]
            limit = "" if expected.classes is None else f" to {expected.classes - 1}"
            wanted = f"hold integers from 0{limit}"
            if not counted.size:
                return
            if _floating(y.dtype) and (counted % 1).any():
                self.refuse("y", wanted, f"labels with fractions, such as {counted[counted % 1 != 0].flat[0]:g}")
            low, high = counted.min(), counted.max()
            if low < 0 or (expected.classes is not None and high >= expected.classes):
                self.refuse("y", wanted, f"labels from {low:g} to {high:g}")
        elif expected.labels == "indicators" and (low < -ROUNDING or high > 1 + ROUNDING):
            self.refuse("y", "hold numbers from 0 to 1", f"labels from {low:g} to {high:g}")
        elif expected.labels == "hinge" and (low < -1 - ROUNDING or high > 1 + ROUNDING):
            self.refuse("y", "hold numbers from -1 to 1", f"labels from {low:g} to {high:g}")
        elif expected.labels == "signs" and not ((y == 1) | (y == -1)).all():
            self.refuse("y", "hold -1 and +1 alone", f"labels from {low:g} to {high:g}")


class _CheckedDataset(keras.utils.PyDataset):
    """A `PyDataset` whose batches are checked as they arrive."""

    def __init__(self, inner: keras.utils.PyDataset, check: Check):
        super().__init__(
            workers=inner.workers, use_multiprocessing=inner.use_multiprocessing, max_queue_size=inner.max_queue_size
        )
        self._inner, self._check = inner, check

    def __getitem__(self, index: int) -> Any:
        return self._check.batch(self._inner[index])

    @property
    def num_batches(self) -> int | None:
        return self._inner.num_batches

    def on_epoch_begin(self) -> None:
        self._inner.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._inner.on_epoch_end()


def ready(expected: Expected, x: Any, y: Any, weight: Any) -> tuple[Any, Any, Any]:
    """Checked arrays or tensors, in the ranks and dtypes that layers, losses and metrics take."""
    x, y, weight = (_native(one) for one in (x, y, weight))
    rank = None if expected.features is None else len(expected.features) + 1
    if rank is not None and len(x.shape) != rank:
        x = x[..., None] if len(x.shape) < rank else x[..., 0]
    if y is not None:
        dtype = keras.backend.standardize_dtype(y.dtype)
        if expected.labels == "classes" and "float" not in dtype and dtype not in ("int32", "int64"):
            y = _cast(y, "int32")
        elif dtype == "bool" and expected.labels is not None:
            y = _cast(y, keras.config.floatx())
    if weight is not None and expected.outputs is not None:
        weight = _cast(weight, keras.config.floatx())
        rank = max(1, len(expected.outputs))
        if len(weight.shape) > rank:
            weight = weight[..., 0]
        elif len(weight.shape) < rank:  # a weight of an example is that of all its positions
            weight = weight[(..., *(None,) * (rank - len(weight.shape)))]
    return x, y, weight


def _cast(value: Any, dtype: str) -> Any:
    return ops.cast(value, dtype) if ops.is_tensor(value) else value.astype(dtype)


def _native(value: Any) -> Any:
    """An array in native byte order, with at most 64 bits per float."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind == "f" and value.dtype.itemsize > 8:
        return value.astype(np.float64)
    return value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))


def _floating(dtype: Any) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _fits(shape: Shape, *forms: Shape | None) -> bool:
    """Whether a shape without its batch axis matches one of the forms. `None` matches anything."""

    def same(size: int | None, other: int | None) -> bool:
        return size is None or other is None or size == other

    return any(form is None or (len(shape) == len(form) and all(map(same, shape, form))) for form in forms)


def _input_shapes(features: Shape | None) -> list[Shape | None]:
    """The shape of an input, and those that Keras makes fit by a last axis of size 1."""
    if features is None:
        return [None]
    return [features, (*features, 1)] if not features or features[-1] != 1 else [features, features[:-1], (*features, 1)]


def _label_shapes(expected: Expected) -> list[Shape | None]:
    if expected.labels is None or expected.outputs is None:
        return [None]
    before = expected.outputs[:-1]
    if expected.labels == "classes":
        return [before, (*before, 1)]
    if not expected.outputs:
        return [(), (1,)]
    return [expected.outputs, before] if expected.outputs[-1] == 1 else [expected.outputs]


def _weight_shapes(expected: Expected) -> list[Shape | None]:
    if expected.outputs is None:
        return [None]
    forms = [expected.outputs[:count] for count in range(max(1, len(expected.outputs)))]
    return list(itertools.chain(*((form, (*form, 1)) for form in forms)))


def text_of(shape: Shape | None) -> str:
    """The shape of a batch, for messages."""
    if shape is None:
        return "(batch, ...)"
    sizes = ["batch", *("any" if size is None else str(size) for size in shape)]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _plain(shape: Shape) -> str:
    sizes = ["any" if size is None else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def described(value: Any) -> str:
    """Describes a value that is not an array, for messages."""
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(repr, value))}"
    if _tensorflow_kind(value):
        return f"a {_tensorflow_kind(value)} tensor"
    if isinstance(value, (list, tuple)):
        shapes = [_plain(tuple(one.shape)) for one in value if getattr(one, "shape", None) is not None]
        parts = f" with arrays of shape {', '.join(shapes[:3])}" if shapes else ""
        return f"a {type(value).__name__} of length {len(value)}{parts}"
    return f"{type(value).__name__}"
