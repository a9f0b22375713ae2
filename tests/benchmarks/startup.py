"""Time from the command line to the first optimizer step, compared with importing torch and deepspeed alone.

python -m tests.benchmarks.startup [--rounds 5] [--json]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from tqdm import tqdm

from tests.benchmarks.contenders import ROOT, ContenderFailed, end_in_order
from tests.benchmarks.report import print_report, ratios

RECIPE = "quickstart"
PREPARE_LIMIT = 1800.0
STEP_LIMIT = 300.0
END_LIMIT = 60.0
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def first_step() -> float:
    """Seconds from the launch of a new run to its first line in metrics.jsonl, where the run is stopped."""
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        command = [sys.executable, "-m", "trainer", "train", RECIPE, "--set", f"run.dir={run}"]
        with log.open("w") as output:
            started = time.perf_counter()
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=output, stderr=output, start_new_session=True
            )
            try:
                return _wait_for_line(run / "metrics.jsonl", process, log) - started
            finally:
                _end(process)


def _wait_for_line(path: Path, process: subprocess.Popen[bytes], log: Path) -> float:
    deadline = time.monotonic() + STEP_LIMIT
    while time.monotonic() < deadline:
        if path.exists() and "\n" in path.read_text():
            return time.perf_counter()
        if process.poll() is not None:
            raise ContenderFailed(f"the run ended with status {process.returncode}:\n{log.read_text()[-3000:]}")
        time.sleep(0.005)
    raise ContenderFailed(f"no step in {STEP_LIMIT:.0f} s:\n{log.read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate the command, which stops its ranks; if it has to be killed, they stop by themselves."""
    process.terminate()
    try:
        process.wait(END_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def imports() -> float:
    """Seconds of a Python process that only imports torch and deepspeed."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import torch, deepspeed"],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=STEP_LIMIT,
    )
    return time.perf_counter() - started


def startup_results(first_steps: list[float], import_times: list[float]) -> dict[str, list[float]]:
    """Return what the report lists: seconds, and the time to the first step over that of the imports."""
    return {
        "seconds_to_first_step": first_steps,
        "seconds_to_import_torch_deepspeed": import_times,
        "first_step_over_imports": ratios(first_steps, import_times),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="Also print one JSON object at the end.")
def main(rounds: int, as_json: bool) -> None:
    """Measure seconds from `python -m trainer train quickstart` to its first optimizer step, with prepared data.

    \b
    Example:
      python -m tests.benchmarks.startup --rounds 2 --json
    """
    end_in_order()
    prepare = [sys.executable, "-m", "trainer", "prepare", RECIPE]
    subprocess.run(prepare, cwd=ROOT, stdout=subprocess.DEVNULL, check=True, timeout=PREPARE_LIMIT)
    first_steps, import_times = [], []
    for _ in tqdm(range(rounds), desc="start", dynamic_ncols=True):
        import_times.append(imports())
        first_steps.append(first_step())
    notes = ["1 trunk and 1 pool rank; a new run.dir, prepared data, files in the page cache"]
    title = f"Seconds from the command line to the first optimizer step of {RECIPE}"
    print_report(
        title, "python -m tests.benchmarks.startup", startup_results(first_steps, import_times), notes, as_json
    )


if __name__ == "__main__":
    main()
