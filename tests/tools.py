"""Helpers of several test files: programs that may be missing, and the command line run in this process."""

import atexit
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from trainer.cli import main


def folder_of_process() -> Path:
    """Make a folder that is there until this process ends, for what several tests share."""
    folder = Path(tempfile.mkdtemp(prefix="unipool-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def need(program: str, package: str) -> str:
    """Path of a program of a Debian package; without it the test is skipped, on CI it fails."""
    path = shutil.which(program)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {program}: apt-get install {package}")
    return path


def need_package(module: str, how: str) -> None:
    """Without the package the test is skipped, on CI it fails."""
    if find_spec(module) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {module}: {how}")


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of a command line."""
    monkeypatch.setattr(sys, "argv", ["unipool", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
