"""Run rendered pods as processes of this machine, as close to a cluster as possible.

Each pod gets what kubelet and the JobSet controller would give it: the container's command and environment, the
downward API's values, its volumes at their paths, a host name, and namespaces of its own: network (joined to the others
by a bridge that is in a namespace too), mounts, processes and shared memory. Its command is process 1 there. Names of
the headless service are lines of an /etc/hosts that only the pods see.

Left out, because this machine's own files serve as the image: the user 1000, the read-only root, and volumes at /tmp
and below /home.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.distributed import TIME_LIMIT
from tests.tools import need
from tests.trainer.job import BIN, ROOT
from trainer.cluster.launch import free_port
from trainer.common.atomic import atomic_write

ADDRESSES = "10.88.0"
"""Addresses that exist in the namespaces made here only."""

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
    return os.geteuid() == 0 and _works("unshare", "--net", "--mount", "true") and _works("ip", "netns")


def _works(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=TIME_LIMIT).returncode == 0
    except FileNotFoundError:
        return False


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, timeout=TIME_LIMIT)


class Network:
    """A bridge in a namespace of its own, and a namespace for each pod on it. A context manager that leaves nothing."""

    def __init__(self) -> None:
        self.isolated = can_isolate()
        self.switch = f"unipool-{os.getpid()}"
        self.gateway = f"{ADDRESSES}.1"
        self._given = 1
        self._namespaces: list[str] = []

    def __enter__(self) -> Network:
        if self.isolated:
            self._make_namespace(self.switch)
            _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self.switch, "addr", "add", f"{self.gateway}/24", "dev", "bridge")
            _ip("-n", self.switch, "link", "set", "bridge", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in reversed(self._namespaces):
            subprocess.run(("ip", "netns", "del", namespace), check=False, timeout=TIME_LIMIT)

    def attach(self) -> tuple[str, str]:
        """A new namespace on the bridge: its name and address."""
        self._given += 1
        number = self._given
        name, address = f"{self.switch}-{number}", f"{ADDRESSES}.{number}"
        self._make_namespace(name)
        _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"pod{number}", "netns", self.switch)
        _ip("-n", self.switch, "link", "set", f"pod{number}", "master", "bridge", "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        return name, address

    def cut(self, namespace: str) -> None:
        """Pull the cable of a pod's namespace."""
        _ip("-n", namespace, "link", "set", "eth0", "down")

    def detach(self, namespace: str) -> None:
        """Remove a namespace from which all processes are gone."""
        self._namespaces.remove(namespace)
        _ip("netns", "del", namespace)

    def read(self, url: str) -> str:
        """A page, as something else in the cluster sees it."""
        code = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=60).read().decode())"
        command = ["ip", "netns", "exec", self.switch, sys.executable, "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIME_LIMIT).stdout

    def _make_namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._namespaces.append(name)
        _ip("-n", name, "link", "set", "lo", "up")


class Pod:
    """One pod under way.

    Args:
        host: its host name.
        template: its rendered template.
        labels: those it has in the cluster: the template's, and what a controller adds.
        index: its completion index.
        fields: what else the downward API may be asked for.
    """

    def __init__(
        self,
        cluster: Cluster,
        host: str,
        template: dict[str, Any],
        labels: Mapping[str, str],
        index: int,
        fields: Mapping[str, str] | None = None,
    ):
        self.host, self.name = host, (fields or {}).get("metadata.name", host)
        self.log_file = cluster.folder / f"{self.name}.log"
        self.address = self.namespace = ""
        self._cluster, self._container = cluster, template["spec"]["containers"][0]
        program, *arguments = self._container["command"]
        command = [need(program, program), *arguments, *self._container.get("args", [])]
        if cluster.isolated:
            self.namespace, self.address = cluster.network.attach()
            shm = cluster.folder / f"{self.name}-shm"
            shm.mkdir(exist_ok=True)
            volumes = [str(word) for pair in (cluster.volumes | {"/dev/shm": shm}).items() for word in reversed(pair)]
            command = [
                *("ip", "netns", "exec", self.namespace),
                *("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"),
                *("sh", "-c", _CONTAINER, "sh", self.host, str(cluster.hosts), *volumes, "--", *command),
            ]
        else:
            command = [*map(cluster.localize, command), *cluster.loopback]
        fields = {"metadata.name": host, "status.podIP": self.address, "spec.nodeName": "node", **(fields or {})}
        environment = self._environment(cluster, labels, index, fields)
        with self.log_file.open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _environment(
        self, cluster: Cluster, labels: Mapping[str, str], index: int, fields: Mapping[str, str]
    ) -> dict[str, str]:
        environment = {"JOB_COMPLETION_INDEX": str(index)}
        for source in self._container.get("envFrom", []):
            environment |= cluster.config_maps[source["configMapRef"]["name"]]
        for variable in self._container.get("env", []):
            source = variable.get("valueFrom", {})
            if "value" in variable:
                environment[variable["name"]] = variable["value"]
            elif "fieldRef" in source:
                path = source["fieldRef"]["fieldPath"]
                found = labels[path.split("'")[1]] if path.startswith("metadata.labels['") else fields[path]
                environment[variable["name"]] = found
            else:
                assert source["secretKeyRef"]["optional"], f"{variable['name']}: there are no Secrets here"
        image = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(cluster.folder)}
        image |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return image | {"TORCH_CPP_LOG_LEVEL": "WARNING"} | environment  # it says when a name is not known

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
        return subprocess.run(entered, check=False, timeout=TIME_LIMIT).returncode

    def read(self, url: str) -> str:
        """A page, read as the cluster's Prometheus would: by the pod's address, from another namespace."""
        return self._cluster.network.read(url)

    def processes(self) -> list[psutil.Process]:
        """All that is in the container, its first process first."""
        try:
            first = self._first
            return [first, *first.children(recursive=True)]
        except (psutil.NoSuchProcess, IndexError):  # it has just ended
            return []

    def freeze(self) -> None:
        """What a dead node looks like to the others: no answer, and no farewell either."""
        self._cluster.network.cut(self.namespace)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)

    def wait_for(self, text: str, limit: float = TIME_LIMIT) -> None:
        """Until `text` stands in the log, at most `limit` seconds, in which no pod may end."""
        deadline = time.monotonic() + limit
        while text not in self.log:
            ended = {pod.name: status for pod in self._cluster._pods if (status := pod.poll()) is not None}
            assert time.monotonic() < deadline and not ended, f"no {text!r}, ended: {ended}, in:\n{self.log}"
            time.sleep(0.1)

    def wait(self, limit: float = TIME_LIMIT) -> int:
        """The container's exit status."""
        return self._process.wait(limit)

    def poll(self) -> int | None:
        """The container's exit status as kubelet tells it, or None while it runs."""
        status = self._process.poll()
        return status if status is None or status >= 0 else 128 - status

    def kill(self) -> None:
        """All its processes at once, stopped ones too."""
        self._process.kill()  # unshare takes its children along
        self._process.wait(TIME_LIMIT)


