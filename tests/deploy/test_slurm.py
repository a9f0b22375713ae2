"""The Slurm script, with an srun that starts its tasks as processes here, and an agent that does not train."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.job import BIN, ROOT

SCRIPT = ROOT / "deploy/slurm/unipool.sbatch"
JOB = 42

# NODES is "first:2 second:1;third:1": components, their nodes and the GPUs on these. The last node answers first.
SRUN = """#!/bin/bash
IFS=';' read -ra components <<< "$NODES"
while [[ $1 == --* ]]; do
    [[ $1 == --het-group=* ]] && range=${1#*=}
    shift
done
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
# Says what it was given, and ends with status ENDS; without one all end with 75 at a USR1 to one, as the trainer's do.
AGENT = """#!/bin/bash
trap 'touch asked' USR1
echo "$*" > "agent.$SLURMD_NODENAME"
cp "$UNIPOOL_HOSTS" hosts
[ -z "$ENDS" ] || exit "$ENDS"
until [ -e asked ]; do sleep 0.05; done
exit 75
"""
SCONTROL = """#!/bin/bash
echo "$*" >> requeued
"""

Submit = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def submit(tmp_path: Path) -> Submit:
    """Starts the script as the batch step of a job of these nodes, in the folder of the test."""
    for name, text in (("srun", SRUN), ("agent", AGENT), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(nodes: str, *arguments: str, ends: str = "0", **settings: str) -> subprocess.Popen[str]:
        environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "NODES": nodes, "ENDS": ends, "UNIPOOL": "agent"}
        environment |= {"SLURM_JOB_ID": str(JOB), "SLURM_SUBMIT_DIR": str(tmp_path), **settings}
        if ";" in nodes:
            environment["SLURM_HET_SIZE"] = str(nodes.count(";") + 1)
        return subprocess.Popen(["bash", SCRIPT, *arguments], cwd=tmp_path, env=environment, text=True)

    return start


def test_shellcheck_finds_nothing() -> None:
    scripts = [SCRIPT, *(ROOT / "tests/deploy").glob("*.sh")]
    done = subprocess.run([BIN / "shellcheck", *scripts], capture_output=True, text=True, check=False)
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
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("agent.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75
    assert (tmp_path / "requeued").read_text() == f"requeue {JOB}\n"


@pytest.mark.parametrize("status", ["1", "2", "75"])
def test_nothing_else_goes_back_to_the_queue(status: str, submit: Submit, tmp_path: Path) -> None:
    """Neither a fault, nor a wrong input, nor a job whose ranks were stopped because it was cancelled."""
    assert submit("a:1", "recipe", ends=status).wait(120) == int(status)
    assert not (tmp_path / "requeued").exists()
