"""The versions of the software that computes: this project with its commit, Python, and the main libraries."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trainer import __version__

_LIBRARIES = ("torch", "deepspeed", "transformers")


def software() -> dict[str, str]:
    """Return versions by name; "commit" is there only in a checkout of this project's repository."""
    found = {"unipool": __version__}
    if commit := _commit(Path(__file__).parents[2]):
        found["commit"] = commit
    found["python"] = platform.python_version()
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit(root: Path) -> str | None:
    """Return the commit of a checkout, with "-dirty" if tracked files differ from it; None if `root` is none."""
    if not (root / ".git").exists():  # else git would look in the folders above
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
