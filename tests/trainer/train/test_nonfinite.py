"""Numbers that are not finite: routers' logits, losses, and how they are written and printed."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import TIME_LIMIT, join, run_ranks
from tests.trainer.forked import ForkedJob
from tests.trainer.job import write_recipe
from tests.training import optimizer_step, tiny, tokens
from trainer.checkpoint.format import complete
from trainer.common.errors import DIVERGED
from trainer.common.strict_json import dumps, name_not_finite
from trainer.config.recipe import Recipe, load_recipe
from trainer.planning.schedule import make_schedule
from trainer.train.ends.summary import perplexity

ROOT = Path(__file__).parents[3]

LAYOUTS: dict[str, dict[str, Any]] = {
    "colocated": {"trunk_zero": 1, "pool_zero": 1},
    "every rank, zero 0": {"layout": "every_rank", "trunk_ranks": 2, "trunk_zero": 0, "pool_zero": 0},
    "1+1": {"pool_ranks": 1, "lanes": 2},
    "2+1": {"trunk_ranks": 2, "pool_ranks": 1, "trunk_zero": 2},
}


def broken_routers(recipe: Recipe) -> dict[str, Any] | None:
    """A step with infinite logits in the last layer of the last trunk rank, then evaluation and probe."""
    from trainer.data.batches import SequenceStream
    from trainer.train.agreement import agreed_placement
    from trainer.train.pool_rank import PoolRank
    from trainer.train.trunk_rank import TrunkRank

    job, data = join(recipe), tokens(recipe)
    placement = agreed_placement(job, recipe, None)
    if not job.is_trunk:
        assert placement
        pool = PoolRank(recipe, job, make_schedule(recipe), placement)
        before = {name: p.clone() for name, p in pool.engines["pool/shard_0"].module.named_parameters()}
        assert optimizer_step(job, pool, 0) is None
        for name, parameter in pool.engines["pool/shard_0"].module.named_parameters():
            assert parameter.equal(before[name]), name
        for _ in range(2):
            pool.evaluate(1, 1)
        job.close()
        return None
    role = TrunkRank(
        recipe, job, make_schedule(recipe), placement, SequenceStream([data], 0), SequenceStream([data], None)
    )
    router = role.trunk.blocks[-1].router
    if job.rank == recipe.parallel.trunk_ranks - 1:
        router.forward = _infinite_first_token(router.forward)
    modules = [engine.module for engine in role.engines.values()]
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    scalars = optimizer_step(job, role, 0)
    assert scalars
    for module, values in zip(modules, before, strict=True):
        for name, value in module.state_dict().items():
            assert value.equal(values[name]), name
    found = {"loss": scalars.loss, "applied": scalars.applied, "tokens": scalars.nonfinite_router_tokens}
    found["val_loss"], _ = role.evaluate(1, 1)
    found["random_loss"], _ = role.evaluate(1, 1, random_layer=1)
    job.close()
    return found


def _infinite_first_token(forward: Any) -> Any:
    """A router whose first token has an infinite logit and whatever gradient that has."""

    def route(h_TD: torch.Tensor, **others: Any) -> Any:
        return forward(h_TD * torch.tensor([math.inf] + [1.0] * (len(h_TD) - 1))[:, None], **others)

    return route


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("norm", "colocated"),
        ("sigmoid_bias", "every rank, zero 0"),
        ("softmax", "1+1"),
        ("sigmoid_bias", "1+1"),
        ("norm", "2+1"),
    ],
)
def test_a_step_with_infinite_router_logits_is_skipped_and_counted(kind: str, layout: str) -> None:
    balance = {} if kind == "norm" else {"pool": 0.0, "layer": 0.01}
    recipe = tiny(router={"kind": kind}, parallel=LAYOUTS[layout], balance=balance)
    ranks = run_ranks(recipe.grid.world_size, broken_routers, recipe)
    for found in ranks[: recipe.parallel.trunk_ranks]:
        assert not found["applied"]
        assert found["tokens"] == recipe.micro_batches  # one of each micro-batch of one rank
        assert all(math.isnan(found[name]) for name in ("loss", "val_loss", "random_loss")), found


def test_a_diverged_run_ends_as_told(tmp_path: Path) -> None:
    """All steps are done, most of them skipped: a summary without a sample, records that are JSON, status 3."""
    rate = ["train.lr=1e20", "train.min_lr=1e20", "checkpoint.every=1", "checkpoint.keep=1", "probe.every=0"]
    recipe = load_recipe(str(write_recipe(tmp_path)), [f"run.dir={tmp_path / 'run'}", *rate])
    job = ForkedJob(recipe, tmp_path)
    assert job.end(TIME_LIMIT) == [DIVERGED, DIVERGED], job.log(0)
    log = job.log(0)
    assert "Traceback" not in log + job.log(1)
    assert "validation loss   nan: not finite, because the model has diverged" in log
    assert "sample            none, because the model's logits are not finite" in log
    assert re.search(
        r"^unipool: all steps are done, but the model has diverged \(validation loss nan\): .* Exit status 3$",
        log,
        re.M,
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse_constant) for line in lines]
    steps = [record for record in records if "applied" in record]
    assert [step["applied"] for step in steps] == [True, False, False, False]
    assert steps[-1]["loss"] is None and {"loss", "grad_norm"} <= set(steps[-1]["not_finite"])
    assert "not_finite" not in steps[0]
    assert records[-1] == {"step": 4, "val_loss": None, "val_tokens": 256, "not_finite": ["val_loss"]}
    assert [folder.name for folder in complete(tmp_path / "run" / "checkpoints")] == ["step_00000004"]


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("indent", [None, 1])
def test_dumps(indent: int | None) -> None:
    tree = {"a": [math.nan, 1.5, (math.inf, None)], "b": {"c": -math.inf, "d": "NaN"}, "e": np.float64("nan"), "f": 3}
    text = dumps(tree, indent)
    expected = {"a": [None, 1.5, [None, None]], "b": {"c": None, "d": "NaN"}, "e": None, "f": 3}
    assert json.loads(text, parse_constant=refuse_constant) == expected
    assert ("\n" in text) == bool(indent)
    assert name_not_finite({"a": 1.0, "b": math.inf}) == {"a": 1.0, "b": math.inf, "not_finite": ["b"]}
    assert name_not_finite({"a": 1.0}) == {"a": 1.0}


def test_json_is_written_in_one_place() -> None:
    """Whoever calls json.dump(s) itself may write NaN, which is no JSON."""
    callers = set()
    for path in (file for package in ("trainer", "pool", "router") for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps", "JSONEncoder")
            if named and isinstance(node.value, ast.Name) and node.value.id == "json":
                callers.add(str(path.relative_to(ROOT)))
            if isinstance(node, ast.ImportFrom) and node.module == "json":
                callers.add(str(path.relative_to(ROOT)))
    assert callers == {"trainer/common/strict_json.py"}


def test_a_perplexity_that_no_float_holds() -> None:
    assert perplexity(0.0) == 1 and perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan))
