"""The dashboards are up to date with dashboards.yaml, fit Grafana's types, and have no overlapping panels."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.observability import GRAFANA, WATCHING, dashboards, panels
from tests.distributed import TIME_LIMIT

TYPES = Path(__file__).parent / "grafana"
DASHBOARDS = dashboards()


def test_dashboards_are_those_of_dashboards_yaml() -> None:
    made = runpy.run_path(str(GRAFANA / "make_dashboards.py"))["files"]()
    there = {path.name: path.read_text() for path in (GRAFANA / "dashboards").iterdir()}
    assert made == there, "run deploy/grafana/make_dashboards.py"


def covered(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    return {
        (x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])
    }


@pytest.mark.parametrize("name", DASHBOARDS)
def test_layout(name: str) -> None:
    """Nothing overlaps or leaves the 24 columns, each row's panels lie between it and the next, ids are unique."""
    dashboard = DASHBOARDS[name]
    ids = [panel["id"] for panel in dashboard["panels"]] + [panel["id"] for panel in panels(dashboard)]
    assert len(set(ids)) == len(dashboard["panels"]) + sum(len(row.get("panels", ())) for row in dashboard["panels"])
    top = dashboard["panels"]
    for group in [top, *(row["panels"] for row in top if row["type"] == "row")]:
        for one, other in combinations(group, 2):
            assert not covered(one) & covered(other), (one["title"], other["title"])
        assert all(0 <= x < 24 for panel in group for x, _ in covered(panel))
    for row in top:
        if row["type"] == "row" and row["panels"]:
            assert row["collapsed"] and min(panel["gridPos"]["y"] for panel in row["panels"]) == row["gridPos"]["y"] + 1
    assert [panel["gridPos"]["y"] for panel in top] == sorted(panel["gridPos"]["y"] for panel in top)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_datasource_and_run_are_variables(name: str) -> None:
    dashboard = DASHBOARDS[name]
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "run"]
    for panel in panels(dashboard):
        assert panel["description"] and panel["targets"]
        for query in panel["targets"]:
            assert query["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert 'run=~"$run"' in query["expr"]
            assert not re.search(r"\b[A-Z_]{3,}\b", query["expr"]), "a word that is not written out"
    assert dashboard["links"][0]["tags"] == dashboard["tags"] == ["unipool"]


def test_provisioning() -> None:
    """The environment variables that it needs are documented."""
    files = [yaml.safe_load(path.read_text()) for path in sorted((GRAFANA / "provisioning").glob("*/*.yaml"))]
    assert [sorted(file) for file in files] == [["apiVersion", "providers"], ["apiVersion", "datasources"]]
    for variable in re.findall(r"\$(\w+)", str(files)):
        assert f"{variable}=" in WATCHING.read_text(), variable


def test_dashboards_are_of_grafanas_types(tmp_path: Path) -> None:
    """Grafana's own types accept them, and would not accept a mistake."""
    compiler = TYPES / "node_modules" / ".bin" / "tsc"
    if not compiler.exists():
        told = f"needs Grafana's types: npm install --no-package-lock --prefix {TYPES}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(told)
    shutil.copy(TYPES / "dashboard.ts", tmp_path)
    (tmp_path / "node_modules").symlink_to(TYPES / "node_modules")
    texts = {name: (GRAFANA / "dashboards" / name).read_text() for name in DASHBOARDS}
    wrong = {
        "option": ('"colorMode": "value"', '"colorMode": "valu"'),
        "field": ('"drawStyle": "line"', '"drawStile": "line"'),
        "number": ('"graphTooltip": 1', '"graphTooltip": 7'),
        "query": ('"expr":', '"exp":'),
    }
    for name, (right, mistake) in wrong.items():
        assert right in texts["training.json"]
        texts[f"wrong-{name}"] = texts["training.json"].replace(right, mistake, 1)
    for name, text in texts.items():
        lines = ("import type { OurDashboard } from './dashboard';", f"export const made: OurDashboard = {text};")
        (tmp_path / f"{name}.ts").write_text("\n".join(lines))
    options = ("--strict", "--noEmit", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler")
    done = subprocess.run(
        [compiler, *options, *(f"{name}.ts" for name in texts)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    complaints = set(re.findall(r"^([\w.-]+)\.ts\(", done.stdout, re.M))
    assert complaints == {f"wrong-{name}" for name in wrong}, done.stdout[:3000] + done.stderr
