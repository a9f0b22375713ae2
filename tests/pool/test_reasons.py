"""What real messages of gloo, NCCL and the store are taken for."""

from __future__ import annotations

import pytest

from pool.wire.reasons import from_peers, ran_out

WORK = "WorkNCCL(SeqNum=7, OpType=COALESCED, NumelIn=0, NumelOut=0, Timeout(ms)=300000)"

LIMITS = [
    "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 60000ms for recv operation to complete",
    f"[Rank 3] Watchdog caught collective operation timeout: {WORK} ran for 300012 milliseconds before timing out.",
    f"[Rank 3] Work {WORK} timed out in blocking wait.",
    "NCCL timeout when waiting for nonblocking call to become successful.",
    "wait timeout after 300000ms, keys: /default_pg/0/0",
    "Socket Timeout",
]
LOST = [
    "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:40404",
    "Read error [127.0.0.1]:40404: Connection reset by peer",
    "Write error: Broken pipe",
    f"Collective {WORK} raised the following async exception: NCCL error: remote process exited or there was a network "
    "error, NCCL version 2.30.3 ncclRemoteError: A call failed possibly due to a network error or a remote process "
    "exiting prematurely. Last error: NET/IB : Got completion from peer 10.0.0.7 with status=12",
    "NCCL communicator was aborted on rank 3. ",
]
OURS = ["CUDA out of memory. Tried to allocate 2.00 GiB.", f"Collective {WORK} failed: ncclInvalidUsage"]


@pytest.mark.parametrize("reason", LIMITS)
def test_a_limit_has_passed(reason: str) -> None:
    assert ran_out(reason) and from_peers(reason)


@pytest.mark.parametrize("reason", LOST)
def test_a_peer_is_lost(reason: str) -> None:
    assert from_peers(reason) and not ran_out(reason)


@pytest.mark.parametrize("reason", OURS)
def test_no_peer_has_to_do_with_it(reason: str) -> None:
    assert not from_peers(reason) and not ran_out(reason)
