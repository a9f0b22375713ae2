"""A small Slurm cluster on this machine: slurmctld, and a slurmd for each node in namespaces of its own.

A node has its own network (joined to the others by a bridge that is in a namespace too), host name, mounts and
processes; it shares the file system with the others, as nodes share a folder on a cluster. Its GPUs are numbers only.
Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.deploy.pods import can_isolate
from tests.trainer.job import environment

NETWORK = "10.87.0"
"""Addresses that exist in the namespaces made here only."""

COMMAND_LIMIT = 60.0
"""Seconds that a command of Slurm may take."""

SLURMD_TIMEOUT = 300
"""Seconds after which Slurm gives up a node that does not answer, as by default."""

# The default pause before a requeued job may start again is two minutes: see `Cluster.start_now`.
_CONF = """
ClusterName=small
SlurmctldHost=controller({network}.1)
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmdTimeout={timeout}
KillWait=10
ReturnToService=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=1-0 State=UP
"""

# The first process of a machine; arguments: host name, hosts file, the command of its daemon.
_MACHINE = """
hostname "$1"
mount --bind "$2" /etc/hosts
shift 2
"$@" &
wait
"""


class Unavailable(Exception):
    """This machine cannot run the cluster."""


class Cluster:
    """Slurm's daemons. A context manager that takes down all that it started.

    Args:
        folder: An empty folder for configuration, state and logs.
        gpus: The number of GPUs of each node, by name.
    """

    def __init__(self, folder: Path, gpus: Mapping[str, int]):
        self.folder, self._gpus = folder, gpus
        self._name = f"slurm-{os.getpid()}"
        self._namespaces: list[str] = []
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
        if missing or not can_isolate():
            need = f"{', '.join(missing)} (Debian: munge slurmctld slurmd slurm-client)" if missing else "root"
            raise Unavailable(f"a Slurm cluster needs {need}")
        try:
            self._write_files()
            self._namespace(self._name)
            _ip("-n", self._name, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._name, "addr", "add", f"{NETWORK}.1/24", "dev", "bridge")
            _ip("-n", self._name, "link", "set", "bridge", "up")
            self._start_munge()
            self.start_controller()
            for node in self._gpus:
                self.start_node(node)
            self.wait_for_nodes(self._gpus)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons.values()):
            _end(daemon)
        for namespace in self._namespaces:
            subprocess.run(("ip", "netns", "del", namespace), check=False, timeout=COMMAND_LIMIT)

    def _write_files(self) -> None:
        for name in ("state", "munge"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        nodes = [
            f"NodeName={node} NodeAddr={self.address(node)} CPUs=2 RealMemory=8000 Gres=gpu:{count} State=UNKNOWN"
            for node, count in self._gpus.items()
        ]
        text = _CONF.format(network=NETWORK, folder=self.folder, timeout=SLURMD_TIMEOUT, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        gres = ""
        for node, count in self._gpus.items():
            for number in range(count):
                (self.folder / f"{node}-gpu{number}").touch()
            gres += f"NodeName={node} Name=gpu File={self.folder}/{node}-gpu[0-{count - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = "".join(f"{self.address(node)} {node}\n" for node in self._gpus)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{NETWORK}.1 controller\n{names}")

    def address(self, node: str) -> str:
        """The address of a node."""
        return f"{NETWORK}.{2 + list(self._gpus).index(node)}"

    def _start_munge(self) -> None:
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": self.folder / "munge.socket", "key-file": key}
        files |= {f"{name}-file": self.folder / "munge" / name for name in ("pid", "seed", "log")}
        self._daemon("munged", ["munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in files.items())])
        _until(lambda: (self.folder / "munge.socket").exists(), "munged")

    def start_controller(self) -> None:
        """Start slurmctld, which finds the jobs of an earlier one."""
        self._machine("slurmctld", "controller", self._name, ["slurmctld", "-D"])
        _until(lambda: "UP" in self._run(["scontrol", "ping"]), "slurmctld")

    def stop_controller(self) -> None:
        """End slurmctld; nodes and their jobs go on."""
        _end(self._daemons.pop("slurmctld"))

    def start_node(self, node: str) -> None:
        """Start a node, which has no processes from before."""
        namespace = f"{self._name}-{node}"
        if namespace not in self._namespaces:
            self._namespace(namespace)
            link = ("link", "add", "eth0", "netns", namespace, "type", "veth", "peer", "name", node)
            _ip(*link, "netns", self._name)
            _ip("-n", self._name, "link", "set", node, "master", "bridge", "up")
            _ip("-n", namespace, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        self._machine(node, node, namespace, ["slurmd", "-D", "-N", node])

    def crash_node(self, node: str) -> None:
        """End all processes of a node at once. Connections to it are reset, because its address still exists."""
        if node in self._daemons:
            _end(self._daemons.pop(node))

    def cut_node(self, node: str) -> None:
        """Take a node's network away: its processes go on, and connections to it stay open without a word."""
        _ip("-n", f"{self._name}-{node}", "link", "set", "eth0", "down")

    def wait_for_nodes(self, nodes: Sequence[str] | Mapping[str, int]) -> None:
        """Wait until these nodes are idle."""

        def idle() -> bool:
            states = self._run(["sinfo", "--noheader", "--Node", "--format=%N %T"]).split("\n")
            return all(f"{node} idle" in states for node in nodes)

        _until(idle, f"nodes {', '.join(nodes)}: {self._run(['sinfo', '--Node', '--long'])}", 120.0)

    def submit(self, *arguments: str, folder: Path, **variables: str) -> int:
        """Call sbatch in `folder`; return the job's number."""
        return int(self._run(["sbatch", "--parsable", *arguments], folder, variables).split(";")[0])

    def scontrol(self, *arguments: str) -> str:
        """Call scontrol; return its output."""
        return self._run(["scontrol", *arguments])

    def signal(self, job: int, name: str = "USR1") -> None:
        """Send a signal to the job's script, as Slurm does before the time limit."""
        self._run(["scancel", "--batch", f"--signal={name}", str(job)])

    def cancel(self, job: int) -> None:
        """Call scancel."""
        self._run(["scancel", str(job)])

    def show(self, job: int) -> dict[str, str]:
        """What Slurm says of a job, such as JobState, Restarts, Reason and ExitCode."""
        text = self.scontrol("show", "job", "--oneliner", str(job)).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def start_now(self, job: int) -> None:
        """Let a requeued job start at once, not after two minutes."""
        self.scontrol("update", f"JobId={job}", "StartTime=now")

    def _run(self, command: list[str], folder: Path | None = None, variables: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            self._inside(self._name, command),
            cwd=folder,
            env=self._environment | (variables or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_LIMIT,
            check=False,
        )
        return done.stdout

    @property
    def _environment(self) -> dict[str, str]:
        return environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def _inside(self, namespace: str, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", namespace, *command]

    def _machine(self, name: str, host: str, namespace: str, command: list[str]) -> None:
        separate = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
        first = [*separate, "sh", "-c", _MACHINE, "sh", host, str(self.folder / "hosts")]
        self._daemon(name, self._inside(namespace, [*first, *command]))

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def _namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._namespaces.append(name)
        _ip("-n", name, "link", "set", "lo", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, timeout=COMMAND_LIMIT)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.kill()  # unshare takes the processes of its node along
    daemon.wait(COMMAND_LIMIT)


def _until(condition: Callable[[], bool], what: str, limit: float = 60.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not there after {limit:g} s")
        time.sleep(0.2)
