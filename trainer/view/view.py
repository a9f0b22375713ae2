"""The numbers that `watch` shows, from the ranks' pages or from the folder of a run."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from trainer.checkpoint import format as checkpoint
from trainer.common.credentials import redacted
from trainer.common.format import plural
from trainer.telemetry.rank_time import PHASES
from trainer.telemetry.time_breakdown import ACTIVITIES
from trainer.view.pages import Page, value
from trainer.view.rates import ROLES, Shares, Window, known_shares, whole
from trainer.view.records import CHECKPOINTS, RECENT, SCALARS, Records, facts_of, recorded_load, saved_recipe

_GAUGES = {
    "step": "unipool_step",
    "target_steps": "unipool_target_steps",
    "val_loss": "unipool_validation_loss_nats",
    "step_seconds": "unipool_step_seconds",
    "skipped_steps": "unipool_skipped_steps_total",
    "checkpoint_step": "unipool_checkpoint_step",
    "checkpoint_failures": "unipool_checkpoint_failures_total",
    "restarts": "unipool_restarts_total",
    **{field.name: field.metadata["metric"].name for field in SCALARS if field.metadata["metric"]},
}
"""Metrics of rank 0 by their names in `View.scalars`."""

MOST_EXPERTS = 100_000
"""The most experts whose load is shown. Any number may stand on a page, or in a damaged file."""

_WAITS = 0.1
"""Share of its time up to which a role that waits counts as busy."""


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
    if info.get("layout") == "every_rank":
        if not roles.get("trunk"):
            return ""
        return f"Every rank has both roles, and waits {roles['trunk']['waiting']:.0%} of its time for others."
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
        self._info: dict[str, str] = {}
        self._losses: dict[float, float] = {}
        self._pace: tuple[float, float] | None = None

    def view(self, pages: Sequence[Page]) -> View:
        """Return the run as these pages show it."""
        self._windows = {page.url: self._windows.get(page.url, Window()) for page in pages}
        answered = {page.url: page for page in pages if not page.error}
        for url, page in answered.items():
            self._windows[url].add(page.samples)
        windows = [self._windows[url] for url in answered]
        first = next((page for page in answered.values() if "unipool_step" in page.samples), None)
        layers = first.samples.get("unipool_layer_load_imbalance_ratio", ()) if first else ()
        scalars = self._scalars(first) | _memory(answered.values()) if first else {}
        ranks = sorted(map(_use, windows), key=lambda use: (ROLES.index(use.role), use.rank))
        experts, too_many = self._experts(windows)
        covered = step_text(self._windows[first.url] if first else windows[0]) if windows else ""
        return View(
            run=self._info.get("run", ""),
            state=_state(answered.values()),
            info=self._info,
            scalars=scalars,
            roles={role: _mean_shares([use.shares for use in ranks if use.role == role]) for role in ROLES},
            ranks=tuple(ranks),
            experts=experts,
            layers=tuple(ratio for _, ratio in sorted((labels.get("layer", ""), ratio) for labels, ratio in layers)),
            losses=tuple(self._losses.values()),
            window=covered,
            load_window=covered,
            notes=(*self._silent(pages), *_twice(ranks), *_on_cpus(answered.values()), *too_many),
        )

    def _scalars(self, page: Page) -> dict[str, float]:
        for labels, _ in page.samples.get("unipool_run_info", ()):
            self._info = {name: "".join(filter(str.isprintable, text)) for name, text in labels.items()}
        scalars = {name: value(page.samples, metric) for name, metric in _GAUGES.items() if metric in page.samples}
        scalars |= self._speed(page, scalars)
        if owned := [share for _, share in page.samples.get("unipool_layer_own_share_ratio", ())]:
            scalars["own_share"] = sum(owned) / len(owned)
        if saved := value(page.samples, "unipool_checkpoint_timestamp_seconds"):
            scalars["checkpoint_age"] = max(page.seconds - saved, 0.0)
        step = scalars["step"]
        if "loss" in scalars and step:  # later losses are dropped, as the run may have gone back to a checkpoint
            self._losses = {at: loss for at, loss in self._losses.items() if at < step} | {step: scalars["loss"]}
        if self._pace is None or self._windows[page.url].from_start:
            self._pace = (page.seconds, step)
        left = scalars.get("target_steps", step) - step
        since, done = page.seconds - self._pace[0], step - self._pace[1]
        # After some steps by the time that has passed, with evaluations and checkpoints; before that by the last step.
        step_seconds = since / done if done >= 5 else scalars.get("step_seconds", math.nan)
        if left > 0 and math.isfinite(step_seconds):
            scalars["eta"] = left * step_seconds
        return scalars

    def _speed(self, page: Page, scalars: Mapping[str, float]) -> dict[str, float]:
        """Return the tokens per second of all trunk ranks, which train on equal shares, by rank 0's page."""
        tokens = sum(self._windows[page.url].per_step("unipool_tokens_total").values())
        seconds, ranks = scalars.get("step_seconds", 0.0), whole(self._info.get("trunk_ranks", ""))
        return {"tokens_per_second": tokens * ranks / seconds} if tokens and seconds and ranks is not None else {}

    def _experts(self, windows: Sequence[Window]) -> tuple[tuple[float, ...], list[str]]:
        """Return the load by expert, and a note if there are too many to show it."""
        load: dict[int, float] = {}
        for window in windows:
            for label, tokens in window.per_step("unipool_expert_tokens_total").items():
                if (expert := whole(label)) is not None:
                    load[expert] = load.get(expert, 0.0) + tokens
        experts = max(whole(self._info.get("experts", "")) or 0, max(load) + 1) if load else 0
        if experts > MOST_EXPERTS:
            return (), [_too_many(experts)]
        return tuple(load.get(expert, math.nan) for expert in range(experts)), []

    def _silent(self, pages: Sequence[Page]) -> Iterator[str]:
        """Say which ranks do not answer, by reason."""
        silent: dict[str, list[str]] = {}
        for page in pages:
            if page.error:
                window = self._windows[page.url]
                place = re.sub(r"^http://|/metrics$", "", redacted(page.url))
                who = f"{window.role} rank {window.rank} at {place}" if window.role else place
                silent.setdefault(page.error, []).append(who)
        for reason, ranks in silent.items():
            more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
            yield f"no metrics ({reason}): {', '.join(ranks[:3])}{more}"


