"""Start real training jobs as a user would, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil

from tests.distributed import TIME_LIMIT
from trainer.telemetry.step_scalars import Efficiency
from trainer.telemetry.time_breakdown import ACTIVITIES

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

RECIPE = """
run: {{dir: {folder}/run}}
model: {{layers: 2, hidden: 32, heads: 2, kv_heads: 1, ffn_hidden: 32, vocab: 300, seq_len: 32}}
pool: {{experts: 8}}
balance: {{pool: 1e-2}}
train: {{steps: 4, global_batch: 8, micro_batch: 4, lr: 1e-2, min_lr: 1e-3, precision: fp32}}
data: {{source: {folder}/text.jsonl, tokenizer: train, split: [8, 2, 1], dir: {folder}/data}}
parallel: {{trunk_ranks: 1, pool_ranks: 1, timeout_seconds: 60}}
eval: {{every: 2, batches: 1}}
probe: {{every: 2, layers: [0, 1]}}
metrics: {{csv: true}}
"""


def write_recipe(folder: Path) -> Path:
    """A tiny recipe and its text; returns the recipe's file."""
    documents = [f"def f{i}(x):\n    return x * {i} + {i * i}\n" * 10 for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(folder=folder))
    return path


EXTENSIONS = Path(tempfile.gettempdir()) / f"unipool-test-extensions-{os.getpid()}"
"""Where torch would put what it compiles."""


TOKEN = "hf_OfAPersonWhoTrains1234567890"
"""A credential in the user's environment; wrong, and not asked for."""


def environment() -> dict[str, str]:
    """The user's environment; one thread a process, for there are few cores."""
    return os.environ | {
        "HF_TOKEN": TOKEN,
        "WANDB_API_KEY": TOKEN,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's folder to its end."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )


def unipool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m trainer ...` to its end."""
    return run(sys.executable, "-m", "trainer", *arguments)


@contextmanager
def started(*command: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A command running in the background, and the file its output goes to. Whatever is left of it is killed.

    Args:
        variables: Of its environment, beside those of the user.
    """
    log = Path(command[-1].removeprefix("run.dir=")).with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment() | variables, stdout=output, stderr=subprocess.STDOUT, text=True
        )
        try:
            yield process, log
        finally:
            for rank in processes_of(command[-1]):
                with suppress(psutil.NoSuchProcess):
                    rank.kill()
            process.kill()
            process.wait()


def wait_for(log: Path, text: str) -> str:
    """Until `text` stands in the log; returns the log."""
    deadline = time.monotonic() + TIME_LIMIT
    while time.monotonic() < deadline:
        if text in log.read_text():
            return log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"no {text!r} in:\n{log.read_text()}")


def processes_of(mark: str) -> list[psutil.Process]:
    """Processes of this user with `mark` on their command line, this one left out."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and mark in (process.info["cmdline"] or []):
            found.append(process)
    return found


def rank_process(mark: str, rank: int) -> psutil.Process:
    """The process that is world rank `rank` of the job with `mark` on its command lines."""
    for process in processes_of(mark):
        try:
            if process.environ().get("RANK") == str(rank):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"rank {rank} is not there")


_TIMED = {"seconds", "tokens_per_second", "pool_wait", *(f.name for f in fields(Efficiency))}
_TIMED |= {f"{side}_{activity}" for side in ("trunk", "pool", "serving") for activity in ACTIVITIES}


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl without what depends on the clock or the memory."""
    return {key: value for key, value in record.items() if key not in _TIMED}


def steps(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of steps and evaluations."""
    return [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
