"""The recipes that come with the trainer load and match the tables of the paper."""

from __future__ import annotations

import pytest

from trainer.config.recipe import Recipe, load_recipe, recipe_names

# L, D, heads, F, M, coefficient of the pool loss
SCALES = {
    "182m": (12, 768, 12, 3072, 96, 1e-2),
    "469m": (24, 1024, 16, 4096, 192, 2e-2),
    "650m": (36, 1024, 16, 4096, 288, 2e-2),
    "830m": (48, 1024, 16, 4096, 384, 2e-2),
    "978m": (24, 1536, 16, 6144, 192, 2e-2),
}
PAPER = [f"{kind}-{scale}" for scale in SCALES for kind in ("unipool", "vanilla", "dense")] + ["unipool-830m-reduced"]


def shape(recipe: Recipe) -> tuple[int, ...]:
    m = recipe.model
    return m.layers, m.hidden, m.heads, m.ffn_hidden


def test_all_are_there() -> None:
    assert set(PAPER) <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_loads_and_writes_to_its_own_folder(name: str) -> None:
    assert load_recipe(name).run.dir == f"runs/{name}"


@pytest.mark.parametrize("name", PAPER)
def test_training_is_the_papers(name: str) -> None:
    recipe = load_recipe(name)
    m, t, d = recipe.model, recipe.train, recipe.data
    assert (t.steps, t.global_batch, m.seq_len) == (60_000, 512, 1024)
    assert (t.lr, t.min_lr, t.warmup_fraction, t.clip, t.precision) == (5e-4, 5e-5, 0.01, 1.0, "bf16")
    assert (m.kv_heads, m.vocab, m.rope_base, m.init_std, recipe.router.top_k) == (4, 51_200, 1e6, 0.01, 1)
    assert (d.source, d.tokenizer, d.split) == ("hub:monology/pile-uncopyrighted", "gpt2", (969, 30, 1))


@pytest.mark.parametrize("scale", SCALES)
def test_unipool(scale: str) -> None:
    recipe = load_recipe(f"unipool-{scale}")
    assert (*shape(recipe), recipe.pool.experts, recipe.balance.pool) == SCALES[scale]
    assert (recipe.model.ffn, recipe.model.groups, recipe.router.kind) == ("pool", 1, "norm")
    b = recipe.balance
    assert (b.layer, b.scores, b.scope, b.delay) == (0.0, "raw", "global_batch", 1)


@pytest.mark.parametrize("scale", SCALES)
def test_vanilla_has_eight_private_experts_a_layer(scale: str) -> None:
    recipe = load_recipe(f"vanilla-{scale}")
    assert (*shape(recipe), recipe.pool.experts) == SCALES[scale][:5]
    assert (recipe.model.groups, recipe.experts_per_layer, recipe.router.kind) == (recipe.model.layers, 8, "softmax")
    assert (recipe.balance.layer, recipe.balance.pool) == (1e-2, 0.0)


@pytest.mark.parametrize("scale", SCALES)
def test_dense(scale: str) -> None:
    recipe = load_recipe(f"dense-{scale}")
    assert shape(recipe) == SCALES[scale][:4]
    assert (recipe.model.ffn, recipe.pool.experts, recipe.parallel.pool_ranks) == ("dense", 0, 0)


def test_reduced_is_the_830m_with_a_smaller_pool() -> None:
    full, reduced = (load_recipe(name).model_dump() for name in ("unipool-830m", "unipool-830m-reduced"))
    differing = {section for section in full if full[section] != reduced[section]}
    assert differing == {"run", "pool"}
    assert reduced["pool"] == full["pool"] | {"experts": 160}
