"""The memory that `plan` estimates, compared with that of ranks which really train."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import TIME_LIMIT, join, run_ranks
from trainer.config.recipe import Recipe, load_recipe
from trainer.planning.memory import estimate_memory
from trainer.planning.schedule import make_schedule

SMALLEST_MAPPING = 64 << 10
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def measured(name: str) -> int:
    """Return a number of bytes from this process's status: VmRSS, its memory, or VmHWM, the most that it was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


def peak(recipe: Recipe) -> int:
    """Train two steps on this rank, and return how much its memory has grown at most since before the model."""
    import torch

    from trainer.data.batches import SequenceStream
    from trainer.engine.deterministic import use_deterministic_kernels
    from trainer.train.agreement import agreed_placement
    from trainer.train.loop import update
    from trainer.train.pool_rank import PoolRank
    from trainer.train.trunk_rank import TrunkRank

    # Every large tensor is a mapping of its own, which goes back to the system when the tensor is freed.
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_MMAP_THRESHOLD, SMALLEST_MAPPING) and libc.mallopt(M_TRIM_THRESHOLD, SMALLEST_MAPPING)
    use_deterministic_kernels()
    job = join(recipe)
    ids = torch.randint(recipe.model.vocab, (2 * recipe.train.global_batch, recipe.model.seq_len + 1))
    rows = SequenceStream([ids.numpy()], None)
    placement, schedule = agreed_placement(job, recipe, None), make_schedule(recipe)
    job.barrier()
    before = measured("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    role: Any
    if job.is_trunk:
        role = TrunkRank(recipe, job, schedule, placement, rows, rows)
    else:
        assert placement
        role = PoolRank(recipe, job, schedule, placement)
    for step in range(2):
        update(job, role, step, role.accumulate(step))
    grown = measured("VmHWM") - before
    job.close()
    return grown


WIDE = ("model.layers=8", "model.hidden=256", "model.vocab=4000", "model.seq_len=256", "train.micro_batch=8")
DENSE = ("model.ffn=dense", "pool.experts=0", "model.layers=4", "model.hidden=768", "model.ffn_hidden=2048")
SHORT = ("model.vocab=8000", "model.seq_len=128", "train.micro_batch=1", "train.global_batch=4")
SHAPES = {
    # The trunk keeps activations of two lanes; the pool has many weights.
    "dedicated": (
        *(*WIDE, "pool.experts=256", "model.ffn_hidden=256", "train.global_batch=16", "parallel.lanes=2"),
        *("parallel.trunk_zero=0", "parallel.pool_zero=0", f"pool.stash_bytes={2**24}"),
    ),
    "colocated": (
        *(*WIDE, "pool.experts=96", "model.ffn_hidden=512", "train.global_batch=16", "parallel.lanes=1"),
        *("parallel.trunk_zero=1", "parallel.pool_zero=0", "parallel.pool_ranks=0", "train.loss_chunk=512"),
    ),
    "recomputed": (
        *(*WIDE, "pool.experts=96", "model.ffn_hidden=512", "train.global_batch=16", "parallel.lanes=1"),
        *("parallel.trunk_zero=0", "parallel.pool_zero=1", "parallel.pool_ranks=0", "train.recompute=true"),
    ),
    # A CPU without AVX-512 takes 50 times as long for some products in bf16 as in fp32.
    "bf16": (
        *(*DENSE, "model.vocab=8000", "model.seq_len=128", "train.micro_batch=2", "train.global_batch=4"),
        *("parallel.pool_ranks=0", "parallel.trunk_zero=0", "train.precision=bf16", "train.loss_chunk=256"),
    ),
    "zero 2": (*DENSE, *SHORT, "parallel.trunk_ranks=2", "parallel.pool_ranks=0", "parallel.trunk_zero=2"),
    "zero 3": (*DENSE, *SHORT, "parallel.trunk_ranks=2", "parallel.pool_ranks=0", "parallel.trunk_zero=3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_estimate_is_within_15_percent_of_a_run(shape: str, tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", (*SHAPES[shape], f"run.dir={tmp_path}"))
    grid = recipe.grid
    grown = run_ranks(grid.world_size, peak, recipe, time_limit=3 * TIME_LIMIT)
    by_role = [max(grown[: grid.trunk_ranks]), *([max(grown[grid.trunk_ranks :])] if grid.pool_ranks else [])]
    for memory, real in zip(estimate_memory(recipe, make_schedule(recipe).lanes), by_role, strict=True):
        assert real > 400e6, "too small: what else the process allocates would matter"
        said = f"{memory.role}: estimated {memory.tensors / 1e6:.0f} MB, used {real / 1e6:.0f} MB; {memory}"
        print(said)
        assert abs(memory.tensors / real - 1) < 0.15, said
