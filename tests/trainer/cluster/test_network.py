"""The interface on which gloo listens, on made-up and real networks."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from trainer.cluster import network
from trainer.cluster.network import INTERFACE, address_towards, choose_gloo_interface

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
        ("127.0.0.1", ["127.0.0.1", "127.0.0.1"], None),  # one machine
        ("::1", ["::1", "::1"], None),
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


def test_gloo_takes_its_interface_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this module relies on."""
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=5))
    group.shutdown()
    monkeypatch.setenv(INTERFACE, "none0")
    with pytest.raises(RuntimeError, match="none0"):
        dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=5))
