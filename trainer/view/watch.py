"""The loop of `watch`: a run in a terminal, until Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.train.ends.early_stop import ended_early
from trainer.view.frame import Frame
from trainer.view.pages import TARGETS_FILE, fetch, page_url, targets
from trainer.view.records import Records, is_run, saved_recipe
from trainer.view.view import Follower, View, recorded_view


def watch(sources: Sequence[str], interval: float, once: bool, as_json: bool) -> None:
    """Show a run, given by its folder or by addresses of pages, until Ctrl-C, or once as a frame or as JSON.

    Raises:
        UserError: A source is neither, or nothing answers.
    """
    views = _views(sources)
    if as_json:
        print(dumps(to_json(next(views))))
        return
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # for terminals without the characters of bars
    console = Console(highlight=False)
    if once or not console.is_terminal:
        console.print(Frame(next(views)))
        return
    footer = f"every {interval:g} s; press Ctrl-C to leave"
    with (
        suppress(KeyboardInterrupt),
        Live(Frame(next(views), footer), console=console, screen=True, refresh_per_second=2) as live,
    ):
        while True:
            time.sleep(interval)
            live.update(Frame(next(views), footer))


def to_json(view: View) -> dict[str, Any]:
    """Convert a view to a tree for JSON, without the loss curve."""
    tree = asdict(view)
    del tree["losses"]
    return tree


def _views(sources: Sequence[str]) -> Iterator[View]:
    """Return an endless iterator over the present state."""
    folders = [source for source in sources if Path(source).is_dir()]
    if not folders:
        return _views_of_pages(list(dict.fromkeys(page_url(source) for source in sources)))
    if len(sources) > 1:
        raise UserError(f"{folders[0]}: give either the folder of one run or addresses of pages, not both")
    return _views_of_run(Path(folders[0]))


def _views_of_pages(urls: Sequence[str]) -> Iterator[View]:
    """Yield views of a run that is known by its pages only."""
    follower = Follower()
    pages = fetch(urls)
    if all(page.error for page in pages):
        more = f" (and {len(urls) - 1} more)" if len(urls) > 1 else ""
        raise UserError(f"{urls[0]}: {pages[0].error}{more}; no rank answers")
    while True:
        yield follower.view(pages)
        pages = fetch(urls)


def _views_of_run(folder: Path) -> Iterator[View]:
    """Yield views of a run that is known by its folder: of its ranks if they answer, otherwise of its records."""
    if not is_run(folder):
        raise UserError(f"{folder}: not a run; give the folder of a run (run.dir) or addresses of its ranks' pages")
    records, follower = Records(folder), Follower()
    while True:
        urls, name = targets(folder)
        view = follower.view(fetch(urls))
        records.read()
        notes = view.notes
        live = bool(view.ranks)
        if live and view.run not in ("", name):  # the ports of a crashed run, which another one uses now
            notes, live = (f"{TARGETS_FILE} names pages that belong to another run now: {view.run}",), False
        if not live:
            yield recorded_view(folder, records, _state(folder, records, bool(urls)), notes)
            continue
        recorded = {"val_loss": records.val_losses[-1]} if records.val_losses else {}
        yield replace(
            view,
            run=view.run or folder.resolve().name,
            scalars={**view.scalars, **recorded},
            losses=tuple(records.columns["loss"]) or view.losses,
        )


def _state(folder: Path, records: Records, was_running: bool) -> str:
    if was_running:
        return "does not answer"
    if not records.steps:
        return "has not begun"
    recipe = saved_recipe(folder)
    if recipe and (records.steps[-1] >= recipe.train.steps or ended_early(recipe.eval, records.val_losses)):
        return "ended"
    return "stopped"
