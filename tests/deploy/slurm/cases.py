"""What happens to jobs of the shipped script on a real Slurm: one function a case, which returns what was seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import psutil

from tests.deploy.slurm.cluster import Cluster
from tests.trainer.job import ROOT, processes_of, write_recipe
from trainer.common.errors import UserError
from trainer.data.cache import Conduct, make_once

SCRIPT = ROOT / "deploy" / "slurm" / "unipool.sbatch"

NODES = {"n1": 1, "n2": 1, "n3": 1}
"""Nodes, each with its number of GPUs."""

LIMIT = 300.0
"""Seconds that a job may take to get where it is expected."""

END = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


class Unexpected(Exception):
    """A case went otherwise than expected."""


class Site:
    """A cluster with a folder from which jobs are submitted."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        self.recipe = write_recipe(folder)
        self.jobs: list[Job] = []

    def submit(self, *arguments: str, options: Sequence[str] = ("--nodes=2",), **variables: str) -> Job:
        """Submit the script; each node has one rank, and those of the first component a GPU."""
        variables = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | variables
        gpus = [word for part in options for word in ([part, "--gpus-per-node=1"] if part == ":" else [part])]
        number = self.cluster.submit(
            "--gpus-per-node=1", *gpus, str(SCRIPT), *arguments, folder=self.folder, **variables
        )
        self.jobs.append(Job(self, number))
        return self.jobs[-1]

    def train(self, *arguments: str, steps: int = 40, options: Sequence[str] = ("--nodes=2",), **variables: str) -> Job:
        """Submit the tiny recipe, in a folder of its own."""
        run = self.folder / f"run{len(self.jobs)}"
        settings = [f"run.dir={run}", f"train.steps={steps}", "parallel.timeout_seconds=20", "checkpoint.every=5"]
        settings += ["eval.every=50", "probe.every=1000"]
        sets = [word for setting in settings for word in ("--set", setting)]
        job = self.submit(str(self.recipe), *sets, *arguments, options=options, **variables)
        job.mark = f"run.dir={run}"
        return job

    def end(self) -> None:
        """Cancel what is left."""
        for job in self.jobs:
            if job.state not in END:
                self.cluster.cancel(job.number)


class Job:
    """A job of the site.

    Attributes:
        mark: A word on the command lines of its ranks only.
    """

    def __init__(self, site: Site, number: int):
        self.site, self.number = site, number
        self.mark = ""

    @property
    def log(self) -> str:
        """What all its starts have printed."""
        logs = list(self.site.folder.glob(f"*-{self.number}.log"))
        return logs[0].read_text(errors="replace") if logs else ""

    @property
    def state(self) -> str:
        return self.show.get("JobState", "unknown")

    @property
    def show(self) -> dict[str, str]:
        return self.site.cluster.show(self.number)

    def until(self, condition: Callable[[], bool], what: str, limit: float = LIMIT) -> None:
        """Wait for a condition; a job that has ended meanwhile is not what was expected."""
        deadline = time.monotonic() + limit
        while not condition():
            state = self.state
            if (state in END and not condition()) or time.monotonic() > deadline:
                tail = "\n".join(self.log.splitlines()[-25:])
                raise Unexpected(f"no {what}, but {state}, status {self.show.get('ExitCode')}; end of the log:\n{tail}")
            time.sleep(0.3)

    def says(self, text: str, times: int = 1) -> None:
        """Wait until the log has a text so many times."""
        self.until(lambda: self.log.count(text) >= times, f"{text!r} in the log")

    def trains(self) -> None:
        """Wait until training has begun, and a checkpoint is there."""
        run = Path(self.mark.removeprefix("run.dir="))
        self.until(lambda: any((run / "checkpoints").glob("step_*")), "first checkpoint")

    def is_back(self, restarts: int = 1, start: bool = True) -> str:
        """Wait until the job is back in the queue, and let it start at once."""
        self.until(lambda: self.show.get("Restarts") == str(restarts), f"restart {restarts}")
        self.until(lambda: self.state == "PENDING", "pending job")
        reason = self.show.get("Reason", "")
        if start:
            self.start_now()
        return f"back in the queue ({reason})"

    def start_now(self) -> None:
        """Do not wait for the two minutes that a requeued job waits. At once would be too soon: slurmd, which has just
        killed this job, would refuse it.
        """
        time.sleep(5)
        self.site.cluster.start_now(self.number)

    def ends(self, state: str = "COMPLETED", status: str = "0:0") -> str:
        """Wait for the job's end."""
        self.until(lambda: self.state in END, "end")
        seen = (self.state, self.show.get("ExitCode"))
        if seen != (state, status):
            tail = "\n".join(self.log.splitlines()[-25:])
            raise Unexpected(f"{seen}, not {(state, status)}; end of the log:\n{tail}")
        self.leaves_nothing()
        return f"{state} with status {status.split(':')[0]}"

    def leaves_nothing(self) -> None:
        """Check that the script has removed its own files."""
        if left := sorted(path.name for path in self.site.folder.glob(f".unipool-{self.number}*")):
            raise Unexpected(f"files were left: {left}")

    def stop(self) -> None:
        """USR1 to the script, as Slurm sends it before the time limit."""
        self.site.cluster.signal(self.number)

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        for process in processes_of(self.mark):
            try:
                if process.environ().get("RANK") == str(rank):
                    return process
            except psutil.Error:
                continue
        raise Unexpected(f"rank {rank} is not there")


