"""Checks of storage: rights, space and speed of the folders that a run writes; and whether its text is there."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.common.errors import os_reason
from trainer.common.format import plural, quantity, size
from trainer.config.recipe import Recipe
from trainer.config.sections import source_list
from trainer.data.reading.hub import can_connect
from trainer.data.reading.sources import HUB_PREFIX, find_files
from trainer.data.settings import TRAIN
from trainer.data.tokenizer import tokenizer_files
from trainer.doctor.findings import Finding, error, ok, warning
from trainer.planning.model_costs import count_parameters

_BLOCK, _MOST_BYTES, _MOST_SECONDS = 4 << 20, 64 << 20, 2.0
_SLOW = 20e6
"""Bytes/s below which a checkpoint keeps a run waiting."""
_SPARE = 10**9
_SAVED_BYTES, _SAVED_BYTES_OF_ZERO_1_AND_2 = 12, 16
"""Of a parameter in a checkpoint: the weight and AdamW's two moments, in fp32. Stages 1 and 2 save the weight twice."""
_SLOW_MEND = "use another disk: checkpoints take long to save"


def folder_of_run(recipe: Recipe | None) -> Iterator[Finding]:
    """Where checkpoints go."""
    needed, needs = _SPARE, ""
    if recipe is not None:
        each, kept = _checkpoint_bytes(recipe), recipe.checkpoint.keep + 1
        needs = f"; {plural(kept, 'checkpoint')} of {size(each)} need {size(each * kept)}"
        needed = max(each, each * kept - _held(Path(recipe.run.dir) / "checkpoints"))
    yield _folder("run.dir", Path(recipe.run.dir if recipe else "runs"), needed, needs, "checkpoint.keep")


def folder_of_data(recipe: Recipe | None) -> Iterator[Finding]:
    """Where prepared data go."""
    yield _folder("data.dir", Path(recipe.data.dir if recipe else "data").expanduser(), _SPARE, "", "data.max_tokens")


def temporary(recipe: Recipe | None) -> Iterator[Finding]:
    """Other folders that libraries write to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for about, folder, variable in (
        ("/tmp", Path(tempfile.gettempdir()), "TMPDIR"),
        ("cache", cache, "XDG_CACHE_HOME"),
    ):
        place = _existing(folder)
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as problem:
            yield error(about, f"{place} cannot be written ({os_reason(problem)})", f"set {variable} to another folder")
        else:
            yield ok(about, f"{folder}, {size(_free(place))} free")


def _folder(about: str, folder: Path, needed: float, needs: str, key: str) -> Finding:
    """Write to the folder, or to where it will be made, and remove what was written."""
    place = _existing(folder)
    try:
        speed = _write_speed(place)
    except OSError as problem:
        return error(about, f"{folder}: {place} cannot be written ({os_reason(problem)})", f"set {about}")
    free = _free(place)
    found = f"{folder}: {size(free)} free{needs}; writes {quantity(speed, 'B/s')}"
    if free < needed:
        return error(about, found, f"free some space, set another folder, or lower {key}")
    return warning(about, found, _SLOW_MEND) if speed < _SLOW else ok(about, found)


def _checkpoint_bytes(recipe: Recipe) -> int:
    count, p = count_parameters(recipe), recipe.parallel
    by_stage = ((count.trunk, p.trunk_zero), (count.pool, p.pool_zero))
    return sum(
        parameters * (_SAVED_BYTES_OF_ZERO_1_AND_2 if stage in (1, 2) else _SAVED_BYTES)
        for parameters, stage in by_stage
    )


def _held(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _free(place: Path) -> int:
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def _write_speed(place: Path) -> float:
    """Bytes/s of a short write up to the disk."""
    block, written, started = os.urandom(_BLOCK), 0, time.monotonic()
    with tempfile.TemporaryFile(dir=place) as file:
        while written < _MOST_BYTES and time.monotonic() - started < _MOST_SECONDS:
            written += file.write(block)
            file.flush()
            os.fsync(file.fileno())
    return written / (time.monotonic() - started)


def text(recipe: Recipe | None) -> Iterator[Finding]:
    """Whether the text and the tokenizer of a recipe are there, and the hub if it needs that."""
    if recipe is None:
        return
    d = recipe.data
    names = [source.source for sources in (d.source, d.validation) if sources for source in source_list(sources)]
    hub = [name for name in names if name.startswith(HUB_PREFIX)]
    for name in (name for name in names if name not in hub):
        yield ok("data.source", f"{name}: {plural(len(find_files(name).read), 'file')}")
    if d.tokenizer != TRAIN and not tokenizer_files(d.tokenizer):
        hub.append(d.tokenizer)
    if not hub:
        return
    wanted = ", ".join(dict.fromkeys(hub))
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield warning("hub", f"HF_HUB_OFFLINE is set, so {wanted} must be in the cache", "unset HF_HUB_OFFLINE")
    elif can_connect():
        yield ok("hub", f"reachable, for {wanted}")
    else:
        mend = "check the network or HF_ENDPOINT, or prepare the data elsewhere; prepared data need no hub"
        yield warning("hub", f"cannot be reached, for {wanted}", mend)
