"""What a person sees while a run goes on: one progress line on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from trainer.config.recipe import Recipe

LOG_SECONDS = 10.0
"""Where stderr is no terminal: at least this long between two lines."""


def say(line: str) -> None:
    """A line on stderr, above the progress bar. Training does not end because a log's disk is full."""
    with suppress(OSError):
        tqdm.write(line, file=sys.stderr)


class Progress:
    """Rank 0's progress display.

    Args:
        done: steps that a resumed run has behind it.
        metrics: where each rank serves its metrics.
    """

    def __init__(self, recipe: Recipe, done: int, metrics: Sequence[str]):
        self._start = self._last_line = time.monotonic()
        self._first, self._total = done, recipe.train.steps
        print(describe(recipe), file=sys.stderr)
        print("\n".join(f"metrics: {line}" for line in metrics), file=sys.stderr)
        if done:
            print(f"resuming after step {done}", file=sys.stderr)
        self._bar = tqdm(
            total=recipe.train.steps,
            initial=done,
            disable=not sys.stderr.isatty(),
            bar_format="step {n_fmt}/{total_fmt} {bar}{postfix}, ETA {remaining}",
            dynamic_ncols=True,
        )

    def step(self, done: int, scalars: dict[str, Any]) -> None:
        """Show a step: `scalars` are those of `metrics.StepScalars`."""
        text = (
            f"loss {scalars['loss']:.4f}, {scalars['tokens_per_second']:,.0f} tokens/s, "
            f"load imbalance {scalars['load_imbalance']:.2f}"
        )
        if not scalars["applied"]:
            say(f"step {done}: skipped, gradients are not finite")
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._bar.disable and (now - self._last_line > LOG_SECONDS or done in (self._first + 1, self._total)):
            self._last_line = now
            left = (now - self._start) / (done - self._first) * (self._total - done)
            say(f"step {done}/{self._total}: {text}, ETA {tqdm.format_interval(left)}")

    def evaluation(self, done: int, val_loss: float) -> None:
        say(f"step {done}: validation loss {val_loss:.4f}")

    def probe(self, done: int, added: float, layers: Sequence[int]) -> None:
        which = f"layer {layers[0]}" if len(layers) == 1 else f"one layer, mean of {', '.join(map(str, layers))},"
        say(f"step {done}: random experts in {which} cost {added:+.4f} nats")

    def close(self) -> None:
        self._bar.close()


def describe(recipe: Recipe) -> str:
    """The run in one line."""
    m, t = recipe.model, recipe.grid
    if m.ffn == "dense":
        model = f"dense, {m.layers} layers"
    elif m.groups == 1:
        model = f"{m.layers} layers share {recipe.pool.experts} experts"
    else:
        model = f"{m.groups} groups of {m.layers // m.groups} layers, {recipe.experts_per_layer} experts each"
    where = f"{t.trunk_ranks} trunk ranks, " + ("colocated" if t.colocated else f"{t.pool_ranks} pool ranks")
    return f"{recipe.run.dir}: {model}; {where}; {recipe.train.precision}"
