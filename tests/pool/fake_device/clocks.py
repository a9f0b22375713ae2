"""Happens-before by vector clocks: every access of a buffer, and its end, is ordered with all others.

Each thread and each stream counts its own events. Waiting for something takes over what its origin knew. Two accesses
of the same bytes, at least one of which writes, are a race unless the later one knows of the earlier one. Memory that
is freed goes back to the stream on which it was allocated, as in torch's caching allocator, so what still uses it must
be over by then on that stream, or be on a stream that was named by `record_stream` before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Clock = dict[str, int]


class Race(AssertionError):
    """Two accesses of a buffer that nothing orders."""


@dataclass
class Access:
    """Who read or wrote a range of bytes, and at which of his events."""

    who: str
    event: int
    start: int
    end: int
    writes: bool
    what: str

    def known_by(self, clock: Clock) -> bool:
        return clock.get(self.who, 0) >= self.event


@dataclass
class Buffer:
    """A piece of memory of a device, or pinned memory of its host."""

    name: str
    memory: Any  # the bytes as a numpy array, kept until the end of the last operation on them
    stream: Any  # on which it was allocated; None for pinned memory
    accesses: list[Access] = field(default_factory=list)
    used_on: list[Any] = field(default_factory=list)  # streams named by record_stream
    freed: str = ""


def merge(into: Clock, other: Clock) -> None:
    """Take over what another clock knows."""
    for who, event in other.items():
        if into.get(who, 0) < event:
            into[who] = event


class Races:
    """The clocks of a world, and what was found wrong."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.accesses = self.frees = 0

    def stamp(self, actor: Any, onto: Clock | None = None) -> Clock:
        """An event of a thread, for others to learn of; return its clock, joined with `onto`."""
        actor.clock[actor.clock_key] = actor.clock.get(actor.clock_key, 0) + 1
        clock = dict(actor.clock)
        merge(clock, onto or {})
        return clock

    def learn(self, actor: Any, clock: Clock) -> None:
        """A thread has seen something that happened after all of `clock`."""
        merge(actor.clock, clock)

    def access(self, buffer: Buffer, start: int, end: int, writes: bool, who: str, clock: Clock, what: str) -> None:
        """Check an access against all earlier ones, and keep it. `clock` has `who`'s current event."""
        self.accesses += 1
        access = Access(who, clock[who], start, end, writes, what)
        if buffer.freed:
            self.found.append(f"{what} uses {buffer.name}, but {buffer.freed}")
        kept = []
        written = writes
        for other in buffer.accesses:
            overlaps = other.start < end and start < other.end
            written = written or (overlaps and other.writes)
            known = other.known_by(clock)
            if overlaps and (writes or other.writes) and not known:
                how = "writes" if writes else "reads"
                self.found.append(f"{what} {how} {buffer.name}; nothing orders it with {other.what}")
            if not (known and writes and start <= other.start and other.end <= end):
                kept.append(other)
        if not written and end - start > 1:  # the message that connects two ranks is a byte, whatever it is
            self.found.append(f"{what} reads {buffer.name}; nothing orders it with a write, for there was none")
        buffer.accesses = [*kept, access]

    def free(self, buffer: Buffer, clock: Clock, what: str) -> None:
        """Check that nothing uses a buffer any more at `clock`, when its memory may be used again."""
        self.frees += 1
        for access in buffer.accesses:
            if not access.known_by(clock):
                self.found.append(f"{what} frees {buffer.name}; nothing orders it with {access.what}")
        buffer.freed = f"{what} has freed it"
