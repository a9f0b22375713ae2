"""Run the tests of exports with other versions of transformers.

Usage: python -m tests.trainer.export.export_versions VERSION...

Each version gets its own environment in the folder --environments. It shares all packages with the current environment,
except transformers and the packages that the version refuses (tokenizers, huggingface_hub).
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
    """Return the Python of an environment with this version, which is created if necessary."""
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
    """Return the number of versions that fail."""
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
