"""What the controllers of Kubernetes and JobSet make of the manifests, by the exit statuses of pods."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy.cluster.controllers import JobSet, Pod
from tests.deploy.kubernetes.overlays import KUBERNETES, render


class Pods:
    """A JobSet of cpu-smoke under way; its pods do what the test says."""

    def __init__(self) -> None:
        self.running: list[Pod] = []
        self.now = 0.0
        (manifest,) = [m for m in render(KUBERNETES / "overlays/cpu-smoke") if m["kind"] == "JobSet"]
        self.job_set = JobSet("train", manifest, self.running.append)
        self.sync()

    def sync(self, seconds: float = 1.0) -> None:
        for _ in range(5):  # until nothing changes
            self.job_set.sync(self.now)
        self.now += seconds

    def end(self, status: int, *pods: Pod) -> None:
        for pod in pods or tuple(self.running):
            pod.end(status, self.now)
            self.running.remove(pod)

    def settle(self) -> None:
        """Pods that are being deleted end."""
        while deleted := [pod for pod in self.running if pod.terminating]:
            self.end(143, *deleted)
            self.sync()


@pytest.fixture
def pods() -> Pods:
    return Pods()


def state(pods: Pods) -> tuple[Any, ...]:
    return pods.job_set.condition, pods.job_set.restarts, pods.job_set.counted_restarts, len(pods.running)


def test_all_end_well(pods: Pods) -> None:
    assert state(pods) == ("", 0, 0, 4)
    pods.end(0)
    pods.sync()
    assert state(pods) == ("Completed", 0, 0, 0)


def test_a_graceful_stop_restarts_at_once_and_is_not_counted(pods: Pods) -> None:
    for restart in range(1, 31):
        pods.running[-1].disrupted = True  # it was evicted, the others follow it
        pods.end(75)
        pods.sync()
        assert state(pods) == ("", restart, 0, 4)


def test_wrong_input_is_not_tried_again(pods: Pods) -> None:
    pods.end(2, pods.running[0])
    pods.sync()
    pods.settle()
    assert state(pods) == ("Failed", 0, 0, 0)


@pytest.mark.parametrize("status", [1, 137])
def test_a_fault_restarts_twenty_times(pods: Pods, status: int) -> None:
    for restart in range(1, 21):
        pods.end(status, pods.running[1])
        pods.end(1)
        pods.sync()
        assert state(pods) == ("", restart, restart, 4)
    pods.end(status)
    pods.sync()
    assert state(pods) == ("Failed", 20, 20, 0)


def test_a_pod_that_does_not_end_stops_the_restart(pods: Pods) -> None:
    lost = pods.running[-1]
    pods.end(1, *pods.running[:3])
    pods.sync()
    assert lost.terminating
    pods.sync(3600)
    assert pods.running == [lost]
    lost.disrupted = True
    pods.end(137, lost)  # as the garbage collector does after the taint out-of-service
    pods.sync()
    assert state(pods)[3] == 4
