"""The numbers that `watch` shows, from the ranks' pages or from the folder of a run."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from trainer.checkpoint import format as checkpoint
from trainer.common.credentials import redacted
from trainer.telemetry.time_breakdown import ACTIVITIES
from trainer.view.pages import Page, Samples
from trainer.view.rates import Shares, Window, value
from trainer.view.records import CHECKPOINTS, RECENT, ROLES, Records, facts_of, recorded_load, saved_recipe

_GAUGES = {
    "step": "unipool_step",
    "target_steps": "unipool_target_steps",
    "loss": "unipool_loss_nats",
    "val_loss": "unipool_validation_loss_nats",
    "lr": "unipool_learning_rate",
    "grad_norm": "unipool_gradient_norm",
    "tokens_per_second": "unipool_tokens_per_second",
    "step_seconds": "unipool_step_seconds",
    "load_imbalance": "unipool_load_imbalance_ratio",
    "shard_imbalance": "unipool_shard_load_imbalance_ratio",
    "dead_experts": "unipool_dead_experts",
    "effective_experts": "unipool_effective_experts",
    "distinct_experts": "unipool_distinct_experts_per_token",
    "skipped_steps": "unipool_skipped_steps_total",
    "checkpoint_step": "unipool_checkpoint_step",
    "checkpoint_failures": "unipool_checkpoint_failures_total",
    "restarts": "unipool_restarts_total",
}
_WAITS = 0.1
"""Share of its time up to which a role that waits counts as busy."""
_HISTORY = 10_000


@dataclass(frozen=True)
class RankUse:
    """How one rank spent its time, and the assignments per step that a pool rank served (NaN if not known)."""

    role: str
    rank: int
    shares: Shares
    served: float = math.nan


@dataclass(frozen=True)
class View:
    """A run at a moment. What is not known is left out, or NaN in a sequence.

    Attributes:
        run: Name of the run.
        state: Its state, such as `running`.
        info: Labels of unipool_run_info.
        scalars: Values of the last step, by their names in metrics.jsonl.
        roles: Shares of time by role, means over its ranks.
        ranks: The same for every rank.
        experts: Assignments per step by expert.
        layers: Load imbalance by layer.
        losses: Training losses so far.
        window: Steps that the shares of time are about.
        load_window: Steps that `experts` is about.
        notes: Problems, one per line.
    """

    run: str
    state: str
    info: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    roles: Mapping[str, Shares] = field(default_factory=dict)
    ranks: tuple[RankUse, ...] = ()
    experts: tuple[float, ...] = ()
    layers: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    window: str = ""
    load_window: str = ""
    notes: tuple[str, ...] = ()


def who_waits(roles: Mapping[str, Shares], info: Mapping[str, str]) -> str:
    """Say in a sentence which role waits for which; empty if it is not known."""
    if info.get("pool_ranks") == "0":
        return "All ranks have the same role, so none waits for another role."
    if not roles.get("trunk") or not roles.get("pool"):
        return ""
    trunk, pool = roles["trunk"]["waiting"], roles["pool"]["waiting"]
    if max(trunk, pool) < _WAITS:
        return f"Neither side waits for long: trunk {trunk:.0%} of its time, pool {pool:.0%}."
    if min(trunk, pool) > max(trunk, pool) / 2:
        return f"Each side waits for the other: trunk {trunk:.0%} of its time, pool {pool:.0%}."
    if trunk > pool:
        return f"The trunk waits for the pool {trunk:.0%} of its time; the pool for the trunk {pool:.0%}."
    return f"The pool waits for the trunk {pool:.0%} of its time; the trunk for the pool {trunk:.0%}."


def step_text(window: Window) -> str:
    """Say which steps a window covers."""
    if not window.steps:
        return ""
    if window.from_start:
        return f"the {window.steps:,.0f} steps since the start"
    return "the last step" if window.steps == 1 else f"the last {window.steps:,.0f} steps"


class Follower:
    """Follows the ranks of one run from page to page."""

    def __init__(self) -> None:
        self._windows: dict[str, Window] = {}
        self._known: dict[str, tuple[str, int]] = {}
        self._info: dict[str, str] = {}
        self._losses: list[tuple[float, float]] = []
        self._pace: tuple[float, float] | None = None

    def view(self, pages: Sequence[Page]) -> View:
        """Return the run as these pages show it."""
        answered = [page for page in pages if not page.error]
        self._windows = {page.url: self._windows.get(page.url, Window()) for page in pages}
        for page in answered:
            self._windows[page.url].add(page.samples)
            self._known[page.url] = _role_and_rank(page.samples)
        first = next((page for page in answered if "unipool_step" in page.samples), None)
        scalars = self._scalars(first) if first else {}
        ranks = tuple(sorted(map(self._use, answered), key=lambda use: (ROLES.index(use.role), use.rank)))
        window = step_text(self._windows[(first or answered[0]).url]) if answered else ""
        return View(
            run=self._info.get("run", ""),
            state="running" if answered else "no rank answers",
            info=self._info,
            scalars=scalars,
            roles={role: _mean_shares([use.shares for use in ranks if use.role == role]) for role in ROLES},
            ranks=ranks,
            experts=self._experts(answered),
            layers=_by_layer(first.samples) if first else (),
            losses=tuple(loss for _, loss in self._losses),
            window=window,
            load_window=window,
            notes=tuple(self._notes(pages)),
        )

    def _scalars(self, page: Page) -> dict[str, float]:
        samples = page.samples
        for labels, _ in samples.get("unipool_run_info", ()):
            self._info = {name: "".join(filter(str.isprintable, text)) for name, text in labels.items()}
        scalars = {name: value(samples, metric, 0.0) for name, metric in _GAUGES.items() if metric in samples}
        saved = value(samples, "unipool_checkpoint_timestamp_seconds", 0.0)
        if saved:
            scalars["checkpoint_age"] = max(page.seconds - saved, 0.0)
        step = scalars["step"]
        if self._losses and self._losses[-1][0] > step:  # the run went back to a checkpoint
            self._losses = [(at, loss) for at, loss in self._losses if at < step]
        if "loss" in scalars and step and (not self._losses or self._losses[-1][0] < step):
            self._losses = [*self._losses[-_HISTORY:], (step, scalars["loss"])]
        if self._pace is None or self._windows[page.url].from_start:
            self._pace = (page.seconds, step)
        left = scalars.get("target_steps", step) - step
        since, done = page.seconds - self._pace[0], step - self._pace[1]
        # After some steps by the time that has passed, with evaluations and checkpoints; before that by the last step.
        step_seconds = since / done if done >= 5 else scalars.get("step_seconds", math.nan)
        if left > 0 and math.isfinite(step_seconds):
            scalars["eta"] = left * step_seconds
        return scalars

    def _use(self, page: Page) -> RankUse:
        role, rank = self._known[page.url]
        window = self._windows[page.url]
        served = window.per_step("unipool_service_tokens_total", "rank")
        return RankUse(role, rank, window.shares(), sum(served.values()) if served else math.nan)

    def _experts(self, answered: Sequence[Page]) -> tuple[float, ...]:
        load: dict[int, float] = {}
        for page in answered:
            for expert, tokens in self._windows[page.url].per_step("unipool_expert_tokens_total", "expert").items():
                if expert.isdecimal():
                    load[int(expert)] = load.get(int(expert), 0.0) + tokens
        if not load:
            return ()
        known = self._info.get("experts", "")
        experts = max(int(known) if known.isdecimal() else 0, max(load) + 1)
        return tuple(load.get(expert, math.nan) for expert in range(experts))

    def _notes(self, pages: Sequence[Page]) -> list[str]:
        silent: dict[str, list[str]] = {}
        for page in pages:
            if page.error:
                role, rank = self._known.get(page.url, ("", -1))
                place = re.sub(r"^http://|/metrics$", "", redacted(page.url))
                silent.setdefault(page.error, []).append(f"{role} rank {rank} at {place}" if role else place)
        notes = []
        for reason, who in silent.items():
            shown = ", ".join(who[:3]) + (f" and {len(who) - 3} more" if len(who) > 3 else "")
            notes.append(f"no metrics ({reason}): {shown}")
        answered = [self._known[page.url] for page in pages if not page.error]
        twice = {rank for rank in answered if answered.count(rank) > 1}
        notes += [
            f"{role} rank {rank} appears more than once: do the pages belong to several runs?"
            for role, rank in sorted(twice)
        ]
        return notes


def recorded_view(run: Path, records: Records, state: str, notes: Sequence[str] = ()) -> View:
    """Return a run whose ranks do not answer, from its folder."""
    recipe = saved_recipe(run)
    scalars = {name: column[-1] for name, column in records.columns.items() if len(column) and column[-1] == column[-1]}
    scalars = {name: number for name, number in scalars.items() if name.partition("_")[0] not in ROLES}
    if records.steps:
        scalars["step"] = records.steps[-1]
        scalars["skipped_steps"] = sum(applied == 0 for applied in records.columns["applied"])
    if records.val_losses:
        scalars["val_loss"] = records.val_losses[-1]
    if recipe:
        scalars["target_steps"] = recipe.train.steps
    newest = checkpoint.newest(run / CHECKPOINTS)
    if newest:
        scalars["checkpoint_step"] = newest[0]
        with suppress(OSError):  # it was replaced by a newer one
            scalars["checkpoint_age"] = max(time.time() - newest[1].stat().st_mtime, 0.0)
    load_LM = recorded_load(run)
    return View(
        run=run.resolve().name,
        state=state,
        info=facts_of(recipe, run) if recipe else {},
        scalars=scalars,
        roles={role: records.shares(role, RECENT) for role in ROLES},
        experts=tuple(load_LM.sum(0).tolist()) if load_LM is not None else (),
        losses=tuple(records.columns["loss"]),
        window=f"the last {min(RECENT, len(records.steps))} steps" if records.steps else "",
        load_window="as saved last",
        notes=tuple(notes),
    )


def _role_and_rank(samples: Samples) -> tuple[str, int]:
    for labels, _ in samples.get("unipool_steps_total", ()):
        if labels.get("role") in ROLES and labels.get("rank", "").isdecimal():
            return labels["role"], int(labels["rank"])
    return "trunk", 0


def _by_layer(samples: Samples) -> tuple[float, ...]:
    found = samples.get("unipool_layer_load_imbalance_ratio", ())
    return tuple(number for _, number in sorted((labels.get("layer", ""), number) for labels, number in found))


def _mean_shares(ranks: Sequence[Shares]) -> Shares:
    known = [shares for shares in ranks if shares]
    return {activity: sum(s[activity] for s in known) / len(known) for activity in ACTIVITIES} if known else {}
