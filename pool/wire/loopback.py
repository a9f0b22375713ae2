"""What a rank that has both roles sends to itself: messages that stay in the process, handed over as they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pool.wire.contract import End, Exchange, WireError


@dataclass(frozen=True)
class Message:
    """A payload and its header; an answer has a header with `WireSettings.check` only."""

    header: Tensor | None
    rows_ND: Tensor


class Loopback:
    """Holds the messages of one thread, which makes requests, serves them and uses their answers in this order."""

    def __init__(self) -> None:
        self._requests: dict[Exchange, Message] = {}
        self._answers: dict[Exchange, Message] = {}

    def put_request(self, exchange: Exchange, message: Message) -> None:
        """Hand a request to this rank's shard."""
        self._requests[exchange] = message

    def take_request(self, exchange: Exchange, end: End) -> Message:
        """Return a request. If it has not been made, the schedule has it in the wrong place."""
        if exchange not in self._requests:
            raise WireError(f"{end.me} is to serve a request of its own that it has not made: {exchange}")
        return self._requests.pop(exchange)

    def put_answer(self, exchange: Exchange, message: Message) -> None:
        """Hand over the answer to a request."""
        self._answers[exchange] = message

    def take_answer(self, exchange: Exchange, end: End) -> Message:
        """Return an answer. If there is none, the request has not been served."""
        if exchange not in self._answers:
            raise WireError(f"{end.me} needs the answer to a request of its own that it has not served: {exchange}")
        return self._answers.pop(exchange)
