"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to fill; at the end it is brought to the disk and renamed to `path`.

    After an exception it is removed. What a killed process left of it is removed by the next one that makes `path`, and
    two must not make it at once. `path` may be an empty folder already, or nothing.
    """
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in (*partial.iterdir(), partial):
            to_disk(file)
        os.rename(partial, path)
        to_disk(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary_path)` write a file, then put it in place: it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    to_disk(temporary)
    temporary.replace(path)


def to_disk(path: Path) -> None:
    """Bring a file, or the names in a folder, from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
