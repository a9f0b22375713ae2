"""What a soak has found: read from its record and the metrics of both jobs."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.report import commit, machine
from tests.soak.watched import WatchedJob
from tests.trainer.job import untimed
from trainer.common.atomic import atomic_write

GROWTH, GROWTH_BYTES, GROWTH_FDS = 0.05, 30 << 20, 2
"""What a process may grow from the second to the last third of its life: both of the first two, or the last one."""

LONG_MINUTES = 30
"""The shortest life of a process that says whether it grows: at first allocators keep what a process needs at most."""

WARM_SECONDS, LEAST_SAMPLES = 120.0, 12
"""What is left out at the start of a process; the fewest samples that say something."""

AS_EXPECTED = (75, 143, -9)
"""Statuses of the disturbed job's supervisor: it has saved, was asked to stop between two attempts, was killed."""

Record = Mapping[str, Any]


def summarise(out: Path, quiet: WatchedJob, job: WatchedJob, every: int) -> dict[str, Any]:
    """Write summary.json and return what is in it; `problems` is empty if all is well."""
    events, samples = _lines(out / "events.jsonl"), _lines(out / "samples.jsonl")
    problems: list[str] = []
    processes = _processes(samples)
    summary = {
        "minutes": round(samples[-1]["at"] / 60, 1) if samples else 0.0,
        "parts": sum(event["kind"] == "begin" for event in events),
        "machine": machine(),
        "commit": commit(),
        "steps": {each.name: each.step for each in (quiet, job)},
        "losses": _compare(quiet, job, problems),
        "faults": _faults(events, every, problems),
        "scrapes": {each.name: vars(each.scrapes) for each in (quiet, job)},
        "processes": processes,
        "problems": problems,
    }
    _judge_growth(processes, problems)
    problems += [f"hang: no step after {event['step']} at {event['at']:.0f} s" for event in _of(events, "hang")]
    for event in _of(events, "supervisor ended"):
        if event["job"] == quiet.name:
            problems.append(f"the undisturbed job ended with status {event['status']} at {event['at']:.0f} s")
        elif event["status"] not in AS_EXPECTED:
            problems.append(f"the disturbed job's supervisor ended with status {event['status']}")
    for event in _of(events, "stopped"):
        if event["status"] != 75:
            problems.append(f"{event['job']}: status {event['status']} instead of 75 at the end")
    if quiet.scrapes.failed > 0.01 * quiet.scrapes.good:
        problems.append(f"{quiet.scrapes.failed} pages of the undisturbed job could not be read")
    text = json.dumps(summary, indent=1)
    atomic_write(out / "summary.json", lambda path: path.write_text(text + "\n"))
    return summary


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _of(events: Sequence[Record], kind: str) -> list[Record]:
    return [event for event in events if event["kind"] == kind]


def _compare(quiet: WatchedJob, job: WatchedJob, problems: list[str]) -> dict[str, Any]:
    """Compare every record of the disturbed job with that of the undisturbed one."""
    wanted = {_key(record): untimed(record) for record in quiet.records()}
    found = {_key(record): untimed(record) for record in job.records()}
    common = [key for key in found if key in wanted]
    differing = sorted(key for key in common if found[key] != wanted[key])
    last = max((step for step, kind in common if kind == "step"), default=0)
    missing = [key for key in wanted if key[0] <= last and key not in found]
    if differing:
        problems.append(f"other losses from {differing[0]} on: {len(differing)} of {len(common)} records")
    return {
        "compared": len(common),
        "differing": len(differing),
        "missing, because the disk was full": len(missing),
        "last loss": found.get((last, "step"), {}).get("loss"),
    }


def _key(record: Record) -> tuple[int, str]:
    return int(record["step"]), "step" if "loss" in record else "evaluation"


def _faults(events: Sequence[Record], every: int, problems: list[str]) -> dict[str, Any]:
    """Say how many faults of each kind there were, and what resumes have repeated."""
    seconds: dict[str, list[float]] = defaultdict(list)
    fault: Record | None = None
    counts: Counter[str] = Counter()
    lost, disk_at, restarts = 0, -1e9, 0
    for event in events:
        if event["kind"] == "fault":
            fault = event
            counts[event["name"]] += 1
        elif event["kind"] == "resumed":
            restarts += 1
            if fault is None:
                continue
            seconds[fault["name"]].append(event["at"] - fault["at"])
            repeated = fault["step"] - event["step"]
            lost = max(lost, repeated)
            if event["step"] < fault["saved"]:
                problems.append(f"resumed after step {event['step']}, though step {fault['saved']} was saved")
            # A save is complete at the next one at the latest, unless the disk was full or slow.
            if repeated > 2 * every and event["at"] - disk_at > 300:
                problems.append(f"{repeated} steps were repeated after {fault['name']}")
            fault = None
        if fault and "disk" in fault["name"]:
            disk_at = event["at"]
    recovered = {name: {"mean": statistics.mean(s), "most": max(s)} for name, s in sorted(seconds.items())}
    return {
        "all": sum(counts.values()),
        "by kind": dict(counts),
        "restarts": restarts,
        "most steps repeated": lost,
        "seconds until resumed": {n: {k: round(v, 1) for k, v in s.items()} for n, s in recovered.items()},
    }


def _processes(samples: Sequence[Record]) -> list[dict[str, Any]]:
    """Say how every process that lived long enough has grown."""
    lives: dict[tuple[str, str, int], list[tuple[float, Record]]] = defaultdict(list)
    for sample in samples:
        for name in ("undisturbed", "disturbed"):
            for who, sizes in sample[name]["processes"].items():
                lives[name, who, sizes["pid"]].append((sample["at"], sizes))
    found = []
    for (job, who, _), life in lives.items():
        warm = [sizes for at, sizes in life if at - life[0][0] >= WARM_SECONDS]
        if len(warm) < LEAST_SAMPLES:
            continue
        third = len(warm) // 3
        grown = {"job": job, "process": who, "minutes": round((life[-1][0] - life[0][0]) / 60, 1)}
        for what in ("rss", "fds", "threads"):
            parts = (warm[:third], warm[third:-third], warm[-third:])
            grown |= {what: [statistics.median(sizes[what] for sizes in part) for part in parts]}
        found.append(grown)
    return found


def _judge_growth(processes: Sequence[Record], problems: list[str]) -> None:
    for grown in processes:
        if grown["minutes"] < LONG_MINUTES:
            continue
        name = f"{grown['process']} of the {grown['job']} job, in {grown['minutes']} min"
        (_, rss, rss_last), (_, fds, fds_last) = grown["rss"], grown["fds"]
        if rss_last - rss > max(GROWTH * rss, GROWTH_BYTES):
            problems.append(f"{name}: memory grew from {rss / 2**20:.0f} to {rss_last / 2**20:.0f} MiB")
        if fds_last - fds > GROWTH_FDS:
            problems.append(f"{name}: open files grew from {fds:g} to {fds_last:g}")
