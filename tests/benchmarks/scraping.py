"""The cost of being scraped: steps of 48 layers and 384 experts with a scrape per second, ten per second, and none.

python -m tests.benchmarks.scraping [--rounds 8] [--json]
"""

from __future__ import annotations

import gzip
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click
import torch

from tests.benchmarks.report import print_report, ratios
from tests.distributed import join, run_ranks
from tests.training import optimizer_step
from trainer.config.recipe import Recipe

PERIODS = {"never": 0.0, "every_second": 1.0, "ten_a_second": 0.1}
"""Seconds between scrapes. The default of Prometheus is 60 s, and deploy/prometheus/ uses 15 s."""

STEPS = 3
"""Steps of a round, in a row."""


def recipe(folder: str) -> Recipe:
    """The depth and the pool of unipool-830m, but narrow, so that a step takes about a second; one pool rank."""
    model = {"layers": 48, "hidden": 128, "heads": 4, "ffn_hidden": 128, "vocab": 2048, "seq_len": 32}
    return Recipe.model_validate(
        {
            "run": {"dir": folder},
            "model": model,
            "pool": {"experts": 384},
            "balance": {"pool": 1e-2},
            "train": {
                "steps": 1000,
                "global_batch": 4,
                "micro_batch": 2,
                "lr": 1e-4,
                "min_lr": 1e-5,
                "precision": "fp32",
            },
            "data": {"source": "unused", "tokenizer": "unused"},
            "parallel": {"pool_ranks": 1, "lanes": 2, "trunk_zero": 0, "pool_zero": 0},
        }
    )


def scrape(addresses: Sequence[str], period: float) -> None:
    """Read every page as Prometheus does, until killed; print the bytes, gzipped bytes and seconds of each."""
    while True:
        for address in addresses:
            request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept-Encoding": "gzip"})
            started = time.perf_counter()
            packed = urllib.request.urlopen(request, timeout=10).read()
            seconds = time.perf_counter() - started
            print(len(gzip.decompress(packed)), len(packed), seconds, flush=True)
        time.sleep(period)


def measure(job_recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Return mean seconds of a step by period of the scrapes, round by round, and (on rank 0) the scrapes."""
    from tests.benchmarks.our_role import make_role

    job = join(job_recipe)
    role = make_role(job_recipe, job)
    job.shared.put("address", role.metrics.address)
    job.barrier()
    addresses = job.shared.gather("address")
    step = 0
    seconds: dict[str, list[float]] = {name: [] for name in PERIODS}
    scrapes: list[str] = []
    for number in range(rounds + 1):
        for name, period in PERIODS.items():
            scraper = _scraper(addresses, period) if job.rank == 0 and period else None
            job.barrier()
            started = time.perf_counter()
            for _ in range(STEPS):
                optimizer_step(job, role, step)
                step += 1
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - started) / STEPS)
            if scraper:
                scraper.kill()
                scrapes += scraper.communicate()[0].splitlines()
    job.close()
    return {"seconds": seconds, "scrapes": [tuple(map(float, line.split())) for line in scrapes]}


def _scraper(addresses: Sequence[str], period: float) -> subprocess.Popen[str]:
    """Start a scraper, and wait until it has read a page."""
    command = [sys.executable, "-m", "tests.benchmarks.scraping", "--read", *addresses, "--period", str(period)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    return process


@click.command()
@click.option("--rounds", default=8, show_default=True, help="Interleaved rounds; about 15 s each.")
@click.option("--json", "as_json", is_flag=True, help="Also print one JSON object at the end.")
@click.option("--read", is_flag=True, hidden=True)
@click.option("--period", type=float, hidden=True)
@click.argument("addresses", nargs=-1)
def main(rounds: int, as_json: bool, read: bool, period: float, addresses: tuple[str, ...]) -> None:
    """Measure how much scraping slows down training."""
    if read:
        with suppress(BrokenPipeError):
            scrape(addresses, period)
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(2, measure, recipe(folder), rounds, time_limit=3600.0)[0]
    seconds = found["seconds"]
    never = seconds.pop("never")
    results = {f"steps_{name}_over_never": ratios(of_steps, never) for name, of_steps in seconds.items()}
    sizes, packed, took = zip(*found["scrapes"], strict=True)
    notes = [
        f"a step takes {statistics.median(never):.2f} s; {len(took)} scrapes of the trunk and the pool rank",
        f"pages have at most {max(sizes) / 1e3:.1f} kB, or {max(packed) / 1e3:.1f} kB gzipped, as Prometheus asks",
        f"a scrape takes {statistics.median(took) * 1e3:.1f} ms, at most {max(took) * 1e3:.1f} ms, on busy cores",
    ]
    title = "Cost of being scraped: 1 trunk + 1 pool rank, 48 layers, 384 experts"
    print_report(title, "python -m tests.benchmarks.scraping", results, notes, as_json)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
