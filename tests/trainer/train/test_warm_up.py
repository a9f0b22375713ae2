"""The warm-up before the first step on GPUs, here on CPUs: it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.training import assert_same, join, make_schedule, run_training, tiny, tokens
from trainer.config.recipe import Recipe
from trainer.model.warm_up import compiler_error

LAYOUTS: dict[str, dict[str, Any]] = {
    "colocated": {"trunk_ranks": 2},
    "dedicated": {"trunk_ranks": 2, "pool_ranks": 2, "lanes": 2, "trunk_zero": 0, "pool_zero": 0},
    "dedicated-zero": {"pool_ranks": 2, "trunk_ranks": 2, "expert_parallel": 1, "trunk_zero": 2, "pool_zero": 1},
    "zero-3": {"pool_ranks": 1, "trunk_zero": 3},
    "every-rank": {"layout": "every_rank", "trunk_ranks": 2, "lanes": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_leaves_nothing_behind(layout: str) -> None:
    """The same numbers to the bit, though the shard's load and the balance loss's statistics count everything."""
    recipe = tiny(parallel=LAYOUTS[layout], balance={"pool": 0.05, "layer": 0.01, "scope": "global_batch"})
    plain, warm = (run_training(recipe, steps=2, warm_up=warm_up) for warm_up in (False, True))
    assert_same(plain, warm, tolerance=0.0)
    assert plain.load_LM.equal(warm.load_LM)


def _noted(recipe: Recipe) -> list[str]:
    """What a rank does in a warm-up, in order."""
    from trainer.data.batches import SequenceStream
    from trainer.train.agreement import agreed_placement
    from trainer.train.pool_rank import PoolRank
    from trainer.train.trunk_rank import TrunkRank

    job, log = join(recipe), []
    placement = agreed_placement(job, recipe, None)
    assert placement
    role: TrunkRank | PoolRank
    if job.is_trunk:
        data = tokens(recipe)
        training, validation = SequenceStream([data], 0), SequenceStream([data], None)
        role = TrunkRank(recipe, job, make_schedule(recipe), placement, training, validation)
        loss = role.trunk.loss
        role.trunk.loss = lambda *args: (log.append("loss"), loss(*args))[1]  # type: ignore[method-assign]
    else:
        role = PoolRank(recipe, job, make_schedule(recipe), placement)
    (engine,) = role.engines.values()
    accumulating, barrier = engine.accumulating, job.barrier

    @contextmanager
    def noted() -> Iterator[None]:
        with accumulating():
            yield
            log.append("reduction")

    engine.accumulating = noted
    job.barrier = lambda: (log.append("barrier"), barrier())[1]  # type: ignore[method-assign]
    role.warm_up(job.start_timeout)
    del job.barrier
    job.close()
    return log


def test_ranks_meet_before_they_reduce() -> None:
    """A reduction on GPUs ends the process after `parallel.timeout_seconds`; compiling may take longer."""
    recipe = tiny(parallel={"trunk_ranks": 2, "pool_ranks": 2, "expert_parallel": 1, "trunk_zero": 1, "pool_zero": 1})
    trunk, pool = ["loss", "barrier", "reduction"], ["barrier", "reduction"]
    assert run_ranks(4, _noted, recipe) == [trunk, trunk, pool, pool]


def _reaches(recipe: Recipe) -> list[str]:
    """What layers reach in the warm-up, an evaluation and a generation at the start."""
    from trainer.data.batches import SequenceStream
    from trainer.train import trunk_rank
    from trainer.train.agreement import agreed_placement
    from trainer.train.evaluation import held_out

    kinds: list[str] = []

    def noted(function: Any) -> Any:
        def call(trunk: Any, pool_map: Any, *others: Any) -> Any:
            kinds.append("none" if pool_map.reaches is None else type(pool_map.reaches[0]).__name__)
            return function(trunk, pool_map, *others)

        return call

    trunk_rank.train_micro_batch = noted(trunk_rank.train_micro_batch)
    held_out.hidden_states = noted(held_out.hidden_states)
    job, stream = join(recipe), SequenceStream([tokens(recipe)], 0)
    placement = agreed_placement(job, recipe, None)
    role = trunk_rank.TrunkRank(recipe, job, make_schedule(recipe), placement, stream, stream)
    role.warm_up(job.start_timeout)
    role.evaluate(1, 0)
    role.generate([1, 2], 1, 0)
    job.close()
    return kinds


@pytest.mark.parametrize(("allocation", "reach"), [("learned", "Faded"), ("random", "Owned"), (None, "none")])
def test_a_run_with_a_lock_warms_up_as_it_begins(allocation: str | None, reach: str) -> None:
    """Otherwise its segments would be compiled for a reach that it never has. Evaluation and generation are locked."""
    lock = {} if allocation is None else {"lock": {"allocation": allocation}}
    recipe = tiny(pool={"experts": 12}, train={"micro_batch": 8}, **lock)
    assert run_ranks(1, _reaches, recipe) == [[reach] * 3]


def test_why_the_compiler_fails_is_one_line() -> None:
    missing = "InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 for ...\n"
    assert compiler_error(missing) == "InvalidCxxCompiler: No working C++ compiler found"
    header = "CppCompileError: C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\nIn file included from a.cpp:2:\n"
    cause = "a.h:6:10: fatal error: Python.h: No such file or directory"
    assert (
        compiler_error(f"{header}{cause}\ncompilation terminated.\n") == f"CppCompileError: C++ compile error {cause}"
    )
    backend = "backend='inductor' raised:\nRuntimeError: No working triton\n\nSet ..."
    assert compiler_error(backend) == "backend='inductor' raised: RuntimeError: No working triton"
