"""Scrape configuration, recording rules and alerts, and the names that they, the dashboards and the code share."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from tests.deploy.observability import CLUSTER, FAULTS, PROMETHEUS, WATCHING, dashboards, names, panels, rules
from tests.distributed import TIME_LIMIT
from tests.tools import need
from trainer.telemetry.catalogue import CATALOGUE

ALERTS = {rule["alert"]: rule for rule in rules("alert")}
RECORDED = {rule["record"]: rule["expr"] for rule in rules("record")}
SERVED = {metric.samples[0] for metric in CATALOGUE}
"""The first of a metric's series: of a histogram, its buckets."""
PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_start_time_seconds"}
"""Of what prometheus_client says of every process."""
RUN = r'run="([\w /-]+)"'


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        [need("promtool", "prometheus"), *arguments], capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_and_rules_are_valid() -> None:
    promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))


def test_alerts_fire_and_keep_silent() -> None:
    """The cases of deploy/prometheus/tests have runs that must raise an alert, and others close to it that must not."""
    promtool("test", "rules", *map(str, (PROMETHEUS / "tests").glob("*.yml")))


def test_every_rule_has_a_case() -> None:
    """Each alert fires at one time of its case and not at another; each case has a run that never fires."""
    tested = set()
    files = [path for path in (PROMETHEUS / "tests").glob("*.yml") if path.name != "recording.yml"]
    for case in [case for path in files for case in yaml.safe_load(path.read_text())["tests"]]:
        questions = [asked for asked in case["promql_expr_test"] if "ALERTS" in asked["expr"]]
        answers = [str(question.get("exp_samples", "")) for question in questions]
        firing = [set(re.findall(r'alertname="(\w+)"', answer)) for answer in answers]
        assert set.intersection(*firing) == set(), case["name"]
        assert set(re.findall(RUN, str(case["input_series"]))) - set(re.findall(RUN, str(answers))), case["name"]
        tested |= set.union(*firing)
    assert tested == set(ALERTS)
    recorded = yaml.safe_load((PROMETHEUS / "tests" / "recording.yml").read_text())["tests"]
    assert set.union(*(names(str(case["promql_expr_test"])) for case in recorded)) >= set(RECORDED)


@pytest.mark.parametrize("name", ALERTS)
def test_alerts_say_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/operations/watching.md#{name.lower()}"
    assert f'| <a id="{name.lower()}"></a>{name} | {rule["labels"]["severity"]} |' in WATCHING.read_text()


def test_every_metric_used_is_served_and_every_one_served_is_shown() -> None:
    shown = {
        name
        for dashboard in dashboards().values()
        for panel in panels(dashboard)
        for query in panel["targets"]
        for name in names(query["expr"])
    }
    used = shown | {name for expr in RECORDED.values() for name in names(expr)}
    used |= {name for rule in ALERTS.values() for name in names(rule["expr"])}
    assert used - SERVED - PROCESS - CLUSTER - set(RECORDED) == {"up"}
    assert set(RECORDED) <= used, "a recorded expression that nobody uses"
    shown |= {name for recorded in shown & set(RECORDED) for name in names(RECORDED[recorded])}
    assert SERVED - shown - names(WATCHING.read_text() + FAULTS.read_text()) == set()
