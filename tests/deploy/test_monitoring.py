"""deploy/kubernetes/monitoring: what the Prometheus operator and Grafana get, and which targets pods become."""

from __future__ import annotations

import copy
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.observability import GRAFANA, KUBERNETES, PROMETHEUS
from tests.deploy.schemas import check
from tests.tools import need

RUNNING = {"app_kubernetes_io_name": "unipool", "jobset_sigs_k8s_io_jobset_name": "unipool", "unipool_slots": "8"}
"""Labels of a pod, as Prometheus names them."""


@cache
def _render() -> str:
    command = [need("kubectl", "kubectl"), "kustomize", str(KUBERNETES / "monitoring")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects() -> dict[str, dict[str, Any]]:
    """What `kubectl apply -k` would apply, by kind."""
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(_render())}


def test_every_object_fits_its_schema_and_is_found() -> None:
    """By kube-prometheus-stack: its operator looks for `release`, Grafana's sidecar for `grafana_dashboard`."""
    found = objects()
    assert set(found) == {"ConfigMap", "PodMonitor", "PrometheusRule"}
    for manifest in found.values():
        check(manifest)
        assert manifest["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    assert found["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_rules_and_dashboards_are_those_of_prometheus_and_grafana() -> None:
    """If the rules are not: python deploy/kubernetes/prometheusrule.py."""
    files = sorted((PROMETHEUS / "rules").glob("*.yml"))
    groups = [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]
    assert objects()["PrometheusRule"]["spec"] == {"groups": groups}
    dashboards = {path.name: path.read_text() for path in (GRAFANA / "dashboards").iterdir()}
    assert objects()["ConfigMap"]["data"] == dashboards


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("PodMonitor", ["spec", "podMetricsEndpoints", 0, "relabellings"], []),
        ("PrometheusRule", ["spec", "groups", 0, "rule"], []),
    ],
)
def test_a_misspelt_field_is_found(kind: str, path: list[Any], value: Any) -> None:
    node = manifest = copy.deepcopy(objects()[kind])
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(Exception, match=path[-1]):
        check(manifest)


def relabelings(source: str) -> list[dict[str, Any]]:
    """How pods become targets: by the PodMonitor, whose keys are in camel case, or by Prometheus alone."""
    if source == "kubernetes.yml":
        config = yaml.safe_load((PROMETHEUS / source).read_text())
        return list(config["scrape_configs"][0]["relabel_configs"])
    (endpoint,) = objects()["PodMonitor"]["spec"]["podMetricsEndpoints"]
    spelt = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    return [{spelt.get(key, key): value for key, value in step.items()} for step in endpoint["relabelings"]]


def targets(steps: list[dict[str, Any]], pods: list[dict[str, str]], tmp_path: Path) -> list[dict[str, str]]:
    """The targets' labels that Prometheus makes of the ports of pods, each pod with its labels, namespace and phase."""
    discovered = []
    for number, pod in enumerate(pods):
        place = {"__meta_kubernetes_namespace": pod["namespace"], "__meta_kubernetes_pod_phase": pod["phase"]}
        own = {f"__meta_kubernetes_pod_label_{name}": value for name, value in pod.items()}
        for slot in range(8):
            port = {"__meta_kubernetes_pod_container_port_name": f"metrics-{slot}"}
            discovered.append({"targets": [f"10.0.0.{number}:{9400 + slot}"], "labels": place | own | port})
    job = {"job_name": "pods", "static_configs": discovered, "relabel_configs": steps}
    (tmp_path / "pods.yml").write_text(yaml.safe_dump({"scrape_configs": [job]}))
    command = [need("promtool", "prometheus"), "check", "service-discovery", str(tmp_path / "pods.yml"), "pods"]
    done = subprocess.run([*command, "--timeout=1s"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [target["labels"] for target in json.loads(done.stdout) if target["labels"]]


@pytest.mark.parametrize("source", ["podmonitor.yaml", "kubernetes.yml"])
def test_runs_of_one_name_in_two_namespaces_stay_apart(source: str, tmp_path: Path) -> None:
    """Every rank of a running pod is a target, and its `run` tells the namespaces apart: one hangs, one alert."""
    pods = [
        {"namespace": "a", "phase": "Running"} | RUNNING | {"unipool_slots": "2"},
        {"namespace": "b", "phase": "Running"} | RUNNING,
        {"namespace": "c", "phase": "Pending"} | RUNNING,  # its image is still being pulled
    ]
    found = targets(relabelings(source), pods, tmp_path)
    assert sorted((target["run"], target["instance"]) for target in found) == [
        *(("a/unipool", f"10.0.0.0:{port}") for port in (9400, 9401)),
        *(("b/unipool", f"10.0.0.1:{port}") for port in range(9400, 9408)),
    ]
    by_run = {target["run"]: {key: target[key] for key in ("run", "instance")} for target in found}
    hung, well = by_run["a/unipool"], by_run["b/unipool"]
    training = {"phase": "training", "rank": "0"}
    series = {
        f"up{selector(hung)}": "1x60",
        f"up{selector(well)}": "1x60",
        f"unipool_step{selector(hung)}": "5x60",
        f"unipool_step{selector(well)}": "0+10x60",
        f"unipool_phase{selector(hung | training)}": "1x60",
        f"unipool_phase{selector(well | training)}": "1x60",
    }
    fired = {"alertname": "UnipoolNoProgress", "alertstate": "firing", "run": "a/unipool", "severity": "critical"}
    question = {
        "expr": 'ALERTS{alertstate="firing"}',
        "eval_time": "40m",
        "exp_samples": [{"labels": f"ALERTS{selector(fired)}", "value": 1}],
    }
    case = {"input_series": [{"series": name, "values": values} for name, values in series.items()]}
    rules = {"rule_files": [str(PROMETHEUS / "rules" / name) for name in ("recording.yml", "alerts.yml")]}
    rules["group_eval_order"] = ["unipool-recording", "unipool-alerts"]
    tests = {"tests": [case | {"interval": "1m", "promql_expr_test": [question]}]}
    (tmp_path / "case.yml").write_text(yaml.safe_dump(rules | tests))
    command = [need("promtool", "prometheus"), "test", "rules", str(tmp_path / "case.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def selector(labels: dict[str, str]) -> str:
    """Labels in PromQL."""
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
