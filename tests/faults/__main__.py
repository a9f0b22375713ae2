"""Faults of every kind in every phase of tiny jobs that the real launcher starts, and a table of what came of them.

python -m tests.faults [--count 200] [--seed 0] [--only SUBSTRING] [--jobs 2] [--out FOLDER]

A fault comes from outside: a signal, a file, a full disk, a cut link, a clock. A process only waits for it at the place
that was chosen (`plug/sitecustomize.py`). Then the job must end or go on within its time limits and name who failed;
the same command must bring it to the losses and weights of an undisturbed run. Results are kept in FOLDER: the same
command goes on where it was ended. As root, Linux only; needs util-linux, iproute2, iptables and a C compiler.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from tests.benchmarks.report import commit, machine
from tests.faults.catalogue import choose_cases
from tests.faults.jobs import Reference, undisturbed
from tests.faults.report import Record, read_records, write_report
from tests.faults.running import run_case
from tests.faults.scene import Case
from tests.trainer.job import write_recipe

_APART = "UNIPOOL_TEST_APART"


def _own_mounts() -> None:
    """Run on in a mount namespace of this command's own, so that its small disks end with it."""
    if _APART not in os.environ:
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.faults"]
        os.execvpe(command[0], [*command, *sys.argv[1:]], os.environ | {_APART: "1"})


def _references(folder: Path, recipe: Path, cases: Iterable[Case]) -> dict[str, Reference]:
    """Run every layout of the cases without a fault."""
    layouts = sorted({case.layout for case in cases})
    return {layout: undisturbed(folder / f"undisturbed-{layout}", recipe, layout) for layout in layouts}


@click.command(help=__doc__)
@click.option("--count", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, help="Run only cases whose number, or a part of whose fault or phase, this is.")
@click.option("--jobs", default=2, show_default=True, help="Cases at once.")
@click.option("--limit", default=float("inf"), help="Start no case after so many seconds.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/faults"), show_default=True)
@click.option("--keep", is_flag=True, help="Keep the folders of cases with problems.")
def main(count: int, seed: int, only: tuple[str, ...], jobs: int, limit: float, out: Path, keep: bool) -> None:
    """Run the cases that have no result yet, and print the table."""
    _own_mounts()
    out.mkdir(parents=True, exist_ok=True)
    records, on = read_records(out), (commit(), machine())
    numbers = {record.outcome.number for record in records}
    cases = [case for case in choose_cases(count, seed) if case.number not in numbers and _is_meant(case, only)]
    since, lock = time.monotonic(), threading.Lock()
    with tempfile.TemporaryDirectory(prefix="unipool-faults-") as temporary:
        folder = Path(temporary)
        recipe = write_recipe(folder)
        references = _references(folder, recipe, cases)

        def run(case: Case) -> None:
            if time.monotonic() - since > limit:
                return
            own = folder / str(case.number)
            outcome = run_case(case, own, recipe, references[case.layout])
            with lock:
                records.append(Record(outcome, *on))
                write_report(records, count, out)
                found = records[-1]
                print(f"{found.place}: status {outcome.status}, {outcome.seconds} s: {found.verdict}", flush=True)
            if keep and outcome.problems:
                shutil.copytree(own, out / f"case{case.number}", dirs_exist_ok=True)
            shutil.rmtree(own, ignore_errors=True)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, cases))
    write_report(records, count, out)
    bad = sum(bool(record.outcome.problems) for record in records)
    print(f"{len(records)} faults, {bad} with problems; {out / 'README.md'}")
    sys.exit(bool(bad))


def _is_meant(case: Case, only: tuple[str, ...]) -> bool:
    return not only or any(word == str(case.number) or word in f"{case.fault} | {case.phase}" for word in only)


if __name__ == "__main__":
    main()
