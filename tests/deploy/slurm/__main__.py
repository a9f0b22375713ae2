"""Try the shipped Slurm script on a real Slurm, brought up on this machine for the purpose:

    python -m tests.deploy.slurm [--keep] [CASE]...

It needs root and Debian's packages slurmctld, slurmd, slurm-client and munge. All cases take about 20 minutes. It shows
a table of what happened, and ends with status 1 if anything was not as expected.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.deploy.slurm.cases import CASES, NODES, Site, Unexpected
from tests.deploy.slurm.cluster import Cluster, Unavailable


def main() -> int:
    """Run the cases that the command line names; return the exit status."""
    names = [case.__name__ for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of {', '.join(names)}; default: all")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the logs")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(names):
        parser.error(f"{', '.join(unknown)}: must be among {', '.join(names)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # takes everything down again
    chosen = [case for case in CASES if not arguments.cases or case.__name__ in arguments.cases]
    rows, good = [], True
    folder = Path(tempfile.mkdtemp(prefix="unipool-slurm-"))
    try:
        with Cluster(folder, NODES) as cluster:
            work = folder / "work"
            work.mkdir()
            site = Site(cluster, work)
            for case in chosen:
                began = time.monotonic()
                try:
                    seen = case(site)
                except (Unexpected, OSError, subprocess.SubprocessError, TimeoutError) as error:
                    seen, good = f"NOT AS EXPECTED: {error}", False
                finally:
                    site.end()
                rows.append((case.__name__, (case.__doc__ or "").splitlines()[0], seen))
                print(f"{case.__name__} ({time.monotonic() - began:.0f} s): {seen}", flush=True)
                cluster.wait_for_nodes(NODES)
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if arguments.keep:
            print(f"logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"\n{version}\n\n| case | what happened |\n|---|---|")
    for _, what, seen in rows:
        print(f"| {what} | {seen.splitlines()[0]} |")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
