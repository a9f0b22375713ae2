"""The rest of the control plane: nodes, a scheduler, kubelets, the node life cycle, the pod garbage collector, names.

Time passes `speed` times faster here than on the clock: what a cluster waits for (grace periods, tolerations, back-off)
is divided by it, what the job itself needs is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deploy import pods as processes
from tests.deploy.cluster.controllers import Job, JobSet, Pod

NODE_MONITOR_GRACE = 50.0
"""Seconds without a sign of life until the control plane taints a node as unreachable."""

TOLERATED = 300.0
"""Seconds that a pod tolerates that taint if it says nothing itself."""

GC_PERIOD = 20.0
"""Seconds between two rounds of the pod garbage collector."""


@dataclass(eq=False)
class Node:
    name: str
    alive: bool = True
    silent_since: float = 0.0
    out_of_service: bool = False  # the taint node.kubernetes.io/out-of-service

    def unreachable(self, now: float) -> bool:
        return not self.alive and now >= self.silent_since + NODE_MONITOR_GRACE


@dataclass(eq=False)
class Namespace:
    """A namespace, and what has been applied to it."""

    name: str
    cluster: processes.Cluster
    job_set: JobSet | None = None
    jobs: list[Job] = field(default_factory=list)  # those without a JobSet
    names: dict[str, str] = field(default_factory=dict)  # of the headless service
    failed: int = 0  # jobset_failed_total
    completed: int = 0

    def everything(self) -> list[Job]:
        return [*self.jobs, *(self.job_set.jobs if self.job_set else [])]


class Plane:
    """A cluster's control plane on processes. A context manager that leaves nothing.

    Args:
        folder: an empty one.
        nodes: their number.
        speed: how much faster than the clock time passes here.
    """

    def __init__(self, folder: Path, nodes: int, speed: float):
        self.folder, self.speed = folder, speed
        self.network = processes.Network()
        self.nodes = [Node(f"node-{number}") for number in range(nodes)]
        self.namespaces: dict[str, Namespace] = {}
        self.observe: Callable[[], None] = lambda: None  # called at the end of every step
        self.containers: dict[Pod, processes.Pod] = {}
        self.placed: dict[Pod, Node] = {}
        self.history: list[str] = []
        self._terminated: set[Pod] = set()
        self._began, self._collected = time.monotonic(), 0.0

    def __enter__(self) -> Plane:
        self.network.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for namespace in self.namespaces.values():
                namespace.cluster.__exit__()
        finally:
            self.network.__exit__()

    @property
    def now(self) -> float:
        """The cluster's seconds since its beginning."""
        return (time.monotonic() - self._began) * self.speed

    def add_namespace(self, name: str) -> Namespace:
        (self.folder / name).mkdir()
        made = Namespace(name, processes.Cluster(self.folder / name, self.network))
        self.namespaces[name] = made
        return made

    def apply(self, namespace: Namespace, manifests: list[dict[str, Any]]) -> None:
        """kubectl apply: ConfigMaps, Jobs and a JobSet; the rest needs no processes."""
        namespace.cluster.apply(manifests)
        for manifest in manifests:
            name, spec = manifest["metadata"]["name"], manifest.get("spec", {})
            if manifest["kind"] == "JobSet":
                assert namespace.job_set is None, "a JobSet cannot change while it exists"
                namespace.job_set = JobSet(namespace.name, manifest, self._start)
            elif manifest["kind"] == "Job" and name not in [job.name for job in namespace.jobs]:
                labels = spec["template"].get("metadata", {}).get("labels", {})
                namespace.jobs.append(Job(namespace.name, name, {"completions": 1, **spec}, labels, self._start))

    def step(self) -> None:
        """Everything that controllers do once."""
        now = self.now
        for pod, container in list(self.containers.items()):
            self._look_after(pod, container, now)
        self._manage_nodes(now)
        for namespace in self.namespaces.values():
            for job in namespace.jobs:
                job.sync(now)
            if namespace.job_set:
                self._sync(namespace, namespace.job_set, now)
            self._publish(namespace)
        self.observe()

    def until(self, condition: Callable[[], bool], limit: float, what: str) -> None:
        """Let time pass until `condition`, at most `limit` seconds of the clock."""
        deadline = time.monotonic() + limit
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {limit:.0f} s: {what}")
            self.step()
            time.sleep(0.25)

    def for_seconds(self, seconds: float) -> None:
        """Let so many of the cluster's seconds pass."""
        end = self.now + seconds
        self.until(lambda: self.now >= end, seconds / self.speed + 60, "time passes")

    def evict(self, pod: Pod) -> None:
        """The eviction API: the condition, then a deletion with the pod's grace period."""
        pod.disrupted = True
        pod.delete(self.now)

    def lose(self, node: Node) -> None:
        """A node's power fails: nothing on it runs on, and nothing says so."""
        node.alive, node.silent_since = False, self.now
        for pod, container in self.containers.items():
            if self.placed[pod] is node:
                container.freeze()

    def _start(self, pod: Pod) -> None:
        """The scheduler and a kubelet."""
        namespace = self.namespaces[pod.job.namespace]
        load = [self.placed[other] for other in self.containers]
        node = min((node for node in self.nodes if node.alive), key=load.count)
        template = pod.job.spec["template"]
        fields = {"metadata.name": pod.name, "metadata.namespace": namespace.name, "spec.nodeName": node.name}
        host = f"{pod.job.name}-{pod.index}"
        self.containers[pod] = namespace.cluster.run(host, template, pod.job.labels, pod.index, fields)
        self.placed[pod], pod.phase = node, "Running"
        self._say(pod, f"starts on {node.name}")

    def _look_after(self, pod: Pod, container: processes.Pod, now: float) -> None:
        """What the kubelet of a pod's node does."""
        if not self.placed[pod].alive:
            return
        status = container.poll()
        if status is None:
            if pod.deleted is not None and pod not in self._terminated:
                if found := container.processes():
                    found[0].terminate()
                    self._terminated.add(pod)
            elif pod.deleted is not None and now > pod.deleted + pod.grace:
                container.kill()
            return
        pod.end(status, now)
        self._forget(pod, f"ends with status {status}")

    def _forget(self, pod: Pod, what: str) -> None:
        self._say(pod, what)
        container = self.containers.pop(pod)
        container.kill()
        self.network.detach(container.namespace)

    def _manage_nodes(self, now: float) -> None:
        for pod in list(self.containers):
            node = self.placed[pod]
            if node.unreachable(now) and now >= node.silent_since + NODE_MONITOR_GRACE + _tolerated(pod):
                pod.disrupted = pod.disrupted or pod.active
                pod.delete(now)  # it stays Terminating: no kubelet confirms
        if now < self._collected + GC_PERIOD:
            return
        self._collected = now
        for pod in list(self.containers):
            node = self.placed[pod]
            if node.out_of_service and node.unreachable(now) and pod.terminating:
                pod.disrupted, pod.phase, pod.finished = True, "Failed", now
                self._forget(pod, "is removed by the garbage collector")

    def _sync(self, namespace: Namespace, job_set: JobSet, now: float) -> None:
        before = job_set.condition, job_set.restarts
        job_set.sync(now)
        if job_set.restarts > before[1]:
            self._note(f"{namespace.name}: restart {job_set.restarts}, {job_set.counted_restarts} of them counted")
        if job_set.condition != before[0]:
            self._note(f"{namespace.name}: JobSet {job_set.condition} {job_set.reason}".rstrip())
            namespace.failed += job_set.condition == "Failed"
            namespace.completed += job_set.condition == "Completed"
        if job_set.gone:
            namespace.job_set = None

    def _publish(self, namespace: Namespace) -> None:
        """The headless service: every pod that is not over, ready or not."""
        names = {}
        for pod, container in self.containers.items():
            if pod.job.namespace == namespace.name and (run := pod.job.labels.get("jobset.sigs.k8s.io/jobset-name")):
                names[f"{container.host}.{run} {container.host}"] = container.address
        if names != namespace.names:
            namespace.cluster.publish(names)
            namespace.names = names

    def _say(self, pod: Pod, what: str) -> None:
        self._note(f"{pod.job.namespace}/{pod.name} {what}")

    def _note(self, what: str) -> None:
        self.history.append(what)
        print(f"{self.now:7.0f} s  {what}", flush=True)


def _tolerated(pod: Pod) -> float:
    """Seconds for which a pod tolerates an unreachable node."""
    for toleration in pod.job.spec["template"]["spec"].get("tolerations", []):
        if toleration.get("key") == "node.kubernetes.io/unreachable":
            return float(toleration.get("tolerationSeconds", float("inf")))
    return TOLERATED
