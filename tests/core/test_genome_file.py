"""Genome files: exact to the last bit, whole or not there, and an error that says so where one was
damaged."""

import hashlib
import json
import os
import re

import keras
import numpy as np
import pytest
import rule_table

from keras_blur import Genome, Rule, __version__

EVERY = {**rule_table.SINGLE, **rule_table.COVER, "running": {"normalization_momentum": 0.25}}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_keras_serialization_and_json_are_exact(name, dtype):
    genome = rule_table.draw_genome(Rule(**EVERY[name]), dtype=dtype)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(genome)))
    for other in (Genome.from_json(genome.to_json()), keras.saving.deserialize_keras_object(config)):
        assert other == genome
        assert {value.dtype.name for value in other.arrays.values()} == {dtype}
        for key, value in genome.arrays.items():
            assert other.arrays[key].tobytes() == value.tobytes()


@pytest.mark.parametrize(
    ("name", "value"), [("states", np.int64(3)), ("oja_factor", np.float32(0.5)), ("keep_neurons", np.True_)]
)
def test_options_may_be_numpy_numbers(name, value):
    genome = Genome.random(Rule(**{name: value}), 0)
    assert Genome.from_json(genome.to_json()) == genome


@pytest.fixture
def genome():
    return Genome.random(Rule(update_decay="power", feedback="error", loss="mse"), 0)


def load(tmp_path, content):
    path = tmp_path / "changed.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Genome.load(path)


def test_round_trip(tmp_path, genome):
    genome.save(tmp_path / "g.json")
    assert Genome.load(tmp_path / "g.json") == genome
    assert os.listdir(tmp_path) == ["g.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert os.stat(tmp_path / "g.json").st_mode & 0o777 == 0o666 & ~mask


def test_any_changed_digit_is_found(tmp_path, genome):
    """Each digit of each number, rule and arrays: it is an error, unless it spells the very same
    number."""
    text = genome.to_json()
    end = text.index('"checksum"')
    digits = [place for place in re.finditer(r"\d", text[:end]) if text[: place.start()].count('"') % 2 == 0]
    assert len(digits) > 300
    errors = []
    for place in (digit.start() for digit in digits):
        other = text[:place] + str((int(text[place]) + 5) % 10) + text[place + 1 :]
        try:
            assert load(tmp_path, other) == genome
        except ValueError as error:
            errors.append(str(error))
    said = r"changed.json' (is damaged|is not a genome|has genome format version)"
    assert [error for error in errors if not re.search(said, error)] == []
    assert len(errors) > 0.9 * len(digits)


@pytest.mark.parametrize("change", [("tanh", "relu"), ("-0.", "0."), ("nu_tilde", "nu_tilda"), ("false", "true")])
def test_changed_text_is_found(tmp_path, genome, change):
    with pytest.raises(ValueError, match=r"changed.json' is damaged: its checksum does not match"):
        load(tmp_path, genome.to_json().replace(*change, 1))


def test_changed_checksum_is_found(tmp_path, genome):
    text = genome.to_json()
    place = text.index('"checksum": "') + 20
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path, text[:place] + ("1" if text[place] == "0" else "0") + text[place + 1 :])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated(tmp_path, genome, share):
    text = genome.to_json()
    with pytest.raises(ValueError, match=r"changed.json' is not a genome: not JSON"):
        load(tmp_path, text[: int(len(text) * share)])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("hello", "changed.json' is not a genome: not JSON"),
        ("[1]", "changed.json' is not a genome: expected a JSON object with format 'keras_blur.genome'"),
        ('{"format": "other"}', "changed.json' is not a genome: expected a JSON object"),
        (bytes(range(128, 256)), "changed.json' could not be read"),
        ('{"format": "keras_blur.genome", "version": 1}', "changed.json' is damaged"),
    ],
)
def test_other_files(tmp_path, content, named):
    with pytest.raises(ValueError, match=named):
        load(tmp_path, content)


def test_other_version(tmp_path, genome):
    with pytest.raises(ValueError, match=r"changed.json' has genome format version 2; this release reads version 1"):
        load(tmp_path, genome.to_json().replace('"version": 1', '"version": 2'))


def test_licence_and_release_are_in_the_file(tmp_path, genome):
    path = tmp_path / "g.json"
    genome.save(path)
    assert Genome.load(path).license == json.loads(path.read_text())["license"] == "NOASSERTION"
    genome.save(path, license="CC-BY-4.0")
    document = json.loads(path.read_text())
    assert document["written_by"] == f"keras_blur {__version__}"
    loaded = Genome.load(path)
    assert loaded.license == document["license"] == "CC-BY-4.0"
    assert loaded == genome
    loaded.save(path)
    assert Genome.load(path).license == "CC-BY-4.0"  # it travels with the genome
    assert Genome.from_config(loaded.get_config()).license == "CC-BY-4.0"
    assert loaded.replace(temperature=2.0).license == "NOASSERTION"  # other numbers, nothing said


@pytest.mark.parametrize("license", ["", "  ", 3])
def test_a_licence_is_a_text(tmp_path, genome, license):
    with pytest.raises(ValueError, match=r"`license` must be an SPDX identifier.*Received: license="):
        genome.save(tmp_path / "g.json", license=license)
    assert os.listdir(tmp_path) == []


def test_a_file_without_a_licence_loads(tmp_path, genome):
    """Files had none at first; this is one of those, with the checksum that it had."""
    document = genome.to_dict()
    old = {key: document[key] for key in ("format", "version", "rule", "arrays")}
    text = json.dumps(old, sort_keys=True, separators=(",", ":"))
    old["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    loaded = load(tmp_path, json.dumps(old))
    assert loaded == genome
    assert loaded.license == "NOASSERTION"


def test_missing(tmp_path):
    with pytest.raises(ValueError, match=r"absent.json' could not be read: .*No such file"):
        Genome.load(tmp_path / "absent.json")


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_save_is_all_or_nothing(tmp_path, monkeypatch, genome, function):
    genome.save(tmp_path / "g.json")

    def fail(*arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError, match="disk full"):
            genome.replace(temperature=3.0).save(tmp_path / "g.json")
    assert os.listdir(tmp_path) == ["g.json"]
    assert Genome.load(tmp_path / "g.json") == genome
