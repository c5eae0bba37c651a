"""Files: written whole or not at all, on a disk or in a bucket.

A path with a scheme, as in `gs://bucket/genome.json`, goes through TensorFlow's file systems. What is written goes to
another name first and is renamed, so that no reader sees half a file, and a kill leaves the old one.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

import tensorflow as tf

Path = str | os.PathLike[str]


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


def exists(path: Path) -> bool:
    """Whether there is such a file; an `OSError` where a bucket cannot be asked."""
    with _naming(path):
        return tf.io.gfile.exists(os.fspath(path))


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, unless they are there; an `OSError` where that cannot be."""
    with _naming(path):
        tf.io.gfile.makedirs(os.fspath(path))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """A local temporary file, of the same ending, that takes the place of `path` if the block ends well."""
    target = os.fspath(path) if is_remote(path) else os.path.abspath(os.fspath(path))
    _, *endings = os.path.basename(target).split(".")
    folder = None if is_remote(path) else os.path.dirname(target)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".".join(["", "tmp", *endings]))
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if is_remote(path):
            with _naming(path):
                tf.io.gfile.copy(temporary, target + ".tmp", overwrite=True)
                tf.io.gfile.rename(target + ".tmp", target, overwrite=True)
            os.unlink(temporary)
        else:
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def local(path: Path) -> Iterator[str]:
    """A local path where what is in `path` can be read."""
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
