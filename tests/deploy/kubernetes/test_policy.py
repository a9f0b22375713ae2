"""deploy/kubernetes: what becomes of a job whose ranks end, or whose node dies, is drained or no longer wanted."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.deploy.kubernetes.overlays import OVERLAYS, WITH_GPUS, of_kind, pods_of, render
from tests.trainer.job import ROOT


def why_failed(job: dict[str, Any], status: int, disrupted: bool = False) -> tuple[str, str]:
    """Reason and message with which the Job controller fails a Job whose pod has ended: a model of its source."""
    (container,) = job["template"]["spec"]["containers"]
    for number, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {"values": [], "containerName": container["name"]})
        assert codes["containerName"] == container["name"]
        message = f"matching {rule['action']} rule at index {number}"
        if status in codes["values"]:
            message = f"Container trainer for pod train-a/unipool-x failed with exit code {status} {message}"
        elif disrupted and rule.get("onPodConditions") == [{"type": "DisruptionTarget", "status": "True"}]:
            message = f"Pod train-a/unipool-x has condition DisruptionTarget {message}"
        else:
            continue
        return ("PodFailurePolicy", message) if rule["action"] == "FailJob" else ("", "ignored")
    assert job["backoffLimit"] == 0
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def action(policy: dict[str, Any], *failures: tuple[str, str]) -> str:
    """What the JobSet controller does about failed Jobs: a model of its source."""
    for rule in policy["rules"]:
        for reason, message in failures:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                return str(rule["action"])
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("status", "disrupted", "expected"),
    [
        (1, False, "RestartJobSet"),
        (2, False, "FailJobSet"),
        (2, True, "FailJobSet"),
        (3, False, "FailJobSet"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (143, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, False, "RestartJobSet"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
    ],
)
def test_an_exit_status_does_what_the_runbook_says(status: int, disrupted: bool, expected: str) -> None:
    for overlay in (name for name in OVERLAYS if name.startswith("overlays/")):
        spec = of_kind(render(OVERLAYS[overlay]), "JobSet")["spec"]
        for group in spec["replicatedJobs"]:
            failure = why_failed(group["template"]["spec"], status, disrupted)
            assert failure[0], "a pod of its own would be created, after a pause that grows with every failed pod"
            assert action(spec["failurePolicy"], failure) == expected
            # The other group ends with an error because this one has left, or because it was asked to stop too.
            lost = why_failed(group["template"]["spec"], 1)
            assert action(spec["failurePolicy"], lost, failure) == expected


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.startswith(("overlays/", "prepare/"))])
def test_pods_leave_a_dead_node_soon_and_a_drained_one_at_once(overlay: str) -> None:
    manifests = render(OVERLAYS[overlay])
    assert not [m for m in manifests if m["kind"] == "PodDisruptionBudget"]  # it would refuse to drain the node
    document = (ROOT / "docs/operations/kubernetes.md").read_text()
    assert "kubectl drain NODE --ignore-daemonsets --delete-emptydir-data" in document  # else it refuses these pods
    for pod in pods_of(manifests).values():
        assert any("emptyDir" in volume for volume in pod["volumes"])
        for state in ("unreachable", "not-ready"):
            (found,) = [t for t in pod["tolerations"] if t["key"] == f"node.kubernetes.io/{state}"]
            assert (found["operator"], found["effect"]) == ("Exists", "NoExecute") and found["tolerationSeconds"] <= 60


@pytest.mark.parametrize("overlay", ["overlays/cpu-smoke", *WITH_GPUS])
def test_autoscalers_leave_pods_alone_and_ended_jobs_disappear(overlay: str) -> None:
    spec = of_kind(render(OVERLAYS[overlay]), "JobSet")["spec"]
    for group in spec["replicatedJobs"]:
        annotations = group["template"]["spec"]["template"]["metadata"]["annotations"]
        assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
        assert annotations["karpenter.sh/do-not-disrupt"] == "true"
    assert spec["ttlSecondsAfterFinished"] >= 86400
