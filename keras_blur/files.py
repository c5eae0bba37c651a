"""Files: written whole or not at all, on a disk, in a bucket or on the Hugging Face Hub.

A path with a scheme, as in `gs://bucket/genome.json`, goes through TensorFlow's file systems, as
Keras's own remote paths do. A path on the Hub, `hf://OWNER/REPOSITORY/genome.json`, goes through
`huggingface_hub`; Keras's `hf://` stands for a repository with one model and has no single files.
Each is imported only when such a path is used. A file is written under a temporary name and then
renamed, or uploaded in one commit to the Hub. No reader sees half a file, and the old one survives
a kill or a full disk.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

Path = str | os.PathLike[str]

# Files written sequentially, which can therefore go to a device such as /dev/stdout.
_STREAMED = (".json", ".csv", ".png", ".pdf", ".svg")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HUB = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.*[^/])")
_DESCRIPTOR = re.compile(r"(?:/proc/(\d+)|/dev)/fd/(\d+)")


class Memory(io.BytesIO):
    """A file in memory. `str` gives its name, from which Keras infers the format.

    HDF5 crashes the process if the disk is full, so it writes to memory and the bytes are then
    written to disk.
    """

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def __str__(self) -> str:
        return self._name


def is_remote(path: Path) -> bool:
    """Whether a path has a scheme, so that it is in a bucket or on the Hub.

    Args:
        path: any path.

    Example:

    >>> is_remote("gs://bucket/genome.json"), is_remote("genome.json")
    (True, False)
    """
    return "://" in os.fspath(path)


@contextlib.contextmanager
def _bucket(path: Path) -> Iterator[Any]:
    """TensorFlow's file systems. Their errors become an `OSError` that names the path."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise OSError(
            f"{os.fspath(path)}: a path with a scheme needs TensorFlow, which is not installed: "
            "pip install 'keras_blur[cpu]'"
        ) from error
    try:
        yield tf.io.gfile
    except tf.errors.OpError as error:
        raise OSError(f"{os.fspath(path)}: {error.message or type(error).__name__}") from error


