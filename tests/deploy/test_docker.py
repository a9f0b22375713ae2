"""The Dockerfile, as far as it can be checked without building an image; `try_image.sh` builds one."""

from __future__ import annotations

import re
import subprocess
import tomllib

from packaging.utils import canonicalize_name

from tests.distributed import TIME_LIMIT
from tests.locked import NOT_LOCKED, locked, requirements
from tests.trainer.job import BIN, ROOT
from trainer import __version__

DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [BIN / "hadolint", "--no-color", DOCKERFILE], capture_output=True, text=True, timeout=TIME_LIMIT
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_only_what_is_copied_is_sent() -> None:
    """.dockerignore lets through what the Dockerfile takes from the repository, and that has all that is installed."""
    steps = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    copied = {word for step in steps if re.match(r"COPY (?!--from)", step) for word in step.split()[1:-1]}
    bound = {found for step in steps for found in re.findall(r"type=bind,source=([^,\s]+)", step)}
    let_through = {
        line[1:] for line in (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert copied | bound == let_through
    assert all((ROOT / path).exists() for path in copied | bound)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {package.removesuffix("*") for package in packages} <= copied


LOCK = (ROOT / "deploy/requirements.lock").read_text().replace("\\\n", " ").splitlines()
"""A line for each package, with its hashes."""


def test_every_package_has_the_locked_version_and_hashes() -> None:
    """If not: make lock."""
    packages = {}
    for line in LOCK:
        if not line.startswith("#"):
            name, *hashes = line.split()
            assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for digest in hashes), name
            packages.update({required.name: required for required in requirements(name)})
    versions = locked()
    for name, required in packages.items():
        if not NOT_LOCKED.fullmatch(name):  # libraries of CUDA, which torch's wheel names
            assert str(required.specifier) == f"=={versions[canonicalize_name(name)]}", name
    needed = {required.name.replace("_", "-") for required in requirements((ROOT / "requirements.txt").read_text())}
    assert needed | {"setuptools"} <= packages.keys()


def test_every_installation_of_packages_checks_hashes() -> None:
    """But that of torch's CPU wheel, which has another index, and that of the trainer itself."""
    steps = DOCKERFILE.read_text().replace("\\\n", " ")
    installed = re.findall(r"pip install ([^;&\n]*)", steps)
    others = [words for words in installed if "--require-hashes" not in words]
    assert len(installed) == 5 and len(others) == 2, installed
    assert "torch --index-url" in others[1] and others[0].split()[-1] == "."
    for program in ("setuptools", "torch"):  # what the programs in the Dockerfile take from the lock
        assert sum(line.startswith(f"{program}==") for line in LOCK) == 1
    command = ["awk", r"/^setuptools==/, !/\\$/", ROOT / "deploy/requirements.lock"]
    part = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIME_LIMIT).stdout
    assert part.startswith("setuptools==") and "==" not in part[13:] and "--hash" in part.splitlines()[-1]


def test_the_image_for_gpus_has_what_rdma_and_drivers_need() -> None:
    stage = DOCKERFILE.read_text().partition("FROM base AS cuda")[2]
    assert {"libibverbs1", "ibverbs-providers"} <= set(stage.split())
    assert "ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in stage


def test_versions_are_those_of_the_lock() -> None:
    text = DOCKERFILE.read_text()
    assert f'image.version="{__version__}"' in text
    before, _, after = text.partition("COPY constraints.txt /opt/constraints.txt\n")
    assert "pip install" not in before and "pip install" in after
    for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):  # the second is what later releases of pip build with
        assert f" {name}=/opt/constraints.txt" in before and name not in after
