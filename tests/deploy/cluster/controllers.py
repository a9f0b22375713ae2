"""The Job controller of Kubernetes and the JobSet controller, as far as the manifests of deploy/kubernetes use them.

Written from their sources (Kubernetes 1.36, JobSet 0.10): what they do with the exit statuses of pods, with pods that
are being deleted, with failure policies, back-off and restart limits. Left out: suspending, scaling, startup policies.
Time is in the cluster's seconds and is given; nothing here waits or starts a process.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FIRST_BACKOFF, LONGEST_BACKOFF = 10.0, 600.0
"""Seconds before a Job replaces pods: doubled with every failed one, those that are not counted too."""

ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"
GROUP = "jobset.sigs.k8s.io/replicatedjob-name"

_names = itertools.count(1)  # what makes the names of pods different; Kubernetes draws letters


@dataclass(eq=False)
class Pod:
    """A pod as the API server has it."""

    job: Job
    index: int
    name: str
    phase: str = "Pending"  # Running, Succeeded, Failed
    status: int | None = None  # of its container
    finished: float = 0.0
    deleted: float | None = None  # since when it is Terminating, if its phase is not final
    disrupted: bool = False  # the condition DisruptionTarget

    @property
    def over(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def active(self) -> bool:
        return not self.over and self.deleted is None

    @property
    def terminating(self) -> bool:
        return not self.over and self.deleted is not None

    @property
    def grace(self) -> float:
        return float(self.job.spec["template"]["spec"].get("terminationGracePeriodSeconds", 30))

    def delete(self, now: float) -> None:
        if self.active:
            self.deleted = now

    def end(self, status: int, now: float) -> None:
        """Kubelet says that the container has ended."""
        self.status, self.finished = status, now
        self.phase = "Failed" if status else "Succeeded"


@dataclass(eq=False)
class Job:
    """A Job of batch/v1 with the completion mode Indexed.

    Args:
        labels: of its pods.
        create: starts a pod.
    """

    namespace: str
    name: str
    spec: dict[str, Any]
    labels: dict[str, str]
    create: Callable[[Pod], None]
    pods: list[Pod] = field(default_factory=list)
    condition: str = ""  # Complete or Failed
    reason: str = ""
    message: str = ""
    deleting: bool = False
    _counted: set[Pod] = field(default_factory=set)
    _failed: int = 0
    _backoff: int = 0
    _last_failure: float = 0.0
    _target: bool = False

    @property
    def gone(self) -> bool:
        """Whether a deletion in the foreground is over: no pod is Terminating."""
        return self.deleting and not any(pod.terminating for pod in self.pods)

    def delete(self, now: float) -> None:
        """In the foreground: the Job stays until its pods are gone."""
        self.deleting = True
        for pod in self.pods:
            pod.delete(now)

    def rule_of(self, pod: Pod) -> tuple[int, dict[str, Any]] | None:
        """The first rule of the pod failure policy that a failed pod matches, with its place."""
        for place, rule in enumerate(self.spec.get("podFailurePolicy", {}).get("rules", [])):
            if codes := rule.get("onExitCodes"):
                if pod.status and (pod.status in codes["values"]) == (codes["operator"] == "In"):
                    return place, rule
            elif pod.disrupted and any(named["type"] == "DisruptionTarget" for named in rule["onPodConditions"]):
                return place, rule
        return None

    def sync(self, now: float) -> None:
        if self.condition or self.deleting:
            return
        self._count()
        if self._target:
            for pod in self.pods:
                pod.delete(now)
            if not any(pod.terminating for pod in self.pods):  # it waits for the last of them
                self.condition = "Failed"
            return
        succeeded = {pod.index for pod in self.pods if pod.phase == "Succeeded"}
        unfinished = [pod for pod in self.pods if not pod.over]
        completions = int(self.spec["completions"])
        if len(succeeded) >= completions and not unfinished:
            self.condition = "Complete"
        wait = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (self._backoff - 1)) if self._backoff else 0.0
        if now < self._last_failure + wait:
            return
        # With a pod failure policy a pod is replaced when it has failed, not yet while it is Terminating.
        for index in sorted(set(range(completions)) - succeeded - {pod.index for pod in unfinished}):
            pod = Pod(self, index, f"{self.name}-{index}-{next(_names)}")
            self.pods.append(pod)
            self.create(pod)

    def _count(self) -> None:
        """Take note of pods that have ended since the last time."""
        for pod in sorted(self.pods, key=lambda pod: pod.finished):
            if not pod.over or pod in self._counted:
                continue
            self._counted.add(pod)
            if pod.phase == "Succeeded":
                self._backoff = 0
                continue
            self._backoff += 1
            self._last_failure = pod.finished
            matched = self.rule_of(pod)
            if matched is None or matched[1]["action"] == "Count":
                self._failed += 1
            elif matched[1]["action"] == "FailJob" and not self._target:
                place, rule = matched
                named = f"{self.namespace}/{pod.name}"
                why = f"Pod {named} has condition DisruptionTarget"
                if "onExitCodes" in rule:
                    container = self.spec["template"]["spec"]["containers"][0]["name"]
                    why = f"Container {container} for pod {named} failed with exit code {pod.status}"
                self._fail("PodFailurePolicy", f"{why} matching FailJob rule at index {place}")
        if self._failed > self.spec.get("backoffLimit", 6) and not self._target:
            self._fail("BackoffLimitExceeded", "Job has reached the specified backoff limit")

    def _fail(self, reason: str, message: str) -> None:
        self._target, self.reason, self.message = True, reason, message


@dataclass(eq=False)
class JobSet:
    """A JobSet of jobset.x-k8s.io/v1alpha2.

    Args:
        create: starts a pod.
    """

    namespace: str
    manifest: dict[str, Any]
    create: Callable[[Pod], None]
    restarts: int = 0
    counted_restarts: int = 0
    jobs: list[Job] = field(default_factory=list)
    condition: str = ""  # Completed or Failed
    reason: str = ""
    deleting: bool = False

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def gone(self) -> bool:
        return self.deleting and not self.jobs

    def delete(self, now: float) -> None:
        """kubectl delete --cascade=foreground."""
        self.deleting = True
        for job in self.jobs:
            job.delete(now)

    def sync(self, now: float) -> None:
        for job in self.jobs:
            job.sync(now)
        self.jobs = [job for job in self.jobs if not job.gone]
        if self.deleting:
            return
        if self.condition:
            self._delete([job for job in self.jobs if not job.condition], now)
            return
        current = [job for job in self.jobs if int(job.labels[ATTEMPT]) == self.restarts]
        previous = [job for job in self.jobs if job not in current]
        self._delete(previous, now)
        if failed := [job for job in current if job.condition == "Failed"]:
            self._apply_failure_policy(failed)
            return
        if len([job for job in current if job.condition == "Complete"]) == len(self.manifest["spec"]["replicatedJobs"]):
            self.condition = "Completed"
            return
        blocking = self.manifest["spec"]["failurePolicy"].get("restartStrategy") == "BlockingRecreate"
        if not (previous and blocking):
            self._create_jobs()

    def _delete(self, jobs: list[Job], now: float) -> None:
        for job in jobs:
            if not job.deleting:
                job.delete(now)

    def _create_jobs(self) -> None:
        names = {job.name for job in self.jobs}
        complete = {
            job.labels["jobset.sigs.k8s.io/replicatedjob-name"] for job in self.jobs if job.condition == "Complete"
        }
        for group in self.manifest["spec"]["replicatedJobs"]:
            assert group["replicas"] == 1, "only groups of one Job are played"
            name = f"{self.name}-{group['name']}-0"
            needed = [needs for needs in group.get("dependsOn", []) if needs["name"] not in complete]
            assert all(needs["status"] == "Complete" for needs in needed), "only Complete is played"
            if name in names or needed:
                continue
            spec = group["template"]["spec"]
            labels = spec["template"].get("metadata", {}).get("labels", {}) | {
                "jobset.sigs.k8s.io/jobset-name": self.name,
                GROUP: group["name"],
                ATTEMPT: str(self.restarts),
            }
            self.jobs.append(Job(self.namespace, name, spec, labels, self.create))

    def _apply_failure_policy(self, failed: list[Job]) -> None:
        policy = self.manifest["spec"]["failurePolicy"]
        action = "RestartJobSet"
        for rule in policy.get("rules", []):
            if any(_applies(rule, job) for job in failed):
                action = rule["action"]
                break
        if action == "FailJobSet":
            self.condition, self.reason = "Failed", "FailJobSetFailurePolicyAction"
        elif action == "RestartJobSetAndIgnoreMaxRestarts":
            self.restarts += 1
        else:
            assert action == "RestartJobSet", f"{action} is not played"
            if self.counted_restarts >= policy["maxRestarts"]:
                self.condition, self.reason = "Failed", "ReachedMaxRestarts"
                return
            self.restarts += 1
            self.counted_restarts += 1


def _applies(rule: dict[str, Any], job: Job) -> bool:
    reasons, patterns = rule.get("onJobFailureReasons", []), rule.get("onJobFailureMessagePatterns", [])
    groups = rule.get("targetReplicatedJobs", [])
    return (
        (not reasons or job.reason in reasons)
        and (not patterns or any(re.search(pattern, job.message) for pattern in patterns))
        and (not groups or job.labels[GROUP] in groups)
    )
