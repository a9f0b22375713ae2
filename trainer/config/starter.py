"""A recipe to start from: a file with the keys that a beginner changes, and what each of them means."""

from __future__ import annotations

import glob
import textwrap
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import yaml

from trainer.common.errors import UserError
from trainer.config.key_errors import sections_in
from trainer.config.recipe import Recipe, check_recipe, parse_mapping, read_tree

SHOWN = {
    "run": ("dir", "seed"),
    "model": ("layers", "hidden", "heads", "kv_heads", "ffn_hidden", "vocab", "seq_len"),
    "router": ("top_k",),
    "pool": ("experts",),
    "balance": ("pool",),
    "train": ("steps", "global_batch", "micro_batch", "lr", "min_lr", "warmup_fraction", "precision"),
    "data": ("source", "tokenizer", "max_tokens"),
    "parallel": ("trunk_ranks", "pool_ranks"),
    "eval": ("every", "batches"),
    "checkpoint": ("every", "keep"),
    "metrics": ("port",),
}
"""The keys that every file shows, beside those that the recipe it is made from sets."""

_WIDTH = 118
_CHECKPOINTS = 4


def start_from(base: str, run: str, source: str | None, gpus: int | None, ranks: int | None) -> str:
    """Return the text of a recipe file.

    Args:
        base: The recipe that it is made from.
        run: `run.dir`.
        source: `data.source`; None keeps the recipe's.
        gpus: The number of GPUs, each of which gets a trunk rank with the whole pool; None or 0: no GPU.
        ranks: Such ranks on the CPU, where there is no GPU; None keeps the recipe's layout.

    Raises:
        UserError: The recipe does not exist or is wrong, or there is no such source.
    """
    tree = deepcopy(read_tree(base))
    recipe = check_recipe(tree, [], f"recipe {base}")
    settings: dict[str, Any] = {"run.dir": run}
    if source is not None:
        if source != "python-stdlib" and not source.startswith("hub:") and not glob.glob(source):
            raise UserError(f"--source {source}: there is no such file or folder; hub:NAME names a data set on the hub")
        settings["data.source"] = source
    if count := gpus or ranks:
        settings |= _batches(recipe, count)
        for key in ("layout", "expert_parallel", "lanes", "hardware"):  # of the recipe's own layout
            tree.get("parallel", {}).pop(key, None)
    if gpus:
        settings["train.precision"] = "bf16"
    if not recipe.checkpoint.every:
        settings["checkpoint.every"] = max(1, recipe.train.steps // _CHECKPOINTS)
    for key, value in settings.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    made = check_recipe(tree, [], f"recipe {base} for {count or recipe.grid.world_size} ranks")
    text = "\n".join(_lines(made, tree, base))
    assert check_recipe(parse_mapping(text, base, "sections"), [], base) == made
    return text


def _batches(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """Settings with which `ranks` trunk ranks divide the global batch: the recipe's own one, or the next larger one."""
    batch, most = recipe.train.global_batch, recipe.train.micro_batch
    batch = -(-batch // ranks) * ranks
    micro = next(size for size in range(min(most, batch // ranks), 0, -1) if batch // ranks % size == 0)
    layout = {"parallel.trunk_ranks": ranks, "parallel.pool_ranks": 0}
    return {"train.global_batch": batch, "train.micro_batch": micro} | layout


def _lines(recipe: Recipe, tree: dict[str, Any], base: str) -> Iterator[str]:
    values = recipe.model_dump(mode="json")
    yield from _comment(
        f"Made from the recipe {base}. `unipool plan` says what it costs, docs/reference/recipe.md has all keys.", ""
    )
    for section, field in Recipe.model_fields.items():
        given = tree.get(section) or {}
        keys = [key for key in values[section] or () if key in given or key in SHOWN.get(section, ())]
        if not keys:
            continue
        model = next(sections_in(field.annotation))
        yield ""
        yield from _comment(" ".join((model.__doc__ or "").split()), "")
        yield f"{section}:"
        for key in keys:
            yield from _comment(model.model_fields[key].description or "", "  ")
            value = given.get(key, values[section][key])  # the recipe's own text may leave keys of a source out
            yield f"  {key}: {_in_one_line(value)}"
    yield ""


def _in_one_line(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)[1:-2]


def _comment(text: str, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
