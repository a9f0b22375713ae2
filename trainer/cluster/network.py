"""How this rank reaches others: the host of the job's store, and the interface on which its gloo listens.

gloo takes the address of the host's name, which Debian and many containers resolve to a loopback address. Other
machines cannot reach that.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

INTERFACE = "GLOO_SOCKET_IFNAME"
"""Environment variable: the interface that gloo uses."""

_ANY_PORT = 9  # nothing is sent

_LOOK_SECONDS = 0.05
_LOOKING_SECONDS = 5.0


def address_towards(host: str) -> str:
    """Return the address from which this machine reaches `host`; "" if that is not known."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as s:
            s.connect(target)
            return str(s.getsockname()[0])
    except OSError:
        return ""


def wait_for_listener(host: str, port: int) -> None:
    """Wait until somebody listens on a port, or for a few seconds.

    torch's store waits as long as it takes, and says why, but looks again only after 0.25 to 0.75 s, and then more and
    more rarely (torch/csrc/distributed/c10d/TCPStore.cpp, Backoff.cpp).
    """
    deadline = time.monotonic() + _LOOKING_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((host, port), timeout=_LOOKING_SECONDS):
            return
        time.sleep(_LOOK_SECONDS)


def loopback_listener(host: str, port: int) -> int | None:
    """Return the descriptor of a socket on a port of a loopback address, on which torch's store can listen.

    The store itself would listen on all addresses of the machine. None for other addresses, and for names.

    Raises:
        OSError: The port is in use.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if not address.is_loopback:
        return None
    listener = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        error.filename = f"{host}:{port}"
        raise
    return listener.detach()


def choose_gloo_interface(own: str, others: Sequence[str]) -> None:
    """Let gloo use the interface through which this rank reaches the others, unless the user has named one.

    On a single machine that is reached by a loopback address it is the loopback interface, which others cannot reach.

    Args:
        own: This rank's address towards the host of the job's store.
        others: Those of all ranks.
    """
    if INTERFACE in os.environ:
        return
    reachable = [address for address in others if not _is_loopback(address)]
    if reachable and _is_loopback(own):  # the store's host is this machine
        own = address_towards(reachable[0])
    if interface := interface_with(own):
        os.environ[INTERFACE] = interface


def interface_with(own: str) -> str | None:
    """Return the interface of this machine that has an address."""
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            return str(interface)
    return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return True
