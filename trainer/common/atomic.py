"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.common.errors import UserError


def partial_folder(path: Path) -> Path:
    """Where `whole_folder` fills a folder that is to be `path`."""
    return path.with_name(f".partial-{path.name}")


@contextmanager
def whole_folder(path: Path, progress_file: str | None = None) -> Iterator[Path]:
    """A folder beside `path` to fill; at the end it is brought to the disk and renamed to `path`.

    It is empty, and removed after an exception. What a killed process left of it is removed by the next one that makes
    `path`, and two must not make it at once. `path` may be an empty folder already, or nothing.

    Args:
        progress_file: name of a file by which a later start can go on. A folder that has it is kept as it is, after an
            exception too unless that is a `UserError`; at the end the file is removed.
    """
    partial = partial_folder(path)

    def has_progress() -> bool:
        return progress_file is not None and (partial / progress_file).is_file()

    if not has_progress():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    try:
        yield partial
        for file in (*partial.iterdir(), partial):
            to_disk(file)
        os.rename(partial, path)
        if progress_file is not None:
            (path / progress_file).unlink(missing_ok=True)
        to_disk(path.parent)
    except BaseException as error:
        if isinstance(error, UserError) or not has_progress():
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
