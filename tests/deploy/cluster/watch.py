"""A real Prometheus in the played cluster, set up as the operator would set it up, with the rules as they are shipped.

Where time passes faster (`speed`), every duration of the rules and of the scraping is divided by it.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.cluster.plane import Plane
from tests.deploy.observability import PROMETHEUS
from tests.tools import need

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
DURATION = re.compile(r"(?<=\[)\d+[smhd](?=[\]:])|(?<=:)\d+[smhd](?=\])|(?<=offset )\d+[smhd]")
"""In PromQL: ranges, the steps of subqueries, offsets."""

PORT, STATE_PORT = 9090, 8080


def faster(duration: str, speed: float) -> str:
    """A duration of Prometheus (`15s`, `5m`), divided by `speed`."""
    return f"{round(int(duration[:-1]) * UNITS[duration[-1]] * 1000 / speed)}ms"


def faster_rules(text: str, speed: float) -> dict[str, Any]:
    """A file of rules with all durations in them divided: ranges, offsets, and how long an alert waits."""
    rules: dict[str, Any] = yaml.safe_load(text)
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        rule["expr"] = DURATION.sub(lambda found: faster(found[0], speed), rule["expr"])
        if "for" in rule:
            rule["for"] = faster(rule["for"], speed)
    return rules


def scrape_configs(monitor: dict[str, Any], targets: Path, speed: float) -> list[dict[str, Any]]:
    """What the Prometheus operator makes of a PodMonitor; `targets` stands for the discovery by the API server."""
    found = []
    spec, name = monitor["spec"], monitor["metadata"]["name"]
    for number, endpoint in enumerate(spec["podMetricsEndpoints"]):
        relabelings: list[dict[str, Any]] = [
            {"action": "drop", "source_labels": ["__meta_kubernetes_pod_phase"], "regex": "(Failed|Succeeded)"}
        ]
        for key, value in spec["selector"]["matchLabels"].items():
            sources = [f"__meta_kubernetes_pod_{what}_{_sanitized(key)}" for what in ("label", "labelpresent")]
            relabelings.append({"action": "keep", "source_labels": sources, "regex": f"({value});true"})
        if "port" in endpoint:
            port = {"source_labels": ["__meta_kubernetes_pod_container_port_name"], "regex": endpoint["port"]}
            relabelings.append({"action": "keep"} | port)
        for source, target in (("namespace", "namespace"), ("pod_container_name", "container"), ("pod_name", "pod")):
            relabelings.append({"source_labels": [f"__meta_kubernetes_{source}"], "target_label": target})
        relabelings.append({"target_label": "job", "replacement": f"monitoring/{name}"})
        for own in endpoint.get("relabelings", []):
            relabelings.append({_snake(key): value for key, value in own.items()})
        found.append(
            {
                "job_name": f"podMonitor/monitoring/{name}/{number}",
                "scrape_interval": faster(endpoint["interval"], speed),
                "scrape_timeout": faster(endpoint["interval"], speed),
                "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}],
                "relabel_configs": relabelings,
            }
        )
    return found


def _sanitized(label: str) -> str:
    return re.sub(r"\W", "_", label)


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda letter: f"_{letter[0].lower()}", name)


def discovered(plane: Plane) -> list[dict[str, Any]]:
    """What the discovery of pods by the API server would say: a target for each port of each pod."""
    targets = []
    for pod, container in plane.containers.items():
        labels = {"namespace": pod.job.namespace, "pod_name": pod.name, "pod_phase": pod.phase}
        for key, value in pod.job.labels.items():
            labels |= {f"pod_label_{_sanitized(key)}": value, f"pod_labelpresent_{_sanitized(key)}": "true"}
        for declared in pod.job.spec["template"]["spec"]["containers"]:
            for port in declared.get("ports", []):
                own = {"pod_container_name": declared["name"], "pod_container_port_name": port["name"]}
                made = {f"__meta_kubernetes_{key}": value for key, value in (labels | own).items()}
                targets.append({"targets": [f"{container.address}:{port['containerPort']}"], "labels": made})
    return targets


def state_metrics(plane: Plane) -> dict[str, str]:
    """Pages of the JobSet controller and of kube-state-metrics, as far as the rules ask for them."""
    job_set, kube = [], []
    for name, namespace in plane.namespaces.items():
        if namespace.failed:  # a counter's series exists when it is first counted
            job_set.append(f'jobset_failed_total{{jobset_name="unipool",namespace="{name}"}} {namespace.failed}')
        if namespace.completed:
            job_set.append(f'jobset_completed_total{{jobset_name="unipool",namespace="{name}"}} {namespace.completed}')
        for job in namespace.everything():
            labels = f'namespace="{name}",job_name="{job.name}"'
            for kind, condition in (("failed", "Failed"), ("complete", "Complete")):
                if job.condition == condition:
                    kube.append(f'kube_job_{kind}{{{labels},condition="true"}} 1')
            kube.append(f"kube_job_status_suspended{{{labels}}} 0")
            for pod in job.pods:
                if pod.terminating and pod.deleted is not None:
                    since = time.time() - (plane.now - pod.deleted - pod.grace)  # the rules read seconds of the cluster
                    kube.append(f'kube_pod_deletion_timestamp{{namespace="{name}",pod="{pod.name}"}} {since:.3f}')
    return {"jobset": "\n".join(job_set) + "\n", "kube": "\n".join(kube) + "\n"}


class Server:
    """A Prometheus that scrapes the pods of a plane."""

    def __init__(self, plane: Plane):
        self._plane, self._address = plane, f"http://{plane.network.gateway}:{PORT}"

    def ask(self, path: str, **parameters: Any) -> Any:
        url = f"{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        return json.loads(self._plane.network.read(url))["data"]

    def values(self, expression: str) -> dict[str, float]:
        """Newest values of a vector by the label `run`."""
        found = self.ask("query", query=expression)["result"]
        return {series["metric"].get("run", ""): float(series["value"][1]) for series in found}

    def fired(self, since: float, until: float) -> dict[str, set[str]]:
        """Names of the alerts that fired between two times of the clock, by run."""
        found = self.ask("query_range", query='ALERTS{alertstate="firing"}', start=since, end=until, step=0.5)["result"]
        alerts = defaultdict(set)
        for series in found:
            alerts[series["metric"].get("run", "")].add(series["metric"]["alertname"])
        return dict(alerts)


@contextmanager
def prometheus(plane: Plane, monitor: dict[str, Any]) -> Iterator[Server]:
    """Prometheus and the two exporters of the cluster's state, until the context ends."""
    folder = plane.folder / "prometheus"
    (folder / "state").mkdir(parents=True)
    targets = folder / "targets.json"
    rules = {path.name: faster_rules(path.read_text(), plane.speed) for path in (PROMETHEUS / "rules").glob("*.yml")}
    for name, content in rules.items():
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
    state = [
        {
            "job_name": page,
            "metrics_path": f"/{page}",
            "honor_labels": page == "kube",  # the JobSet controller's monitor does not set it
            "static_configs": [
                {"targets": [f"{plane.network.gateway}:{STATE_PORT}"], "labels": {"namespace": "system"}},
            ],
        }
        for page in ("jobset", "kube")
    ]
    interval = faster("15s", plane.speed)
    config = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(folder / name) for name in rules],
        "scrape_configs": [*scrape_configs(monitor, targets, plane.speed), *state],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config, sort_keys=False))

    def write() -> None:
        for name, page in state_metrics(plane).items():
            _write(folder / "state" / name, page)
        _write(targets, json.dumps(discovered(plane)))

    write()
    inside = ["ip", "netns", "exec", plane.network.switch]
    commands = [
        [need("python3", "python3"), "-m", "http.server", str(STATE_PORT), "--directory", str(folder / "state")],
        [
            need("prometheus", "prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={plane.network.gateway}:{PORT}",
            f"--query.lookback-delta={faster('5m', plane.speed)}",
        ],
    ]
    started = []
    with (folder / "log").open("w") as log:
        try:
            for command in commands:
                started.append(subprocess.Popen([*inside, *command], stdout=log, stderr=subprocess.STDOUT))
            plane.observe = write
            server = Server(plane)
            plane.until(lambda: "Server is ready" in (folder / "log").read_text(), 120, "Prometheus starts")
            yield server
        finally:
            for process in started:
                process.kill()
                process.wait()


def _write(path: Path, text: str) -> None:
    """Whole or not at all: Prometheus may read at any time."""
    if not path.exists() or path.read_text() != text:
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)
