"""A cluster in small: python -m tests.deploy.cluster

Plays the pods of the overlay cpu-smoke as processes in namespaces, the controllers of Kubernetes and JobSet as their
sources say, and nodes that fail; a real Prometheus watches with the rules as they are shipped. Prints a table: what was
done, what the job did, which alerts fired. Ends with status 1 if that is not what should have happened. Needs root, and
the Debian packages prometheus and iproute2; takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deploy.cluster.controllers import Pod
from tests.deploy.cluster.plane import Namespace, Plane
from tests.deploy.cluster.watch import Server, prometheus
from tests.deploy.kubernetes.overlays import KUBERNETES, render

ACTS = ("evict", "kill", "lose_node", "split", "wrong_input", "finish")

FAR = 1_000_000
"""Steps that no run gets to."""


@dataclass
class Act:
    """One row of the table."""

    done: str
    alerts: dict[str, set[str]]  # those that should fire, by run
    job: list[str] = field(default_factory=list)
    fired: dict[str, set[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def expect(self, what: str, true: bool) -> None:
        """Note what the job did, and whether it should have."""
        self.job.append(what)
        if not true:
            self.wrong.append(f"not so: {what}")


class Play:
    """The scenes, on a plane that is watched."""

    def __init__(self, plane: Plane, server: Server, folder: Path):
        self.plane, self.server, self._folder = plane, server, folder
        self.acts: list[Act] = []
        self.a, self.b, self.c = (plane.add_namespace(f"train-{letter}") for letter in "abc")

    @contextmanager
    def act(self, done: str, alerts: dict[str, set[str]] | None = None) -> Iterator[Act]:
        act = Act(done, alerts or {})
        self.acts.append(act)
        print(f"-- {done}", flush=True)
        began = time.time()
        try:
            yield act
        except (TimeoutError, AssertionError) as error:
            act.wrong.append(f"{type(error).__name__}: {error}")
        act.fired = self.server.fired(began, time.time())
        if act.fired != act.alerts:
            act.wrong.append(f"alerts: {act.fired or 'none'} instead of {act.alerts or 'none'}")
        for problem in act.wrong:
            print(f"!! {problem}", flush=True)

    def apply(self, namespace: Namespace, *arguments: str, **split: int) -> None:
        """kubectl apply of cpu-smoke with a split and further arguments of `train`."""
        manifests = self._rendered("overlays/cpu-smoke", **split)
        for manifest in manifests:
            if manifest["kind"] == "JobSet":
                for group in manifest["spec"]["replicatedJobs"]:
                    group["template"]["spec"]["template"]["spec"]["containers"][0]["args"] = list(arguments)
        self.plane.apply(namespace, manifests)

    def _rendered(self, overlay: str, **split: int) -> list[dict[str, Any]]:
        """An overlay of cpu-smoke, with another split.env."""
        copy = Path(tempfile.mkdtemp(dir=self._folder)) / "kubernetes"
        shutil.copytree(KUBERNETES, copy)
        numbers = copy / "overlays/cpu-smoke/split.env"
        edited = numbers.read_text()
        for key, value in split.items():
            edited = re.sub(rf"^{key}=.*$", f"{key}={value}", edited, flags=re.MULTILINE)
        numbers.write_text(edited)
        return render(copy / overlay)

    def wait_until(self, what: str, condition: Callable[[], bool], limit: float = 240) -> None:
        self.plane.until(condition, limit, what)

    def pods(self, namespace: Namespace) -> list[Pod]:
        return [pod for pod in self.plane.containers if pod.job.namespace == namespace.name]

    def rank_0(self, namespace: Namespace) -> str:
        """The log of rank 0's pod, empty while there is none."""
        pods = [pod for pod in self.pods(namespace) if pod.name.startswith("unipool-trunk-0-0-")]
        return self.plane.containers[pods[0]].log if pods else ""

    def step(self, namespace: Namespace) -> int:
        """The newest step of the run, 0 before the first."""
        path = namespace.cluster.folder / "volume/runs/unipool/metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line).get("step", 0) for line in lines if line.endswith("\n")), default=0)

    def data(self, namespace: Namespace) -> dict[str, int]:
        """Prepared files, with the times at which they were written."""
        found = (namespace.cluster.folder / "volume/data").rglob("*.arrow")
        return {str(path): path.stat().st_mtime_ns for path in found}

    def trains(self, namespace: Namespace) -> None:
        """Until a run that has just begun has made some steps."""
        self.wait_until(f"{namespace.name} trains", lambda: self.step(namespace) >= 10)

    def resumed(self, namespace: Namespace) -> int:
        """The step after which the newest pods resume, when they have made ten more."""

        def resumes() -> bool:
            assert namespace.job_set is None or not namespace.job_set.condition, "the JobSet is over"
            return "resuming after step " in self.rank_0(namespace)

        self.wait_until("it resumes", resumes)
        step = int(re.findall(r"resuming after step (\d+)", self.rank_0(namespace))[0])
        self.wait_until("it trains on", lambda: self.step(namespace) >= step + 10)
        return step

    # --- the acts -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        with self.act("Apply prepare/cpu-smoke in train-a, on an empty volume; evict its pod") as act:
            self.plane.apply(self.a, self._rendered("prepare/cpu-smoke"))
            (job,) = self.a.jobs
            self.wait_until("it works", lambda: any(self.plane.containers[pod].log for pod in self.pods(self.a)))
            self.plane.evict(job.pods[0])
            self.wait_until("the data is ready", lambda: bool(job.condition))
            statuses = [pod.status for pod in job.pods]
            act.expect(f"pods end with {statuses}", statuses == [75, 0])
            act.expect(f"the Job is {job.condition}", job.condition == "Complete")

    def start(self) -> None:
        prepared = self.data(self.a)
        with self.act("Apply overlays/cpu-smoke in train-a: 2 trunk and 2 pool pods") as act:
            self.apply(self.a, "--set", f"train.steps={FAR}", "--set", "parallel.timeout_seconds=30")
            self.trains(self.a)
            act.expect("its ranks use the prepared data", self.data(self.a) == prepared)
        with self.act("Apply it in train-b: 1 trunk and 1 pool pod") as act:
            arguments = ["--set", f"train.steps={FAR}", "--set", "parallel.timeout_seconds=30"]
            self.apply(self.b, *arguments, TRUNK_PODS=1, POOL_PODS=1)
            self.trains(self.b)
            self.plane.for_seconds(120)
            ranks = self.server.values("sum by (run) (up{run!=''})")
            seen = ", ".join(f"{run}: {count:.0f}" for run, count in sorted(ranks.items()))
            act.expect(f"ranks that are scraped: {seen}", ranks == {"train-a/unipool": 4, "train-b/unipool": 2})

    def evict(self) -> None:
        with self.act("Evict one pool pod of train-a (a node is drained)") as act:
            self.wait_until("a checkpoint", lambda: self.step(self.a) > 60)
            job_set = self.a.job_set
            assert job_set is not None
            counted, restarts = job_set.counted_restarts, job_set.restarts
            old = self.pods(self.a)
            self.plane.evict(old[-1])
            self.wait_until("the pods end", lambda: all(pod.over for pod in old))
            ended, before = self.plane.now, self.step(self.a)
            statuses = sorted({pod.status for pod in old if pod.status is not None})
            act.expect(f"statuses {statuses}", statuses == [75])
            self.wait_until("new pods", lambda: len(self.pods(self.a)) == 4, 700 / self.plane.speed + 60)
            act.expect(f"new pods {self.plane.now - ended:.0f} s later", self.plane.now - ended < 30)
            resumed = self.resumed(self.a)
            act.expect(f"{before - resumed} steps lost", before == resumed)
            more = job_set.restarts - restarts, job_set.counted_restarts - counted
            act.expect(f"restarts + {more[0]}, of them counted {more[1]}", more[1] == 0)

    def kill(self) -> None:
        with self.act("Kill a rank of train-b (out of memory)") as act:
            self.wait_until("a checkpoint", lambda: self.step(self.b) > 60)
            job_set = self.b.job_set
            assert job_set is not None
            counted = job_set.counted_restarts
            pod = self.pods(self.b)[-1]
            before = self.step(self.b)
            ranks = [p for p in self.plane.containers[pod].processes() if "LOCAL_RANK" in p.environ()]
            ranks[-1].kill()
            self.wait_until("a restart", lambda: job_set.counted_restarts == counted + 1)
            resumed = self.resumed(self.b)
            act.expect(f"{before - resumed} steps lost, at most 50", before - resumed <= 50)
            act.expect(f"counted restarts {job_set.counted_restarts}", True)

    def lose_node(self) -> None:
        alerts = {"train-a/unipool": {"UnipoolRankSilent", "UnipoolPodTerminating"}}
        with self.act("The node of a pool pod of train-a loses power", alerts) as act:
            job_set = self.a.job_set
            assert job_set is not None
            lost = next(pod for pod in reversed(self.pods(self.a)) if "pool" in pod.name)
            node, before, began = self.plane.placed[lost], self.step(self.a), self.plane.now
            self.plane.lose(node)
            others = [pod for pod in self.pods(self.a) if self.plane.placed[pod] is not node]
            logs = [self.plane.containers[pod].log_file for pod in others]
            self.wait_until("its peers notice", lambda: all(pod.over for pod in others))
            act.expect(f"peers end with {sorted({pod.status for pod in others if pod.status})}", True)
            said = any("does not respond" in path.read_text() for path in logs)
            act.expect(f"they name the lost rank after {self.plane.now - began:.0f} s", said)
            overdue = 15 * 60 + lost.grace
            self.wait_until("Terminating for long", lambda: self.plane.now > began + 400 + overdue, 900)
            act.expect("no pods start while one is Terminating", len(self.pods(self.a)) == 1)
            node.out_of_service = True
            self.wait_until("new pods", lambda: len(self.pods(self.a)) == 4)
            resumed = self.resumed(self.a)
            act.expect(
                f"taint out-of-service: new pods elsewhere, {before - resumed} steps lost", before - resumed <= 50
            )

    def split(self) -> None:
        with self.act("Stop train-a, apply it as 1 trunk and 2 pool pods") as act:
            assert self.a.job_set is not None
            self.a.job_set.delete(self.plane.now)
            self.wait_until("train-a is gone", lambda: self.a.job_set is None)
            before = self.step(self.a)
            arguments = ["--set", f"train.steps={FAR}", "--set", "parallel.timeout_seconds=30"]
            self.apply(self.a, *arguments, TRUNK_PODS=1, POOL_PODS=2)
            resumed = self.resumed(self.a)
            act.expect(f"resharded, {before - resumed} steps lost", before == resumed)

    def wrong_input(self) -> None:
        with self.act("Apply in train-c with a wrong value", {"train-c/unipool": {"UnipoolJobSetFailed"}}) as act:
            self.apply(self.c, "--set", "train.steps=-1", TRUNK_PODS=1, POOL_PODS=1)
            job_set = self.c.job_set
            assert job_set is not None
            self.wait_until("it fails", lambda: bool(job_set.condition))
            act.expect(f"JobSet {job_set.condition}, {job_set.restarts} restarts", job_set.restarts == 0)
            self.plane.for_seconds(120)

    def finish(self) -> None:
        alerts = {"train-c/unipool": {"UnipoolJobSetFailed", "UnipoolJobFailed"}}  # since the act before
        with self.act("Let train-a finish, wait half an hour", alerts) as act:
            assert self.a.job_set is not None
            self.a.job_set.delete(self.plane.now)
            self.wait_until("train-a is gone", lambda: self.a.job_set is None)
            steps = self.step(self.a) + 20
            self.apply(self.a, "--set", f"train.steps={steps}", "--force", TRUNK_PODS=1, POOL_PODS=2)
            self.wait_until("the end", lambda: self.a.job_set is not None and self.a.job_set.condition == "Completed")
            act.expect(f"JobSet Completed after step {self.step(self.a)}", self.step(self.a) == steps)
            self.plane.for_seconds(2000)


