"""Versions: of Python, of the packages that a run needs, and of this program."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import Version

from trainer import __version__
from trainer.common.versions import LIBRARIES, ROOT, commit, installed
from trainer.config.recipe import Recipe
from trainer.doctor.findings import Finding, error, ok, warning

_LOCK = ROOT / "constraints.txt"
_PROJECT = "unipool"
_INSTALL = "python -m pip install -r requirements.txt"


def python(recipe: Recipe | None) -> Iterator[Finding]:
    """The interpreter, whose version pip has checked."""
    yield ok("Python", f"{platform.python_version()} in {sys.prefix}; unipool {__version__} in {ROOT}{_commit()}")


def packages(recipe: Recipe | None) -> Iterator[Finding]:
    """Whether what is installed lies within the ranges of the requirements, and how it differs from the lock."""
    try:
        required = [Requirement(text) for text in metadata.requires(_PROJECT) or ()]
    except metadata.PackageNotFoundError:
        yield warning("packages", f"{_PROJECT} is not installed, so the ranges are not known", "pip install -e .")
        return
    absent, outside, within = [], [], []
    for requirement in required:
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        version = installed(requirement.name)
        if version is None:
            absent += [] if optional else [requirement.name]
        elif not requirement.specifier.contains(version, prereleases=True):
            outside.append(f"{requirement.name} {version} (tested: {requirement.specifier})")
        else:
            within.append(requirement.name)
    if absent:
        yield error("packages", f"not installed: {', '.join(absent)}", _INSTALL)
    if outside:
        yield warning("packages", f"outside the ranges that were tested: {', '.join(outside)}", _INSTALL)
    yield ok("packages", f"{_libraries()}; {len(within)} packages in the tested ranges{_beside_the_lock()}")


def _beside_the_lock() -> str:
    try:
        lock = locked(_LOCK.read_text())
    except OSError:
        return ""  # an installation without the repository
    differing = [
        f"{name} {found} (locked: {version})"
        for name, version in sorted(lock.items())
        if (found := installed(name)) and Version(found).public != version.public
    ]
    return f"; not as in constraints.txt: {', '.join(differing)}" if differing else ", all as in constraints.txt"


def requirements(text: str) -> list[Requirement]:
    """Those of a requirements or constraints file."""
    return [Requirement(line) for line in text.splitlines() if line and not line.lstrip().startswith("#")]


def locked(text: str) -> dict[NormalizedName, Version]:
    """The one version that a lock has of each package."""
    versions: dict[NormalizedName, Version] = {}
    for required in requirements(text):
        (specifier,) = required.specifier
        assert specifier.operator == "==", required
        name = canonicalize_name(required.name)
        assert name not in versions, f"{name} is there twice"
        versions[name] = Version(specifier.version)
    return versions


def versions() -> str:
    """What a report of an error should name, in two lines."""
    return (
        f"unipool {__version__}{_commit()}\nPython {platform.python_version()}, {_libraries()}, {platform.platform()}"
    )


def _libraries() -> str:
    return ", ".join(f"{name} {version}" for name in LIBRARIES if (version := installed(name)))


def _commit() -> str:
    """The commit that this program is run from, as text in brackets; "" without one."""
    found = commit(digits=9)
    return f" (commit {found})" if found else ""
