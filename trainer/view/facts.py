"""A run in words and numbers: its results, its model, its training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from trainer.checkpoint import format as checkpoint
from trainer.common.format import count, duration, perplexity
from trainer.config.recipe import Recipe
from trainer.config.sections import source_names
from trainer.planning.model_costs import count_parameters
from trainer.view.records import CHECKPOINTS, RECENT, ROLES, Records, facts_of

Facts = list[tuple[str, str]]
"""Names and values."""


def headline(records: Records, recipe: Recipe | None) -> Facts:
    """Return the most important numbers."""
    facts: Facts = []
    if records.val_losses:
        facts.append(("validation loss, nats per token", f"{records.val_losses[-1]:.4f}"))
    for title, name, spec in (
        ("loss, nats per token", "loss", ".4f"),
        ("load imbalance, max/mean", "load_imbalance", ".2f"),
    ):
        last = records.mean(name, RECENT)
        if not math.isnan(last):
            facts.append((f"{title}, last {min(RECENT, len(records.steps))} steps", format(last, spec)))
    if records.has("tokens"):
        facts.append(("tokens seen", count(_tokens(records))))
    speeds = [speed for speed in records.columns["tokens_per_second"] if math.isfinite(speed)]
    if speeds:
        facts.append(("tokens per second, median step", f"{statistics.median(speeds):,.0f}"))
    if records.steps and recipe:
        facts.append((f"steps done, of {recipe.train.steps:,}", f"{records.steps[-1]:,}"))
    return facts


def outcome(run: Path, records: Records) -> Facts:
    """Return the results, the time they took, and what was lost."""
    facts: Facts = []
    losses = [
        (loss, step) for loss, step in zip(records.columns["loss"], records.steps, strict=True) if math.isfinite(loss)
    ]
    if losses:
        facts.append(("last step's loss", f"{losses[-1][0]:.4f} at step {losses[-1][1]:,}"))
        facts.append(("lowest loss of a step", "{:.4f} at step {:,}".format(*min(losses))))
    validated = zip(records.val_losses, records.val_steps, strict=True)
    evaluated = [(loss, step) for loss, step in validated if math.isfinite(loss)]
    if evaluated:
        (last, _), (best, step) = evaluated[-1], min(evaluated)
        facts.append(("last validation loss", f"{last:.4f}, perplexity {perplexity(last)}"))
        facts.append(("best validation loss", f"{best:.4f} at step {step:,}"))
    seconds = _seconds(records)
    if seconds:
        facts.append(("time in training steps", duration(sum(seconds))))
    for role in ROLES:
        waiting = records.shares(role).get("waiting")
        if waiting is not None and seconds:
            facts.append((f"waiting time of a {role} rank", f"{duration(waiting * sum(seconds))}, {waiting:.1%}"))
    applied = records.columns["applied"]
    skipped = [second for second, done in zip(seconds, applied, strict=False) if done == 0]
    lost = f"{len(skipped):,}, {duration(sum(skipped))}" if skipped else "none"
    facts.append(("skipped steps (gradients not finite)", lost))
    saved = checkpoint.complete(run / CHECKPOINTS)
    facts.append(("checkpoints", ", ".join(f"{checkpoint.steps_of(folder):,}" for folder in saved) or "none"))
    return facts


def model_facts(recipe: Recipe) -> Facts:
    """Return the size of the model and who shares experts; the recipe itself is shown below them."""
    m, p = recipe.model, count_parameters(recipe)
    facts = [("parameters", count(p.total)), ("active per token", count(p.active))]
    if m.ffn == "dense":
        return [*facts, ("feed-forward", "dense")]
    kind = "one pool, shared by all layers" if m.groups == 1 else f"{m.groups} groups of {m.layers // m.groups} layers"
    return [
        *facts,
        ("in the trunk, in the pool", f"{count(p.trunk)}, {count(p.pool)}"),
        ("experts", f"{recipe.pool.experts}: {kind}"),
        ("router", f"{recipe.router.kind}, top-{recipe.router.top_k}"),
    ]


def training_facts(run: Path, recipe: Recipe) -> Facts:
    """Return data, batch and layout."""
    batch, p = recipe.train.global_batch, recipe.parallel
    facts = [
        ("data", source_names(recipe.data.source)),
        ("batch", f"{batch:,} sequences, {batch * recipe.model.seq_len:,} tokens"),
    ]
    if recipe.grid.colocated:
        return [*facts, ("layout", f"{p.trunk_ranks} ranks, ZeRO {p.trunk_zero}")]
    shards = recipe.grid.expert_parallel
    return [
        *facts,
        ("trunk ranks", f"{p.trunk_ranks}, ZeRO {p.trunk_zero}"),
        ("pool ranks", f"{p.pool_ranks}: {shards} shards x {p.pool_ranks // shards}, ZeRO {p.pool_zero}"),
        ("lanes", facts_of(recipe, run)["lanes"] or "unknown"),
    ]


def evaluations(records: Records, most: int = 24) -> Iterable[tuple[int, float]]:
    """Return steps and validation losses; if there are too many, an even choice that includes the last."""
    every = max(math.ceil(len(records.val_steps) / most), 1)
    pairs = list(zip(records.val_steps, records.val_losses, strict=True))
    return pairs[::-1][::every][::-1]


def _tokens(records: Records) -> float:
    return sum(tokens for tokens in records.columns["tokens"] if math.isfinite(tokens))


def _seconds(records: Records) -> list[float]:
    """Return the time of each step; from its throughput if it is not recorded."""
    if records.has("seconds"):
        return [seconds if math.isfinite(seconds) else 0.0 for seconds in records.columns["seconds"]]
    speeds = zip(records.columns["tokens"], records.columns["tokens_per_second"], strict=True)
    return [tokens / speed if speed > 0 and math.isfinite(tokens) else 0.0 for tokens, speed in speeds]
