"""The environment of the peers, separate from ours: Hugging Face transformers and DeepSpeed, at pinned versions.

python -m tests.benchmarks.peers
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-peers"
REQUIREMENTS = Path(__file__).with_name("requirements-peers.txt")
PYTHON = FOLDER / "bin" / "python"
INSTALLED = FOLDER / "installed"
"""Holds what was installed; written at the end, so that an interrupted installation is repeated."""

INSTALL_LIMIT = 3600.0


def is_ready() -> bool:
    """Whether the environment has the current REQUIREMENTS."""
    return INSTALLED.exists() and INSTALLED.read_text() == REQUIREMENTS.read_text()


def install() -> None:
    """Create the environment if it is missing or outdated."""
    if is_ready():
        return
    print(f"installing the peers into {FOLDER.name}", file=sys.stderr)
    venv.create(FOLDER, with_pip=True, clear=True)
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(REQUIREMENTS)]
    subprocess.run(command, check=True, timeout=INSTALL_LIMIT)
    INSTALLED.write_text(REQUIREMENTS.read_text())


def peers_python() -> str:
    """Return the interpreter of the peers' environment, which is installed first if necessary."""
    install()
    return str(PYTHON)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Install the benchmarks' peers into .venv-peers, unless they are installed already.

    \b
    Example:
      python -m tests.benchmarks.peers
    """
    install()
    print(f"peers are installed in {FOLDER.name}")


if __name__ == "__main__":
    main()
