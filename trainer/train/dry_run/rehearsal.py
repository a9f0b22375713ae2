"""What a dry run trains: the recipe, in a folder of its own that is removed afterwards, on a little text if need be."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import psutil

from trainer.common.machine import process_namespace
from trainer.config.recipe import Recipe
from trainer.config.sections import Sources
from trainer.data.prepare import is_prepared
from trainer.engine.ds_config import check_wandb

MOST_DOCUMENTS, MOST_TOKENS = 500, 2_000_000
"""What is read of each source if its data is not prepared yet, or if it is read while a run trains."""


FOLDER = "UNIPOOL_DRY_RUN"
"""Environment variable: the folder of the dry run of which this process is a rank."""


def folder_of(recipe: Recipe, port: int, host: str = "") -> Path:
    """Return the folder of a dry run: beside `run.dir`, so that the same disk is tried.

    Args:
        port: The job's port, by which ranks without the environment variable `FOLDER` tell their dry run from others.
        host: The first host of the job, where all its nodes know it by the same name.
    """
    return Path(os.environ.get(FOLDER) or _beside(recipe, f"{port}-{quote(host, '')}" if host else str(port)))


def new_folder(recipe: Recipe) -> Path:
    """Return a folder for a dry run of this process; remove those of processes of this machine that were killed.

    Another container is another machine, even if it has the same name: its processes are not seen here.
    """
    digest = hashlib.sha256(process_namespace().encode()).hexdigest()
    machine = f"{socket.gethostname()}-{digest[:8]}-"
    own = _beside(recipe, f"{machine}{os.getpid()}")
    prefix = _beside(recipe, machine).name
    for left in own.parent.glob(glob.escape(prefix) + "*"):
        number = left.name.removeprefix(prefix)
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    return own


def _beside(recipe: Recipe, which: str) -> Path:
    path = Path(recipe.run.dir).absolute()
    return path.with_name(f".{path.name}.dry-run-{which}")


def rehearsal(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe of a dry run in a folder of its own.

    Raises:
        UserError: It wants Weights & Biases, to which a dry run sends nothing, and wandb is not installed.
    """
    check_wandb(recipe)
    data = recipe.data
    if data.stream_window or not is_prepared(recipe):  # no part of a stream is made, which nobody might want
        limits = {"max_documents": MOST_DOCUMENTS, "max_tokens": MOST_TOKENS}
        data = data.model_copy(
            update={
                **{key: min(getattr(data, key) or most, most) for key, most in limits.items()},
                "source": _little(data.source),
                "validation": None if data.validation is None else _little(data.validation),
                "dir": str(folder / "data"),
                "stream_window": None,
            }
        )
    changed = {
        "run": {"dir": str(folder)},
        "profile": {"steps": None},
        "metrics": {"port": 0, "targets_dir": None, "wandb": None},
    }
    sections = {name: getattr(recipe, name).model_copy(update=keys) for name, keys in changed.items()}
    return recipe.model_copy(update={**sections, "data": data})


def _little(sources: Sources) -> Sources:
    if isinstance(sources, str):
        return sources
    unlimited = {"max_documents": None, "max_tokens": None}
    return tuple(source.model_copy(update=unlimited) for source in sources)


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Remove the folder of a dry run after the `with` block, and folders above it that it has created."""
    missing = [path for path in folder.parents if not path.exists()]
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in missing:  # the innermost first
            with suppress(OSError):
                path.rmdir()
