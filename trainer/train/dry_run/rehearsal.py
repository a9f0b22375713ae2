"""What a dry run trains: the recipe, in a folder of its own that is removed afterwards, on a little text if need be."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.config.recipe import Recipe
from trainer.config.sections import Sources
from trainer.data.prepare import is_prepared
from trainer.engine.ds_config import check_wandb

MOST_DOCUMENTS, MOST_TOKENS = 500, 2_000_000
"""What is read of each source if its data is not prepared yet, or if it is read while a run trains."""


def folder_of(recipe: Recipe) -> Path:
    """Return the folder of the dry run: beside `run.dir`, so that the same disk is tried."""
    path = Path(recipe.run.dir).absolute()
    return path.with_name(f".{path.name}.dry-run")


def rehearsal(recipe: Recipe) -> Recipe:
    """Return the recipe of a dry run.

    Raises:
        UserError: It wants Weights & Biases, to which a dry run sends nothing, and wandb is not installed.
    """
    check_wandb(recipe)
    folder, data = folder_of(recipe), recipe.data
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
def nothing_left(recipe: Recipe) -> Iterator[None]:
    """Remove the folder of the dry run of `recipe` after the `with` block, and folders above it that it has created."""
    folder = folder_of(recipe).absolute()
    missing = [path for path in folder.parents if not path.exists()]
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in missing:  # the innermost first
            with suppress(OSError):
                path.rmdir()
