"""Whether `unipool eval` and lm-evaluation-harness's own command give a model the same scores, in any batch size.

    python -m tests.compare_scores EXPORT FOLDER [--tasks TASK,...] [--limit N]

EXPORT is an export of `unipool export`, FOLDER has the task files that `python -m tests.local_tasks FOLDER` writes. The
exit status is 1 if a score differs. Perplexities are sums of many rounded numbers, so they may differ by 1e-5 of their
value; accuracies must be equal.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tests.local_tasks import DATA
from trainer.common.tables import new_table, print_tables

Values = dict[tuple[str, str], float]
"""Scores by task and metric."""

TASKS = (*DATA, "lambada_openai")
OURS, THEIRS = (1, 8, 32), ("1", "32", "auto")
"""Batch sizes of either command."""
CLOSE = 1e-5


def our_scores(export: Path, folder: Path, tasks: Sequence[str], limit: int | None, batch_size: int) -> Values:
    """Scores by `unipool eval`."""
    options = [] if limit is None else ["--limit", str(limit)]
    options += ["--include-path", str(folder), "--batch-size", str(batch_size), "--json"]
    command = [sys.executable, "-m", "trainer", "eval", str(export), "--tasks", ",".join(tasks), *options]
    tree = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    found = tree["tasks"]["tasks"]
    return {(task["task"], name): score["value"] for task in found for name, score in task["metrics"].items()}


def their_scores(export: Path, folder: Path, tasks: Sequence[str], limit: int | None, batch_size: str) -> Values:
    """Scores by `lm_eval --model hf`."""
    with tempfile.TemporaryDirectory() as work:
        options = [] if limit is None else ["--limit", str(limit)]
        options += ["--include_path", str(folder), "--batch_size", batch_size, "--output_path", work]
        model = ["--model", "hf", "--model_args", f"pretrained={export},trust_remote_code=True", "--device", "cpu"]
        command = [sys.executable, "-m", "lm_eval", *model, "--tasks", ",".join(tasks), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"{' '.join(command)}: {done.stderr[-2000:]}")
        (file,) = Path(work).rglob("results_*.json")
        found: dict[str, dict[str, Any]] = json.loads(file.read_text())["results"]
    return {
        (task, key.removesuffix(",none")): value
        for task, values in found.items()
        for key, value in values.items()
        if key.endswith(",none") and "_stderr" not in key
    }


def same(key: tuple[str, str], values: Sequence[float | None]) -> bool:
    """Whether the values of a score are equal; those of a perplexity nearly."""
    numbers = [value for value in values if value is not None]
    allowed = CLOSE * abs(numbers[0]) if "perplexity" in key[1] else 0.0
    return len(numbers) == len(values) and max(numbers) - min(numbers) <= allowed


def compare(columns: dict[str, Values]) -> int:
    """Print the scores side by side; return how many differ."""
    table = new_table("Scores", "task", "metric", *columns, "")
    keys = dict.fromkeys(key for values in columns.values() for key in values)
    different = 0
    for key in keys:
        values = [found.get(key) for found in columns.values()]
        equal = same(key, values)
        different += not equal
        shown = ["-" if value is None else f"{value:.6g}" for value in values]
        table.add_row(*key, *shown, "" if equal else "differ")
    print_tables(table, notes=[f"{len(keys)} scores, of which {different} differ."])
    return different


@click.command()
@click.argument("export", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tasks", default=",".join(TASKS), show_default=True)
@click.option("--limit", type=int, help="Only the first N examples of each task.")
def main(export: Path, folder: Path, tasks: str, limit: int | None) -> None:
    """Compare the scores of EXPORT on the tasks in FOLDER."""
    names = tasks.split(",")
    columns = {f"unipool {size}": our_scores(export, folder, names, limit, size) for size in OURS}
    columns |= {f"lm_eval {size}": their_scores(export, folder, names, limit, size) for size in THEIRS}
    sys.exit(1 if compare(columns) else 0)


if __name__ == "__main__":
    main()
