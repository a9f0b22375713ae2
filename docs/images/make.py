"""Make the pictures of the documentation that show a run: python docs/images/make.py runs/quickstart

The pictures are written beside this file. See README.md there for the pictures that `unipool` commands make.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from importlib import resources
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.terminal_theme import MONOKAI

from pool.placement import Placement, balanced, contiguous, imbalance
from trainer.common.figure_style import FAINT, INK, QUIET, SERIES, figure_title, new_figure, write_png_and_svg
from trainer.common.strict_json import loads
from trainer.telemetry.expert_heatmap import write_heat_map
from trainer.view.frame import Frame
from trainer.view.records import METRICS_FILE, Records, recorded_load
from trainer.view.report import make_page
from trainer.view.view import recorded_view

TERMINAL = (100, 34)
"""Columns and lines of the terminal in the picture of `watch`."""

SHOWN_STEP = 150
"""Step of the picture of `watch`."""

SHOWN = (
    *("Loss, nats", "Gradient norm", "Tokens per second"),
    *("Time of a trunk rank", "Time of a pool rank", "Load imbalance"),
)
"""Beginnings of the titles of the charts in the picture of `report`."""


def draw_watch(run: Path, out: Path) -> None:
    """Draw what `watch` showed after SHOWN_STEP steps of a run, as SVG, from its records."""
    with TemporaryDirectory() as folder:
        earlier = Path(folder) / "quickstart"
        shutil.copytree(run, earlier, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
        lines = (run / METRICS_FILE).read_text().splitlines(keepends=True)
        (earlier / METRICS_FILE).write_text("".join(line for line in lines if loads(line)["step"] <= SHOWN_STEP))
        records = Records(earlier)
        records.read()
        view = recorded_view(earlier, records, "running")
    left = (view.scalars["target_steps"] - SHOWN_STEP) * records.mean("seconds")
    width, height = TERMINAL
    console = Console(record=True, width=width, height=height, file=io.StringIO(), force_terminal=True)
    view = replace(view, scalars={**view.scalars, "eta": left})
    console.print(Frame(view, "every 2 s; press Ctrl-C to leave"))
    svg = console.export_svg(title="unipool watch runs/quickstart", theme=MONOKAI)
    out.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))  # no font is loaded from elsewhere


def draw_report(run: Path, out: Path) -> None:
    """Draw some charts of the page that `report` writes, with its headline above them, as one SVG."""
    page = make_page(run)
    css = (resources.files("trainer.view") / "report.css").read_text()
    for name, colour in re.findall(r"(--\w+): (#\w+)", css[: css.index("@media")]):
        page = page.replace(f"var({name})", colour)
    width, height, top, columns = 400, 280, 150, 3
    parts = []
    tiles = re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", page[: page.index("</dl>")])
    for place, (name, value) in enumerate(tiles):
        x = 24 + place * (columns * width - 24) / len(tiles)
        parts.append(f'<text x="{x:.0f}" y="86" class="value">{value}</text>')
        lines = re.findall(r".{1,26}(?:\s|$)", unescape(name))
        parts += [f'<text x="{x:.0f}" y="{106 + 16 * n}" class="name">{line}</text>' for n, line in enumerate(lines)]
    found = re.findall(r"<figcaption><b>(.*?)</b>(.*?)</figcaption>(<svg.*?</svg>)\s*</figure>", page, re.DOTALL)
    chosen = [figure for title in SHOWN for figure in found if figure[0].startswith(title)]
    for place, (title, keys, chart) in enumerate(chosen):
        x, y = place % columns * width, top + place // columns * height
        parts.append(f'<rect x="{x + 8}" y="{y + 8}" width="{width - 16}" height="{height - 16}" rx="8" class="card"/>')
        parts.append(f'<text x="{x + 24}" y="{y + 32}" class="title">{title}</text>')
        for n, (colour, key) in enumerate(re.findall(r"--key: (#\w+)\">(.*?)<", keys)):
            parts.append(f'<rect x="{x + 24 + 93 * n}" y="{y + 42}" width="9" height="9" fill="{colour}"/>')
            parts.append(f'<text x="{x + 36 + 93 * n}" y="{y + 51}" class="key">{key}</text>')
        size = f'x="{x + 20}" y="{y + 52}" width="{width - 40}" height="{height - 64}"'
        parts.append(chart.replace("<svg", f"<svg {size}", 1))
    style = (
        "text { font-family: system-ui, sans-serif; fill: #222222; } .head { font-size: 24px; font-weight: 600; } "
        ".value { font-size: 21px; font-weight: 600; } .name { font-size: 11px; fill: #6f6f6a; } "
        ".key { font-size: 10px; fill: #6f6f6a; } "
        ".title { font-size: 14px; font-weight: 600; } .card { fill: #ffffff; stroke: #dededa; }"
    )
    w, h = columns * width, top + -(-len(chosen) // columns) * height + 8
    out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}"><style>{style}</style>'
        f'<rect width="{w}" height="{h}" fill="#f6f6f4"/><text x="24" y="42" class="head">quickstart</text>'
        f"{''.join(parts)}</svg>\n"
    )


def draw_resharding(run: Path, out: Path) -> None:
    """Draw where trunk parameters and experts are before and after a resume in another layout."""
    load = recorded_load(run)
    if load is None:
        raise SystemExit(f"{run}: has no load.npy")
    load_LM = torch.from_numpy(load)
    experts = load.shape[1]
    before, after = contiguous(experts, 1, 2), balanced(load_LM, 4)
    figure = new_figure(10.5, 7)
    axes = figure.subplots()
    heat = load.sum(0) / load.sum(0).max()
    left, right = (0.0, 0.18), (0.82, 1.0)
    places = [_draw_pool(axes, side, p, load_LM, heat) for side, p in ((left, before), (right, after))]
    for expert in range(experts):
        a, b = places[0][expert], places[1][expert]
        shard = after.order.index(expert) // after.num_local_experts
        axes.plot([left[1], right[0]], [a, b], color=SERIES[shard], linewidth=0.7, alpha=0.75)
    top = experts + 14
    trunk = [_draw_trunk(axes, side, ranks, top) for side, ranks in ((left, 2), (right, 1))]
    for y in trunk[0]:
        axes.plot([left[1], right[0]], [y, trunk[1][0]], color=INK, linewidth=1.4)
    axes.text(0.5, top + 9, "trunk parameters and their moments,\nfound by name", ha="center", va="bottom", color=INK)
    axes.text(0.5, experts + 5, "experts and their moments, found by number", ha="center", color=INK)
    axes.text(left[0], top + 17, "saved by 2 trunk and 2 pool ranks", color=INK, weight="bold")
    axes.text(right[1], top + 17, "resumed by 1 trunk and 4 pool ranks", color=INK, weight="bold", ha="right")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-8, top + 20)
    axes.set_axis_off()
    figure_title(figure, "Resharding: every rank reads the tensors that it owns now; results agree to 1e-5")
    write_png_and_svg(figure, out)


def _draw_pool(
    axes: Axes, side: tuple[float, float], placement: Placement, load_LM: torch.Tensor, heat: np.ndarray
) -> dict[int, float]:
    """Draw pool ranks as stacks of experts, darker where they have more load; return each expert's height."""
    gap, places = 3.0, {}
    y = placement.num_experts + gap * (placement.shards - 1) / 2
    total = load_LM.sum().item() / placement.shards
    for shard in range(placement.shards):
        members = placement.experts_of(shard)
        share = load_LM[:, list(members)].sum().item() / total
        axes.text(
            np.mean(side), y + 0.6, f"pool rank {shard}: load {share:.2f} x mean", ha="center", fontsize=8, color=INK
        )
        for expert in members:
            y -= 1
            grey = f"{0.95 - 0.7 * heat[expert]:.3f}"
            axes.add_patch(Rectangle((side[0], y), side[1] - side[0], 1, facecolor=grey, edgecolor="white", lw=0.3))
            places[expert] = y + 0.5
        y -= gap
    worst = imbalance(load_LM, placement).lockstep
    note = f"busiest rank in a layer: {worst:.2f} x mean"
    axes.text(np.mean(side), -6.5, note, ha="center", fontsize=8.5, color=INK)
    return places


