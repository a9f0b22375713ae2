"""The Slurm script, with an srun that starts its tasks as processes here, and an agent that does not train."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

import pytest

from tests.distributed import TIME_LIMIT
from tests.trainer.job import BIN, ROOT

SCRIPT = ROOT / "deploy/slurm/unipool.sbatch"
JOB = 42

# NODES is "first:2 second:1;third:1": components, their nodes and the GPUs on these. The last node answers first.
# The ranks' srun, which binds nothing, starts no task while the file `hold` exists; the other fails if `dead` does.
SRUN = """#!/bin/bash
echo "$*" >> srun.calls
IFS=';' read -ra components <<< "$NODES"
what=list
while [[ $1 == --* ]]; do
    [[ $1 == --het-group=* ]] && range=${1#*=}
    [[ $1 == --cpu-bind=none ]] && what=start
    shift
done
[[ $what == start ]] || [ ! -e dead ] || exit 1
while [[ $what == start && -e hold ]]; do /bin/sleep 0.05; done
range=${range:-0}
tasks=()
for ((i = ${range%-*}; i <= ${range#*-}; i++)); do
    read -ra nodes <<< "${components[i]}"
    for ((n = ${#nodes[@]} - 1; n >= 0; n--)); do
        gpus=${nodes[n]#*:}
        SLURM_NODEID=$n SLURMD_NODENAME=${nodes[n]%:*} SLURM_GPUS_ON_NODE=$gpus "$@" &
        tasks+=($!)
    done
done
highest=0
for task in "${tasks[@]}"; do
    status=0
    wait "$task" || status=$?
    ((status > highest)) && highest=$status
done
exit $highest
"""
# Says what it was given, and ends with the statuses ENDS, one a start; without any, all end with STOPPED at a USR1 to
# one, as the trainer's do.
AGENT = """#!/bin/bash
trap 'echo >> asked' USR1
echo "$*" > "agent.$SLURMD_NODENAME"
echo "$UNIPOOL_RESTARTS${UNIPOOL_MAX_RESTARTS:+ of $UNIPOOL_MAX_RESTARTS}" >> restarts
[ "$1" = prepare ] || cp "$UNIPOOL_HOSTS" hosts
[ "$SLURMD_NODENAME" != "${STUCK:-}" ] || exec /bin/sleep 600
read -ra ends <<< "$ENDS"
[ -z "$ENDS" ] || exit "${ends[UNIPOOL_RESTARTS - ${SLURM_RESTART_COUNT:-0}]}"
until [ -e asked ]; do /bin/sleep 0.05; done
/bin/sleep "${SAVES:-0}"
exit "$STOPPED"
"""
# Fails as often as `away` has lines.
SCONTROL = """#!/bin/bash
echo "$*" >> requeued
[ ! -s away ] || { sed -i 1d away; exit 1; }
"""
# 25 s are what other nodes have to end after the first one.
SLEEP = """#!/bin/bash
[ "$1" != 25 ] || exec /bin/sleep "${PATIENCE:-600}"
echo "$1" >> slept
"""

Job = Popen[bytes]
Submit = Callable[..., Job]


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Submit]:
    """Starts the script as the batch step of a job of these nodes, in the folder of the test."""
    jobs: list[Job] = []
    for name, text in (("srun", SRUN), ("agent", AGENT), ("scontrol", SCONTROL), ("sleep", SLEEP)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(nodes: str, *arguments: str, ends: str = "0", stopped: int = 75, **settings: str) -> Job:
        environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "NODES": nodes, "UNIPOOL": "agent"}
        environment |= {"ENDS": ends, "STOPPED": str(stopped)}
        environment |= {"SLURM_JOB_ID": str(JOB), "SLURM_SUBMIT_DIR": str(tmp_path), **settings}
        if ";" in nodes:
            environment["SLURM_HET_SIZE"] = str(nodes.count(";") + 1)
        with (tmp_path / "log").open("w") as log:
            command = ["bash", SCRIPT, *arguments]
            jobs.append(Popen(command, cwd=tmp_path, env=environment, stderr=log, start_new_session=True))
        return jobs[-1]

    yield start
    for job in jobs:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait(120)


def wait_for(*files: Path) -> None:
    """Until none of the files is empty."""
    deadline = time.monotonic() + 120
    while not all(path.exists() and path.stat().st_size for path in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.05)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_shellcheck_finds_nothing() -> None:
    scripts = [SCRIPT, *(ROOT / "tests/deploy").glob("*.sh")]
    done = subprocess.run([BIN / "shellcheck", *scripts], capture_output=True, text=True, timeout=TIME_LIMIT)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("nodes", "slots", "hosts"),
    [
        ("b:2 a:1", "", ["b slots=2", "a slots=1"]),
        ("t1:1 t10:1;p:2", "", ["t1 slots=1", "t10 slots=1", "p slots=2"]),
        ("t: u:;p:", "4 2", ["t slots=4", "u slots=4", "p slots=2"]),
        ("t: u:", "", ["t slots=1", "u slots=1"]),
    ],
    ids=["uneven", "two components", "told how many", "no GPUs"],
)
def test_every_node_gets_its_place(nodes: str, slots: str, hosts: list[str], submit: Submit, tmp_path: Path) -> None:
    """Lines of the hostfile in the order of the nodes, the first component first; each agent knows its line."""
    assert submit(nodes, "my recipe", "--set", "a=b", UNIPOOL_SLOTS=slots).wait(120) == 0
    assert (tmp_path / "hosts").read_text().splitlines() == hosts
    hostfile = f"{tmp_path}/.unipool-{JOB}.hosts"
    for line, host in enumerate(hosts):
        told = (tmp_path / f"agent.{host.split()[0]}").read_text().strip()
        assert told == f"train my recipe --set a=b --hostfile {hostfile} --node-rank {line} --master-port {20000 + JOB}"
    assert not list(tmp_path.glob(".unipool*"))
    assert not (tmp_path / "requeued").exists()


def test_a_stop_that_slurm_asks_for_goes_back_to_the_queue(submit: Submit, tmp_path: Path) -> None:
    job = submit("a:1 b:1", "recipe", ends="")
    wait_for(tmp_path / "agent.a", tmp_path / "agent.b")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75
    assert lines(tmp_path / "requeued") == [f"requeue Incomplete {JOB}"]
    assert not list(tmp_path.glob(".unipool*"))


def test_a_second_signal_leaves_the_ranks_alone(submit: Submit, tmp_path: Path) -> None:
    """It would end them before they have saved: Slurm's, before the time limit, may follow the user's."""
    job = submit("a:1", "recipe", ends="", SAVES="0.5")
    wait_for(tmp_path / "agent.a")
    job.send_signal(signal.SIGUSR1)
    wait_for(tmp_path / "asked")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75
    assert len((tmp_path / "asked").read_text()) == 1
    assert lines(tmp_path / "requeued") == [f"requeue Incomplete {JOB}"]


def test_a_stop_before_there_are_ranks_goes_back_to_the_queue(submit: Submit, tmp_path: Path) -> None:
    """No process has written its number yet."""
    (tmp_path / "hold").touch()
    job = submit("a:1", "recipe", ends="")
    wait_for(tmp_path / f".unipool-{JOB}.hosts")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75
    assert lines(tmp_path / "requeued") == [f"requeue Incomplete {JOB}"]
    assert "before the ranks were started" in (tmp_path / "log").read_text()


def test_a_stop_during_preparation_goes_back_to_the_queue(submit: Submit, tmp_path: Path) -> None:
    """Before there are ranks, USR1 ends the trainer with status 128 + 10."""
    job = submit("a:1 b:1", "recipe", ends="", stopped=138)
    wait_for(tmp_path / "agent.a", tmp_path / "agent.b")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75
    assert lines(tmp_path / "requeued") == [f"requeue Incomplete {JOB}"]


def test_a_stop_does_not_wait_for_nodes_that_know_nothing_of_it(submit: Submit, tmp_path: Path) -> None:
    """Before the ranks have met, those of the other nodes wait for the first one's."""
    job = submit("a:1 b:1", "recipe", ends="", stopped=138, STUCK="b", PATIENCE="0.2")
    wait_for(tmp_path / "agent.a", tmp_path / "agent.b")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75
    assert lines(tmp_path / "requeued") == [f"requeue Incomplete {JOB}"]


def test_a_job_that_never_saves_is_held(submit: Submit, tmp_path: Path) -> None:
    """Its time limit may be too short for a start: it would return for ever. A checkpoint begins the count anew."""
    for stopped in (138, 75, 138, 138, 138):
        (tmp_path / "asked").unlink(missing_ok=True)
        (tmp_path / "agent.a").unlink(missing_ok=True)
        job = submit("a:1", "recipe", ends="", stopped=stopped, UNIPOOL_MAX_RESTARTS="2")
        wait_for(tmp_path / "agent.a")
        job.send_signal(signal.SIGUSR1)
        assert job.wait(120) == 75
    assert lines(tmp_path / "requeued") == [*[f"requeue Incomplete {JOB}"] * 4, f"requeuehold Incomplete {JOB}"]
    assert f"scontrol release {JOB}" in (tmp_path / "log").read_text()
    assert not list(tmp_path.glob(".unipool*"))


def test_slurmctld_may_be_away_when_the_job_returns(submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "away").write_text("\n\n")
    job = submit("a:1", "recipe", ends="")
    wait_for(tmp_path / "agent.a")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75
    assert lines(tmp_path / "requeued") == [f"requeue Incomplete {JOB}"] * 3


@pytest.mark.parametrize(
    ("ends", "status", "restarts"),
    [("1 137 0", 0, 2), ("1 1 1 1", 1, 3), ("1 2", 2, 1), ("2", 2, 0), ("3", 3, 0)],
    ids=["two faults", "too many faults", "wrong input after a fault", "wrong input", "diverged"],
)
def test_ranks_start_again_after_faults_only(
    ends: str, status: int, restarts: int, submit: Submit, tmp_path: Path
) -> None:
    """Not after a wrong input, and not if the model has diverged.

    The limit is this script's: to the ranks, it would be one of all restarts, those that Slurm makes included.
    """
    job = submit("a:1", "recipe", ends=ends, SLURM_RESTART_COUNT="4", UNIPOOL_MAX_RESTARTS="3")
    assert job.wait(120) == status
    assert lines(tmp_path / "restarts") == [str(4 + n) for n in range(restarts + 1)]
    assert lines(tmp_path / "slept") == [str(10 * n) for n in range(1, restarts + 1)]
    assert not (tmp_path / "requeued").exists()
    assert not list(tmp_path.glob(".unipool*"))


def test_a_stop_that_only_the_ranks_are_asked_for_goes_back_to_the_queue(submit: Submit, tmp_path: Path) -> None:
    """At the beginning of a preempted job's grace time Slurm sends SIGTERM to its steps, and nothing to the script."""
    assert submit("a:1", "recipe", ends="75").wait(120) == 75
    assert lines(tmp_path / "requeued") == [f"requeue Incomplete {JOB}"]
    assert not list(tmp_path.glob(".unipool*"))


def test_a_full_disk_does_not_keep_a_job_from_the_queue(submit: Submit, tmp_path: Path) -> None:
    (tmp_path / f".unipool-{JOB}.hosts.lost").mkdir()  # nothing can be written to it either
    job = submit("a:1", "recipe", ends="", stopped=138)
    wait_for(tmp_path / "agent.a")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75
    assert lines(tmp_path / "requeued") == [f"requeue Incomplete {JOB}"]


def test_a_job_with_a_dead_node_waits_for_slurm_to_notice(submit: Submit, tmp_path: Path) -> None:
    """The ranks notice it minutes before Slurm does, and cannot start again; the job must not end as a fault."""
    (tmp_path / "hold").touch()
    job = submit("a:1 b:1", "recipe", ends="1 1")
    wait_for(tmp_path / f".unipool-{JOB}.hosts")
    (tmp_path / "dead").touch()
    (tmp_path / "hold").unlink()
    assert job.wait(120) == 75
    assert lines(tmp_path / "slept") == ["10", *["15"] * 4]
    assert lines(tmp_path / "requeued") == [f"requeue Incomplete {JOB}"]


def test_options_of_srun_are_for_the_trainer(submit: Submit, tmp_path: Path) -> None:
    """The list of nodes is made outside the container."""
    options = "--container-image=unipool.sqsh --container-mounts=/shared:/shared"
    assert submit("a:1", "recipe", UNIPOOL_SRUN=options).wait(120) == 0
    calls = lines(tmp_path / "srun.calls")
    assert [options in call for call in calls if call.startswith("--")] == [False, True]


def test_preparation(submit: Submit, tmp_path: Path) -> None:
    assert submit("a:", "prepare", "my recipe", "--set", "a=b").wait(120) == 0
    assert lines(tmp_path / "agent.a") == ["prepare my recipe --set a=b"]


def test_a_preparation_that_is_stopped_goes_back_to_the_queue(submit: Submit, tmp_path: Path) -> None:
    job = submit("a:", "prepare", "recipe", ends="")
    wait_for(tmp_path / "agent.a")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75
    assert lines(tmp_path / "requeued") == [f"requeue Incomplete {JOB}"]


@pytest.mark.parametrize("arguments", [[], ["prepare"]])
def test_a_job_without_a_recipe(arguments: list[str], submit: Submit, tmp_path: Path) -> None:
    job = submit("a:1", *arguments)
    assert job.wait(120) == 2
    assert lines(tmp_path / "log")[0].startswith("usage: sbatch")


def test_a_wrong_number_of_restarts(submit: Submit, tmp_path: Path) -> None:
    assert submit("a:1", "recipe", UNIPOOL_MAX_RESTARTS="many").wait(120) == 2
    assert lines(tmp_path / "log") == ["error: UNIPOOL_MAX_RESTARTS=many: must be a number"]
