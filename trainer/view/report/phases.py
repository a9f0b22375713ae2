"""What the time of a run went into, as far as its records tell: training, evaluating, saving, starting, what was lost.

A step's record has its seconds and the goodput, which is the time of all steps that count over the time since the run's
first start. So the time at which a step ended is known, and the pauses between steps are what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.common.safe_read import read_bytes
from trainer.common.strict_json import loads
from trainer.config.recipe import Recipe
from trainer.telemetry.run_folder import RECORDED
from trainer.view.records import Numbers, Records

TRAINING, SKIPPED, START = "training steps", "skipped steps", "start, until the first step"
EVALUATION, SAVING, BOTH = "evaluations and probes", "checkpoints", "evaluation and checkpoint"
OTHER, LOST = "between other steps", "lost by interruptions"
PHASES = (TRAINING, SKIPPED, EVALUATION, SAVING, BOTH, OTHER, START, LOST)

_INTERRUPTION = 5.0
"""How many times as long as the median pause of its kind a pause is that has a restart in it."""


@dataclass(frozen=True)
class Phase:
    """What a run spent time on.

    Attributes:
        name: One of PHASES.
        pauses: Seconds of each step or pause.
        tokens: Tokens that were trained on or evaluated meanwhile.
    """

    name: str
    pauses: Numbers
    tokens: float = 0.0

    @property
    def seconds(self) -> float:
        return float(self.pauses.sum())


def step_seconds(records: Records) -> Numbers:
    """Return the time of each step, from its throughput if it is not recorded; 0 if that is not known either."""
    seconds, tokens, speed = (np.array(records.columns[name]) for name in ("seconds", "tokens", "tokens_per_second"))
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = np.where(np.isfinite(seconds), seconds, tokens / speed)
    return np.where(np.isfinite(seconds), seconds, 0.0)


def elapsed(records: Records) -> Numbers:
    """Return the seconds from the run's first start to the end of each step; NaN where the goodput is not recorded."""
    counted = np.where(np.array(records.columns["applied"]) == 0, 0.0, step_seconds(records)).cumsum()
    goodput = np.array(records.columns["goodput"])
    seconds: Numbers = np.divide(counted, goodput, out=np.full(len(counted), np.nan), where=goodput > 0)
    return seconds


def phases(run: Path, records: Records, recipe: Recipe | None) -> list[Phase]:
    """Return what the time until the last step went into; without pauses if the goodput is not recorded.

    A pause belongs to what came between two steps: an evaluation or a probe, which are recorded, a checkpoint, where
    the recipe wants one, both, or neither. In a run that was started more than once, a pause much longer than others of
    its kind has a restart in it: what is longer is lost.
    """
    seconds, tokens = step_seconds(records), np.array(records.columns["tokens"])
    applied = np.array(records.columns["applied"]) != 0
    found = [Phase(TRAINING, seconds[applied], float(np.nansum(tokens[applied]))), Phase(SKIPPED, seconds[~applied])]
    ends = elapsed(records)
    if len(ends) and np.isfinite(ends).all():
        pauses = np.diff(ends, prepend=0.0) - seconds
        found += _pauses(pauses.clip(min=0.0), records, recipe, _was_resumed(run))
    return [phase for phase in found if len(phase.pauses)]


def _pauses(pauses: Numbers, records: Records, recipe: Recipe | None, resumed: bool) -> list[Phase]:
    """Divide the pauses before the steps by what came in them."""
    before = np.array(records.steps[:-1])  # every pause but the first comes after a step
    looked = np.isin(before, [*records.val_steps, *records.probe_steps])
    every = recipe.checkpoint.every if recipe else 0
    saved = before % every == 0 if every else np.zeros(len(before), bool)
    tokens = dict(zip(records.val_steps, records.val_tokens, strict=True))
    lost: list[float] = []
    found = []
    for name, chosen in (
        (EVALUATION, looked & ~saved),
        (SAVING, saved & ~looked),
        (BOTH, saved & looked),
        (OTHER, ~saved & ~looked),
    ):
        own = pauses[1:][chosen]
        if resumed and len(own):
            usual = float(np.median(own))
            broken = own > _INTERRUPTION * max(usual, 1.0)
            lost += (own[broken] - usual).tolist()
            own = np.where(broken, usual, own)
        evaluated = sum(tokens.get(step, 0.0) for step in before[chosen].tolist()) if name == EVALUATION else 0.0
        found.append(Phase(name, own, float(np.nan_to_num(evaluated))))
    return [*found, Phase(START, pauses[:1]), Phase(LOST, np.array(lost))]


def _was_resumed(run: Path) -> bool:
    """Return whether the run has been started more than once."""
    try:
        return int(loads(read_bytes(run / "plan.json"))[RECORDED]) > 0
    except (OSError, ValueError, TypeError, LookupError, OverflowError):
        return False
