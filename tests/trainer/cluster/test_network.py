"""The interface on which gloo listens, on made-up and real networks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from tests.deploy.pods import can_isolate
from tests.distributed import TIME_LIMIT
from tests.trainer.job import ROOT
from trainer.cluster import network
from trainer.cluster.launch import free_port
from trainer.cluster.network import INTERFACE, address_towards, choose_gloo_interface, loopback_listener
from trainer.cluster.rendezvous import Launch, _open_stores

INTERFACES = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1", "fe80::1%ib0"]}


@pytest.fixture(autouse=True)
def made_up_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is 10.0.0.1 and 10.1.0.1."""
    addresses = {name: [SimpleNamespace(address=a) for a in own] for name, own in INTERFACES.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(network, "address_towards", {"10.0.0.2": "10.0.0.1", "10.1.0.2": "10.1.0.1"}.__getitem__)
    monkeypatch.setenv(INTERFACE, "")  # so that it is restored
    monkeypatch.delenv(INTERFACE)


@pytest.mark.parametrize(
    ("own", "others", "interface"),
    [
        ("10.0.0.1", ["127.0.1.1", "10.0.0.1"], "eth0"),  # this machine reaches the store's host, which is another
        ("10.1.0.1", ["127.0.1.1", "10.1.0.1"], "ib0"),
        ("127.0.1.1", ["127.0.1.1", "10.1.0.2"], "ib0"),  # the store's host, which Debian knows by a loopback address
        ("", ["", "10.0.0.2"], "eth0"),
        ("fe80::1%ib0", ["::1", "fe80::1%ib0"], "ib0"),
        ("127.0.0.1", ["127.0.0.1", "127.0.0.1"], "lo"),  # one machine
        ("::1", ["::1", "::1"], "lo"),
        ("", ["", ""], None),
        ("10.9.0.1", ["10.9.0.1", "127.0.0.1"], None),  # an address without an interface
    ],
)
def test_the_interface_that_reaches_the_other_machines(own: str, others: list[str], interface: str | None) -> None:
    choose_gloo_interface(own, others)
    assert os.environ.get(INTERFACE) == interface


def test_the_users_choice_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERFACE, "eth1")
    choose_gloo_interface("10.0.0.1", ["10.0.0.1"])
    assert os.environ[INTERFACE] == "eth1"


def test_addresses_by_route() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("no-such-host.invalid") == ""


def listening_on(port: int) -> set[str]:
    listening = [own.laddr for own in psutil.Process().net_connections() if own.status == psutil.CONN_LISTEN]
    return {address.ip for address in listening if address.port == port}


def test_the_store_of_one_machine_listens_on_localhost_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    launch = Launch(0, 1, 0, 1, "127.0.0.1", free_port())
    stores = _open_stores(launch, timedelta(seconds=TIME_LIMIT))
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"
    assert listening_on(launch.master_port) == {"127.0.0.1"}
    with pytest.raises(OSError, match=f"in use: '127.0.0.1:{launch.master_port}'"):
        loopback_listener("127.0.0.1", launch.master_port)


def test_the_store_of_several_machines_listens_on_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [loopback_listener(host, 0) for host in ("10.0.0.1", "node0", "localhost", "")] == [None] * 4
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    node_0 = Launch(0, 2, 0, 1, "127.0.0.1", free_port())
    stores = _open_stores(node_0, timedelta(seconds=TIME_LIMIT))
    assert stores[0].port == node_0.master_port
    assert listening_on(node_0.master_port) in ({"::"}, {"0.0.0.0"}, {"::", "0.0.0.0"})


def test_gloo_takes_its_interface_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this module relies on."""
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=5))
    group.shutdown()
    monkeypatch.setenv(INTERFACE, "none0")
    with pytest.raises(RuntimeError, match="none0"):
        dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=5))


NODE = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
shift 2
exec "$@"
"""
GLOO_RANK = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from trainer.cluster.network import address_towards, choose_gloo_interface
rank, limit = int(sys.argv[1]), timedelta(seconds=60)
store = dist.TCPStore("first", 29511, is_master=rank == 0, timeout=limit, wait_for_workers=False)
own = address_towards("first")
store.set(str(rank), own)
choose_gloo_interface(own, [store.get(str(other)).decode() for other in range(2)])
total = torch.ones(1)
group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, 2, limit)
group.allreduce([total]).wait()
print(own, total.item())
store.set(f"done{rank}", "")
store.wait([f"done{other}" for other in range(2)], limit)
"""


@pytest.fixture
def two_machines() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: 10.88.9.1 and 10.88.9.2."""
    if not can_isolate():
        pytest.skip("needs the right to make namespaces")
    names = [f"unipool-net-{os.getpid()}-{number}" for number in range(2)]
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add v0 netns {names[0]} type veth peer name v1 netns {names[1]}")
    for number, name in enumerate(names):
        commands += [f"-n {name} addr add 10.88.9.{number + 1}/24 dev v{number}"]
        commands += [f"-n {name} link set {device} up" for device in ("lo", f"v{number}")]
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, timeout=60)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=60)


def test_machines_that_know_themselves_by_a_loopback_address(two_machines: list[str], tmp_path: Path) -> None:
    """As Debian's do: without the choice of an interface gloo would listen on 127.0.1.1."""
    ranks = []
    for rank, (namespace, host) in enumerate(zip(two_machines, ("first", "second"), strict=True)):
        lines = {"first": "10.88.9.1", "second": "10.88.9.2"} | {host: "127.0.1.1"}
        hosts = tmp_path / host
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in lines.items()))
        isolated = ["ip", "netns", "exec", namespace, "unshare", "--mount", "--uts", "--kill-child", "--fork"]
        command = [*isolated, "sh", "-c", NODE, "sh", host, str(hosts), sys.executable, "-c", GLOO_RANK, str(rank)]
        ranks.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    try:
        assert ranks[0].communicate(timeout=120)[0] in ("127.0.0.1 2.0\n", "127.0.1.1 2.0\n")
        assert ranks[1].communicate(timeout=120)[0] == "10.88.9.2 2.0\n"
    finally:
        for process in ranks:
            process.kill()
