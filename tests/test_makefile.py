"""The Makefile reports an unsuitable Python in one line, before it creates anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import TIME_LIMIT
from tests.trainer.job import ROOT

OLD = "#!/bin/sh\n[ $1 = --version ] && echo Python 3.10.13 && exit\nexit 1  # sys.version_info < (3, 11)\n"
WITHOUT = f'#!/bin/sh\nPYTHONPATH={{folder}}/without exec {sys.executable} "$@"\n'


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        (OLD, "unipool needs Python 3.11 or newer; {python} is Python 3.10.13: name another, as in make PYTHON="),
        ("", "unipool needs Python 3.11 or newer; {python} is not installed: name another, as in make PYTHON="),
        (WITHOUT, "{python} has no venv or ensurepip: install them (on Debian and Ubuntu the package python3-venv)"),
    ],
    ids=["too old", "not installed", "without ensurepip"],
)
def test_a_python_that_will_not_do_is_one_line(script: str, wanted: str, tmp_path: Path) -> None:
    python, venv = tmp_path / "python", tmp_path / "venv"
    if script:
        python.write_text(script.format(folder=tmp_path))
        python.chmod(0o755)
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "ensurepip.py").write_text("raise ImportError")
    command = ["make", f"PYTHON={python}", f"VENV={venv}", f"{venv}/bin/python"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    said, make = done.stderr.splitlines()
    assert said.startswith(wanted.format(python=python)) and make.startswith("make"), done.stderr
    assert not venv.exists()
