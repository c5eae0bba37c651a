"""Images from scikit-learn and from prepared tensorflow_datasets folders, and what is said where
they are missing."""

import numpy as np
import pytest
from on_backend import digits

from keras_blur.tasks.datasets import load_images


def write_set(folder, name, shape=(6, 5, 1), splits=("train", "test"), label=True):
    """A small prepared set, of a name that tensorflow_datasets does not know."""
    tf, tfds = map(pytest.importorskip, ("tensorflow", "tensorflow_datasets"))
    rng = np.random.default_rng(0)
    parts = {}
    for split in splits:
        columns = {"image": rng.integers(0, 256, (20, *[size or 4 for size in shape]), dtype=np.uint8)}
        if label:
            columns["label"] = rng.integers(0, 3, 20)
        parts[split] = tf.data.Dataset.from_tensor_slices(columns)
    features = {"image": tfds.features.Image(shape=shape)}
    if label:
        features["label"] = tfds.features.ClassLabel(num_classes=3)
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        data_dir=str(folder),
        split_datasets=parts,
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
    )


def test_digits_are_all_there_and_apart():
    images = load_images("digits")
    assert images.x_train.shape == (1437, 8, 8, 1)
    assert images.x_test.shape == (360, 8, 8, 1)
    assert sorted(set(images.y_train)) == list(range(10)) == sorted(set(images.y_test))
    assert images.x_train.max() == images.scale == 16
    both = np.concatenate([images.x_train, images.x_test]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    assert np.array_equal(np.sort(both.sum(1)), np.sort(load_digits().data.sum(1)))


@pytest.mark.filterwarnings("ignore")  # tensorflow_datasets' own, while it writes
def test_prepared_set_of_any_name_and_size(tmp_path):
    write_set(tmp_path, "tiny_images")
    images = load_images("tiny_images", tmp_path)
    assert images.x_train.shape == (20, 6, 5, 1)
    assert images.x_train.dtype == np.uint8
    assert images.classes == 3
    assert images.scale == 255
    assert np.array_equal(images.x_train[0], np.random.default_rng(0).integers(0, 256, (20, 6, 5, 1), dtype=np.uint8)[0])


@pytest.mark.filterwarnings("ignore")
def test_data_dir_from_the_environment_and_validation_as_test(tmp_path, monkeypatch):
    write_set(tmp_path, "tiny_images", splits=("train", "validation"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert load_images("tiny_images").x_test.shape[0] == 20


def test_missing_data_names_folder_and_remedy(tmp_path):
    with pytest.raises(ValueError, match="'mnist' is not prepared in") as error:
        load_images("mnist", tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "download_and_prepare()" in str(error.value)


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="Received: name='no_such_set'"):
        load_images("no_such_set", tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": ("train",)}, "must have the splits train and test"),
        ({"label": False}, "must have the features `image`"),
        ({"shape": (None, None, 1)}, "all of one size"),
    ],
)
def test_sets_that_are_not_labelled_images(tmp_path, options, message):
    write_set(tmp_path, "odd_images", **options)
    with pytest.raises(ValueError, match=message):
        load_images("odd_images", tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_damaged_records(tmp_path):
    write_set(tmp_path, "tiny_images")
    record = next((tmp_path / "tiny_images" / "1.0.0").glob("*train*tfrecord*"))
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(ValueError, match="could not be read"):
        load_images("tiny_images", tmp_path)


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn.datasets"), ("mnist", "tensorflow_datasets")])
def test_missing_package_names_the_install_command(monkeypatch, name, module):
    import importlib

    real = importlib.import_module

    def importing(wanted, *rest):
        if wanted == module:
            raise ImportError(wanted)
        return real(wanted, *rest)

    monkeypatch.setattr(importlib, "import_module", importing)
    with pytest.raises(ImportError, match=r"pip install 'keras_blur\[data\]'"):
        load_images(name)


def test_the_digits_that_tests_on_jax_read_are_these():
    images = load_images()
    for found, wanted in zip(digits(), (images.x_train, images.y_train, images.x_test, images.y_test), strict=True):
        np.testing.assert_array_equal(found, wanted)
