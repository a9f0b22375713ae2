"""Runs the pods of a rendered JobSet as processes of this machine, as near to a cluster as that goes.

Each pod gets what kubelet and the JobSet controller would give it: the container's command and environment, the
downward API's values, its volumes at their paths, a host name, and namespaces of its own: network (joined to the others
by a bridge that is in a namespace too), mounts, processes and shared memory. Its command is process 1 there. Names of
the headless service are lines of an /etc/hosts that only the pods see.

Left out, because this machine's own files serve as the image: the user 1000, the read-only root, and volumes at /tmp
and below /home.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.trainer.job import BIN, ROOT
from trainer.launch import free_port

NETWORK = "10.88.0"
"""Addresses that exist in the namespaces made here only."""

LIMIT = 240.0
"""Seconds that anything may take; only a machine with much else to do needs them."""

# What the container's runtime does before the command; arguments: host name, hosts file, then pairs of folder and path
# up to "--", then the command.
_CONTAINER = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
shift 2
mount -t tmpfs tmpfs /mnt
while [ "$1" != -- ]; do
    mkdir -p "$2"
    mount --bind "$1" "$2"
    shift 2
done
shift
exec "$@"
"""


def can_isolate() -> bool:
    """Whether this user may make namespaces."""
    return os.geteuid() == 0 and not _try("unshare", "--net", "--mount", "true")


def _try(*command: str) -> int:
    with suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode
    return 1


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, timeout=20)


