"""Files on a disk and in a bucket, for which TensorFlow's file system in memory stands: no function of Python reads it."""

import os

import pytest

from keras_blur import Genome, Rule, files, genomes


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "disk" else f"ram://{request.node.name}"


def test_text_there_and_back(folder):
    path = f"{folder}/a.txt"
    assert not files.exists(path)
    for text in ("first", "zweiter, länger"):
        files.write_text(path, text)
        assert files.exists(path)
        assert files.read_text(path) == text


def test_a_genome_there_and_back(folder):
    genome = Genome.random(Rule(), seed=0)
    genome.save(f"{folder}/genome.json")
    assert Genome.load(f"{folder}/genome.json") == genome
    assert genomes.load(f"{folder}/genome.json") == genome


def test_what_is_missing_is_named(folder):
    with pytest.raises(OSError, match="absent"):
        files.read_text(f"{folder}/absent.txt")
    with pytest.raises(ValueError, match="could not be read"):
        Genome.load(f"{folder}/absent.json")


def test_a_block_that_fails_leaves_the_old_file(folder):
    path = f"{folder}/a.txt"
    files.write_text(path, "old")
    block = files.replacing(path)
    temporary = block.__enter__()
    assert temporary.endswith(".txt")
    assert os.path.exists(temporary)
    assert not block.__exit__(RuntimeError, RuntimeError(), None)
    assert files.read_text(path) == "old"
    assert not os.path.exists(temporary)


def test_nothing_else_is_left(tmp_path):
    files.write_text(tmp_path / "a.txt", "text")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert oct(os.stat(tmp_path / "a.txt").st_mode)[-3:] == oct(0o666 & ~files._umask())[-3:]
