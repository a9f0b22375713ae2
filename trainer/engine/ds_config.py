"""The configuration that DeepSpeed reads for a role: a file of `ds_configs/`, filled in from the recipe."""

from __future__ import annotations

import math
from importlib import resources
from importlib.util import find_spec
from typing import Any

from trainer.common.errors import UserError
from trainer.common.strict_json import loads
from trainer.config.recipe import Recipe

_LARGEST_BUCKET = 500_000_000
"""Elements reduced at once, DeepSpeed's default. DeepSpeed allocates a buffer of that size in every step."""


def deepspeed_config(recipe: Recipe, role: str, role_size: int, parameters: int) -> dict[str, Any]:
    """Return the configuration of ds_configs/ for a role at its ZeRO stage, with every "auto" filled in.

    Args:
        role: "trunk" or "pool".
        role_size: Number of ranks of the role's group.
        parameters: Elements of the role's module, which bound the reduction's buffer.
    """
    stage = recipe.parallel.trunk_zero if role == "trunk" else recipe.parallel.pool_zero
    text = (resources.files("ds_configs") / f"{role}_zero{stage}.json").read_text()
    config: dict[str, Any] = loads(text)
    t = recipe.train
    warmup = _warmup_steps(recipe)
    # Gradients are reduced once per step: DeepSpeed's "micro-batch" is all that a rank does between two steps.
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
    # DeepSpeed requires a multiple of twice the ranks.
    bucket = -(-min(parameters, _LARGEST_BUCKET) // (2 * role_size)) * 2 * role_size
    _fill(config["zero_optimization"], reduce_bucket_size=bucket, allgather_bucket_size=bucket)
    if role == "trunk":
        _fill_monitors(config, recipe)
    return config


def scheduled_rate(recipe: Recipe, updates: int) -> float:
    """Return the learning rate after `updates` optimizer steps (Eq. M28).

    With a cosine, it is what DeepSpeed's WarmupCosineLR computes.
    """
    t, warmup = recipe.train, _warmup_steps(recipe)
    if updates < warmup:
        return t.lr * (1 / warmup + updates / warmup * (1 - 1 / warmup))
    falling = max(1, round(t.decay_fraction * t.steps)) if t.schedule == "wsd" else max(1, t.steps - warmup)
    progress = min(1.0, max(0.0, (updates - (t.steps - falling) + 1) / falling))
    match t.schedule:
        case "cosine":
            share = (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            share = 1 - progress
        case "wsd":
            share = 1 - math.sqrt(progress)
    return t.min_lr + (t.lr - t.min_lr) * share


def _warmup_steps(recipe: Recipe) -> int:
    return max(2, round(recipe.train.warmup_fraction * recipe.train.steps))


def check_wandb(recipe: Recipe) -> None:
    """Check that wandb is installed if the recipe wants it.

    Raises:
        UserError: It is not.
    """
    if recipe.metrics.wandb and find_spec("wandb") is None:
        raise UserError(f"metrics.wandb = {recipe.metrics.wandb}: wandb is not installed: pip install wandb")


def _fill_monitors(config: dict[str, Any], recipe: Recipe) -> None:
    m = recipe.metrics
    check_wandb(recipe)
    _fill(config["tensorboard"], enabled=m.tensorboard, output_path=recipe.run.dir, job_name="tensorboard")
    _fill(config["csv_monitor"], enabled=m.csv, output_path=recipe.run.dir, job_name="csv")


def _fill(section: dict[str, Any], **values: Any) -> None:
    for key, value in values.items():
        if section.get(key) == "auto":
            section[key] = value
