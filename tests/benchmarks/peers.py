"""The peers' environment, beside ours: Hugging Face transformers and DeepSpeed, at the versions that were measured.

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
"""What was installed, written when all of it was: an installation that was cut short is made again."""

INSTALL_LIMIT = 3600.0


def is_ready() -> bool:
    """Whether the environment has what REQUIREMENTS asks for now."""
    return INSTALLED.exists() and INSTALLED.read_text() == REQUIREMENTS.read_text()


def install() -> None:
    """Make the environment, if it is not there."""
    if is_ready():
        return
    print(f"installing the peers into {FOLDER.name}", file=sys.stderr)
    venv.create(FOLDER, with_pip=True, clear=True)
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(REQUIREMENTS)]
    subprocess.run(command, check=True, timeout=INSTALL_LIMIT)
    INSTALLED.write_text(REQUIREMENTS.read_text())


def peers_python() -> str:
    """The interpreter of the peers' environment, which is installed first if it is not there."""
    install()
    return str(PYTHON)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Install the benchmarks' peers into .venv-peers; does nothing where that is done.

    \b
    Example:
      python -m tests.benchmarks.peers
    """
    install()
    print(f"peers are installed in {FOLDER.name}")


if __name__ == "__main__":
    main()
