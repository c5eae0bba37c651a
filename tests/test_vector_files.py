"""Vector files that are damaged, incomplete or of another kind: each an error that names the file
and what is wrong."""

import json
import re

import numpy as np
import pytest
from marks import slow_but
from vector_builder import as_bytes, config_of, published, write

from keras_blur import conformance

# Arrays that the default rule reads or that are compared.
READ = [key for key in published() if not key.startswith("genome/")]
READ += ["genome/neuron/transform", "genome/neuron/keep", "genome/synapse/transform/pre", "genome/synapse/update"]
OPTIONS = [name for name in config_of(published()) if name != "separate_forward_synapse"]  # it follows from the others
KEYS = [
    "inputs", "labels", "query_prediction", "genome/neuron/transform", "genome/synapse/transform/pre",
    "genome/neuron/keep", "synapse_init/0/forward", "synapse_init/1/backward", "step1/synapse/0/forward",
    "step2/neurons/1", "meta_gradient/synapse/update",
]  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(tmp_path, share):
    whole = write(tmp_path, published()).read_bytes()
    path = tmp_path / "cut.npz"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"cut\.npz could not be read as a vector file; it may be damaged"):
        conformance.replay(path)


@pytest.mark.parametrize("key", ["inputs", "genome/neuron/transform", "step2/synapse/1/forward", "config"])
def test_one_flipped_byte_is_found(tmp_path, key):
    """The archive's own checksum sees it, before any number is compared."""
    path = write(tmp_path, published())
    whole = path.read_bytes()
    place = whole.index(published()[key].tobytes()) + 17
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"changed\.npz could not be read as a vector file; it may be damaged"):
        conformance.replay(path)


def test_other_files(tmp_path):
    path = tmp_path / "other.npz"
    for content in (np.random.default_rng(0).bytes(2000), b"hello", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.npz could not be read as a vector file"):
            conformance.replay(path)
    with pytest.raises(ValueError, match=r"absent\.npz could not be read as a vector file.*No such file"):
        conformance.replay(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        conformance.replay(tmp_path)


def test_single_array_file(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"array\.npy"):
        conformance.replay(tmp_path / "array.npy")


@pytest.mark.parametrize("key", slow_but(list(READ)[::4], READ))
def test_missing_array_is_named(tmp_path, key):
    arrays = published()
    del arrays[key]
    with pytest.raises(ValueError, match=rf"changed\.npz is incomplete: it has no array '{key}'"):
        conformance.replay(write(tmp_path, arrays))


@pytest.mark.parametrize("option", OPTIONS)
def test_missing_option_is_named(tmp_path, option):
    config = {name: value for name, value in config_of(published()).items() if name != option}
    with pytest.raises(ValueError, match=rf"changed\.npz is incomplete: its config has no '{option}'"):
        conformance.replay(write(tmp_path, {**published(), "config": as_bytes(config)}))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("wrong", ["shape", "nan", "infinite", "integers"])
def test_wrong_array_is_named(tmp_path, key, wrong):
    arrays = published()
    value = arrays[key].copy()
    if wrong == "shape":
        value = np.stack([value, value], axis=-1)
    elif wrong == "integers":
        value = value.astype("int32")
    else:
        value[(0,) * value.ndim] = {"nan": np.nan, "infinite": np.inf}[wrong]
    arrays[key] = value
    said = {"shape": "shape", "integers": "floating-point numbers. Received int32"}.get(wrong, "not finite")
    with pytest.raises(ValueError, match=rf"changed\.npz: '{key}' .*{said}"):
        conformance.replay(write(tmp_path, arrays))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"network_spec": {"new_option": 1}}, "unknown option.*'network_spec': new_option"),
        ({"ojas_spec": {"speed": 1}}, "unknown option.*'ojas_spec': speed"),
        ({"synapse_normalization_spec": {"norm": 2}}, "unknown option.*'synapse_normalization_spec': norm"),
        ({"network_spec": {"backward_update": "none"}}, "`backward_update`.*'none'"),
        ({"network_spec": {"synapse_saturation_type": "soft"}}, "`saturation`.*'soft'"),
        ({"hidden_activation": "softmax"}, "`forward_activation`.*'softmax'"),
        ({"states": 1}, "`states`.*1"),
        ({"states": 3}, "genome/neuron/transform"),
        ({"states": "2"}, "`states`.*'2'"),
        ({"sizes": [5, 8, 3]}, "synapse_init/0/forward"),
        ({"sizes": 5}, "sizes"),
        ({"sizes": [5]}, "(sizes|labels)"),
        ({"steps": 2}, "inputs"),
        ({"steps": "3"}, "steps"),
        ({"batch": None}, "(batch|inputs)"),
        ({"species": 2}, "inputs"),
        ({"replicas": 2}, "inputs"),
        ({"network_spec": 5}, "network_spec"),
        ({"network_spec": [5]}, "network_spec"),
        ({"per_layer_genome": True}, "genome/neuron/"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_wrong_config_is_named(tmp_path, config, named):
    with pytest.raises(ValueError, match=rf"changed\.npz.*{named}"):
        conformance.replay(write(tmp_path, published(), **config))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"3", b"\xff\xfe"])
def test_config_must_be_an_object(tmp_path, content):
    arrays = {**published(), "config": np.frombuffer(content, np.uint8)}
    with pytest.raises(ValueError, match=r"changed\.npz"):
        conformance.replay(write(tmp_path, arrays))


def test_find(tmp_path):
    with pytest.raises(ValueError, match=r"The folder '.*' holds no \.npz file"):
        conformance.find([tmp_path])
    with pytest.raises(ValueError, match=r"There is no file or folder '.*absent'"):
        conformance.find([tmp_path / "absent"])
    for name in ("b.npz", "a.npz", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    a, b, c = (str(tmp_path / name) for name in ("a.npz", "b.npz", "c.txt"))
    assert conformance.find([tmp_path]) == [a, b]
    assert conformance.find([c, str(tmp_path), b]) == [c, a, b, b]
    assert conformance.find([]) == []
