"""Generate dashboards/*.json from dashboards.yaml: `python deploy/grafana/make_dashboards.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]

HERE = Path(__file__).parent
COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WORDS = {"RUN": 'run=~"$run"', "EVERY": "[$__rate_interval]"}
"""Names that are replaced in PromQL, besides those of dashboards.yaml."""

LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
LEGEND = {"calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": True}


def form(defaults: Json, options: Json, **more: Any) -> Json:
    """The part of a panel that depends on its kind."""
    return {"fieldConfig": {"defaults": defaults, "overrides": []}, "options": options} | more


def number(panel: Json) -> Json:
    """The newest value of each series, in large type."""
    options = {
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "percentChangeColorMode": "standard",
        "reduceOptions": LAST,
        "showPercentChange": False,
        "textMode": "auto",
        "wideLayout": True,
    }
    return form({"color": {"mode": "fixed", "fixedColor": "text"}}, options, type="stat")


def lines(panel: Json) -> Json:
    """Curves over time; `log: true` for a logarithmic axis."""
    custom = {
        "drawStyle": "line",
        "fillOpacity": 0,
        "lineWidth": 1,
        "scaleDistribution": {"type": "log", "log": 10} if panel.get("log") else {"type": "linear"},
        "showPoints": "auto",
    }
    options = {"legend": LEGEND | {"calcs": ["lastNotNull"]}, "tooltip": {"mode": "multi", "sort": "desc"}}
    return form({"color": {"mode": "palette-classic"}, "custom": custom}, options, type="timeseries")


def shares(panel: Json) -> Json:
    """Parts of a whole, stacked up to 1."""
    made = lines(panel)
    made["fieldConfig"]["defaults"] |= {"unit": "percentunit", "min": 0, "max": 1}
    made["fieldConfig"]["defaults"]["custom"] |= {"fillOpacity": 60, "stacking": {"group": "A", "mode": "normal"}}
    return made


def counts(panel: Json) -> Json:
    """Numbers stacked on each other."""
    made = lines(panel)
    made["fieldConfig"]["defaults"] |= {"unit": "short", "decimals": 0, "min": 0}
    made["fieldConfig"]["defaults"]["custom"] |= {"fillOpacity": 60, "stacking": {"group": "A", "mode": "normal"}}
    return made


def heat_map(panel: Json) -> Json:
    """Time to the right, a row per series in the order of the legend, values as colours from 0 to the panel's `max`."""
    options = {
        "calculate": False,
        "cellGap": 0,
        "cellValues": {"decimals": 2},
        "color": {
            "exponent": 0.5,
            "fill": "dark-orange",
            "max": panel["max"],
            "min": 0,
            "mode": "scheme",
            "reverse": False,
            "scale": "exponential",
            "scheme": "Viridis",
            "steps": 64,
        },
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto", "value": "times the mean"},
        "showValue": "never",
        "tooltip": {"mode": "single", "showColorScale": True, "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "reverse": False},
    }
    return form({"custom": {"scaleDistribution": {"type": "linear"}}}, options, type="heatmap")


def bars(panel: Json) -> Json:
    """A bar per series: its newest value, up to the panel's `max`. Large ones are red or, with `least`, small ones."""
    options = {
        "displayMode": "basic",
        "legend": LEGEND | {"showLegend": False},
        "maxVizHeight": 300,
        "minVizHeight": 8,
        "minVizWidth": 8,
        "namePlacement": "left",
        "orientation": "horizontal",
        "reduceOptions": LAST,
        "showUnfilled": True,
        "sizing": "auto",
        "valueMode": "color",
    }
    color = {"mode": "continuous-RdYlGr" if panel.get("least") else "continuous-GrYlRd"}
    limits = {"min": 0} | ({"max": panel["max"]} if "max" in panel else {})
    return form({"decimals": 2, "color": color} | limits, options, type="bargauge")


def facts(panel: Json) -> Json:
    """A table of labels, for metrics that are always 1."""
    hidden = dict.fromkeys(("Time", "Value"), True)
    organize = {"id": "organize", "options": {"excludeByName": hidden, "indexByName": {}, "renameByName": {}}}
    return table({}, {"type": "auto"}, [organize, in_order_of("rank")])


def matrix(panel: Json) -> Json:
    """Experts down, layers to the right, newest values as colours."""
    names = {"rowField": "expert", "columnField": "layer", "valueField": "Value", "emptyValue": "zero"}
    defaults = {"unit": "percentunit", "decimals": 0, "min": 0, "color": {"mode": "continuous-BlYlRd"}}
    cells = {"type": "color-background", "mode": "basic"}
    transformations = [in_order_of("layer"), {"id": "groupingToMatrix", "options": names}, in_order_of(ROWS)]
    made = table(defaults, cells, transformations)
    plain = {"id": "custom.cellOptions", "value": {"type": "auto"}}
    made["fieldConfig"]["overrides"] = [{"matcher": {"id": "byName", "options": ROWS}, "properties": [plain]}]
    return made


def in_order_of(field: str) -> Json:
    return {"id": "sortBy", "options": {"fields": {}, "sort": [{"field": field}]}}


def table(defaults: Json, cells: Json, transformations: list[Json]) -> Json:
    custom = {"align": "auto", "cellOptions": cells, "inspect": False}
    options = {"cellHeight": "sm", "frameIndex": 0, "showHeader": True}
    return form(defaults | {"custom": custom}, options, type="table", transformations=transformations)


KINDS: dict[str, Callable[[Json], Json]] = {
    kind.__name__: kind for kind in (number, lines, shares, counts, heat_map, bars, facts, matrix)
}
ROWS = "expert\\layer"
"""What Grafana calls the first column of such a matrix."""
NEWEST = ("bars", "facts", "matrix")
"""Kinds that query the newest value only."""


def expression(text: str, words: dict[str, str]) -> str:
    """PromQL with all names replaced; replacements may contain names."""
    pattern = re.compile(r"\b(" + "|".join(words) + r")\b")
    while pattern.search(text):
        text = pattern.sub(lambda word: words[word.group()], text)
    return text


def query(expr: str, legend: str, number: int = 0, newest: bool = False, columns: bool = False) -> Json:
    """A query of a panel; with `columns`, labels become columns of a table."""
    return {
        "refId": chr(ord("A") + number),
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": expr,
        "format": "table" if columns else "time_series",
        "instant": newest,
        "legendFormat": legend,
        "range": not newest,
    }


def panel_of(panel: Json, words: dict[str, str], place: Json, number: int) -> Json:
    kind = panel["kind"]
    made = KINDS[kind](panel)
    made["fieldConfig"]["defaults"] |= {key: panel[key] for key in ("unit", "decimals") if key in panel}
    for name, color in panel.get("colors", {}).items():
        fixed = {"id": "color", "value": {"mode": "fixed", "fixedColor": color}}
        made["fieldConfig"]["overrides"].append({"matcher": {"id": "byName", "options": name}, "properties": [fixed]})
    repeat = {"repeat": panel["repeat"], "repeatDirection": "h"} if "repeat" in panel else {}
    targets = [
        query(expression(expr, words), legend, i, kind in NEWEST, kind in ("facts", "matrix"))
        for i, (legend, expr) in enumerate(panel["queries"].items())
    ]
    return {
        "id": number,
        "title": panel["title"],
        "description": panel["text"],
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": targets,
        **repeat,
        **made,
    }


def rows(content: Json, words: dict[str, str]) -> list[Json]:
    """The panels in their places; those of a folded row are inside it."""
    made: list[Json] = []
    y, number = 0, 1
    for row in content["rows"]:
        folded = row.get("folded", False)
        head: Json = {"id": number, "type": "row", "title": row["title"], "collapsed": folded, "panels": []}
        made.append(head | {"gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}})
        members = made[-1]["panels"] if folded else made
        x, y, tallest = 0, y + 1, 0
        number += 1
        for panel in row["panels"]:
            width, height = panel.get("width", 8), panel.get("height", 4 if panel["kind"] == "number" else 8)
            if x + width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            members.append(panel_of(panel, words, {"x": x, "y": y, "w": width, "h": height}, number))
            x, tallest, number = x + width, max(tallest, height), number + 1
        y += tallest
    return made


def variables(several: bool) -> list[Json]:
    """The dashboard's variables; with `several`, runs can be compared."""
    runs = {"query": "label_values(unipool_run_info, run)", "refId": "run", "qryType": 1}
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1},
        {"name": "run", "label": "Run", "type": "query", "datasource": DATASOURCE, "query": runs}
        | {"refresh": 2, "sort": 1, "multi": several, "includeAll": False},
    ]


def dashboard(content: Json, words: dict[str, str]) -> Json:
    alerts = expression('ALERTS{alertname=~"Unipool.+", alertstate="firing", RUN}', words)
    annotation = {"name": "Alerts", "datasource": DATASOURCE, "enable": True, "iconColor": "red"}
    link = {"type": "dashboards", "title": "UniPool", "tags": ["unipool"], "icon": "external link", "tooltip": ""}
    return {
        "uid": content["uid"],
        "title": content["title"],
        "description": content["text"],
        "tags": ["unipool"],
        "schemaVersion": 42,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [link | {"includeVars": True, "keepTime": True, "asDropdown": False, "targetBlank": False}],
        "annotations": {"list": [annotation | {"target": query(alerts, ""), "titleFormat": "{{alertname}}"}]},
        "templating": {"list": variables(content["several"])},
        "panels": rows(content, words),
    }


def files() -> dict[str, str]:
    """Content of every file in dashboards/, by name."""
    content = yaml.safe_load((HERE / "dashboards.yaml").read_text())
    made = {f"{name}.json": dashboard(d, WORDS | content["words"]) for name, d in content["dashboards"].items()}
    return {name: json.dumps(d, indent=1) + "\n" for name, d in made.items()}


if __name__ == "__main__":
    for name, text in files().items():
        (HERE / "dashboards" / name).write_text(text)