@contextlib.contextmanager
def _hub(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The client of the Hugging Face Hub, and its arguments for the repository and the revision of
    a path. Its errors, and those of the HTTP library beneath it, become an `OSError` that names the
    path."""
    name = os.fspath(path)
    found = _HUB.fullmatch(name)
    if not found:
        raise OSError(f"{name}: a file on the Hub must be hf://OWNER/REPOSITORY/FILE or hf://OWNER/REPOSITORY@REVISION/FILE")
    try:
        import huggingface_hub
    except ImportError as error:
        raise OSError(
            f"{name}: a path on the Hub needs huggingface_hub, which is not installed: pip install 'keras_blur[hub]'"
        ) from error
    try:
        yield huggingface_hub, {"repo_id": found[1], "revision": found[2]}
    except Exception as error:
        raise OSError(f"{name}: {str(error).strip() or type(error).__name__}") from error


def _on_hub(path: Path) -> bool:
    return os.fspath(path).startswith("hf://")


def _file_on_hub(path: Path) -> str:
    """The path of a file inside its repository."""
    return os.fspath(path).split("/", 4)[4]


@contextlib.contextmanager
def _renaming(path: Path) -> Iterator[None]:
    """Turns an `OSError` about a temporary file into one about the caller's path."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def exists(path: Path) -> bool:
    """Whether a file exists.

    Args:
        path: a local path, or one in a bucket or on the Hub.

    Raises:
        OSError: if the bucket or the Hub cannot be asked.

    Example:

    >>> exists("no such file.json")
    False
    """
    if not is_remote(path):
        return os.path.exists(path)
    if _on_hub(path):
        with _hub(path) as (hub, place):
            return hub.HfApi().file_exists(filename=_file_on_hub(path), **place)
    with _bucket(path) as bucket:
        return bucket.exists(os.fspath(path))


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, unless they exist.

    On the Hub there is nothing to make, since folders there are only parts of file names.

    Args:
        path: a local path, or one in a bucket or on the Hub.

    Raises:
        OSError: if the folder cannot be made, or a file has that name.

    Example:

    >>> folder = os.path.join(tempfile.mkdtemp(), "genomes", "new")
    >>> make_folder(folder)
    >>> os.path.isdir(folder)
    True
    """
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)
        return
    if _on_hub(path):
        return
    with _bucket(path) as bucket:
        bucket.makedirs(os.fspath(path))


def _target(path: Path) -> str:
    """Resolves the symbolic links of a local path to a file, device or descriptor, and checks that
    it can be written."""
    target = name = os.fspath(path)
    if os.path.isdir(name) or os.path.basename(name) == "":
        raise IsADirectoryError(errno.EISDIR, "A file is needed, not a folder", name)
    for _ in range(40):  # the limit of Linux
        folder = os.path.realpath(os.path.dirname(os.path.abspath(target)))
        target = os.path.join(folder, os.path.basename(target))
        if _DESCRIPTOR.fullmatch(target) or not os.path.islink(target):
            break
        target = os.path.join(folder, os.readlink(target))
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
    if _is_stream(target):
        return target
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, f"There is no folder {folder!r} for the file", name)
    if not os.access(folder, os.W_OK | os.X_OK) or not (os.access(target, os.W_OK) or not os.path.exists(target)):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
    return target


def _is_stream(target: str) -> bool:
    """Whether a path is a device, a pipe or an open descriptor, which is written to and never
    replaced."""
    return bool(_DESCRIPTOR.fullmatch(target)) or (os.path.exists(target) and not os.path.isfile(target))


def _send(source: str, target: str) -> None:
    """Writes a file's bytes to a stream. An open descriptor of this process continues at its
    current position."""
    descriptor = _DESCRIPTOR.fullmatch(target)
    own = descriptor is not None and descriptor[1] in (None, str(os.getpid()))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    sink: Any = os.dup(int(descriptor[2])) if descriptor and own else target
    with open(source, "rb") as file, open(sink, "wb" if own else "ab") as out:
        shutil.copyfileobj(file, out)


def _code_of(error: BaseException, before: BaseException | None) -> int | None:
    """The error code for lack of space if an error, or one that caused it, has such a code.

    `before` is the exception that was being handled already; it and its causes do not count.
    """
    link: BaseException | None = error
    while link is not None and link is not before:
        if isinstance(link, OSError) and link.errno in _FULL:
            return link.errno
        link = link.__cause__ or link.__context__
    return None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Gives a local temporary file with the same suffix, which replaces `path` if the block
    succeeds.

    If `path` is a symbolic link, its target is replaced and the link is kept. A device or a pipe
    such as `/dev/stdout` is written to. The new file gets the permissions of the old one. After an
    error or Ctrl-C, the old file is unchanged and the temporary one is removed.

    Args:
        path: a local path, or one in a bucket or on the Hub.

    Raises:
        OSError: if the file cannot be written, its folder does not exist, the path is a folder, or
            the disk is full.

    Example:

    >>> folder = tempfile.mkdtemp()
    >>> with replacing(os.path.join(folder, "a.txt")) as temporary, open(temporary, "w") as file:
    ...     count = file.write("text")
    >>> os.listdir(folder)
    ['a.txt']
    """
    remote, before = is_remote(path), sys.exception()
    target = os.fspath(path) if remote else _target(path)
    stream = not remote and _is_stream(target)
    _, *suffixes = os.path.basename(os.fspath(path)).split(".")
    suffix = ".".join(["", "tmp", *suffixes[-2:]])
    with _renaming(path):
        folder = None if remote or stream else os.path.dirname(target)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=suffix)
    try:
        os.close(handle)
        yield temporary
        with _renaming(path):
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            if remote:
                _upload(temporary, target)
            elif stream:
                _send(temporary, target)
            else:
                _keep_permissions(temporary, target)
                os.replace(temporary, target)
    except BaseException as error:
        code = _code_of(error, before)
        if code is None:
            raise
        raise OSError(code, f"{os.strerror(code)}, and the old file stays as it was", os.fspath(path)) from error
    finally:
        with contextlib.suppress(OSError):  # already renamed, or a more important error is being raised
            os.unlink(temporary)


def _upload(temporary: str, target: str) -> None:
    """Copies a local file to a bucket or to the Hub, whole or not at all."""
    if _on_hub(target):
        with _hub(target) as (hub, place):
            client = hub.HfApi(library_name="keras_blur")
            client.create_repo(place["repo_id"], exist_ok=True)
            client.upload_file(path_or_fileobj=temporary, path_in_repo=_file_on_hub(target), **place)
        return
    with _bucket(target) as bucket:
        try:
            bucket.copy(temporary, target + ".tmp", overwrite=True)
            bucket.rename(target + ".tmp", target, overwrite=True)
        except BaseException:
            with contextlib.suppress(OSError), _bucket(target):
                bucket.remove(target + ".tmp")
            raise


def _keep_permissions(temporary: str, target: str) -> None:
    """Gives a temporary file the permissions and the owner of the file it replaces, or those of a
    new file."""
    if not os.path.exists(target):
        os.chmod(temporary, 0o666 & ~_umask())
        return
    old = os.stat(target)
    with contextlib.suppress(PermissionError):  # only the superuser gives files away
        os.chown(temporary, old.st_uid, old.st_gid)
    os.chmod(temporary, stat.S_IMODE(old.st_mode))