def recorded_view(run: Path, records: Records, state: str, notes: Sequence[str] = ()) -> View:
    """Return a run whose ranks do not answer, from its folder."""
    recipe, load_LM = saved_recipe(run), recorded_load(run)
    scalars = records.last()
    if records.steps:
        scalars["step"] = records.steps[-1]
        scalars["skipped_steps"] = sum(applied == 0 for applied in records.columns["applied"])
    if records.val_losses:
        scalars["val_loss"] = records.val_losses[-1]
    if recipe:
        scalars["target_steps"] = recipe.train.steps
    experts = 0 if load_LM is None else load_LM.shape[1]
    if experts > MOST_EXPERTS:
        load_LM, notes = None, [*notes, _too_many(experts)]
    if newest := checkpoint.newest(run / CHECKPOINTS):
        scalars["checkpoint_step"] = newest[0]
        with suppress(OSError):  # it was replaced by a newer one
            scalars["checkpoint_age"] = max(time.time() - newest[1].stat().st_mtime, 0.0)
    return View(
        run=run.resolve().name,
        state=state,
        info=facts_of(recipe, run) if recipe else {},
        scalars=scalars,
        roles={role: records.shares(role, RECENT) for role in ROLES},
        experts=tuple(load_LM.sum(0).tolist()) if load_LM is not None else (),
        losses=tuple(records.columns["loss"]),
        window=f"the last {min(RECENT, len(records.steps))} steps" if records.steps else "",
        load_window="as last saved",
        notes=tuple(notes),
    )


def _state(pages: Iterable[Page]) -> str:
    """Say what the rank does that is least far, or that none answers."""
    pages = list(pages)
    phases = {labels.get("phase") for page in pages for labels, on in page.samples.get("unipool_phase", ()) if on == 1}
    phase = next((phase for phase in PHASES if phase in phases), "training")
    if not pages:
        return "no rank answers"
    return "running" if phase == "training" else phase.replace("_", " ")


def _on_cpus(pages: Iterable[Page]) -> Iterator[str]:
    """Say which ranks train on a CPU beside GPUs."""
    for page in pages:
        for labels, gpus in page.samples.get("unipool_unused_gpus", ()):
            if gpus and math.isfinite(gpus):
                who = f"{labels.get('role')} rank {labels.get('rank')}"
                yield f"{who} trains on the CPU although its machine has {plural(int(gpus), 'GPU')}: see the run's log"


def _too_many(experts: int) -> str:
    return (
        f"the load of the experts is not shown: there should be {experts:,} of them, and {MOST_EXPERTS:,} are the most"
    )


def _memory(pages: Iterable[Page]) -> dict[str, float]:
    """Return the peak memory of each role's fullest rank: of its GPU, or of the host if it computes there."""
    most: dict[str, float] = {}
    for page in pages:
        samples = page.samples.get("unipool_peak_memory_bytes", ())
        by_place = {labels.get("where", ""): (f"{labels.get('role')}_memory", size) for labels, size in samples}
        if found := by_place.get("gpu") or by_place.get("host"):
            most[found[0]] = max(found[1], most.get(found[0], 0.0))
    return most


def _use(window: Window) -> RankUse:
    served = window.per_step("unipool_service_tokens_total")
    return RankUse(window.role, window.rank, window.shares(), sum(served.values()) if served else math.nan)


def _mean_shares(ranks: Sequence[Shares]) -> Shares:
    return known_shares([sum(shares.get(activity, 0.0) for shares in ranks) for activity in ACTIVITIES])


def _twice(ranks: Sequence[RankUse]) -> Iterator[str]:
    for (role, rank), pages in Counter((use.role, use.rank) for use in ranks).items():
        if pages > 1:
            yield f"{role} rank {rank} appears more than once: do the pages belong to several runs?"
