"""Programs that some tests need and that pip cannot install."""

import os
import shutil

import pytest


def need(program: str, package: str) -> str:
    """Path of a program of a Debian package; without it the test is skipped, on CI it fails."""
    path = shutil.which(program)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {program}: apt-get install {package}")
    return path
