"""The JSON that DeepSpeed reads for a role: that of `ds_configs/`, filled from the recipe."""

from __future__ import annotations

from importlib import resources
from importlib.util import find_spec
from typing import Any

from trainer.common.errors import UserError
from trainer.common.strict_json import loads
from trainer.config.recipe import Recipe

_LARGEST_BUCKET = 500_000_000
"""Elements of a reduction at once: DeepSpeed's default. It allocates a buffer of that size every step."""


def deepspeed_config(recipe: Recipe, role: str, role_size: int, parameters: int) -> dict[str, Any]:
    """The JSON of ds_configs/ for `role` ("trunk" or "pool") at its ZeRO stage, every "auto" filled by the recipe.

    Args:
        parameters: elements of the role's module; a reduction's buffer is no larger.
    """
    stage = recipe.parallel.trunk_zero if role == "trunk" else recipe.parallel.pool_zero
    text = (resources.files("ds_configs") / f"{role}_zero{stage}.json").read_text()
    config: dict[str, Any] = loads(text)
    t = recipe.train
    warmup = max(2, round(t.warmup_fraction * t.steps))
    # DeepSpeed sees one flush a step: a "micro-batch" of its own is all that a rank does between two steps.
    per_rank = max(1, t.global_batch // role_size)
    _fill(config, train_batch_size=per_rank * role_size, train_micro_batch_size_per_gpu=per_rank)
    _fill(config, gradient_clipping=t.clip)
    _fill(config["optimizer"]["params"], lr=t.lr, betas=list(t.betas), eps=t.eps, weight_decay=t.weight_decay)
    _fill(
        config["scheduler"]["params"],
        total_num_steps=t.steps,
        warmup_num_steps=warmup,
        warmup_min_ratio=1 / warmup,
        cos_min_ratio=t.min_lr / t.lr,
    )
    # DeepSpeed wants a multiple of twice the ranks.
    bucket = -(-min(parameters, _LARGEST_BUCKET) // (2 * role_size)) * 2 * role_size
    _fill(config["zero_optimization"], reduce_bucket_size=bucket, allgather_bucket_size=bucket)
    if role == "trunk":
        _fill_monitors(config, recipe)
    return config


def _fill_monitors(config: dict[str, Any], recipe: Recipe) -> None:
    m = recipe.metrics
    if m.wandb and find_spec("wandb") is None:
        raise UserError(f"metrics.wandb = {m.wandb}: wandb is not installed here: pip install wandb")
    _fill(config["tensorboard"], enabled=m.tensorboard, output_path=recipe.run.dir, job_name="tensorboard")
    _fill(config["csv_monitor"], enabled=m.csv, output_path=recipe.run.dir, job_name="csv")
    _fill(config["wandb"], enabled=m.wandb is not None, project=m.wandb or "")


def _fill(section: dict[str, Any], **values: Any) -> None:
    for key, value in values.items():
        if section.get(key) == "auto":
            section[key] = value
