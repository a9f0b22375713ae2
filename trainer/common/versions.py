"""The versions of the software that computes: this project with its commit, Python, and the main libraries."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from trainer import __version__

ROOT = Path(__file__).parents[2]
"""The folder that this program is run from, such as a checkout of its repository."""
LIBRARIES = ("torch", "deepspeed", "transformers")


def software() -> dict[str, str]:
    """Return versions by name; "commit" is there only in a checkout of this project's repository."""
    found = {"unipool": __version__}
    if known := commit(digits=12):
        found["commit"] = known
    found["python"] = platform.python_version()
    return found | {name: version for name in LIBRARIES if (version := installed(name))}


def installed(name: str) -> str | None:
    """Return the version of a package that is installed."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def commit(digits: int) -> str | None:
    """Return the commit of the checkout, with "-dirty" if tracked files differ from it; None if this is none."""
    if not (ROOT / ".git").exists():  # else git would look in the folders above
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", f"--abbrev={digits}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
