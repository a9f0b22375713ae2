"""The Dockerfile, as far as it can be checked without building an image; `try_image.sh` builds one."""

from __future__ import annotations

import re
import subprocess
import tomllib

from tests.trainer.job import BIN, ROOT
from trainer import __version__

DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([BIN / "hadolint", "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_only_what_is_copied_is_sent() -> None:
    """.dockerignore lets through what the Dockerfile takes from the repository, and that has all that is installed."""
    steps = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    copied = {word for step in steps if re.match(r"COPY (?!--from)", step) for word in step.split()[1:-1]}
    bound = {found for step in steps for found in re.findall(r"type=bind,source=([^,\s]+)", step)}
    let_through = {
        line[1:] for line in (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert {path for path in copied | bound if not path.startswith("deploy/mpi/")} | {"deploy/mpi"} == let_through
    assert all((ROOT / path).exists() for path in copied | bound)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {package.partition(".")[0] for package in project["tool"]["setuptools"]["packages"]} <= copied


def test_versions_are_those_of_the_lock() -> None:
    text = DOCKERFILE.read_text()
    assert f'image.version="{__version__}"' in text
    before, _, after = text.partition("COPY constraints.txt /opt/constraints.txt\n")
    assert "pip install" not in before and "pip install" in after
    for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):  # the second is what later releases of pip build with
        assert f" {name}=/opt/constraints.txt" in before and name not in after
