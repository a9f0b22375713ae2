"""Faults of the network: ranks on two nodes, which are network namespaces of this machine joined by one cable."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable

from tests.faults.jobs import LAYOUTS, Node
from tests.faults.scene import Fault, Scene, is_fault, is_fine
from trainer.cluster.launch import free_port

SHORT = 4.0
"""Seconds of an interruption that all limits allow."""

_NODES = (0, 1)
_lock = threading.Lock()


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, timeout=60)


def _names(scene: Scene) -> list[str]:
    return [f"faults-{os.getpid()}-{scene.setting.folder.name}-{node}" for node in _NODES]


def _address(node: int) -> str:
    return f"10.89.0.{node + 1}"


def _two_nodes(scene: Scene) -> None:
    """Give each node a network, and process numbers, of its own."""
    setting = scene.setting
    names = _names(scene)
    for node, name in enumerate(names):
        _ip("netns", "add", name)
        scene.undo.append(lambda name=name: subprocess.run(["ip", "netns", "del", name], check=False, timeout=60))
        _ip("-n", name, "link", "set", "lo", "up")
        if node:
            _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", name)
    for node, name in enumerate(names):
        _ip("-n", name, "addr", "add", f"{_address(node)}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
    ranks = sum(value for key, value in LAYOUTS[setting.layout].items() if key.endswith("_ranks"))
    slots = [ranks - 1, 1]
    hosts = setting.folder / "hosts"
    hosts.write_text("".join(f"{_address(node)} slots={slots[node]}\n" for node in _NODES))
    setting.environment["GLOO_SOCKET_IFNAME"] = "eth0"
    port = str(free_port())
    setting.nodes = [
        Node(
            slots[node],
            ("ip", "netns", "exec", name, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"),
            ("--hostfile", str(hosts), "--node-rank", str(node), "--master-addr", _address(0), "--master-port", port),
        )
        for node, name in enumerate(names)
    ]


def _link(state: str) -> Callable[[Scene], None]:
    return lambda scene: _ip("-n", _names(scene)[0], "link", "set", "eth0", state)


def _filter(*rule: str) -> Callable[[Scene], None]:
    """Let the first node treat what comes from the second in this way."""

    def act(scene: Scene) -> None:
        enter = ("ip", "netns", "exec", _names(scene)[0], "iptables", "-w")
        subprocess.run([*enter, "-A", "INPUT", "-s", _address(1), *rule], check=True, timeout=60)

    return act


def _no_filter(scene: Scene) -> None:
    subprocess.run(["ip", "netns", "exec", _names(scene)[0], "iptables", "-w", "-F"], check=True, timeout=60)


def _for_a_while(act: Callable[[Scene], None], end: Callable[[Scene], None]) -> Callable[[Scene], None]:
    def act_and_end(scene: Scene) -> None:
        act(scene)
        timer = threading.Timer(SHORT, end, (scene,))
        timer.start()
        scene.undo.append(timer.join)

    return act_and_end


def _lose(share: str) -> tuple[str, ...]:
    return ("-m", "statistic", "--mode", "random", "--probability", share, "-j", "DROP")


_RESET = ("-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")


def _kill_node(scene: Scene) -> None:
    """End all processes of the second node at once; its connections stay open, for its link is down too."""
    _link("down")(scene)
    assert scene.start
    scene.start.kill_node(1)


FAULTS: dict[str, Fault] = {
    "link down": Fault(is_fault, prepare=_two_nodes, act=_link("down"), heal=_link("up"), names=True, waits=True),
    "link down for a while": Fault(
        is_fine, prepare=_two_nodes, act=_for_a_while(_link("down"), _link("up")), seconds=3 * SHORT
    ),
    "packets vanish": Fault(
        is_fault, prepare=_two_nodes, act=_filter("-j", "DROP"), heal=_no_filter, names=True, waits=True
    ),
    "packets vanish for a while": Fault(
        is_fine, prepare=_two_nodes, act=_for_a_while(_filter("-j", "DROP"), _no_filter), seconds=3 * SHORT
    ),
    "connections reset": Fault(
        is_fault, prepare=_two_nodes, act=_filter(*_RESET), heal=_no_filter, names=True, waits=True
    ),
    "every tenth packet is lost": Fault(
        is_fine, prepare=_two_nodes, act=_filter(*_lose("0.1")), heal=_no_filter, seconds=60
    ),
    "a node dies": Fault(
        is_fault, prepare=_two_nodes, act=_kill_node, heal=_link("up"), goes_on=False, names=True, waits=True
    ),
}
