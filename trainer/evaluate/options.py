"""Options about tasks, of all commands that score a model on some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from trainer.common.errors import UserError


@dataclass(frozen=True)
class TaskOptions:
    """What to score on, and how; no names: nothing."""

    names: list[str]
    num_fewshot: int
    limit: int | None
    include_path: Path | None


def task_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that `read_options` takes."""
    for decorate in (
        click.option(
            "--include-path",
            type=click.Path(path_type=Path),
            metavar="FOLDER",
            help="Task files (YAML) of your own, which come before the harness's of the same name.  [--tasks]",
        ),
        click.option(
            "--limit", type=click.IntRange(min=1), metavar="N", help="Only a task's first N examples.  [--tasks]"
        ),
        click.option(
            "--num-fewshot",
            type=click.IntRange(min=0),
            metavar="N",
            help="Solved examples before each; default: 0.  [--tasks]",
        ),
        click.option("--tasks", metavar="TASK,...", help="Score on tasks of lm-evaluation-harness."),
    ):
        command = decorate(command)
    return command


def read_options(
    tasks: str | None, num_fewshot: int | None, limit: int | None, include_path: Path | None
) -> TaskOptions:
    """As they were given.

    Raises:
        UserError: --tasks names none, or is missed by another option.
    """
    for option, value in {"--num-fewshot": num_fewshot, "--limit": limit, "--include-path": include_path}.items():
        if value is not None and tasks is None:
            raise UserError(f"{option} {value}: goes with --tasks, as in --tasks piqa,race")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise UserError("--tasks: names no task")
    return TaskOptions(names, num_fewshot or 0, limit, include_path)


def batch_size_option(about: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help=about)
