"""What deploy/ queries from Prometheus: the expressions of rules and dashboards, and the names in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
GRAFANA = DEPLOY / "grafana"
OPERATIONS = DEPLOY.parent / "docs" / "operations"
KUBERNETES = DEPLOY / "kubernetes"
WATCHING = OPERATIONS / "watching.md"
FAULTS = OPERATIONS / "faults.md"

CLUSTER = {
    "jobset_failed_total",
    "jobset_completed_total",
    "kube_job_failed",
    "kube_job_complete",
    "kube_job_status_suspended",
    "kube_pod_deletion_timestamp",
}
"""Of the JobSet controller and kube-state-metrics."""

PREFIXES = ("unipool_", "process_", "jobset_", "kube_")


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules of a kind: `alert` or `record`."""
    files = [yaml.safe_load(path.read_text()) for path in sorted((PROMETHEUS / "rules").glob("*.yml"))]
    return [rule for file in files for group in file["groups"] for rule in group["rules"] if kind in rule]


def dashboards() -> dict[str, dict[str, Any]]:
    """The dashboards by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))}


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel but rows, those of folded rows too."""
    for panel in dashboard["panels"]:
        yield from panel["panels"] if panel["type"] == "row" else [panel]


def names(expression: str) -> set[str]:
    """Metrics and recorded names in PromQL."""
    without_labels = re.sub(r"\{[^{}:]*\}", "", re.sub(r'"[^"]*"', "", expression))
    words = set(re.findall(r"[a-zA-Z_:][\w:]*", without_labels))
    return {word for word in words if ":" in word or word == "up" or word.startswith(PREFIXES)}
