"""Add up a tensor over all processes of a job and print the bandwidth: `torchrun ... all_reduce.py [cuda|cpu]`."""

from __future__ import annotations

import os
import resource
import sys
import time

import torch
import torch.distributed as dist

NUMBERS = {"cuda": 1 << 28, "cpu": 1 << 20}
"""Elements of the tensor: 1 GiB for GPUs."""

ROUNDS = 20


def main(device: str) -> int:
    """Return the exit status: 0, or 1 if the sum is wrong."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if os.environ.get("NCCL_NET") == "IB" and limit != resource.RLIM_INFINITY and os.geteuid() != 0:
        print(
            f"error: {os.uname().nodename} may lock only {limit:,} bytes of memory, which RDMA cannot work with: set "
            "LimitMEMLOCK=infinity in containerd's systemd unit on the node",
            file=sys.stderr,
        )
        return 2
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = torch.full((NUMBERS[device],), float(rank + 1), device=device)
    dist.all_reduce(x)  # makes the connections
    total = ranks * (ranks + 1) / 2
    right = bool((x == total).all())
    _wait(device)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(x, dist.ReduceOp.MAX)
    _wait(device)
    seconds = (time.perf_counter() - start) / ROUNDS
    if rank == 0:
        size, sent = x.nbytes / 1e6, 2 * (ranks - 1) / ranks * x.nbytes / seconds / 1e9
        print(f"{ranks} ranks: all-reduce of {size:,.0f} MB in {1e3 * seconds:.2f} ms, {sent:.1f} GB/s a rank")
    if not right:
        print(f"error: rank {rank} on {os.uname().nodename} has another sum than {total:,.0f}", file=sys.stderr)
    dist.destroy_process_group()
    return 0 if right else 1


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["cuda"])))
