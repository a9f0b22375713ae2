"""The cost of checkpoints: steps of quickstart with a save after every step or every fifth, compared with no saves.

python -m tests.benchmarks.saving [--rounds 2] [--json]
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import click
from tqdm import tqdm

from tests.benchmarks.contenders import ROOT, ContenderFailed, end_in_order
from tests.benchmarks.report import print_report, ratios

RECIPE = "quickstart"
STEPS = 40
WARM_UP = 8
RUN_LIMIT = 600.0
INTERVALS = (0, 5, 1)
"""Steps between saves; 0 means that only the end is saved."""


def measure(every: int) -> dict[str, float]:
    """Return the mean seconds of a step in a new run, and what the metrics say of its last save but one."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sets = {"run.dir": run, "train.steps": STEPS, "checkpoint.every": every, "eval.batches": 1}
        command = [sys.executable, "-m", "trainer", "train", RECIPE]
        command += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        found: dict[str, float] = {}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr
        url, said = None, []
        for line in process.stderr:
            said.append(line)
            if match := re.match(r"metrics: rank 0 .*(http\S+)", line):
                url = match[1]
            if url and line.startswith("step ") and every:
                found |= _scrape(url)
        if process.wait(RUN_LIMIT):
            raise ContenderFailed("".join(said)[-3000:])
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["tokens"] / record["tokens_per_second"] for record in records if "loss" in record]
    return found | {"step": statistics.mean(seconds[WARM_UP:])}


def _scrape(url: str) -> dict[str, float]:
    try:
        text = urllib.request.urlopen(url, timeout=10).read().decode()
    except OSError:  # the run has just ended
        return {}
    return {
        name: float(value)
        for name, value in re.findall(r"^unipool_checkpoint_(stall|duration)_seconds{.*} (\S+)", text, re.M)
    }


def saving_results(runs: dict[int, list[dict[str, float]]]) -> dict[str, list[float]]:
    """Return what the report lists: how much longer steps are by interval, and the seconds of a save."""
    plain = [run["step"] for run in runs[0]]
    results = {
        f"step_with_a_save_every_{every}_over_none": ratios([run["step"] for run in runs[every]], plain)
        for every in INTERVALS
        if every
    }
    saves = [run for every in INTERVALS if every for run in runs[every] if "stall" in run]
    for name in ("stall", "duration"):
        results[f"seconds_{name}"] = [run[name] for run in saves]
    return results


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="Also print one JSON object at the end.")
def main(rounds: int, as_json: bool) -> None:
    """Measure how much saving checkpoints slows down training; a round takes about two minutes.

    \b
    Example:
      python -m tests.benchmarks.saving --rounds 1 --json
    """
    end_in_order()
    runs: dict[int, list[dict[str, float]]] = {every: [] for every in INTERVALS}
    with tqdm(total=rounds * len(INTERVALS), desc="runs", dynamic_ncols=True) as bar:
        for _ in range(rounds):
            for every in INTERVALS:
                runs[every].append(measure(every))
                bar.update()
    notes = [
        "1 trunk and 1 pool rank; a checkpoint has 114 MB",
        "stall: how long training stands still; duration: how long it takes until the checkpoint is complete",
        f"mean of the steps {WARM_UP + 1} to {STEPS}; both cores compute, so writing slows down training",
    ]
    title = f"Cost of checkpoints in {RECIPE}: steps with saves over steps without, and seconds of a save"
    print_report(title, "python -m tests.benchmarks.saving", saving_results(runs), notes, as_json)


if __name__ == "__main__":
    main()
