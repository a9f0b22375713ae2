"""Folders of prepared data: each is made by one process, appears only when it is complete, and is found again later."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from trainer.common.atomic import atomic_folder, partial_folder
from trainer.common.errors import UserError

PROGRESS_FILE = "progress.npz"
"""The file in an unfinished folder from which a later start resumes."""


def make_once(directory: Path, name: str, fill: Callable[[Path], None], progress: bool) -> Path:
    """Return the folder `directory`/`name`; if it is not there, `fill` makes its files.

    Processes that want the same folder at once wait for the first one. A process that is killed leaves a hidden folder;
    the next start resumes from its `PROGRESS_FILE`, or removes it.

    Args:
        directory: The folder to make it in; created if needed.
        fill: Called with a temporary folder, which may hold what an interrupted call has written.
        progress: Whether to print notes on stderr.

    Raises:
        UserError: The folder cannot be written, or `fill` raised it.
    """
    path = directory / name
    try:
        if not path.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(directory, name, progress)
            with _lock(directory / f"{name}.lock", progress), _removed_on_sigterm(partial_folder(path)):
                if not path.is_dir():
                    with atomic_folder(path, PROGRESS_FILE) as partial:
                        fill(partial)
    except OSError as error:
        resumable = (partial_folder(path) / PROGRESS_FILE).is_file()
        raise UserError(
            f"data.dir {directory}: prepared data cannot be written ({error}); free some space or set another folder"
            + ("; the next start resumes the preparation" if resumable else "")
        ) from error
    return path


@contextmanager
def _removed_on_sigterm(partial: Path) -> Iterator[None]:
    """Let SIGTERM end the process at once and remove the unfinished folder, unless a later start can resume it.

    A thread does so, because the main thread may be in native code for a minute, as when it trains a tokenizer.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def watch() -> None:
        while number := os.read(read_end, 1):
            if number[0] == signal.SIGTERM:
                if not (partial / PROGRESS_FILE).is_file():
                    shutil.rmtree(partial, ignore_errors=True)
                os._exit(128 + signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(write_end)
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(previous)
        os.close(write_end)
        thread.join()
        os.close(read_end)


def _lock(lock_file: Path, verbose: bool) -> AbstractContextManager[object]:
    """Wait for the lock, which the system releases when its holder dies, and hold it in a `with` block."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if verbose:
            print(f"waiting for another process, which holds {lock_file}", file=sys.stderr)
        return lock.acquire()


def _remove_abandoned(directory: Path, name: str, verbose: bool) -> None:
    """Remove unfinished folders that nobody holds and nobody can resume; mention those of other names that remain."""
    from filelock import FileLock, Timeout

    for partial in sorted(directory.glob(".partial-*")):
        finished = partial.name.removeprefix(".partial-")
        try:
            with FileLock(directory / f"{finished}.lock", timeout=0):
                if not (partial / PROGRESS_FILE).is_file():
                    shutil.rmtree(partial, ignore_errors=True)
                elif verbose and finished != name:
                    print(f"{partial}: an unfinished preparation; delete it if it is not needed", file=sys.stderr)
        except Timeout:
            continue  # it is being made right now
