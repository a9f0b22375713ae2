"""A real Prometheus scrapes a real run: every expression of dashboards and rules finds data, until the run ends."""

from __future__ import annotations

import json
import math
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.observability import CLUSTER, PROMETHEUS, dashboards, names, panels, rules
from tests.distributed import TIME_LIMIT
from tests.tools import need
from tests.trainer.forked import ForkedJob
from tests.trainer.job import write_recipe
from trainer.cluster.launch import free_port
from trainer.common.errors import START_AGAIN
from trainer.config.recipe import load_recipe

LAYOUT = ("parallel.trunk_ranks=2", "parallel.pool_ranks=2", "train.steps=1000000", "metrics.per_layer_experts=true")
OFTEN = ("eval.every=5", "checkpoint.every=5", "checkpoint.keep=1", "router.z_loss=1e-3")
SLOWLY = ("train.lr=1e-5", "train.min_lr=1e-6")
"""So that the loss has no spikes, for which there is an alert, however many steps are made meanwhile."""

NO_DATA = {
    'ALERTS{alertname=~"Unipool.+", alertstate="firing", run=~"$run"}': "nothing is wrong with this run",
    'max by (run) (unipool_model_flops_utilisation_ratio{run=~"$run"})': "the run does not say on which hardware it is",
    'max by (run) (unipool_peak_flops_per_second{run=~"$run"})': "nor is it known",
    "run:unipool_mfu:avg30m": "hence there is no MFU",
    'run:unipool_mfu:avg30m{run=~"$run"}': "hence there is no MFU",
    "max by (run) (avg_over_time(unipool_model_flops_utilisation_ratio[30m]))": "hence there is no MFU",
    'max by (run) (unipool_max_restarts{run=~"$run"})': "nothing starts this job again",
    'max by (run, role, kind) (unipool_device_memory_bytes{run=~"$run", kind!="total"})': "there is no GPU",
    'min by (run, role) (unipool_device_memory_bytes{run=~"$run", kind="total"})': "there is no GPU",
    'sum by (run) (unipool_device_allocation_retries_total{run=~"$run"})': "there is no GPU",
    'max by (run) (unipool_lock_stage{run=~"$run"})': "the run has no lock",
    'max by (run) (unipool_entropy_loss{run=~"$run"})': "the run has no lock",
    'max by (run) (unipool_foreign_assignments{run=~"$run"})': "the run has no lock",
    'max by (run, layer) (unipool_layer_own_share_ratio{run=~"$run"})': "the run has no lock",
    'max by (run, layer) (unipool_ownership_shortfall_ratio{run=~"$run"})': "the run has no lock",
}
"""Expressions of dashboards that find nothing, and why."""


@dataclass(frozen=True)
class Server:
    port: int

    def ask(self, path: str, **parameters: Any) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters, doseq=True)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> list[float]:
        """Newest values, those that are numbers."""
        found = [float(series["value"][1]) for series in self.ask("query", query=expression)["result"]]
        return [value for value in found if math.isfinite(value)]

    def curves(self, expression: str) -> list[float]:
        """Values of the last half minute, those that are numbers."""
        now = time.time()
        found = self.ask("query_range", query=expression, start=now - 30, end=now, step=1)["result"]
        values = [float(value) for series in found for _, value in series["values"]]
        return [value for value in values if math.isfinite(value)]


@contextmanager
def prometheus(folder: Path, targets: Path) -> Iterator[Server]:
    """deploy/prometheus as it is, except that it scrapes one run's targets, and faster."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / pattern) for pattern in config["rule_files"]]
    config["scrape_configs"][0]["file_sd_configs"][0] |= {"files": [str(targets)], "refresh_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    server = Server(free_port())
    command = [
        need("prometheus", "prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{server.port}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: ready(server.port), lambda: (folder / "prometheus.log").read_text())
        yield server
    finally:
        process.kill()
        process.wait()


def ready(port: int) -> bool:
    """Whether Prometheus answers queries: it listens earlier."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=60):
            return True
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], told: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


def in_terms_of(run: str, expression: str) -> str:
    """What Grafana would put for its variables."""
    return expression.replace("$run", run).replace("$__rate_interval", "10s").replace("$__range", "1h")


def expressions() -> dict[str, bool]:
    """Every expression of the dashboards and recording rules, and whether only its newest value is asked for.

    Only a cluster has the series of some rules.
    """
    recording = [rule for rule in rules("record") if not names(rule["expr"]) & CLUSTER]
    found = {rule[key]: True for rule in recording for key in ("expr", "record")}
    for dashboard in dashboards().values():
        queries = [query for panel in panels(dashboard) for query in panel["targets"]]
        queries += [annotation["target"] for annotation in dashboard["annotations"]["list"]]
        found |= {query["expr"]: query["instant"] for query in queries}
    return found


@pytest.mark.slow
def test_every_expression_finds_data(tmp_path: Path) -> None:
    need("prometheus", "prometheus")
    folder = tmp_path / "some run"
    recipe = load_recipe(str(write_recipe(tmp_path)), [f"run.dir={folder}", *LAYOUT, *OFTEN, *SLOWLY])
    job = ForkedJob(recipe, tmp_path)
    try:
        with prometheus(tmp_path, folder / "targets.json") as server:
            wanted = {in_terms_of("some run", expr): newest for expr, newest in expressions().items()}
            empty = {in_terms_of("some run", expr) for expr in NO_DATA}
            missing = set(wanted)

            def all_found() -> bool:
                missing.difference_update(
                    [expr for expr in missing if (server.values if wanted[expr] else server.curves)(expr)]
                )
                return missing <= empty

            wait_until(all_found, lambda: f"no data: {sorted(missing)}\n{job.log(0)}")
            assert missing == empty

            # A rank that gets no processor for a second misses a scrape, and counts as silent until the next one.
            wait_until(lambda: server.values("run:up:sum") == [4], lambda: str(server.values("up")))
            assert server.ask("label/run/values") == ["some run"]
            totals = server.values("sum by (role) (run_role_activity:unipool_activity_seconds:ratio_rate5m)")
            assert totals == pytest.approx([1, 1])
            assert sum(server.values("run_rank:unipool_service_tokens:ratio_rate5m")) == pytest.approx(1)
            made = [rule for group in server.ask("rules")["groups"] for rule in group["rules"]]
            assert {rule["name"] for rule in made} == {r[kind] for kind in ("alert", "record") for r in rules(kind)}
            assert [rule for rule in made if rule["health"] != "ok"] == []
            assert server.values('ALERTS{alertstate="firing"}') == []

            job.terminate(0)
            assert job.end(TIME_LIMIT) == [START_AGAIN] * 4, job.log(0)
            wait_until(lambda: not server.values("up"), lambda: "targets of a run that has ended are still scraped")
            wait_until(lambda: not server.ask("alerts")["alerts"], lambda: str(server.ask("alerts")))
    finally:
        job.end(0)
