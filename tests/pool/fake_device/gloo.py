"""A process group of gloo, for headers: messages by tag, limits, connections that break."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import Tensor

from tests.pool.fake_device.clocks import Clock
from tests.pool.fake_device.world import Signal, World, current


class Box:
    """Messages of one tag from one rank to another, in order. A send is over when its receive has been posted."""

    def __init__(self) -> None:
        self.sent: deque[tuple[Tensor, Clock]] = deque()
        self.signal = Signal()
        self.count_sent = self.count_posted = self.taken = 0


class Mail:
    """All boxes of a group."""

    def __init__(self, world: World):
        self.world = world
        self.boxes: dict[tuple[int, int, int], Box] = {}
        self.lose: Callable[[int, int, Tensor], bool] = lambda source, target, message: False
        self.tag = 0  # of the message that is being sent, for `lose`


class GlooWork:
    """`torch.distributed.Work` of gloo: `wait` blocks the host."""

    def __init__(self, group: FakeGloo, peer: int, box: Box, number: int, into: Tensor | None):
        self._group, self._peer, self._box, self._number, self._into = group, peer, box, number, into

    def _ready(self) -> bool:
        box = self._box
        if self._into is None:
            return box.count_posted > self._number
        return box.count_sent > self._number and box.taken == self._number

    def wait(self, timeout: timedelta | None = None) -> bool:
        world = self._group.mail.world
        verb = "send" if self._into is None else "recv"
        limit = None if timeout is None else timeout.total_seconds()
        what = f"a header {verb} with rank {self._peer}"
        dead = world.dead_ranks
        come = world.wait(lambda: self._ready() or self._peer in dead, self._box.signal, what, limit, learns=False)
        if not self._ready():
            if come:
                raise RuntimeError("Read error [127.0.0.1]:40404: Connection reset by peer")
            assert limit is not None
            raise RuntimeError(f"Timed out waiting {limit * 1000:g}ms for {verb} operation to complete")
        if self._into is not None:
            message, clock = self._box.sent.popleft()
            self._box.taken += 1
            self._into.copy_(message)
            world.fire(self._box.signal)
            if world.races:
                world.races.learn(current(), clock)
        return True

    def is_completed(self) -> bool:
        """As gloo: a receive says no until somebody waits."""
        return self._into is None and self._ready()


class FakeGloo:
    """One rank's end of a group."""

    def __init__(self, mail: Mail, rank: int):
        self.mail, self.rank = mail, rank

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> GlooWork:
        box = self._box(self.rank, peer, tag, peer)
        number = box.count_sent
        world = self.mail.world
        self.mail.tag = tag
        if not self.mail.lose(self.rank, peer, tensors[0]):
            box.count_sent += 1
            box.sent.append((tensors[0].clone(), world.races.stamp(current()) if world.races else {}))
            world.fire(box.signal)
        return GlooWork(self, peer, box, number, None)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> GlooWork:
        box = self._box(peer, self.rank, tag, peer)
        number = box.count_posted
        box.count_posted += 1
        self.mail.world.fire(box.signal)
        return GlooWork(self, peer, box, number, tensors[0])

    def _box(self, source: int, target: int, tag: int, peer: int) -> Box:
        world: Any = self.mail.world
        world.check_alive(current())
        world.give_way()
        if peer in world.dead_ranks:
            raise RuntimeError("Connection closed by peer [127.0.0.1]:40404")
        return self.mail.boxes.setdefault((source, target, tag), Box())
