"""A picture of what a device does in one step, from torch's profiler."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.common.figure_style import QUIET, SERIES, new_figure, panel_title, style_axes

KINDS = {
    "attention": ("flash", "fmha", "attention"),
    "products": ("gemm", "cutlass", "cublas", "nvjet", "matmul", "aten::mm", "aten::bmm", "addmm"),
    "copies": ("memcpy", "memset", "copy_", "nccl"),
}
"""Parts of the names of kernels, by kind, of which the first that fits counts; what has none of them is the rest."""

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
MOST = 12
"""Names in the list of what takes longest."""


def kind_of(name: str) -> str:
    """Return the kind of a kernel or an operator."""
    return next((kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), "the rest")


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def draw_step(step: Callable[[], object], device: torch.device, picture: Path) -> dict[str, Any]:
    """Run a step under the profiler, and draw its timeline beside its trace.

    Returns:
        The step's time, for how much of it the device was busy, and what took longest, in seconds.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    trace = picture.with_suffix(".trace.json")
    profiler.export_chrome_trace(str(trace))
    text = trace.read_bytes()
    trace.unlink()
    picture.with_suffix(".trace.json.gz").write_bytes(gzip.compress(text))
    wanted = ON_DEVICE if on_gpu else ("cpu_op",)
    events = [event for event in json.loads(text)["traceEvents"] if event.get("cat") in wanted and "dur" in event]
    assert events, f"the profiler saw nothing of {device} (on a GPU it needs CUPTI); its trace lies beside {picture}"
    return _draw(events, picture)


def _draw(events: Sequence[dict[str, Any]], picture: Path) -> dict[str, Any]:
    """Draw a row for each stream (or thread), coloured by kind; times in the trace are microseconds."""
    start = min(event["ts"] for event in events)
    rows: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        at, length = (event["ts"] - start) / 1e3, event["dur"] / 1e3
        rows[str(event["tid"])][kind_of(event["name"])].append((at, length))
        seconds[event["name"]] += length / 1e3
    everything = [(at, at + length) for row in rows.values() for bars in row.values() for at, length in bars]
    end, used = max(end for _, end in everything), busy(everything)
    figure = new_figure(14.0, 1.6 + 0.5 * len(rows))
    axes = figure.add_subplot()
    colours = dict(zip((*KINDS, "the rest"), (*SERIES[:3], QUIET), strict=True))
    for number, row in enumerate(rows.values()):
        for kind, bars in row.items():
            axes.broken_barh(bars, (number - 0.4, 0.8), color=colours[kind], linewidth=0)
    for kind, colour in colours.items():
        axes.plot([], [], color=colour, linewidth=6, label=kind)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("stream")
    style_axes(axes, "x")
    panel_title(axes, f"One step: busy for {used / end:.0%} of {end:.0f} ms")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(picture)
    longest = sorted(seconds.items(), key=lambda item: -item[1])[:MOST]
    launches = len(events)
    return {"seconds": end / 1e3, "busy": used / end, "launches": launches, "longest": dict(longest)}
