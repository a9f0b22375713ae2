"""Draw rows of a dashboard as they look, with Grafana's own components in a headless Chromium:

    npm ci --prefix tests/deploy/grafana/drawn
    python tests/deploy/grafana/drawn/draw.py http://127.0.0.1:9090 RUN training Speed --start 1795962000 \\
        --end 1795962600 --out picture.png

Prometheus must have scraped the run with deploy/prometheus. Heat maps are drawn with matplotlib, from the same query.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np

Json = dict[str, Any]

HERE = Path(__file__).parent
DASHBOARDS = HERE.parents[3] / "deploy/grafana/dashboards"
CELL = {"width": 60, "height": 38, "gap": 8}
"""Pixels of a cell of Grafana's grid, which has 24 columns, and between panels."""
PAGE = """\
<!doctype html>
<meta charset="utf-8">
<link rel="stylesheet" href="panels.css">
<div id="root"></div>
<script src="data.js"></script>
<script src="panels.js"></script>
"""
POINTS = 300
"""Points of a curve."""


def ask(server: str, path: str, **parameters: Any) -> list[Json]:
    """Return the series that a query finds."""
    url = f"{server}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        return list(json.load(answer)["data"]["result"])


def moment(sample: tuple[float, str]) -> tuple[float, float | None]:
    """Return a sample's time in milliseconds and its value; None if that is no finite number, which JSON lacks."""
    value = float(sample[1])
    return sample[0] * 1000, value if np.isfinite(value) else None


def legend(form: str, labels: dict[str, str]) -> str:
    """Return a legend with its labels filled in."""
    return re.sub(r"\{\{(\w+)\}\}", lambda label: labels.get(label[1], ""), form)


class Query:
    """Queries of panels about one run.

    Args:
        server: Address of Prometheus.
        run: Value of the variable `run`.
        start, end: Unix times.
        interval: Seconds between two scrapes.
    """

    def __init__(self, server: str, run: str, start: float, end: float, interval: float):
        self.server, self.run, self.start, self.end = server, run, start, end
        self.step = max((end - start) / POINTS, interval)
        self.rate_interval = max(self.step + interval, 4 * interval)

    def result(self, target: Json) -> list[Json]:
        """Return what Grafana would get for a query: values with times in milliseconds, labels and a legend."""
        expr = target["expr"].replace("$run", re.escape(self.run))
        expr = expr.replace("$__rate_interval", f"{self.rate_interval * 1000:.0f}ms")
        expr = expr.replace("$__range", f"{self.end - self.start:.0f}s")
        if target["instant"]:
            found = ask(self.server, "query", query=expr, time=self.end)
        else:
            span = {"start": self.start, "end": self.end, "step": self.step}
            found = ask(self.server, "query_range", query=expr, **span)
        return [
            {
                "metric": series["metric"],
                "legend": legend(target["legendFormat"], series["metric"]) or self.run,
                "values": self._filled(series["values"]) if "values" in series else [moment(series["value"])],
            }
            for series in found
        ]

    def _filled(self, values: list[tuple[float, str]]) -> list[tuple[float, float | None]]:
        """Return a value for every step: None where there is none, as Grafana shows gaps."""
        known = {round((at - self.start) / self.step): value for at, value in values}
        steps = range(int((self.end - self.start) / self.step) + 1)
        return [moment((self.start + i * self.step, known.get(i, "nan"))) for i in steps]


