"""Compare constraints.txt with what the requirements allow and with what is installed.

python -m tests.locked    # names what is installed in another version than the locked one, and fails if anything is
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import Version

from tests.trainer.job import ROOT
from trainer.doctor import software
from trainer.doctor.software import requirements

LOCK = ROOT / "constraints.txt"
NOT_LOCKED = re.compile(r"(cuda|nvidia)-.+|pip|triton|unipool|uv")
"""pip comes with Python, uv makes the lock, and the CUDA libraries are those that torch was built with."""


def ranges() -> list[Requirement]:
    """Everything that the project may require, with the versions it allows."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    files = sorted(ROOT.glob("requirements*.txt"))
    return [required for file in files for required in requirements(file.read_text())] + requirements("\n".join(build))


def locked() -> dict[NormalizedName, Version]:
    """The one version that the lock has of each package."""
    return software.locked(LOCK.read_text())


def main() -> int:
    """Compare what is installed with the lock; a local version (torch 2.13.0+cpu) counts as its public one."""
    lock, differing = locked(), []
    for found in metadata.distributions():
        name, version = canonicalize_name(found.metadata["Name"]), Version(found.version)
        if not NOT_LOCKED.fullmatch(name) and Version(version.public) != lock.get(name):
            differing.append(f"{name} {version} is installed, constraints.txt has {lock.get(name, 'none')}")
    print(*sorted(differing), sep="\n", file=sys.stderr, end="\n" if differing else "")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
