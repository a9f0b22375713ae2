"""Turns a soak into a page of the documents: what happened, and a picture of it.

python -m tests.soak.report [--soak runs/soak] [--out docs/results/soak]
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from matplotlib.axes import Axes

from tests.soak.summary import GROWTH, GROWTH_FDS, LONG_MINUTES
from trainer.common.figure_style import (
    INK,
    QUIET,
    SERIES,
    add_legend,
    new_figure,
    panel_title,
    style_axes,
    write_png_and_svg,
)

Record = Mapping[str, Any]

BOTH = ("undisturbed", "disturbed")


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(samples: Sequence[Record], events: Sequence[Record], path: Path) -> None:
    """Draw the steps of both jobs with the faults, and the memory and open files of their processes, over minutes."""
    figure = new_figure(9.0, 8.0)
    steps, memory, files = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))
    for job, colour in zip(BOTH, (QUIET, SERIES[0]), strict=True):
        steps.plot([s["at"] / 60 for s in samples], [s[job]["step"] for s in samples], color=colour, label=job)
    saved = [s["disturbed"]["saved"] for s in samples]
    steps.step([s["at"] / 60 for s in samples], saved, color=SERIES[2], lw=0.8, where="post", label="last checkpoint")
    faults = [event for event in events if event["kind"] == "fault"]
    for kind, colour in (("kill", SERIES[1]), ("stopped", SERIES[3]), ("SIGTERM", INK), ("disk", SERIES[2])):
        hit = [event for event in faults if kind in event["name"]]
        steps.plot([e["at"] / 60 for e in hit], [e["step"] for e in hit], "v", color=colour, ms=5, label=_LABELS[kind])
    panel_title(steps, "Steps, and what hit the disturbed job")
    add_legend(steps, ncols=2)
    for job, marker in zip(BOTH, (":", "-"), strict=True):
        for index, who in enumerate(("rank 0", "rank 1", "supervisor")):
            _process(memory, samples, job, who, "rss", 2.0**-20, marker, SERIES[index])
            _process(files, samples, job, who, "fds", 1.0, marker, SERIES[index])
    panel_title(memory, "Resident memory, MiB (dotted: undisturbed)")
    add_legend(memory, ncols=3)
    panel_title(files, "Open files")
    files.set_xlabel("minutes")
    for axes in (steps, memory, files):
        style_axes(axes)
    write_png_and_svg(figure, path)
    path.with_suffix(".png").unlink()


_LABELS = {"kill": "killed", "stopped": "stopped", "SIGTERM": "asked to stop", "disk": "disk full or slow"}


def _process(
    axes: Axes, samples: Sequence[Record], job: str, who: str, what: str, unit: float, style: str, colour: str
) -> None:
    """Draw a size of a process, with a gap where there is none."""
    sizes = [sample[job]["processes"].get(who) for sample in samples]
    values = [float("nan") if size is None else size[what] * unit for size in sizes]
    label = who if job == "disturbed" else None
    axes.plot([sample["at"] / 60 for sample in samples], values, style, color=colour, lw=1.0, label=label)


def page(summary: Record) -> str:
    """Return the page, in Markdown."""
    faults, losses = summary["faults"], summary["losses"]
    scrapes = summary["scrapes"]
    rows = [f"| {name} | {number} | {_seconds(faults, name)} |" for name, number in sorted(faults["by kind"].items())]
    grown = [
        f"| {p['process']} of the {p['job']} job | {p['minutes']} | {p['rss'][0] / 2**20:.0f} | "
        f"{p['rss'][1] / 2**20:.0f} | {p['rss'][2] / 2**20:.0f} | {p['fds'][0]:g} | {p['fds'][2]:g} |"
        for p in sorted(summary["processes"], key=lambda p: -p["minutes"])[:8]
    ]
    verdict = "Nothing was found." if not summary["problems"] else "Found:"
    found = [f"- {problem}" for problem in summary["problems"]]
    return "\n".join(
        [
            "# A soak",
            "",
            f"`python -m tests.soak`, {summary['minutes']:g} minutes, commit {summary['commit']},",
            f"{summary['machine']}.",
            "A job trained under random faults while the same job trained undisturbed on the same cores.",
            "",
            verdict,
            *([""] if found else []),
            *found,
            "",
            f"- **Losses:** {losses['compared']} records (steps and evaluations) of both were compared bit for bit, "
            f"{losses['differing']} differ.",
            f"  {losses['missing, because the disk was full']} records of the disturbed job are missing, because the "
            "disk was full when they were to be written.",
            f"- **Progress:** {summary['steps']['disturbed']} steps with {faults['all']} faults and "
            f"{faults['restarts']} restarts; {summary['steps']['undisturbed']} undisturbed.",
            f"  A restart repeated at most {faults['most steps repeated']} steps; a checkpoint was due every 20.",
            f"- **Scrapes:** {scrapes['undisturbed']['good']} pages of the undisturbed job were read, "
            f"{scrapes['undisturbed']['failed']} could not be; the slowest took "
            f"{scrapes['undisturbed']['slowest']:.2f} s.",
            f"- **Growth** is judged from the second third of a life to the last, if it lasted {LONG_MINUTES} minutes: "
            f"at most {GROWTH:.0%} of the memory and {GROWTH_FDS} open files.",
            "",
            "![Steps, memory and open files of both jobs](soak.svg)",
            "",
            "| fault | times | seconds until resumed (mean, most) |",
            "|---|---|---|",
            *rows,
            "",
            "The processes that lived longest: medians of the thirds of their lives.",
            "",
            "| process | minutes | MiB, first | second | last | open files, first | last |",
            "|---|---|---|---|---|---|---|",
            *grown,
            "",
        ]
    )


def _seconds(faults: Record, name: str) -> str:
    seconds = faults["seconds until resumed"].get(name)
    return f"{seconds['mean']:.0f}, {seconds['most']:.0f}" if seconds else "it went on"


@click.command(help=__doc__)
@click.option("--soak", type=click.Path(path_type=Path, exists=True), default=Path("runs/soak"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results/soak"), show_default=True)
def main(soak: Path, out: Path) -> None:
    """Write README.md, soak.svg and summary.json."""
    out.mkdir(parents=True, exist_ok=True)
    draw(lines(soak / "samples.jsonl"), lines(soak / "events.jsonl"), out / "soak")
    shutil.copy(soak / "summary.json", out)
    (out / "README.md").write_text(page(json.loads((soak / "summary.json").read_text())))


if __name__ == "__main__":
    main()
