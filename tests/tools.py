"""What some tests need and requirements-dev.txt does not install."""

import os
import shutil
from importlib.util import find_spec

import pytest


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