class Cluster:
    """A namespace of Kubernetes: its pods, one volume for all, and names. A context manager that leaves nothing.

    Without the right to make namespaces the pods run on loopback, with the volumes' paths rewritten.

    Args:
        folder: an empty one, for volumes and logs.
        network: on which there may be the pods of others too; by default one of its own.
    """

    def __init__(self, folder: Path, network: Network | None = None):
        self.folder, self._own = folder, network is None
        self.network = network or Network()
        self.isolated = self.network.isolated
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")
        self.volumes: dict[str, Path] = {}
        self.restarts = 0
        self.config_maps: dict[str, dict[str, str]] = {}
        self.loopback = ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--set", "metrics.port=0"]
        self._pods: list[Pod] = []

    def __enter__(self) -> Cluster:
        if self._own:
            self.network.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for pod in self._pods:
                pod.kill()
        finally:
            if self._own:
                self.network.__exit__()

    def start(self, manifests: list[dict[str, Any]], arguments: list[str], names_known: bool = True) -> dict[str, Pod]:
        """Start every pod of the JobSet among `manifests`; returns them by host name.

        Args:
            arguments: as an overlay's patch would give them to the container: `args`.
            names_known: whether the headless service is there yet; else `publish` makes it.
        """
        self.apply(manifests)
        (job_set,) = [m for m in manifests if m["kind"] == "JobSet"]
        run = job_set["metadata"]["name"]
        pods = {}
        for group in job_set["spec"]["replicatedJobs"]:
            template = group["template"]["spec"]["template"]
            template["spec"]["containers"][0]["args"] = arguments
            labels = template["metadata"]["labels"] | {
                "jobset.sigs.k8s.io/jobset-name": run,
                "jobset.sigs.k8s.io/replicatedjob-name": group["name"],
                "jobset.sigs.k8s.io/restart-attempt": str(self.restarts),
            }
            for index in range(group["template"]["spec"]["completions"]):
                pod = self.run(f"{run}-{group['name']}-0-{index}", template, labels, index)
                pods[pod.host] = pod
        self._names = {f"{host}.{run} {host}": pod.address for host, pod in pods.items()}
        self.publish(self._names if names_known else {})
        return pods

    def apply(self, manifests: list[dict[str, Any]]) -> None:
        """Keep the ConfigMaps among `manifests`."""
        self.config_maps |= {m["metadata"]["name"]: m["data"] for m in manifests if m["kind"] == "ConfigMap"}

    def run(
        self,
        host: str,
        template: dict[str, Any],
        labels: Mapping[str, str],
        index: int,
        fields: Mapping[str, str] | None = None,
    ) -> Pod:
        """Start one pod: see `Pod`."""
        self._make_volumes(template["spec"])
        pod = Pod(self, host, template, labels, index, fields)
        self._pods.append(pod)
        return pod

    def publish(self, names: Mapping[str, str] | None = None) -> None:
        """The headless service's names, all if not given, and their addresses."""
        names = self._names if names is None else names
        with self.hosts.open("r+") as hosts:  # the same file: pods have mounted it
            hosts.write("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items()))
            hosts.truncate()

    def _make_volumes(self, spec: dict[str, Any]) -> None:
        """Folders behind the pods' common volumes, by the path at which pods see them."""
        sources = {volume["name"]: volume for volume in spec["volumes"]}
        for mount in spec["containers"][0]["volumeMounts"]:
            source = sources[mount["name"]]
            if "persistentVolumeClaim" in source:
                self.volumes[mount["mountPath"]] = self.folder / "volume"
            elif "configMap" in source:
                self.volumes[mount["mountPath"]] = self.folder / source["configMap"]["name"]
        for folder in self.volumes.values():
            folder.mkdir(exist_ok=True)
            for key, text in self.config_maps.get(folder.name, {}).items():
                own = text if self.isolated else self.localize(text)
                atomic_write(folder / key, partial(Path.write_text, data=own))  # others may just be reading it

    def localize(self, text: str) -> str:
        """Where there are no mounts: a text with paths on volumes replaced by those of the folders behind them."""
        for path, folder in self.volumes.items():
            text = text.replace(path, str(folder))
        return text
