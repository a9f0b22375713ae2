"""Upcycled models compute what they were made from, unless noise is asked for; and they train on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.importing.checkpoints import (
    VOCAB,
    assert_close,
    checkpoint,
    refusal,
    some_tokens,
    tokenizer,
    unipool,
)
from tests.training import run_training, tiny
from trainer.config.recipe import load_recipe
from trainer.export.loaded_model import load_model

DENSE: dict[str, Any] = {"model": {"ffn": "dense"}, "pool": {"experts": 0}, "balance": {"pool": 0.0}}
VANILLA: dict[str, Any] = {"model": {"groups": 3}, "pool": {"experts": 12}, "balance": {"layer": 0.05, "pool": 0.0}}
RUNS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "softmax": VANILLA | {"router": {"kind": "softmax"}},
    "norm": VANILLA,
    "norm_bias": VANILLA | {"router": {"kind": "norm_bias", "bias_rate": 0.3}},
    "sigmoid_bias": VANILLA | {"router": {"kind": "sigmoid_bias", "bias_rate": 0.3}},
}
OPTIONS = {
    "dense": ("--experts", "9", "--top-k", "3"),
    "dense, norm": ("--router", "norm", "--top-k", "1"),
}


def run(name: str, folder: Path) -> Path:
    """Train a run for one step."""
    sections = {key: dict(value) for key, value in RUNS[name].items()}
    sections["model"] |= {"vocab": VOCAB}
    parallel = {"trunk_zero": 0, "pool_zero": 0}
    recipe = tiny(**sections, parallel=parallel, data={"source": "gone", "tokenizer": "train"})
    run_training(recipe, 1, save_to=folder / "checkpoints")
    (folder / "tokenizer.json").write_text(tokenizer())
    return folder


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    found: Tensor = load_model(folder).model(some_tokens()[:, :9]).logits
    return found


@pytest.mark.parametrize("name", [*RUNS, "dense, norm"])
def test_runs_start_as_they_were(name: str, tmp_path: Path) -> None:
    """Whatever their router, with biases of the selection that have moved."""
    source = run(name.removesuffix(", norm"), tmp_path)
    done = unipool("upcycle", source, tmp_path / "pool", *OPTIONS.get(name, ()))
    assert done.exit_code == 0, done.exception
    assert_close(logits(tmp_path / "pool"), logits(source))
    config = load_model(tmp_path / "pool").model.config
    assert (config.num_expert_groups, config.num_experts) == (1, {"dense": 9, "dense, norm": 6}.get(name, 12))


def test_checkpoints_and_exports_too(tmp_path: Path) -> None:
    """A checkpoint of Hugging Face whose top-k is renormalised, or its import; the recipe of both has one pool."""
    checkpoint("qwen3_moe", tmp_path / "theirs")
    assert unipool("import", tmp_path / "theirs", tmp_path / "ours").exit_code == 0
    expected = logits(tmp_path / "ours")
    for source in ("theirs", "ours"):
        done = unipool("upcycle", tmp_path / source, tmp_path / f"pool of {source}", "--set", "run.dir=elsewhere")
        assert done.exit_code == 0, done.exception
        assert float((logits(tmp_path / f"pool of {source}") - expected).abs().max()) <= 1e-5 * float(
            expected.abs().max()
        )
        recipe = load_recipe(str(tmp_path / f"pool of {source}" / "recipe.yaml"))
        assert (recipe.model.groups, recipe.pool.experts, recipe.router.logit_bias) == (1, 15, True)
        assert recipe.run.dir == "elsewhere" and recipe.balance.layer == 0


def test_noise_and_distance_open_the_pool(tmp_path: Path) -> None:
    """Copies of an FFN differ by the noise, and foreign experts are chosen as soon as they are not far below."""
    source = run("dense", tmp_path / "run")
    options = ("--experts", "6", "--noise", "0.1", "--distance", "0")
    assert unipool("upcycle", source, tmp_path / "pool", *options).exit_code == 0
    model = load_model(tmp_path / "pool").model
    first, second, foreign = model.model.experts.down_proj[:3]
    own = load_model(source).model.model.layers[0].mlp.down_proj.weight
    for copy in (first, second):
        assert float((copy - own).std() / own.std()) == pytest.approx(0.1, rel=0.2)
    assert float((foreign - own).std() / own.std()) > 1
    seen = model(some_tokens()[:, :9], output_router_logits=True).router_logits[0].topk(2).indices
    assert int(seen.max()) > 1


def test_what_cannot_be_exact_is_refused(tmp_path: Path) -> None:
    dense, pool = run("dense", tmp_path / "dense"), tmp_path / "pool"
    assert "--experts 7: must be a multiple of the 3 layers" in refusal("upcycle", dense, pool, "--experts", "7")
    assert "--top-k 2: must be from 2 to the copies" in refusal("upcycle", dense, pool, "--experts", "3")
    assert "must have --top-k 1 and --experts 6" in refusal("upcycle", dense, pool, "--router", "norm")
    assert unipool("upcycle", dense, pool).exit_code == 0
    assert "its layers share one pool already; `unipool resize` changes its size" in refusal(
        "upcycle", pool, tmp_path / "again"
    )
    unused = refusal("upcycle", pool, tmp_path / "again", "--top-k", "2")
    assert "--top-k: SOURCE has experts and routers of its own; leave it out" in unused
