"""Files on a disk, in a bucket and on the Hugging Face Hub.

TensorFlow's file system in memory stands for a bucket: no function of Python reads it. A client
with the calls of `huggingface_hub` stands for the Hub.
"""

import contextlib
import errno
import json
import os
import pathlib
import resource
import stat
import sys
import types

import keras
import pytest

from keras_blur import Genome, Rule, files, genomes
from keras_blur.report import style


class Hub:
    """What `files.py` calls of `huggingface_hub` 2.4, with its arguments, on a folder."""

    def __init__(self, root):
        self.root, self.repositories, self.commits = root, set(), []

    def HfApi(self, library_name=None):
        return self

    def path(self, repo_id, filename, revision):
        return self.root / repo_id / (revision or "main") / filename

    def file_exists(self, repo_id, filename, *, revision=None):
        return self.path(repo_id, filename, revision).is_file()

    def create_repo(self, repo_id, *, exist_ok=False):
        assert exist_ok or repo_id not in self.repositories
        self.repositories.add(repo_id)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, revision=None):
        assert repo_id in self.repositories
        target = self.path(repo_id, path_in_repo, revision)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(pathlib.Path(path_or_fileobj).read_bytes())
        self.commits.append(path_in_repo)

    def hf_hub_download(self, repo_id, filename, *, revision=None, library_name=None):
        path = self.path(repo_id, filename, revision)
        if not path.is_file():
            raise RuntimeError(f"404: no {filename} in {repo_id}\n")  # of the HTTP library beneath it
        return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stand_in = Hub(tmp_path / "hub")
    names = ("HfApi", "hf_hub_download")
    module = types.SimpleNamespace(**{name: getattr(stand_in, name) for name in names})
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return stand_in


@pytest.fixture(params=["disk", "bucket", "hub"])
def folder(request, tmp_path):
    if request.param == "hub":
        request.getfixturevalue("hub")
        return "hf://someone/genomes/of/mine"
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


def test_a_revision_of_the_hub_is_its_own_place(hub):
    files.write_text("hf://someone/genomes@v1/a.txt", "first")
    files.write_text("hf://someone/genomes/a.txt", "second")
    assert files.read_text("hf://someone/genomes@v1/a.txt") == "first"
    assert files.read_text("hf://someone/genomes/a.txt") == "second"
    assert hub.commits == ["a.txt", "a.txt"]  # each one is whole: no other name in between
    assert hub.repositories == {"someone/genomes"}


def test_a_model_goes_to_the_hub_and_back(hub):
    model = keras_model()
    files.save(model, "hf://someone/models/of/mine/m.keras")
    with files.local("hf://someone/models/of/mine/m.keras") as path:
        same = keras.models.load_model(path)
    assert hub.commits == ["of/mine/m.keras"]
    assert (same.layers[0].kernel.numpy() == model.layers[0].kernel.numpy()).all()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("path", ["hf://genomes", "hf://someone/genomes", "hf://someone/genomes/", "hf://a@v1/b/c.json"])
def test_a_path_of_the_hub_that_names_no_file_is_refused(path):
    with pytest.raises(OSError, match="a file on the Hub must be hf://OWNER/REPOSITORY/FILE"):
        files.write_text(path, "text")


def test_without_its_client_a_path_of_the_hub_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = r"needs huggingface_hub, which is not installed: pip install 'keras_blur\[hub\]'"
    with pytest.raises(OSError, match=said):
        Genome.random(Rule(), seed=0).save("hf://someone/genomes/g.json")
    with pytest.raises(ValueError, match=said):
        Genome.load("hf://someone/genomes/g.json")


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
