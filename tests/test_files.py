"""Files on a disk and in a bucket, for which TensorFlow's file system in memory stands: no function
of Python reads it."""

import contextlib
import errno
import json
import os
import pathlib
import resource
import stat

import keras
import pytest

from keras_blur import Genome, Rule, files, genomes
from keras_blur.report import style


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


@contextlib.contextmanager
def full_disk(room=0):
    """No file can grow beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def picture(path):
    figure, axes = style.figure()
    axes[0][0].plot([0, 1])
    style.save(figure, path)


def keras_model():
    return keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])


WRITERS = {
    "a.txt": lambda path: files.write_text(path, "new" * 4000),
    "genome.json": lambda path: Genome.random(Rule(), seed=0).save(path),
    "model.keras": lambda path: files.save(keras_model(), path),
    "picture.png": picture,
    "picture.svg": picture,
}


@pytest.mark.parametrize("room", [0, 100])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_gives_one_sentence_and_leaves_the_old_file(name, room, tmp_path):
    path = tmp_path / name
    path.write_text("old")
    with (
        pytest.raises(OSError, match=r"File too large, and the old file stays as it was: '.*" + name) as raised,
        full_disk(room),
    ):
        WRITERS[name](path)
    assert raised.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [name]
    WRITERS[name](path)
    assert path.stat().st_size > 100


def test_a_full_device_and_an_interrupt_leave_nothing(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device.*'/dev/full'"):
        files.write_text("/dev/full", "text")
    files.write_text(tmp_path / "a.txt", "old")

    def write_half(broken):
        with files.replacing(tmp_path / "a.txt") as temporary:
            pathlib.Path(temporary).write_text("half")
            raise broken

    for broken in (KeyboardInterrupt, SystemExit, RuntimeError):
        with pytest.raises(broken):
            write_half(broken)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_of_other_kind_passes_through_and_a_failing_unlink_does_not_mask_it(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "no", path)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(RuntimeError, match="why"), files.replacing(tmp_path / "a.txt"):
        raise RuntimeError("why")
    with pytest.raises(FileNotFoundError, match="elsewhere"), files.replacing(tmp_path / "a.txt"):
        open("/elsewhere/b.txt")  # noqa: SIM115


def test_an_error_that_was_already_handled_is_not_taken_for_a_full_disk(tmp_path):
    try:
        raise OSError(errno.ENOSPC, "of another file")
    except OSError:
        with pytest.raises(RuntimeError, match="why"), files.replacing(tmp_path / "a.txt"):
            raise RuntimeError("why") from None


def test_links_lead_to_the_file_and_stay(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("old")
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "second").symlink_to("folder/a.txt")
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "dangling").symlink_to("real/new.txt")
    files.write_text(tmp_path / "first", "new")
    files.write_text(tmp_path / "dangling", "other")
    assert (tmp_path / "real" / "a.txt").read_text() == "new"
    assert (tmp_path / "real" / "new.txt").read_text() == "other"
    assert all((tmp_path / name).is_symlink() for name in ("first", "second", "dangling"))
    assert sorted(os.listdir(tmp_path / "real")) == ["a.txt", "new.txt"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"symbolic links: '.*loop"):
        files.write_text(tmp_path / "loop", "text")


def test_devices_pipes_and_descriptors_are_written_and_stay(tmp_path):
    files.write_text("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    (tmp_path / "null").symlink_to("/dev/null")
    files.write_text(tmp_path / "null", "text")
    assert (tmp_path / "null").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    with open(tmp_path / "log.txt", "w") as log:  # as of `command > log.txt`
        log.write("before, ")
        log.flush()
        files.write_text(f"/dev/fd/{log.fileno()}", "within, ")
        log.write("after")
    assert (tmp_path / "log.txt").read_text() == "before, within, after"


def test_permissions_stay(tmp_path):
    path = tmp_path / "a.txt"
    for mode in (0o600, 0o664):
        path.write_text("old")
        path.chmod(mode)
        files.write_text(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert path.read_text() == "new"


@pytest.mark.parametrize("name", ["", "there", "there/", "absent/"])
def test_a_folder_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("there")
    with pytest.raises(IsADirectoryError, match=f"A file is needed, not a folder: '{name}'"):
        files.write_text(name, "text")
    assert os.listdir() == ["there"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder '.*absent' for the file: '.*a.txt'"):
        files.write_text(tmp_path / "absent" / "a.txt", "text")
    assert os.listdir(tmp_path) == []


def test_a_file_that_must_not_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may do all
    with pytest.raises(PermissionError, match=r"Permission denied: '.*a\.txt'"):
        files.write_text(tmp_path / "a.txt", "new")


def test_numbers_of_other_settings_are_no_start(tmp_path):
    path = str(tmp_path / "numbers.json")
    assert files.read_numbers(path, {"seed": 0}) == {"settings": {"seed": 0}}
    files.write_text(path, json.dumps({"settings": {"seed": 0}, "found": [1.5]}))
    assert files.read_numbers(path, {"seed": 0})["found"] == [1.5]
    with pytest.raises(ValueError, match=r"settings \{'seed': 1\}\. Received: .*numbers\.json, of \{'seed': 0\}"):
        files.read_numbers(path, {"seed": 1})
