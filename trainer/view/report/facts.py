"""A run in words and numbers: its results, its model, its training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from trainer.checkpoint import format as checkpoint
from trainer.common.format import ABSENT, count, duration, loss, number, percent, perplexity, plural, quantity, size
from trainer.config.recipe import Recipe
from trainer.config.sections import source_names
from trainer.planning.model_costs import count_parameters
from trainer.view.rates import ROLES
from trainer.view.records import CHECKPOINTS, RECENT, Records, facts_of
from trainer.view.report.phases import step_seconds

Facts = list[tuple[str, str]]
"""Names and values."""


def headline(records: Records, recipe: Recipe | None) -> Facts:
    """Return the most important numbers, as far as they are known."""
    steps = records.steps
    recent = f"last {min(RECENT, len(steps))} steps"
    speeds = records.finite("tokens_per_second")
    tokens = records.finite("tokens")
    facts = [
        ("validation loss, nats per token", loss(records.val_losses[-1] if records.val_losses else None)),
        (f"loss, nats per token, {recent}", loss(records.mean("loss", RECENT))),
        (f"load imbalance, max/mean, {recent}", number(records.mean("load_imbalance", RECENT), ".2f")),
        ("tokens seen", count(tokens.sum()) if len(tokens) else ABSENT),
        ("tokens per second, median step", f"{np.median(speeds):,.0f}" if len(speeds) else ABSENT),
        (f"steps done, of {recipe.train.steps:,}" if recipe else "steps done", f"{steps[-1]:,}" if steps else ABSENT),
    ]
    return [(name, text) for name, text in facts if text != ABSENT]


def progress(records: Records, recipe: Recipe | None) -> Facts:
    """Return the same numbers by names that every run has, to compare runs by; ABSENT where one is not known."""
    steps, speeds, tokens = records.steps, records.finite("tokens_per_second"), records.finite("tokens")
    done = f"{steps[-1]:,}" if steps else "0"
    return [
        ("steps", f"{done} of {recipe.train.steps:,}" if recipe else done),
        ("tokens seen", count(tokens.sum()) if len(tokens) else ABSENT),
        (f"loss, nats per token, mean of {RECENT} steps", loss(records.mean("loss", RECENT))),
        (f"load imbalance, mean of {RECENT} steps", number(records.mean("load_imbalance", RECENT), ".2f")),
        ("tokens per second, median step", f"{np.median(speeds):,.0f}" if len(speeds) else ABSENT),
    ]


def outcome(run: Path, records: Records) -> Facts:
    """Return the results, the time they took, and what was lost."""
    facts: Facts = []
    if losses := _finite_pairs(records, "loss"):
        (last, step), (lowest, at) = losses[-1], min(losses)
        facts.append(("last step's loss", f"{loss(last)} at step {step:,.0f}"))
        facts.append(("lowest loss of a step", f"{loss(lowest)} at step {at:,.0f}"))
    if losses := _finite_pairs(records, "val_loss"):
        (last, _), (lowest, at) = losses[-1], min(losses)
        facts.append(("last validation loss", f"{loss(last)}, perplexity {perplexity(last)}"))
        facts.append(("best validation loss", f"{loss(lowest)} at step {at:,.0f}"))
    seconds = step_seconds(records)
    total = float(seconds.sum())
    if total:
        facts.append(("time in training steps", duration(total)))
    for role in ROLES:
        waiting = records.shares(role).get("waiting")
        if waiting is not None and total:
            facts.append((f"waiting time of a {role} rank", f"{duration(waiting * total)}, {percent(waiting, 1)}"))
    if len(flops := records.finite("flops_per_second")):
        facts.append(("FLOP/s per rank, median step", quantity(float(np.median(flops)), "FLOP/s")))
    if len(mfu := records.finite("mfu")):
        facts.append(("MFU, median step", percent(float(np.median(mfu)), 1)))
    for role in ROLES:
        if len(memory := records.finite(f"{role}_memory")):
            facts.append((f"peak memory of a {role} rank", size(float(memory.max()))))
    if len(goodput := records.finite("goodput")):
        facts.append(("goodput", percent(float(goodput[-1]))))
    skipped = seconds[np.array(records.columns["applied"]) == 0]
    lost = f"{len(skipped):,}, {duration(skipped.sum())}" if len(skipped) else "none"
    saved = [f"{checkpoint.steps_of(folder):,}" for folder in checkpoint.complete(run / CHECKPOINTS)]
    facts.append(("skipped steps (gradients not finite)", lost))
    facts.append(("checkpoints", ", ".join(saved) or "none"))
    return facts


def model_facts(recipe: Recipe) -> Facts:
    """Return the size of the model and who shares experts; the recipe itself is shown below them."""
    m, p = recipe.model, count_parameters(recipe)
    facts = [("parameters", count(p.total)), ("active per token", count(p.active))]
    if m.ffn == "pool":
        shared = (
            f"{m.groups} groups of {plural(m.layers // m.groups, 'layer')}"
            if m.groups > 1
            else "one pool, shared by all layers"
        )
        balance = {"pool": recipe.balance.pool, "layer": recipe.balance.layer}
        if m.private_ffn:
            shared += f"; beside it one of width {m.private_ffn:,} in each layer"
        facts += [
            ("in the trunk, in the pool", f"{count(p.trunk)}, {count(p.pool)}"),
            ("experts", f"{recipe.pool.experts}: {shared}"),
            ("router", f"{recipe.router.kind}, top-{recipe.router.top_k}"),
            ("balance loss", ", ".join(f"{name} {value:g}" for name, value in balance.items() if value) or "none"),
        ]
    else:
        facts.append(("feed-forward", "dense"))
    return [
        *facts,
        ("layers, hidden width, FFN width", f"{m.layers}, {m.hidden:,}, {m.ffn_hidden:,}"),
        ("heads, key-value heads", f"{m.heads}, {m.kv_heads}"),
        ("vocabulary, sequence", f"{m.vocab:,}, {m.seq_len:,} tokens"),
    ]


def training_facts(run: Path, recipe: Recipe) -> Facts:
    """Return data, schedule and layout."""
    t, p, shards = recipe.train, recipe.parallel, recipe.grid.expert_parallel
    known = facts_of(recipe, run)
    facts = [
        ("data", source_names(recipe.data.source)),
        ("tokenizer", recipe.data.tokenizer),
        ("batch", f"{t.global_batch:,} sequences, {t.global_batch * recipe.model.seq_len:,} tokens"),
        ("learning rate", f"{t.lr:g} to {t.min_lr:g}, warm-up {t.warmup_fraction:.1%}"),
        ("clipping norm, weight decay", f"{t.clip:g}, {t.weight_decay:g}"),
        ("precision", t.precision),
        ("devices", known["devices"] or "unknown"),
        ("seed", str(recipe.run.seed)),
    ]
    if recipe.grid.colocated:
        return [*facts, ("layout", f"{plural(p.trunk_ranks, 'rank')}, ZeRO {p.trunk_zero}")]
    if recipe.grid.every_rank:
        both = f"{p.trunk_ranks} ranks with both roles: {shards} shards x {recipe.grid.replicas}"
        zero = f"ZeRO {p.trunk_zero} of the trunk, {p.pool_zero} of the pool"
        return [*facts, ("layout", f"{both}, {zero}"), ("lanes", known["lanes"] or "unknown")]
    return [
        *facts,
        ("trunk ranks", f"{p.trunk_ranks}, ZeRO {p.trunk_zero}"),
        ("pool ranks", f"{p.pool_ranks}: {shards} shards x {p.pool_ranks // shards}, ZeRO {p.pool_zero}"),
        ("lanes", known["lanes"] or "unknown"),
    ]


def evaluations(records: Records, most: int = 24) -> Iterable[tuple[int, float]]:
    """Return steps and validation losses; if there are too many, an even choice that includes the last."""
    every = max(math.ceil(len(records.val_steps) / most), 1)
    pairs = list(zip(records.val_steps, records.val_losses, strict=True))
    return pairs[::-1][::every][::-1]


def _finite_pairs(records: Records, name: str) -> list[tuple[float, float]]:
    """Return (value, step) where the value is finite."""
    steps, values = records.series(name)
    return [(value, step) for value, step in zip(values, steps, strict=True) if math.isfinite(value)]