def table(acts: list[Act]) -> str:
    rows = ["| what was done | what the job did | alerts |", "|---|---|---|"]
    for act in acts:
        alerts = "; ".join(f"{run}: {', '.join(sorted(names))}" for run, names in sorted(act.fired.items())) or "none"
        rows.append(f"| {act.done} | {'; '.join(act.job)} | {alerts} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--speed", type=float, default=6, help="how much faster than the clock the cluster's time passes"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and series")
    parser.add_argument("--only", nargs="*", choices=ACTS, help="the acts to play after the start; by default all")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing stays
    folder = Path(tempfile.mkdtemp(prefix="unipool-cluster-"))
    (folder / "plane").mkdir()
    monitor = monitor_of()
    with Plane(folder / "plane", nodes=6, speed=options.speed) as plane:
        if not plane.network.isolated:
            sys.exit("error: needs root and the right to make namespaces")
        with prometheus(plane, monitor) as server:
            play = Play(plane, server, folder)
            play.prepare()
            play.start()
            for name in ACTS if options.only is None else options.only:
                getattr(play, name)()
    print(table(play.acts))
    wrong = [problem for act in play.acts for problem in act.wrong]
    if options.keep or wrong:
        print(f"logs and series: {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if wrong else 0


def monitor_of() -> dict[str, Any]:
    """The PodMonitor as it is shipped."""
    (monitor,) = [m for m in render(KUBERNETES / "monitoring") if m["kind"] == "PodMonitor"]
    return monitor


if __name__ == "__main__":
    sys.exit(main())