def _draw_trunk(axes: Axes, side: tuple[float, float], ranks: int, top: float) -> Sequence[float]:
    """Draw trunk ranks: each has all weights and, by ZeRO 1, a part of the moments; return their heights."""
    edges = np.linspace(top + 14, top, ranks + 1)
    for high, low in pairwise(edges):
        size = (side[1] - side[0], high - low - 0.8)
        axes.add_patch(Rectangle((side[0], low), *size, facecolor=FAINT, edgecolor=QUIET))
    for rank, (high, low) in enumerate(pairwise(edges)):
        part = "all moments" if ranks == 1 else f"1/{ranks} of the moments"
        text = f"trunk rank {rank}\nall weights, {part}"
        axes.text(np.mean(side), (high + low) / 2 - 0.4, text, ha="center", va="center", fontsize=8, color=INK)
    return [float((high + low) / 2 - 0.4) for high, low in pairwise(edges)]


def main(run: Path, folder: Path) -> None:
    """Make all pictures of a run that has ended."""
    draw_watch(run, folder / "watch.svg")
    draw_report(run, folder / "report.svg")
    draw_resharding(run, folder / "resharding.svg")
    (folder / "resharding.png").unlink()
    load = recorded_load(run)
    if load is not None:
        write_heat_map(load, folder / "load.png", "quickstart: share of each layer's tokens by expert")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent)
