"""Recipes are checked when they are loaded: an error is one line with the key, the value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from trainer.common.errors import UserError
from trainer.config.recipe import load_recipe, recipe_names, recipe_text, save_recipe
from trainer.config.sections import source_names

WRONG = {
    "train.stpes=3": "train.stpes: unknown key; did you mean steps?",
    "optimiser.lr=3": "optimiser: unknown key; allowed: run, model,",
    "train.steps=many": "train.steps = 'many': must be a valid integer",
    "train.steps=0": "train.steps = 0: must be greater than or equal to 1",
    "train.lr=-1": "train.lr = -1: must be greater than 0",
    "model.ffn=sparse": "model.ffn = 'sparse': must be 'pool' or 'dense'",
    "model.heads=3": "model.heads = 3: must divide model.hidden (128)",
    "model.kv_heads=3": "model.kv_heads = 3: must divide model.heads (4)",
    "model.groups=3": "model.groups = 3: must divide model.layers (8)",
    "model.groups=two": "model.groups = 'two': must be a valid integer",
    "model.groups=[1, 6, 1]": "model.groups = [1, 6, 1]: must be a valid integer",
    "model.layers=null": "model.layers = None: must be a valid integer",
    "pool.experts=0": "pool.experts = 0: must be at least 1 with model.ffn = pool",
    "router.top_k=65": "router.top_k = 65: must be at most the experts a layer sees (64)",
    "router={kind: softmax, constant_factor: 2}": "router.constant_factor = 2.0: must be 1 with router.kind = softmax",
    "router.bias_rate=1e308": "router.bias_rate = 1e+308: must be less than or equal to 1e+38",
    "parallel.timeout_seconds=1e30": "parallel.timeout_seconds = 1e+30: must be less than or equal to",
    "lock={alocation: random}": "lock.alocation: unknown key; did you mean allocation?",
    "lock.full_fraction=0": "lock.full_fraction = 0: must be greater than 0",
    "lock={anneal_fraction: 0.99}": "lock.anneal_fraction = 0.99: must be at most 1 - lock.full_fraction (0.983333)",
    "lock=random": "lock = 'random': must be a mapping, as in {key: value}",
    "balance.delay=0": "balance.delay = 0: must be at least 1 with balance.scope = global_batch",
    "train.global_batch=12": "train.global_batch = 12: must be divisible by train.micro_batch x parallel.trunk_ranks",
    "parallel.pool_ranks=3": "pool.experts = 64: must be divisible by the shards of the pool (3)",
    "parallel.expert_parallel=2": "parallel.expert_parallel = 2: must divide parallel.pool_ranks (1)",
    "parallel.trunk_zero=4": "parallel.trunk_zero = 4: must be 0, 1, 2 or 3",
    "train.compile=auto": "train.compile = 'auto': must be a valid boolean",
    "profile.steps=3": "profile.steps = 3: must be a list",
    "profile.steps=[3, 4, 5]": "profile.steps = [3, 4, 5]: must have at most 2 items, not 3",
    "parallel.pool_zero=3": "parallel.pool_zero = 3: must be 0, 1 or 2",
    "parallel={trunk_ranks: 2, pool_ranks: 1, trunk_zero: 3}": "parallel.trunk_zero = 3: needs parallel.lanes=1",
    "model.ffn=dense": "pool.experts = 64: must be 0 with model.ffn = dense",
    "probe={every: 5, layers: [7, 8]}": "probe.layers = [7, 8]: must be different numbers from 0 to 7",
    "probe.layers=[]": "probe.layers = []: must have at least 1 item",
    "topology.order=pool_first": "topology.order = 'pool_first': must be 'pool_last' or 'interleaved'",
    "train.lr=0": "train.lr = 0: must be greater than 0",
    "train.pool_lr_factor=1": "train.pool_lr_factor: unknown key",
    "train.pool_lr_factor=0.35": "train.pool_lr_factor: unknown key",
    "train.min_lr=1": "train.min_lr = 1.0: must be at most train.lr (0.002)",
    "data.split=[0, 1, 1]": "data.split = [0, 1, 1]: the first part (training) must be above 0",
    "data.split=[3, 0, 1]": "data.split = [3, 0, 1]: the second part (validation) must be above 0, or data.validation",
    "data.source=3": "data.source = 3: must be a name in quotes, or a list such as [{source: a, weight: 2}",
    "data.source=[a]": "data.source = ['a']: must be a name in quotes, or a list",
    "data.source=[]": "data.source = []: must name at least one source",
    "data.source=[{weight: 1}]": "data.source.0.source: missing",
    "data.source=[{source: a, wieght: 2}]": "data.source.0.wieght: unknown key; did you mean weight?",
    "data.source=[{source: a}, {source: b, weight: 0}]": "data.source.1.weight = 0: must be greater than or",
    "data.validation=[{source: a, weight: .inf}]": "data.validation.0.weight = inf: must be ",
    "data.max_bad_share=2": "data.max_bad_share = 2: must be less than or equal to 1",
    "metrics.port=65535": "metrics.port = 65535: port + rank must stay below 65536; the last would be 65536",
    "train.steps": "--set train.steps: must be key=value, as in --set train.steps=100",
    "train.steps.x=1": "steps is a value, not a section",
}


@pytest.mark.parametrize(("override", "message"), WRONG.items(), ids=list(WRONG))
def test_wrong_keys_and_values(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("quickstart", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_recipe_suggests_names() -> None:
    with pytest.raises(UserError, match="did you mean: quickstart"):
        load_recipe("quikstart")


def test_zero_3_is_never_compiled() -> None:
    with pytest.raises(UserError, match="train.compile = True: must be false or left out with parallel.trunk_zero = 3"):
        load_recipe("quickstart", ["parallel.trunk_zero=3", "train.compile=true"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["router.kind=softmax"], "router.kind = 'softmax': must be norm with a section lock"),
        (["model.groups=2"], "model.groups = 2: must be 1 with a section lock"),
        (["pool.experts=60"], "pool.experts = 60: must be a multiple of model.layers (8) with a section lock"),
        (["router.top_k=9"], "router.top_k = 9: must be at most the experts that a layer owns with a section lock (8)"),
        (["model.ffn=dense", "pool.experts=0", "parallel.pool_ranks=0"], "model.ffn = 'dense': must be pool with a"),
    ],
)
def test_what_a_lock_needs(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("quickstart", ["lock={}", *overrides])
    assert message in str(caught.value)


def test_a_lock_is_switched_on_and_off(tmp_path: Path) -> None:
    """Also in the resolved recipe of a run without one, which says `lock: null`."""
    save_recipe(load_recipe("quickstart"), tmp_path / "recipe.yaml")
    locked = load_recipe(str(tmp_path / "recipe.yaml"), ["lock.allocation=random"])
    assert locked.lock and locked.lock.coverage == 0.95
    save_recipe(locked, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml"), ["lock=null"]) == load_recipe("quickstart")


def test_the_default_width_of_a_head_may_be_written_out() -> None:
    """It is no other model to a resume, a sweep or a schedule; another width is."""
    recipe = load_recipe("quickstart")
    assert load_recipe("quickstart", [f"model.head_dim={recipe.model.head_size}"]) == recipe
    assert load_recipe("quickstart", ["model.head_dim=2"]).model.head_dim == 2
    with pytest.raises(UserError, match="model.hidden: missing"):
        load_recipe("quickstart", ["model={layers: 1, heads: 2, head_dim: 4, ffn_hidden: 8, vocab: 9}"])


def test_probed_layers() -> None:
    """The deep half, or those that are named; a dense model has no routing to probe."""
    assert load_recipe("quickstart").probed_layers == (4, 5, 6, 7)
    assert load_recipe("quickstart", ["model.layers=7"]).probed_layers == (4, 5, 6)
    assert load_recipe("quickstart", ["probe={every: 1, layers: [0, 2]}"]).probed_layers == (0, 2)
    with pytest.raises(UserError, match="probe.every = 5: must be 0 with model.ffn = dense"):
        load_recipe("dense-182m", ["probe.every=5"])


def test_a_dense_model_has_nothing_of_a_pool() -> None:
    with pytest.raises(UserError, match="model.private_ffn = 64: must be 0 with model.ffn = dense"):
        load_recipe("dense-182m", ["model.private_ffn=64"])


def test_recipes_of_older_runs(tmp_path: Path) -> None:
    """They name every key, also one that exists no more, with the value that changed nothing."""
    recipe = load_recipe("mid")
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe).replace("\n  lr:", "\n  pool_lr_factor: 1.0\n  lr:"))
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_sources(tmp_path: Path) -> None:
    """One, or several with weights; the saved recipe gives the same."""
    recipe = load_recipe("quickstart", ["data.source=[{source: a, weight: 2}, {source: b, max_tokens: 9}]"])
    assert source_names(recipe.data.source) == "2 x a, 1 x b"
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe
    own = load_recipe("quickstart", ["data.split=[9, 0, 1]", "data.validation=held-out.txt"])
    assert own.data.validation == source_names("held-out.txt") == "held-out.txt"


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not YAML"), ("- 1", "must be a mapping of sections"), ("run: {dir: x}", "model: missing")],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(tmp_path / "r.yaml"))


def test_overrides_and_numbers_with_exponents() -> None:
    recipe = load_recipe("quickstart", ["train.lr=2e-3", "run.dir=elsewhere", "data.max_documents=5"])
    assert (recipe.train.lr, recipe.run.dir, recipe.data.max_documents) == (2e-3, "elsewhere", 5)


@pytest.mark.parametrize("name", recipe_names())
def test_the_resolved_recipe_loads_to_itself(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError):
        load_recipe("quickstart").train.steps = 1  # type: ignore[misc]


def test_the_limit_of_deferred_work_follows_from_the_shapes() -> None:
    """In bf16 2048 rows of each expert of a shard: x and dy (768 each), dH (6144), the activation (3072)."""
    colocated = ["parallel.pool_ranks=0", "parallel.trunk_ranks=1"]
    limits = {
        (): 2**30,  # 24 experts a shard, for which it is more
        tuple(colocated): 2048 * 96 * (2 * 768 + 6144 + 3072) * 2,
        (*colocated, "train.precision=fp32"): 2**30,
        (*colocated, "pool.stash_bytes=5"): 5,
    }
    for changes, limit in limits.items():
        assert load_recipe("unipool-182m", changes).stash_limit == limit, changes
