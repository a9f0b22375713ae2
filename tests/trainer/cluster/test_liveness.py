"""What heartbeats tell about ranks that are alive."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from trainer.cluster.devices import Sight
from trainer.cluster.liveness import Arrival, Liveness


def test_a_rank_that_others_wait_for_is_late() -> None:
    """It has come to fewer meetings; a rank that waits is not late itself, and whoever has arrived no longer is."""
    store = dist.HashStore()
    ranks = [Liveness(rank, ["trunk", "pool"], store, store) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda rank: rank.exchange_arrivals(Arrival("", "", Sight("host", 0))), ranks))
    assert [rank.late() for rank in ranks] == [[], []]
    ranks[0].meetings = 1
    assert [rank.late() for rank in ranks] == [[1], []]
    ranks[1].meetings = 1
    while ranks[0].late():  # until the next heartbeat
        time.sleep(0.05)
    for rank in ranks:
        rank.stop()
