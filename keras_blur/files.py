"""Files: written whole or not at all, on a disk or in a bucket.

A path with a scheme, as in `gs://bucket/genome.json`, goes through TensorFlow's file systems. A file is written under
another name and then renamed, so no reader sees half of it, and a kill or a full disk leaves the old one.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

Path = str | os.PathLike[str]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DESCRIPTOR = re.compile(r"(?:/proc/(\d+)|/dev)/fd/(\d+)")


class Memory(io.BytesIO):
    """A file in memory whose text is its name, which is what Keras reads a format from.

    HDF5 crashes the process when the disk is full, so it writes here and the bytes go to the disk.
    """

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def __str__(self) -> str:
        return self._name


def is_remote(path: Path) -> bool:
    """Whether a path has a scheme.

    Example:

    >>> is_remote("gs://bucket/genome.json"), is_remote("genome.json")
    (True, False)
    """
    return "://" in os.fspath(path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what TensorFlow's file systems raise into an `OSError` that names the path."""
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(f"{os.fspath(path)}: {error.message or type(error).__name__}") from error


@contextlib.contextmanager
def _renaming(path: Path) -> Iterator[None]:
    """Turns an `OSError` about a temporary name into one about the path that the caller knows."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def exists(path: Path) -> bool:
    """Whether there is such a file; an `OSError` where a bucket cannot be asked."""
    with _naming(path):
        return tf.io.gfile.exists(os.fspath(path))


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, unless they exist; an `OSError` if that fails."""
    with _naming(path):
        tf.io.gfile.makedirs(os.fspath(path))


def _target(path: Path) -> str:
    """The file, device or descriptor that a local path leads to through its symbolic links; checked."""
    target = name = os.fspath(path)
    if os.path.isdir(name) or os.path.basename(name) == "":
        raise IsADirectoryError(errno.EISDIR, "A file is needed, not a folder", name)
    for _ in range(40):  # as many links as Linux follows
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
    """Whether a path is a device, a pipe or an open descriptor, which is written and not replaced."""
    return bool(_DESCRIPTOR.fullmatch(target)) or (os.path.exists(target) and not os.path.isfile(target))


def _send(source: str, target: str) -> None:
    """Writes a file's bytes to a stream; to an open descriptor of this process from where it stands."""
    descriptor = _DESCRIPTOR.fullmatch(target)
    own = descriptor is not None and descriptor[1] in (None, str(os.getpid()))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    sink: Any = os.dup(int(descriptor[2])) if descriptor and own else target
    with open(source, "rb") as file, open(sink, "wb" if own else "ab") as out:
        shutil.copyfileobj(file, out)


def _code_of(error: BaseException, before: BaseException | None) -> int | None:
    """Why there was no room, if an error or one that led to it says so; `before` was there already."""
    link: BaseException | None = error
    while link is not None and link is not before:
        if isinstance(link, OSError) and link.errno in _FULL:
            return link.errno
        link = link.__cause__ or link.__context__
    return None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """A local temporary file with the same suffix; it takes the place of `path` if the block succeeds.

    A symbolic link stays, and the file it leads to is replaced. A device or a pipe (`/dev/stdout`) is written. The new
    file has the permissions of the old one. After an error, Ctrl-C included, the old file is as it was and the temporary
    one is gone.

    Args:
        path: the file.

    Raises:
        OSError: if the file cannot be written, the disk is full, or the path is a folder.

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
        with contextlib.suppress(OSError):  # renamed, or an error that counts for more is on its way
            os.unlink(temporary)


def _upload(temporary: str, target: str) -> None:
    """Copies a local file to a bucket, whole or not at all."""
    with _naming(target):
        try:
            tf.io.gfile.copy(temporary, target + ".tmp", overwrite=True)
            tf.io.gfile.rename(target + ".tmp", target, overwrite=True)
        except BaseException:
            with contextlib.suppress(tf.errors.OpError):
                tf.io.gfile.remove(target + ".tmp")
            raise


def _keep_permissions(temporary: str, target: str) -> None:
    """Gives a temporary file the permissions and the owner of the file it replaces, or those of a new file."""
    if not os.path.exists(target):
        os.chmod(temporary, 0o666 & ~_umask())
        return
    old = os.stat(target)
    with contextlib.suppress(PermissionError):  # only the superuser gives files away
        os.chown(temporary, old.st_uid, old.st_gid)
    os.chmod(temporary, stat.S_IMODE(old.st_mode))


def save(saved: Any, path: Path) -> None:
    """Writes something that has `save(path)`, such as a Keras model, whole or not at all.

    Args:
        saved: the object.
        path: the file, which is replaced if it exists.

    Raises:
        OSError: as of `replacing`.
    """
    with replacing(path) as temporary:
        saved.save(temporary)


@contextlib.contextmanager
def local(path: Path) -> Iterator[str]:
    """A local path where the contents of `path` can be read."""
    if not is_remote(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, os.path.basename(os.fspath(path)))
        with _naming(path):
            tf.io.gfile.copy(os.fspath(path), copy)
        yield copy


def write_text(path: Path, text: str) -> None:
    """Writes a text file."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        OSError: if there is none.
        UnicodeDecodeError: if it is no text.
    """
    with local(path) as copy, open(copy, encoding="utf-8") as file:
        return file.read()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
