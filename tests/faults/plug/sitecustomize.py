"""Lets one process of a job wait at a chosen place, so that a fault can hit it there from outside.

Python imports this module in every process that finds this folder in PYTHONPATH. The product knows nothing of it.
`UNIPOOL_TEST_PAUSE` is the JSON of `tests.faults.jobs.Pause`, plus the folder through which the two sides talk: the
process makes the file `reached` and waits until there is a file `go`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def _is_meant(pause: dict[str, Any]) -> bool:
    """Whether the pause is for this process: a rank, or `unipool train` itself, which has no rank."""
    is_job = {"trainer", "train"} <= set(sys.orig_argv) and "deepspeed.launcher.launch" not in sys.orig_argv
    rank, start = os.environ.get("RANK", "train"), int(os.environ.get("UNIPOOL_RESTARTS", "0"))
    return is_job and rank == str(pause["who"]) and start == pause["start"]


def _wait(folder: Path) -> bool:
    """Wait for `go`; return False if another call has done so."""
    try:
        os.close(os.open(folder / "claimed", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    (folder / "reached").touch()
    while not (folder / "go").exists():
        time.sleep(0.005)
    return True


def _poison(result: Any) -> Any:
    """Put a NaN into the first element of a tensor, or of each tensor in a list."""
    for tensor in result if isinstance(result, list | tuple) else [result]:
        if tensor.numel():
            tensor.view(-1)[0] = float("nan")
    return result


def _patch(pause: dict[str, Any], owner: Any, name: str) -> None:
    original, calls, poisoned = getattr(owner, name), 0, False

    def function(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls, poisoned
        kinds = {getattr(getattr(a, "kind", a), "name", "") for a in arguments}
        if not pause["kind"] or pause["kind"] in kinds:
            calls += 1
            if calls == pause["number"] and _wait(Path(pause["folder"])):
                if pause["then"] == "raise":
                    raise ValueError("this row is broken")
                poisoned = pause["then"].startswith("nan")
        result = original(*arguments, **keywords)
        if poisoned:
            poisoned = pause["then"] == "nan on"
            result = _poison(result)
        return result

    setattr(owner, name, function)


class _Finder:
    """Patches a module as soon as it has been imported."""

    def __init__(self, pause: dict[str, Any]):
        self._pause = pause
        self._module, _, self._path = pause["place"].partition(":")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_patch(module: Any) -> None:
            execute(module)
            *owners, last = self._path.split(".")
            owner = module
            for part in owners:
                owner = getattr(owner, part)
            _patch(self._pause, owner, last)

        spec.loader.exec_module = execute_and_patch
        return spec


def _install() -> None:
    pause = json.loads(os.environ["UNIPOOL_TEST_PAUSE"])
    if not _is_meant(pause):
        return
    if pause["place"]:
        sys.meta_path.insert(0, _Finder(pause))
    else:
        _wait(Path(pause["folder"]))


if "UNIPOOL_TEST_PAUSE" in os.environ:
    _install()
