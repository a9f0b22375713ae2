"""The loop of `watch`: a run in a terminal, until Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps, json_safe
from trainer.view.frame import Frame
from trainer.view.pages import TARGETS_FILE, fetch, page_url, targets
from trainer.view.records import Records, is_run, saved_recipe
from trainer.view.view import Follower, View, recorded_view


def watch(sources: Sequence[str], interval: float, once: bool, as_json: bool) -> None:
    """Show a run, given by its folder or by addresses of pages, until Ctrl-C, or once as a frame or as JSON.

    Raises:
        UserError: A source is neither, or nothing answers.
    """
    look = _look_at(sources)
    if as_json:
        print(dumps(to_json(look())))
        return
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # for terminals without the characters of bars
    console = Console(highlight=False)
    if once or not console.is_terminal:
        console.print(Frame(look()))
        return
    with suppress(KeyboardInterrupt):
        _follow(look, interval, console)


def _follow(look: Callable[[], View], interval: float, console: Console) -> None:
    footer = f"every {interval:g} s; press Ctrl-C to leave"
    with Live(Frame(look(), footer), console=console, screen=True, refresh_per_second=2) as live:
        while True:
            time.sleep(interval)
            live.update(Frame(look(), footer))


def to_json(view: View) -> dict[str, Any]:
    """Convert a view to JSON, without the loss curve; numbers that are unknown or not finite are null."""
    tree: dict[str, Any] = json_safe(asdict(replace(view, losses=())))
    del tree["losses"]
    return tree


def _look_at(sources: Sequence[str]) -> Callable[[], View]:
    """Return a function that gives the next view, after a first successful look."""
    folders = [source for source in sources if Path(source).is_dir()]
    if folders:
        if len(sources) > 1:
            raise UserError(f"{folders[0]}: give either the folder of one run or addresses of pages, not both")
        return _Run(Path(folders[0])).look
    return _Pages(list(dict.fromkeys(page_url(source) for source in sources))).look


class _Pages:
    """A run that is known by its pages only."""

    def __init__(self, urls: Sequence[str]):
        self._urls = urls
        self._follower = Follower()
        self._first = fetch(urls)
        if all(page.error for page in self._first):
            more = f" (and {len(urls) - 1} more)" if len(urls) > 1 else ""
            raise UserError(f"{urls[0]}: {self._first[0].error}{more}; no rank answers")

    def look(self) -> View:
        pages, self._first = self._first or fetch(self._urls), []
        return self._follower.view(pages)


class _Run:
    """A run that is known by its folder: its ranks if they answer, otherwise its records."""

    def __init__(self, folder: Path):
        if not is_run(folder):
            raise UserError(f"{folder}: not a run; give the folder of a run (run.dir) or addresses of its ranks' pages")
        self._folder = folder
        self._records = Records(folder)
        self._follower = Follower()

    def look(self) -> View:
        urls, name = targets(self._folder)
        pages = fetch(urls)
        self._records.read()
        view = self._follower.view(pages)
        notes, live = view.notes, any(not page.error for page in pages)
        if live and view.run not in ("", name):  # the ports of a crashed run, which another one uses now
            notes, live = (f"{TARGETS_FILE} names pages that belong to another run now: {view.run}",), False
        if not live:
            return recorded_view(self._folder, self._records, self._state(bool(urls)), notes)
        scalars = dict(view.scalars)
        if self._records.val_losses:
            scalars["val_loss"] = self._records.val_losses[-1]
        losses = tuple(self._records.columns["loss"]) or view.losses
        return replace(view, run=view.run or self._folder.resolve().name, scalars=scalars, losses=losses)

    def _state(self, was_running: bool) -> str:
        if was_running:
            return "does not answer"
        recipe = saved_recipe(self._folder)
        if not self._records.steps:
            return "has not begun"
        return "ended" if recipe and self._records.steps[-1] >= recipe.train.steps else "stopped"