def prepared(site: Site) -> str:
    """The preparation's job, and one that depends on it."""
    first = site.submit("prepare", str(site.recipe), options=("--nodes=1",))
    options = ("--nodes=2", f"--dependency=afterok:{first.number}", "--kill-on-invalid-dep=yes")
    second = site.train(options=options)
    waited = second.show.get("Reason", "")
    seen = first.ends()
    return f"preparation {seen}; training waits ({waited}), then {second.ends()}"


def failed_preparation(site: Site) -> str:
    """A preparation that cannot succeed takes the job that depends on it along."""
    first = site.submit("prepare", str(site.recipe), "--set", "data.source=nowhere.jsonl", options=("--nodes=1",))
    options = ("--nodes=2", f"--dependency=afterok:{first.number}", "--kill-on-invalid-dep=yes")
    second = site.train(options=options)
    seen = first.ends("FAILED", "2:0")
    return f"preparation {seen}; training {second.ends('CANCELLED')}"


def before_pid(site: Site) -> str:
    """USR1 when srun has been called but no task runs yet: a prolog delays them."""
    prolog = site.folder / "prolog.sh"
    prolog.write_text("#!/bin/sh\nsleep 8\n")
    prolog.chmod(0o755)
    job = site.train(UNIPOOL_SRUN=f"--task-prolog={prolog}")
    job.says("n2 slots=1")
    job.stop()
    seen = job.is_back()
    return f"{seen}, then {job.ends()}"


def in_preparation(site: Site) -> str:
    """USR1 while the data is being prepared: another process is at it."""
    data = site.folder / "data-held"
    if not (site.folder / "data").is_dir():
        prepared(site)
    (tokenizer,) = [path for path in (site.folder / "data").glob("tokenizer-*") if path.is_dir()]
    begun, enough = Event(), Event()

    def fill(folder: Path, report: object) -> None:
        begun.set()
        enough.wait()
        raise UserError("never finished")

    with ThreadPoolExecutor() as other:
        preparing = other.submit(make_once, data, tokenizer.name, fill, Conduct(show=False))
        try:
            begun.wait(LIMIT)
            job = site.train("--set", f"data.dir={data}")
            job.says("waiting for another process")
            job.stop()
            seen = job.is_back(start=False)
        finally:
            enough.set()
        preparing.exception(LIMIT)
    job.start_now()
    return f"{seen}, then {job.ends()}"


def in_start(site: Site) -> str:
    """USR1 when the ranks have met, but have not begun to train."""
    job = site.train()
    job.says("ranks by host")
    job.stop()
    seen = job.is_back()
    return f"{seen}, then {job.ends()}"


def in_step(site: Site) -> str:
    """USR1 during training."""
    job = site.train(steps=200)
    job.trains()
    job.stop()
    seen = job.is_back()
    job.says("resuming after step")
    return f"{seen}; resumed, then {job.ends()}"


def two_components(site: Site) -> str:
    """Two components, the trunk's with GPUs and the pool's without; USR1 during training."""
    options = ("--nodes=1", ":", "--nodes=2", "--exclusive", "--mem=0")
    job = site.train("--set", "parallel.pool_ranks=2", steps=200, options=options)
    job.trains()
    job.stop()
    job.is_back(start=False)
    for component in (job.number, job.number + 1):
        site.cluster.start_now(component)
    job.says("resuming after step")
    return f"back in the queue with both; resumed, then {job.ends()}"


