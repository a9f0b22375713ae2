"""Runs the export's tests against other versions of transformers.

Usage: python -m tests.trainer.export.export_versions VERSION...

Each version gets an environment of its own, below the folder --environments, that shares all packages but transformers
and those that the version refuses (tokenizers, huggingface_hub) with the environment that this runs in.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

TESTS = [
    "tests/trainer/export/test_export.py",
    "tests/trainer/export/test_folder.py",
    "tests/trainer/export/test_transformers.py",
]


def environment(folder: Path, version: str) -> Path:
    """The Python of the environment that has this version; it is made where it is not there."""
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.is_file():
        venv.create(folder, with_pip=True, clear=True)
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(site) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"transformers=={version}"], check=True)
        done.touch()
    return python


def main() -> int:
    """The number of versions that fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument(
        "--environments", type=Path, default=Path(tempfile.gettempdir()) / "unipool-transformers", metavar="FOLDER"
    )
    arguments, options = parser.parse_known_args()
    failed = []
    for version in arguments.versions:
        print(f"transformers {version}", flush=True)
        python = environment(arguments.environments / version, version)
        if subprocess.run([python, "-m", "pytest", *TESTS, *options]).returncode:
            failed.append(version)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
