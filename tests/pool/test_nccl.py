"""The communicator over NCCL, with a stand-in for torch's group, and what it relies on in torch."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from pool.wire.nccl import MAX_CTAS, NcclCommunicator


class Work:
    """A work of a group: `done` says whether its kernel has ended, `error` what NCCL has found."""

    done = False
    error: RuntimeError | None = None

    def is_completed(self) -> bool:
        return self.done or self.error is not None

    def wait(self) -> None:
        if self.error:
            raise self.error

    def synchronize(self) -> None:
        pass


class Group:
    """Notes what is called."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.work = Work()

    def _start_coalescing(self) -> None:
        self.calls.append("start")

    def _end_coalescing(self) -> Work:
        self.calls.append("end")
        return self.work

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self.calls.append(("send", len(tensors[0]), peer))

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self.calls.append(("recv", len(tensors[0]), peer))


def test_messages_are_launched_in_groups() -> None:
    group = Group()
    communicator = NcclCommunicator(group, range(8, 16))
    communicator.launch([(torch.ones(2), 13), (torch.ones(3), 15)], [(torch.ones(4), 14)])
    communicator.launch(receives=[(torch.ones(4), 8)])
    sends = [("send", 2, 5), ("send", 3, 7)]
    assert group.calls == ["start", *sends, ("recv", 4, 6), "end", "start", ("recv", 4, 0), "end"]


def test_a_failed_work_is_not_taken_for_a_completed_one() -> None:
    """torch's works are completed when they have failed, too."""
    group = Group()
    work = NcclCommunicator(group, range(8)).launch([(torch.ones(2), 5)])
    assert not work.is_completed()
    group.work.error = RuntimeError("NCCL error: remote process exited or there was a network error")
    with pytest.raises(RuntimeError, match="remote process exited"):
        work.is_completed()
    group.work.error, group.work.done = None, True
    assert work.is_completed()


def test_what_torch_offers() -> None:
    """Only the names, which this build without CUDA has too."""
    backend = {"_start_coalescing", "_end_coalescing", "eager_connect_single_device", "abort", "shutdown"}
    assert backend <= set(dir(c10d.Backend))
    assert {"is_completed", "wait", "synchronize"} <= set(dir(c10d.Work))
    stub = (Path(cast(Any, torch).__file__).parent / "_C" / "_distributed_c10d.pyi").read_text()
    nccl = stub[stub.index("class ProcessGroupNCCL") :]
    for line in ("config: ProcessGroupNCCL.NCCLConfig", "max_ctas: int", "is_high_priority_stream: bool"):
        assert line in nccl


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this build of torch has no NCCL")
def test_what_a_build_with_nccl_offers() -> None:
    """What `Job` sets before it has a GPU."""
    options = c10d.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas, options._timeout = MAX_CTAS, timedelta(seconds=77)
    assert (options.config.max_ctas, options._timeout) == (MAX_CTAS, timedelta(seconds=77))
    assert options.is_high_priority_stream
    offered = {"send", "recv", "eager_connect_single_device", "_start_coalescing", "_end_coalescing", "abort"}
    assert offered | {"_set_default_timeout"} <= set(dir(c10d.ProcessGroupNCCL))


def test_a_limit_would_block_the_host() -> None:
    """Why nothing here gives torch's works a limit."""
    assert "if timeout is set, it will block the CPU thread until the NCCL work is completed" in str(
        c10d.Work.wait.__doc__
    )