class Pod:
    """One pod under way."""

    def __init__(self, cluster: Cluster, group: str, index: int, template: dict[str, Any]):
        self.host = f"{cluster.run}-{group}-0-{index}"
        self.log_file = cluster.folder / f"{self.host}.log"
        self.address = ""
        self._cluster, self._container = cluster, template["spec"]["containers"][0]
        environment = self._environment(cluster, group, index, template)
        command = [*self._container["command"], *self._container["args"]]
        mounts = self._mounts(template)
        if not cluster.isolated:
            command = cluster.on_loopback(command, mounts)
        else:
            namespace, self.address = cluster.attach()
            volumes = [str(word) for pair in mounts for word in pair]
            command = [
                *("ip", "netns", "exec", namespace),
                *("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"),
                *("sh", "-c", _CONTAINER, "sh", self.host, str(cluster.hosts), *volumes, "--", *command),
            ]
        with self.log_file.open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _environment(self, cluster: Cluster, group: str, index: int, template: dict[str, Any]) -> dict[str, str]:
        labels = template["metadata"]["labels"] | {
            "jobset.sigs.k8s.io/jobset-name": cluster.run,
            "jobset.sigs.k8s.io/replicatedjob-name": group,
            "jobset.sigs.k8s.io/restart-attempt": str(cluster.restarts),
        }
        environment = {"JOB_COMPLETION_INDEX": str(index)}
        for source in self._container.get("envFrom", []):
            environment |= cluster.config_maps[source["configMapRef"]["name"]]
        for variable in self._container["env"]:
            if "value" in variable:
                environment[variable["name"]] = variable["value"]
            else:
                path = variable["valueFrom"]["fieldRef"]["fieldPath"]
                assert path.startswith("metadata.labels['"), path
                environment[variable["name"]] = labels[path.split("'")[1]]
        image = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(cluster.folder)}
        return image | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment

    def _mounts(self, template: dict[str, Any]) -> list[tuple[Path, str]]:
        """Folders of this machine, and the paths at which the container sees them."""
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        found = []
        for mount in self._container["volumeMounts"]:
            volume, path = volumes[mount["name"]], mount["mountPath"]
            if "configMap" in volume:
                found.append((self._cluster.config_folder(volume["configMap"]["name"]), path))
            elif "persistentVolumeClaim" in volume:
                found.append((self._cluster.volume, path))
            elif volume["emptyDir"].get("medium") == "Memory":
                folder = self._cluster.folder / f"{self.host}-{volume['name']}"
                folder.mkdir(exist_ok=True)
                found.append((folder, path))
        return found

    @property
    def _first(self) -> psutil.Process:
        """The container's first process."""
        process = psutil.Process(self._process.pid)
        return process.children()[0] if self._cluster.isolated else process

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def terminate(self) -> None:
        """What kubelet does first."""
        self._first.send_signal(signal.SIGTERM)

    def probe(self, name: str) -> int:
        """Exit status of a probe, run in the container."""
        command = self._container[name]["exec"]["command"]
        entered = ["nsenter", "--target", str(self._first.pid), "--mount", "--pid", *command]
        return subprocess.run(entered, check=False, timeout=20).returncode

    def read(self, url: str) -> str:
        """A page, read as the cluster's Prometheus would: by the pod's address, from another namespace."""
        code = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=10).read().decode())"
        command = ["ip", "netns", "exec", self._cluster.switch, sys.executable, "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout

    def wait_for(self, text: str, limit: float = LIMIT) -> None:
        """Until `text` stands in the log, at most `limit` seconds."""
        deadline = time.monotonic() + limit
        while text not in self.log:
            assert time.monotonic() < deadline and self._process.poll() is None, f"no {text!r} in:\n{self.log}"
            time.sleep(0.1)

    def wait(self, limit: float = LIMIT) -> int:
        """The container's exit status."""
        return self._process.wait(limit)

    def kill(self) -> None:
        """The pod's node is gone: all its processes at once."""
        self._process.kill()  # unshare takes its children along
        self._process.wait(20)


class Cluster:
    """The pods of a JobSet, one volume for all, and the network between them. A context manager that leaves nothing.

    Without the right to make namespaces the pods run on loopback, with the volumes' paths rewritten.

    Args:
        folder: an empty one, for volumes and logs.
    """

    def __init__(self, folder: Path):
        self.folder, self.isolated = folder, can_isolate()
        self.volume, self.hosts = folder / "volume", folder / "hosts"
        self.volume.mkdir()
        self.restarts = 0
        self.run = ""
        self.config_maps: dict[str, dict[str, str]] = {}
        self.switch = f"unipool-{os.getpid()}"
        self._port = free_port()
        self._namespaces: list[str] = []
        self._pods: list[Pod] = []

    def __enter__(self) -> Cluster:
        if self.isolated:
            self._make_namespace(self.switch)
            _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self.switch, "addr", "add", f"{NETWORK}.1/24", "dev", "bridge")
            _ip("-n", self.switch, "link", "set", "bridge", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self._pods:
            pod.kill()
        for namespace in self._namespaces:
            _ip("netns", "del", namespace)

    def start(self, manifests: list[dict[str, Any]], arguments: list[str], names_known: bool = True) -> dict[str, Pod]:
        """Start every pod of the JobSet among `manifests`; returns them by host name.

        Args:
            arguments: as an overlay's patch would give them to the container: `args`.
            names_known: whether the headless service is there yet; else `publish` makes it.
        """
        self.config_maps = {m["metadata"]["name"]: m["data"] for m in manifests if m["kind"] == "ConfigMap"}
        (job_set,) = [m for m in manifests if m["kind"] == "JobSet"]
        self.run = job_set["metadata"]["name"]
        self.hosts.write_text("127.0.0.1 localhost\n")
        pods = []
        for group in job_set["spec"]["replicatedJobs"]:
            job = group["template"]["spec"]
            job["template"]["spec"]["containers"][0]["args"] = arguments
            pods += [Pod(self, group["name"], index, job["template"]) for index in range(job["completions"])]
            self._pods += pods
        started = {pod.host: pod for pod in pods}
        self._addresses = "".join(f"{pod.address} {pod.host}.{self.run} {pod.host}\n" for pod in pods if pod.address)
        if names_known:
            self.publish()
        return started

    def publish(self) -> None:
        """The headless service's names."""
        with self.hosts.open("a") as hosts:  # the same file: pods have mounted it
            hosts.write(self._addresses)

    def config_folder(self, name: str) -> Path:
        """A ConfigMap as a folder."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for key, text in self.config_maps[name].items():
            (folder / key).write_text(text)
        return folder

    def on_loopback(self, command: list[str], mounts: list[tuple[Path, str]]) -> list[str]:
        """The same command where there are no namespaces: other paths, one address for all, free ports."""
        for folder, path in mounts:
            for script in self.folder.glob("*/start.sh"):
                script.write_text(script.read_text().replace(path, str(folder)))
            command = [word.replace(path, str(folder)) for word in command]
        return [*command, "--master-addr", "127.0.0.1", "--master-port", str(self._port), "--set", "metrics.port=0"]

    def attach(self) -> tuple[str, str]:
        """A network namespace on the bridge: its name and address."""
        number = len(self._namespaces) + 1
        name, address = f"{self.switch}-{number}", f"{NETWORK}.{number}"
        self._make_namespace(name)
        _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"pod{number}", "netns", self.switch)
        _ip("-n", self.switch, "link", "set", f"pod{number}", "master", "bridge", "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        return name, address

    def _make_namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._namespaces.append(name)
        _ip("-n", name, "link", "set", "lo", "up")
