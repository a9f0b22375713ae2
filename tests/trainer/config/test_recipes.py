"""The recipes that come with the trainer load, and those of the paper have all of its numbers."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.recipe import Recipe, load_recipe, recipe_names

# The paper's table of models: L, D, heads, F, M, coefficient of the pool loss
SCALES = {
    "182m": (12, 768, 12, 3072, 96, 1e-2),
    "469m": (24, 1024, 16, 4096, 192, 2e-2),
    "650m": (36, 1024, 16, 4096, 288, 2e-2),
    "830m": (48, 1024, 16, 4096, 384, 2e-2),
    "978m": (24, 1536, 16, 6144, 192, 2e-2),
}
# What all of them have in common, from the paper, and where it is silent from its released scripts.
TRAIN = {
    "steps": 60_000,
    "global_batch": 512,
    "lr": 5e-4,
    "min_lr": 5e-5,
    "warmup_fraction": 0.01,
    "weight_decay": 0.01,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "clip": 1.0,
    "precision": "bf16",
    "init_from": None,
    "freeze": "none",
}
DATA = {
    "source": "hub:monology/pile-uncopyrighted",
    "tokenizer": "gpt2",
    "split": (969, 30, 1),
    "validation": None,
    "max_documents": None,
    "max_tokens": 31_500_000_000,  # what 60,000 steps read, instead of the whole Pile
    "document_mask": False,
}
SHAPE = {"kv_heads": 4, "vocab": 51_200, "seq_len": 1024, "init_std": 0.01, "rope_base": 1e6, "norm_eps": 1e-5}
ROUTER = {"top_k": 1, "z_loss": 0.0, "constant_factor": 1.0}
NO_BALANCE = {"layer": 0.0, "pool": 0.0, "scores": "raw"}
LOCK = {
    "allocation": "learned",
    "full_fraction": 1 / 60,
    "anneal_fraction": 1 / 60,
    "entropy": 5e-3,
    "coverage": 0.95,
    "evaluations": 5,
    "stop_above": 0.05,
}
EVAL_BATCHES = 100


def numbers(kind: str, scale: str) -> dict[str, dict[str, Any]]:
    """All that the paper says of a model, by section and key."""
    layers, hidden, heads, width, experts, coefficient = SCALES[scale]
    shape = SHAPE | {"layers": layers, "hidden": hidden, "heads": heads, "ffn_hidden": width}
    if kind == "dense":
        model, router, balance, pool = {"ffn": "dense", "groups": 1}, {}, NO_BALANCE, 0
    elif kind == "vanilla":
        assert experts == 8 * layers, "of each layer's own"
        model, router, pool = {"ffn": "pool", "groups": layers}, ROUTER | {"kind": "softmax"}, experts
        balance = NO_BALANCE | {"layer": 1e-2, "scope": "micro_batch", "delay": 0}
    else:
        model, router, pool = {"ffn": "pool", "groups": 1}, ROUTER | {"kind": "norm"}, experts
        balance = NO_BALANCE | {"pool": coefficient, "scope": "micro_batch", "delay": 1}
    expected = {"lock": LOCK} if kind == "unipool-lock" else {}
    return expected | {
        "model": shape | model,
        "router": router,
        "pool": {"experts": pool},
        "balance": balance,
        "train": TRAIN,
        "data": DATA,
        "eval": {"batches": EVAL_BATCHES},
    }


def keys_of(recipe: Recipe, expected: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The recipe's values of the same sections and keys."""
    return {
        section: {key: getattr(getattr(recipe, section), key) for key in values} for section, values in expected.items()
    }


@pytest.mark.parametrize("name", recipe_names())
def test_loads_and_writes_to_its_own_folder(name: str) -> None:
    assert load_recipe(name).run.dir == f"runs/{name}"


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        *((kind, scale) for kind in ("dense", "vanilla", "unipool") for scale in SCALES),
        *(("unipool-lock", scale) for scale in SCALES if scale != "978m"),
    ],
)
def test_every_number_is_the_papers(kind: str, scale: str) -> None:
    expected, recipe = numbers(kind, scale), load_recipe(f"{kind}-{scale}")
    assert keys_of(recipe, expected) == expected
    assert (recipe.lock is not None) == (kind == "unipool-lock")


def differing(name: str, other: str) -> dict[str, Any]:
    """Keys of `other` whose values are not those of `name`, but for the run's folder."""
    a, b = (load_recipe(recipe).model_dump() for recipe in (name, other))
    keys = ((section, key) for section, values in b.items() if values for key in values)
    found = {f"{section}.{key}": b[section][key] for section, key in keys if a[section][key] != b[section][key]}
    assert found.pop("run.dir") == f"runs/{other}"
    return found


def test_variants_differ_in_what_they_are_named_after() -> None:
    assert differing("unipool-830m", "unipool-830m-reduced") == {"pool.experts": 160}
    assert differing("unipool-182m", "unipool-182m-global-load") == {"balance.scope": "global_batch"}