def time_limit(site: Site) -> str:
    """Slurm's own USR1 before the time limit."""
    job = site.train(steps=100_000, options=("--nodes=2", "--time=3", "--signal=B:USR1@60"))
    job.says("is saved; run the same command to resume")
    seen = job.is_back(start=False)
    site.cluster.cancel(job.number)
    return seen


def short_limit(site: Site) -> str:
    """A time limit below the five minutes before which USR1 comes: every start is stopped at once."""
    job = site.train(options=("--nodes=2", "--time=1"), UNIPOOL_MAX_RESTARTS="1")
    job.is_back()
    job.until(lambda: "held" in job.show.get("Reason", "").lower(), "held job")
    seen = f"back in the queue twice, then held ({job.show['Reason']})"
    site.cluster.cancel(job.number)
    return seen


def fault(site: Site) -> str:
    """A rank is killed."""
    job = site.train(steps=200)
    job.trains()
    job.rank(1).kill()
    job.says("restart 1 of 3")
    job.says("resuming after step")
    number = job.rank(0).environ().get("UNIPOOL_RESTARTS")
    if number != "1":
        raise Unexpected(f"UNIPOOL_RESTARTS is {number}")
    return f"started again in place, resumed with UNIPOOL_RESTARTS=1, then {job.ends()}"


def faults(site: Site) -> str:
    """A job that always fails."""
    job = site.train(UNIPOOL="false", UNIPOOL_MAX_RESTARTS="2")
    seen = job.ends("FAILED", "1:0")
    starts = job.log.count("n1 slots=1")
    if starts != 3:
        raise Unexpected(f"{starts} starts")
    return f"{starts} starts, then {seen}"


def wrong_input(site: Site) -> str:
    """A recipe with a mistake."""
    job = site.train("--set", "train.lr=often")
    return f"{job.ends('FAILED', '2:0')}, {job.log.count('n1 slots=1')} start"


def cancelled(site: Site) -> str:
    """The user cancels the job during training."""
    job = site.train(steps=100_000)
    job.trains()
    site.cluster.cancel(job.number)
    job.until(lambda: job.state == "CANCELLED", "cancelled job")
    deadline = time.monotonic() + 45  # beyond the time until processes are killed
    while time.monotonic() < deadline:
        if job.state != "CANCELLED":
            raise Unexpected(f"{job.state} after scancel:\n{job.log[-2000:]}")
        time.sleep(1)
    if "restart 1" in job.log or "returns to the queue" in job.log:
        raise Unexpected(f"the script went on:\n{job.log[-2000:]}")
    job.leaves_nothing()
    return "CANCELLED, and remains so"


def controller_away(site: Site) -> str:
    """slurmctld is down when the ranks have saved and the job wants to return."""
    job = site.train(steps=200)
    job.trains()
    job.stop()
    site.cluster.stop_controller()
    deadline = time.monotonic() + 60
    while "returns to the queue" not in job.log and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(15)
    site.cluster.start_controller()
    seen = job.is_back()
    return f"{seen} once slurmctld was up, then {job.ends()}"


def crashed_node(site: Site) -> str:
    """All processes of a node end at once."""
    return _lost_node(site, site.cluster.crash_node)


def cut_node(site: Site) -> str:
    """A node's network fails: its connections stay open, and nothing answers."""
    return _lost_node(site, site.cluster.cut_node)


def _lost_node(site: Site, lose: Callable[[str], None]) -> str:
    job = site.train(steps=200)
    job.trains()
    began = time.monotonic()
    lose("n2")
    try:
        job.until(lambda: job.show.get("Restarts") == "1", "restart 1", 500.0)
        seen = f"{job.is_back()} after {time.monotonic() - began:.0f} s"
        why = [line for line in job.log.splitlines() if "returns to the queue" in line]
        job.says("resuming after step")
        hosts = job.show.get("NodeList", "")
        seen += f" ({why[-1].split(': ')[-1] if why else 'by Slurm'}), resumed on {hosts}"
        return f"{seen}, then {job.ends()}"
    finally:
        site.cluster.crash_node("n2")
        site.cluster.start_node("n2")
        site.cluster.wait_for_nodes(["n2"])


CASES = (
    *(prepared, failed_preparation, before_pid, in_preparation, in_start, in_step, two_components),
    *(fault, faults, wrong_input, cancelled, controller_away, crashed_node, cut_node, time_limit, short_limit),
)
