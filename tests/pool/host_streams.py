"""The seam `pool.wire.streams` without a device: what is launched happens at once, messages travel over gloo."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pool.wire.streams import Message


class Done:
    """An event that has come."""

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class HostStreams:
    """See `pool.wire.streams.Streams`."""

    def enter(self) -> None:
        pass

    def new(self) -> None:
        return None

    def on(self, stream: None) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self) -> Done:
        return Done()

    def wait(self, event: Done) -> None:
        pass

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    def used(self, tensor: Tensor) -> None:
        pass

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def to_device(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    def copy(self, into: Tensor, source: Tensor) -> None:
        into.copy_(source)


class HostWork:
    """Messages under way, which a thread waits for; gloo's own works do not say whether they are done."""

    def __init__(self, works: list[Any]):
        self._works, self._error = works, ""
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            self._error = str(error)

    def wait(self) -> None:
        self._thread.join()

    def is_completed(self) -> bool:
        if self._error:
            raise RuntimeError(self._error)
        return not self._thread.is_alive()


class HostCommunicator:
    """See `pool.wire.streams.Communicator`."""

    def __init__(self, group: Any):
        self.group = group

    def launch(self, sends: Sequence[Message] = (), receives: Sequence[Message] = ()) -> HostWork:
        works = [self.group.send([tensor], peer, 0) for tensor, peer in sends]
        return HostWork(works + [self.group.recv([tensor], peer, 0) for tensor, peer in receives])

    def abort(self) -> None:
        pass
