"""What a person sees during a run: one progress line on a terminal, or a line now and then in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from tqdm import tqdm

from trainer.common.format import plural
from trainer.config.lock import locked_after
from trainer.config.recipe import Recipe
from trainer.telemetry.over_steps import Spike
from trainer.telemetry.step_scalars import Efficiency, StepScalars

LOG_SECONDS = 10.0
"""Least time between two lines when stderr is not a terminal."""


def say(line: str) -> None:
    """Print a line on stderr, above the progress bar. A full disk under the log does not end training."""
    with suppress(OSError):
        tqdm.write(line, file=sys.stderr)


class Progress:
    """Rank 0's progress display.

    Args:
        done: Optimizer steps done before this start of the run.
        metrics: Where each rank serves its metrics.
    """

    def __init__(self, recipe: Recipe, done: int, metrics: Sequence[str]):
        self._start = self._last_line = time.monotonic()
        self._first, self._total, self._has_pool = done, recipe.train.steps, recipe.model.ffn != "dense"
        for line in (describe(recipe), *(f"metrics: {line}" for line in metrics)):
            say(line)
        if done:
            say(f"resuming after step {done}")
        self._bar = tqdm(
            total=recipe.train.steps,
            initial=done,
            disable=not sys.stderr.isatty(),
            bar_format="step {n_fmt}/{total_fmt} {bar}{postfix}, ETA {remaining}",
            dynamic_ncols=True,
        )

    def step(self, done: int, scalars: StepScalars, efficiency: Efficiency) -> None:
        """Show a step."""
        text = f"{scalars.console(self._has_pool)}, {efficiency.console()}"
        if not scalars.applied and math.isfinite(scalars.grad_norm) and not scalars.nonfinite_router_tokens:
            norm = f"{scalars.grad_norm:.4g}"
            say(f"step {done}: skipped because the gradient norm, {norm}, is a spike (train.skip_spikes)")
        elif not scalars.applied:
            say(f"step {done}: skipped because gradients are not finite")
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._bar.disable and (now - self._last_line > LOG_SECONDS or done in (self._first + 1, self._total)):
            self._last_line = now
            left = (now - self._start) / (done - self._first) * (self._total - done)
            say(f"step {done}/{self._total}: {text}, ETA {tqdm.format_interval(left)}")

    def evaluation(self, done: int, val_loss: float) -> None:
        """Show an evaluation; the loss is in nats per token."""
        say(f"step {done}: validation loss {val_loss:.4f}")

    def spike(self, done: int, name: str, spike: Spike, where: str) -> None:
        """Show that a value, called `name`, has jumped, and on which data."""
        far = f", {spike.deviations:.0f} deviations" if math.isfinite(spike.deviations) else ""
        say(
            f"step {done}: the {name} has a spike: {spike.value:.4f}, where the median of the steps before is "
            f"{spike.median:.4f}{far}; {where}"
        )

    def probe(self, done: int, added: float, layers: Sequence[int]) -> None:
        """Show by how many nats random experts in one of `layers` increase the loss, on average."""
        which = f"layer {layers[0]}" if len(layers) == 1 else f"one of the layers {', '.join(map(str, layers))}"
        say(f"step {done}: random experts in {which} add {added:+.4f} nats to the loss")

    def close(self) -> None:
        """Remove the progress line."""
        self._bar.close()


def describe(recipe: Recipe) -> str:
    """Describe the run in one line."""
    m, t = recipe.model, recipe.grid
    if m.ffn == "dense":
        model = f"dense, {m.layers} layers"
    elif m.groups == 1:
        model = f"{m.layers} layers share {recipe.pool.experts} experts"
    else:
        model = (
            f"{m.groups} groups of {plural(m.layers // m.groups, 'layer')} with {recipe.experts_per_layer} experts each"
        )
    if recipe.lock:
        locked = locked_after(recipe)
        model += f", locked {f'after step {locked}' if locked else 'from the first step'}"
    if t.every_rank:
        part = "the whole pool" if t.expert_parallel == 1 else "a part of the pool"
        ranks = f"{plural(t.world_size, 'rank')}, each with {part}"
    else:
        pool = "colocated" if t.colocated else plural(t.pool_ranks, "pool rank")
        ranks = f"{plural(t.trunk_ranks, 'trunk rank')}, {pool}"
    return f"{recipe.run.dir}: {model}; {ranks}; {recipe.train.precision}"
