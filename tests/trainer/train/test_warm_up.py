"""The warm-up before the first step on GPUs, here on CPUs: it leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

from tests.training import assert_same, run_training, tiny
from trainer.model.warm_up import compiler_error

LAYOUTS: dict[str, dict[str, Any]] = {
    "colocated": {"trunk_ranks": 2},
    "dedicated": {"trunk_ranks": 2, "pool_ranks": 2, "lanes": 2, "trunk_zero": 0, "pool_zero": 0},
    "dedicated-zero": {"pool_ranks": 2, "trunk_ranks": 2, "expert_parallel": 1, "trunk_zero": 2, "pool_zero": 1},
    "zero-3": {"pool_ranks": 1, "trunk_zero": 3},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_leaves_nothing_behind(layout: str) -> None:
    """The same numbers to the bit, though the shard's load and the balance loss's statistics count everything."""
    recipe = tiny(parallel=LAYOUTS[layout], balance={"pool": 0.05, "layer": 0.01, "scope": "global_batch"})
    plain, warm = (run_training(recipe, steps=2, warm_up=warm_up) for warm_up in (False, True))
    assert_same(plain, warm, tolerance=0.0)
    assert plain.load_LM.equal(warm.load_LM)


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