def save(saved: Any, path: Path) -> None:
    """Saves an object that has a method `save(path)`, such as a Keras model, atomically.

    Args:
        saved: the object.
        path: the file, which is replaced if it exists.

    Raises:
        OSError: as `replacing` does.

    Example:

    >>> from keras_blur import genomes
    >>> path = os.path.join(tempfile.mkdtemp(), "genome.json")
    >>> save(genomes.backprop(0.1), path)
    >>> exists(path)
    True
    """
    with replacing(path) as temporary:
        saved.save(temporary)


@contextlib.contextmanager
def local(path: Path) -> Iterator[str]:
    """Gives a local path from which the contents of `path` can be read inside the block.

    Args:
        path: a local path, or one in a bucket or on the Hub.

    Raises:
        OSError: if a bucket or the Hub has no such file, or cannot be asked.
    """
    if not is_remote(path):
        yield os.fspath(path)
        return
    if _on_hub(path):
        with _hub(path) as (hub, place):
            copy = hub.hf_hub_download(filename=_file_on_hub(path), library_name="keras_blur", **place)
        yield copy
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, os.path.basename(os.fspath(path)))
        with _bucket(path) as bucket:
            bucket.copy(os.fspath(path), copy)
        yield copy


def check_output(name: str, path: str | os.PathLike[str], endings: tuple[str, ...] = (), overwrite: bool = True) -> None:
    """Checks that an output file can be written, before the work that produces it.

    Args:
        name: name of the argument, or the flag with its dashes, for messages.
        path: the file. A symbolic link is followed, and a device needs no ending. For a path with a
            scheme, as in `gs://bucket/file.json`, only the ending and the existence are checked.
        endings: allowed endings; empty for any.
        overwrite: whether the file may already exist.

    Raises:
        ValueError: if `path` is not a path, is a folder, has another ending, is in a folder that
            does not exist or cannot be written, or exists and must not be overwritten.
        OSError: if the bucket or the Hub cannot be asked.

    Example:

    >>> check_output("path", "curves.txt", (".png", ".pdf"))
    Traceback (most recent call last):
    ValueError: `path` must end with .png or .pdf. Received: path='curves.txt'
    """
    shown = name if name.startswith("--") else f"`{name}`"

    def refuse(expected: str) -> NoReturn:
        raise ValueError(f"{shown} must {expected}. Received: {name}={path!r}")

    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path) or "\0" in os.fspath(path):
        refuse("be the path of a file")
    path = os.fspath(path)
    device = not is_remote(path) and os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path)
    if device and set(endings) <= set(_STREAMED):
        if not os.access(path, os.W_OK):
            refuse("be a device that can be written")
        return
    if os.path.isdir(path) or path.endswith("/"):
        refuse("be a file, not a folder")
    known = tuple(ending for ending in endings if path.endswith(ending))
    if endings and not known and not path.lower().endswith(tuple(set(endings) & set(_STREAMED))):
        *first, last = endings
        refuse(f"end with {', '.join(first)} or {last}" if first else f"end with {last}")
    if os.path.basename(path).startswith(".") and os.path.basename(path) in endings:
        refuse("have a name before its ending")
    if is_remote(path):
        there = exists(path)
    else:
        folder = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(folder):
            refuse(f"be a file in a folder that exists; there is no folder {folder!r}")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            refuse(f"be a file in a folder that can be written; {folder!r} cannot be: {error.strerror}")
        try:
            os.stat(path)
            there = True
        except FileNotFoundError:
            there = False
        except OSError as error:
            refuse(f"be a file that can be written: {error.strerror}")
    if there and not overwrite:
        allowed = "--overwrite" if name.startswith("--") else "`overwrite`"
        refuse(f"be a new file, unless {allowed} is given; {path!r} exists")


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 atomically.

    Args:
        path: the file, which is replaced if it exists.
        text: its contents.

    Raises:
        OSError: as `replacing` does.
    """
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8.

    Args:
        path: a local path, or one in a bucket or on the Hub.

    Raises:
        OSError: if the file does not exist or cannot be read.
        UnicodeDecodeError: if it is not UTF-8 text.
    """
    with local(path) as copy, open(copy, encoding="utf-8") as file:
        return file.read()


def read_numbers(path: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the results of an earlier run with the same settings from a JSON file.

    Args:
        path: the file, or `None`.
        settings: what the results depend on, as JSON-compatible values.

    Returns:
        The document in the file, or `{"settings": settings}` if there is no file.

    Raises:
        ValueError: if the file has other settings or is not JSON.
        OSError: if the file cannot be read.

    Example:

    >>> read_numbers(None, {"seed": 0})
    {'settings': {'seed': 0}}
    """
    if not path or not exists(path):
        return {"settings": dict(settings)}
    document = json.loads(read_text(path))
    if document["settings"] != settings:
        raise ValueError(
            f"`path` must have numbers of the settings {dict(settings)}. Received: {path}, of {document['settings']}"
        )
    return document


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
