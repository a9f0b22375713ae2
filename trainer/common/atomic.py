"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_folder(path: Path) -> Path:
    """Where `atomic_folder` fills the folder that becomes `path`."""
    return path.with_name(f".partial-{path.name}")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to `path` to fill; it is written to the disk and renamed to `path` at the end.

    The folder is removed after an exception; the next call for the same `path` removes what a killed process left. No
    two processes may make the same folder at once. `path` must not exist, or must be an empty folder.
    """
    partial = partial_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        publish_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish_folder(partial: Path, path: Path, check: Callable[[], object] = lambda: None) -> None:
    """Write a filled folder to the disk and rename it to `path`, which must not exist, or must be an empty folder.

    Args:
        check: Called in between, because the disk may take long; what it raises prevents the renaming.
    """
    for file in (*partial.iterdir(), partial):
        fsync(file)
    check()
    os.rename(partial, path)
    fsync(path.parent)


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary_path)` write a file, then rename it to `path`.

    Raises:
        OSError: It cannot be written, or `path` is that of a folder: an empty path is the current one.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.partial")
    with naming(path):
        write(temporary)
        fsync(temporary)
        temporary.replace(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError in the `with` block name `path` if it names no file: those of a full disk do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # without a number it would lose its message
            error.filename = str(path)
        raise


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
