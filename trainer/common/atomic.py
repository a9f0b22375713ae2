"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.common.errors import UserError


def partial_folder(path: Path) -> Path:
    """Where `atomic_folder` fills the folder that becomes `path`."""
    return path.with_name(f".partial-{path.name}")


@contextmanager
def atomic_folder(path: Path, progress_file: str | None = None) -> Iterator[Path]:
    """Yield an empty folder next to `path` to fill; it is written to the disk and renamed to `path` at the end.

    The folder is removed after an exception; the next call for the same `path` removes what a killed process left. No
    two processes may make the same folder at once. `path` must not exist, or must be an empty folder.

    Args:
        progress_file: The name of a file from which a later call can resume. A folder that has it is kept, even after
            an exception unless that is a `UserError`, and yielded as it is; the file is removed at the end.
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
            fsync(file)
        os.rename(partial, path)
        if progress_file is not None:
            (path / progress_file).unlink(missing_ok=True)
        fsync(path.parent)
    except BaseException as error:
        if isinstance(error, UserError) or not has_progress():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary_path)` write a file, then rename it to `path`."""
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
        if error.filename is None:
            error.filename = str(path)
        raise


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
