"""What can be learnt from some minutes on a GPU: python -m tests.gpu.check --out DIR

Each part runs in processes of its own with a time limit, so that a part which fails or hangs costs the others nothing.
DIR/check.json is written anew after every part, and printed at the end; pictures and all that parts have said lie
beside it.

The parts, in `tests/gpu/parts.py`, run on one GPU; those with NCCL between the roles are skipped unless there are two.
--rehearse runs all of them on the CPU with tiny shapes, which takes about a minute and shows that the script works.

A machine without network needs the packages of requirements.txt that it lacks, from torch 2.11 on, and those that they
need in turn; the part `machine` lists what it lacks. Fetch their wheels elsewhere for its version of Python (`pip
download --only-binary=:all: --no-deps --python-version ...`); deepspeed comes as source, so build its wheel with
`DS_BUILD_OPS=0 pip wheel --no-deps deepspeed`. Install them there with `pip install --no-index --no-deps --target SITE
*.whl`, and run this script with PYTHONPATH=SITE.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import psutil

from trainer.common.atomic import atomic_write
from trainer.common.strict_json import dumps, loads

ROOT = Path(__file__).parents[2]
LIMITS = {
    "machine": 60,
    "quickstart": 120,
    "experts": 90,
    "colocated": 150,
    "every_rank": 60,
    "nccl_quickstart": 90,
    "every_rank_two": 60,
    "lanes_2": 60,
    "lanes_4": 60,
    "lanes_4_eight_queues": 60,
    "lanes_4_two_channels": 60,
}
"""The parts in their order, and the seconds that each may take, besides those that the parts before it have left."""

TWO_GPUS = ("nccl_quickstart", "every_rank_two", "lanes_2", "lanes_4", "lanes_4_eight_queues", "lanes_4_two_channels")

REHEARSAL = 5.0
"""A rehearsal may take this many times as long: it measures nothing, and CPUs are slow and busy."""

TAIL = 3000
"""Characters of a failed part's output that are kept in check.json."""

PART = "UNIPOOL_GPU_CHECK_PART"
"""Environment variable by which the processes of a part are known."""


def run_part(command: Sequence[str], limit: float, results: Path) -> dict[str, Any]:
    """Run a part, which writes what it finds to a JSON file, and say how it ended.

    Whatever it has written is kept if it fails or is stopped after `limit` seconds. What it says is kept in a file
    beside the results, with the suffix .log.
    """
    started, log = time.monotonic(), results.with_suffix(".log")
    mark = f"{os.getpid()} {results}"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {PART: mark},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            ended = "ok" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _kill_rest(mark)
    part: dict[str, Any] = {"ended": ended, "seconds": round(time.monotonic() - started, 1)}
    with suppress(OSError, ValueError):
        part |= loads(results.read_text())
    return part if ended == "ok" else part | {"output": log.read_text(errors="replace")[-TAIL:]}


def _kill_rest(mark: str) -> None:
    """Kill what a part has started in other sessions, as `train` starts its ranks; they would keep the GPU busy."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(PART) == mark:
                process.kill()


def _one_gpu(parts: dict[str, Any], out: Path) -> bool:
    """Return whether the part `machine` has found fewer than two GPUs, now or when it ran last."""
    found = parts.get("machine")
    if found is None:
        with suppress(OSError, ValueError):
            found = loads((out / "machine.json").read_text())
    gpus = (found or {}).get("gpus")
    return gpus is not None and len(gpus) < 2


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("gpu-check"), show_default=True)
@click.option("--minutes", type=float, default=8.0, show_default=True, help="Time for all parts together.")
@click.option("--only", multiple=True, type=click.Choice(list(LIMITS)), help="Run only this part.")
@click.option("--rehearse", is_flag=True, help="Run on the CPU with tiny shapes.")
def main(out: Path, minutes: float, only: tuple[str, ...], rehearse: bool) -> None:
    """Check the trainer on this machine's GPUs."""
    longer = REHEARSAL if rehearse else 1.0
    deadline = time.monotonic() + 60 * minutes * longer
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {}
    report = {"rehearsal": rehearse, "parts": parts}
    wanted = {name: limit for name, limit in LIMITS.items() if not only or name in only}
    for number, (name, limit) in enumerate(wanted.items()):
        left = deadline - time.monotonic()
        results = out / f"{name}.json"
        results.unlink(missing_ok=True)
        skipped = () if rehearse or not _one_gpu(parts, out) else TWO_GPUS
        if name in skipped:
            parts[name] = {"ended": "skipped: needs two GPUs"}
        elif left < 10:
            parts[name] = {"ended": "skipped: no time left"}
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "tests.gpu.parts", name, str(out), *(["--rehearse"] if rehearse else [])]
            later = [other for other in list(wanted)[number + 1 :] if other not in skipped]
            unused = left - longer * sum(wanted[other] for other in later)
            parts[name] = run_part(command, min(max(limit * longer, unused), left), results)
            print(f"{name}: {parts[name]['ended']}", file=sys.stderr, flush=True)
        text = dumps(report, indent=1)
        atomic_write(out / "check.json", lambda path, text=text: path.write_text(text))  # type: ignore[misc]
    print(dumps(report, indent=1))
    sys.exit(any(not part["ended"].startswith(("ok", "skipped: needs")) for part in parts.values()))


if __name__ == "__main__":
    main()
