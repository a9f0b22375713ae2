"""Checks of the network: interfaces of gloo and NCCL, InfiniBand, ports for metrics, the hub."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from trainer.cluster.network import INTERFACE, address_towards, interface_with
from trainer.config.recipe import Recipe
from trainer.doctor.findings import Finding, error, ok, warning

_NCCL = "NCCL_SOCKET_IFNAME"
_ELSEWHERE = "198.51.100.1"
"""An address that no machine has (RFC 5737): the way to it is the way to other machines."""
_INFINIBAND = Path("/sys/class/infiniband")


def interfaces(recipe: Recipe | None) -> Iterator[Finding]:
    """Which interface gloo and NCCL use, and whether one that the environment names is there."""
    up = [name for name, state in psutil.net_if_stats().items() if state.isup]
    own = address_towards(_ELSEWHERE)
    by_default = interface_with(own) if own else None
    default = f"{by_default} ({own})" if by_default else "only this machine (no route to others)"
    for about, variable in (("gloo", INTERFACE), ("NCCL", _NCCL)):
        wanted = os.environ.get(variable)
        if wanted is None:
            continue
        if not _named(wanted, up, exact=variable == INTERFACE):
            mend = f"unset it, or name one of {', '.join(up)}"
            yield error(about, f"{variable}={wanted} names no interface that is up", mend)
        else:
            yield ok(about, f"{variable}={wanted}")
    yield ok("network", default)
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        mend = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo for jobs on one machine"
        yield warning("host name", f"{socket.gethostname()} has no address, which gloo looks for", mend)
    ports = sorted(_INFINIBAND.glob("*/ports/*/state"))
    active = [port.parts[-4] for port in ports if "ACTIVE" in port.read_text()]
    if ports and not active:
        yield warning("InfiniBand", f"none of {len(ports)} ports is active", "see ibstat, and the cables")
    elif ports:
        yield ok("InfiniBand", f"{', '.join(dict.fromkeys(active))} of {len(ports)} ports")


def _named(wanted: str, up: list[str], exact: bool) -> bool:
    """Whether an interface that is up is meant: by name for gloo, by beginnings (or with "=", "^") for NCCL."""
    if exact:
        return wanted in up
    names, chosen = wanted.lstrip("^=").split(","), []
    for name in up:
        meant = name in names if "=" in wanted[:2] else any(name.startswith(begin) for begin in names)
        chosen += [name] if meant != wanted.startswith("^") else []
    return bool(chosen)


def ports(recipe: Recipe | None) -> Iterator[Finding]:
    """Whether the ports on which a recipe's ranks serve metrics are free."""
    if recipe is None:
        return
    m, ranks = recipe.metrics, recipe.grid.world_size
    if m.port == 0:
        yield ok("metrics.port", "0: each rank takes a free one")
        return
    taken = []
    for port in range(m.port, m.port + ranks):
        with socket.socket(socket.AF_INET6 if ":" in m.host else socket.AF_INET) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((m.host, port))
            except OSError as problem:
                if problem.errno != errno.EADDRINUSE:
                    raise
                taken.append(port)
    found = f"{m.port} to {m.port + ranks - 1} on {m.host}" if ranks > 1 else f"{m.port} on {m.host}"
    if taken:
        mend = "is this run still training? otherwise set another metrics.port, or 0"
        yield error("metrics.port", f"{found}: {', '.join(map(str, taken))} in use", mend)
    else:
        yield ok("metrics.port", f"{found}: free")