def draw_heat_map(panel: Json, found: list[Json], query: Query, out: Path) -> None:
    """Draw a heat map as the panel's options say: one row per series, in the order of the legend."""
    width, height = (panel["gridPos"][side] * CELL[name] / 100 for side, name in (("w", "width"), ("h", "height")))
    found = sorted(found, key=lambda series: series["legend"])
    values = np.array([[value for _, value in series["values"]] for series in found], dtype=float)
    colors = panel["options"]["color"]
    figure, axes = plt.subplots(figsize=(width, height - 0.4), dpi=200, layout="constrained")
    minutes = (query.end - query.start) / 60
    shown = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        cmap=colors["scheme"].lower(),
        vmin=colors["min"],
        vmax=colors["max"],
        extent=(0, minutes, -0.5, len(found) - 0.5),
    )
    every = max(1, len(found) // 16)
    axes.set_yticks(range(0, len(found), every), [series["legend"] for series in found[::every]])
    axes.set_xlabel("minutes")
    figure.colorbar(shown, ax=axes, pad=0.01, extend="max")
    figure.savefig(out)
    plt.close(figure)


def chosen(dashboard: Json, titles: list[str]) -> list[Json]:
    """The rows of these titles and their panels; folded rows are unfolded.

    Raises:
        SystemExit: There is no such row.
    """
    taken: list[Json] = []
    take, y = False, 0
    known = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    if missing := set(titles) - set(known):
        raise SystemExit(f"there is no row {missing.pop()!r}; rows are {', '.join(known)}")
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            take = panel["title"] in titles
        if take:
            taken += [panel, *panel.get("panels", ())]
    shift, before = 0, None
    for panel in taken:  # close the gaps that the other rows leave
        if panel["type"] == "row":
            shift = panel["gridPos"]["y"] - (y if before else 0)
            before = panel
        panel["gridPos"]["y"] -= shift
        y = max(y, panel["gridPos"]["y"] + panel["gridPos"]["h"])
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="address of Prometheus")
    parser.add_argument("run", help="value of the label run")
    parser.add_argument("dashboard", choices=sorted(path.stem for path in DASHBOARDS.glob("*.json")))
    parser.add_argument("rows", nargs="+", help="titles of rows")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=float, required=True, help="Unix time")
    parser.add_argument("--end", type=float, required=True, help="Unix time")
    parser.add_argument("--interval", type=float, default=15.0, help="seconds between scrapes")
    arguments = parser.parse_args()
    query = Query(arguments.server, arguments.run, arguments.start, arguments.end, arguments.interval)
    dashboard = json.loads((DASHBOARDS / f"{arguments.dashboard}.json").read_text())
    panels = chosen(dashboard, arguments.rows)
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) * CELL["height"] + CELL["gap"]
    width = 24 * CELL["width"] + CELL["gap"]
    for panel in panels:
        panel["title"] = panel["title"].replace("$run", arguments.run)
    with TemporaryDirectory() as folder:
        page = Path(folder)
        results = {p["id"]: [query.result(target) for target in p["targets"]] for p in panels if p["type"] != "row"}
        for panel in panels:
            if panel["type"] == "heatmap":
                draw_heat_map(panel, results[panel["id"]][0], query, page / f"heatmap-{panel['id']}.png")
        drawn = {"dashboard": {"panels": panels}, "results": results, "rows": [0], "cell": CELL}
        drawn |= {"start": query.start * 1000, "end": query.end * 1000, "interval": query.step * 1000}
        (page / "data.js").write_text(f"window.DRAWN = {json.dumps(drawn)};")
        (page / "index.html").write_text(PAGE)
        bundle = [HERE / "node_modules/.bin/esbuild", HERE / "panels.jsx", "--bundle", "--jsx=automatic", "--minify"]
        bundle += ["--log-level=error", "--loader:.svg=dataurl", "--loader:.ttf=dataurl"]
        bundle += ['--define:process.env.NODE_ENV="production"', f"--outfile={page / 'panels.js'}"]
        subprocess.run(bundle, check=True, timeout=300)
        browser = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--allow-file-access-from-files"]
        view = [f"--window-size={width},{height}", "--force-device-scale-factor=1", "--virtual-time-budget=20000"]
        picture = f"--screenshot={arguments.out.resolve()}"
        command = [*browser, *view, picture, str(page / "index.html")]
        subprocess.run(command, check=True, timeout=300, stderr=subprocess.DEVNULL)  # it misses a desktop


if __name__ == "__main__":
    main()
