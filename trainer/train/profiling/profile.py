"""Recordings of optimizer steps by torch's profiler: a trace of every rank, and a table of each role's costs."""

from __future__ import annotations

import errno
import gzip
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from trainer.cluster.process_groups import Job
from trainer.common.atomic import atomic_write
from trainer.config.recipe import Recipe
from trainer.telemetry.console import say
from trainer.telemetry.run_folder import RunFolder

ROWS = 40
"""Rows of each table at most."""


class StepProfile:
    """Records the steps of `profile.steps` on one rank, and writes them into profile/ of the run's folder.

    Files appear whole or not at all: after the last of these steps, or where a signal stops the run before it. A fault
    meanwhile leaves none. A run that resumes between the first and the last step records those that are left.

    Args:
        compiled: Whether the trunk's segments are compiled.
    """

    def __init__(self, recipe: Recipe, job: Job, folder: RunFolder, compiled: bool):
        self._recipe, self._job, self._compiled = recipe, job, compiled
        self._folder = folder.path / "profile"
        first, last = recipe.profile.steps or (1, 0)
        self._wanted = range(first, last + 1)
        self._recorded: list[int] = []
        self._profiler: Any = None

    def step(self, number: int) -> AbstractContextManager[None]:
        """Return a context for a step, as the progress line counts them, which records it if it is wanted."""
        return self._record(number) if number in self._wanted else nullcontext()

    @contextmanager
    def _record(self, number: int) -> Iterator[None]:
        from torch.profiler import ProfilerActivity, profile, record_function

        from trainer.train.profiling.profile_ranges import named_ranges

        if self._profiler is None:
            activities = [ProfilerActivity.CPU]
            if self._job.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities)
            self._profiler.start()
        layers = 0 if self._recipe.model.ffn == "dense" else self._recipe.model.layers
        with named_ranges(layers, self._compiled), record_function(f"step {number}"):
            yield
        self._recorded.append(number)
        if number == self._wanted[-1]:
            self.finish()

    def finish(self) -> None:
        """Write what has been recorded, if anything. All ranks call this after the same step."""
        if self._profiler is None:
            return
        profiler, self._profiler, job = self._profiler, None, self._job
        profiler.stop()
        steps = f"steps_{self._recorded[0]}-{self._recorded[-1]}"
        trace, table = self._folder / f"{steps}_rank_{job.rank}.json.gz", self._folder / f"{steps}_{self._role}.txt"
        try:
            self._folder.mkdir(exist_ok=True)
            _write(trace, lambda path: _export(profiler, path))
            if job.rank in (0, job.topology.first_pool_rank):
                title = f"{self._recipe.run.dir}, {job.name}, optimizer {steps.replace('_', ' ')}"
                text = costs(averages(profiler.events()), title, len(self._recorded), job.device.type == "cuda")
                _write(table, lambda path: path.write_text(text))
                say(f"profile: {table} lists the largest costs; traces of all ranks are beside it")
        except OSError as error:
            say(f"warning: {self._folder}: the profile of {job.name} cannot be written ({error.strerror})")
        job.barrier()  # writing may take longer than a step may wait

    @property
    def _role(self) -> str:
        topology = self._job.topology
        if self._recipe.model.ffn == "dense":
            return "trunk"
        if not topology.dedicated:
            return "trunk_and_pool"
        return "trunk" if self._job.is_trunk else "pool"


def _write(path: Path, write: Any) -> None:
    try:
        atomic_write(path, write)
    except BaseException:
        path.with_name(f".{path.name}.partial").unlink(missing_ok=True)
        raise


def _export(profiler: Any, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        raw = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        if not raw.exists():  # Kineto only logs that it could not write
            raise OSError(errno.EIO, "torch could not write the trace; the disk may be full")
        with raw.open("rb") as source, gzip.open(path, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target)


def averages(events: Sequence[Any]) -> list[Any]:
    """Add up events of the same name, without what the host did between two steps, such as an evaluation.

    A GPU's own events are all kept: it may still be busy with a step when the host has ended it.

    Args:
        events: `torch.profiler.profile.events()`.
    """
    from torch.autograd.profiler_util import FunctionEventAvg

    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    steps = sorted((event.time_range.start, event.time_range.end) for event in host if _kind(event.key) == "step")
    between = [(end, start) for (_, end), (start, _) in pairwise(steps)]
    left_out = {id(e) for e in host if any(since < e.time_range.start < until for since, until in between)}
    found: dict[tuple[Any, ...], Any] = defaultdict(FunctionEventAvg)
    for event in events:
        if id(event) not in left_out:
            found[event.key, event.device_type, event.is_user_annotation].add(event)
    return list(found.values())


def costs(events: Sequence[Any], title: str, steps: int, on_gpu: bool) -> str:
    """Return the tables of a recording: its ranges by kind, its ranges, and its operations, largest first.

    Args:
        events: What `averages` returned.
        steps: Number of steps recorded.
        on_gpu: Whether to sort by the time of kernels rather than the host's.
    """
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    messages = [event for event in host if event.key.startswith(("gloo:", "nccl:"))]
    ranges = [event for event in host if event.is_user_annotation and event not in messages]
    operations = [event for event in (events if on_gpu else host) if not event.is_user_annotation]
    total = sum(event.cpu_time_total for event in ranges if _kind(event.key) == "step") or 1.0

    def spent(event: Any) -> tuple[float, float]:
        return event.cpu_time_total, event.device_time_total

    def alone(event: Any) -> tuple[float, float]:
        return event.self_cpu_time_total, event.self_device_time_total

    kinds: dict[str, tuple[int, tuple[float, float]]] = defaultdict(lambda: (0, (0.0, 0.0)))
    for event in ranges:
        (calls, (cpu, device)), (more_cpu, more_device) = kinds[_kind(event.key)], spent(event)
        kinds[_kind(event.key)] = calls + event.count, (cpu + more_cpu, device + more_device)
    tables = {
        "Kinds of ranges, with all that is within them": [(kind, *found) for kind, found in kinds.items()],
        "Ranges, with all that is within them": [(event.key, event.count, spent(event)) for event in ranges],
        "Messages and collectives, which may run beside the work": [(m.key, m.count, spent(m)) for m in messages],
        "Operations by themselves": [(event.key, event.count, alone(event)) for event in operations],
    }
    parts = [f"{title}\nms per step, and shares of the steps' wall time on the host"]
    for name, rows in tables.items():
        if not rows:
            continue
        rows.sort(key=lambda row: row[2][on_gpu], reverse=True)
        heading = f"{name:<56} {'calls':>9} {'host ms':>10} {'share':>7}" + (f" {'device ms':>10}" if on_gpu else "")
        lines = [
            f"{key[:56]:<56} {calls / steps:>9,.1f} {cpu / steps / 1e3:>10,.3f} {cpu / total:>7.1%}"
            + (f" {device / steps / 1e3:>10,.3f}" if on_gpu else "")
            for key, calls, (cpu, device) in rows[:ROWS]
        ]
        parts.append("\n".join([heading, *lines]))
    return "\n\n".join(parts) + "\n"


def _kind(name: str) -> str:
    """Return a range's name without the numbers of its step, layers and lanes."""
    return re.sub(r"( (layer|lane))? \d[\d,]*", "", name)
