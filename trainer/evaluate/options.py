"""The options of commands that score a model on tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from trainer.common.errors import UserError


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks to score, and how.

    Attributes:
        names: The tasks; empty if --tasks was not given.
        num_fewshot: The number of solved examples before each question.
        limit: The maximum number of examples of a task; None for all.
        include_path: A folder with task files of the user's own.
        batch_size: The number of sequences in a forward pass.
    """

    names: list[str]
    num_fewshot: int
    limit: int | None
    include_path: Path | None
    batch_size: int


def task_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options about tasks to a command, which gets them as the argument `tasks`, a `TaskOptions`."""

    @click.option("--tasks", metavar="TASK,...", help="Score tasks of lm-evaluation-harness.")
    @click.option(
        "--num-fewshot",
        type=click.IntRange(min=0),
        metavar="N",
        help="Solved examples before each question.  [with --tasks; default: 0]",
    )
    @click.option(
        "--limit",
        type=click.IntRange(min=1),
        metavar="N",
        help="Use only the first N examples of each task.  [with --tasks]",
    )
    @click.option(
        "--include-path",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Folder with your own task files (YAML), which take precedence.  [with --tasks]",
    )
    @click.option(
        "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences per forward pass."
    )
    @wraps(command)
    def with_tasks(
        tasks: str | None,
        num_fewshot: int | None,
        limit: int | None,
        include_path: Path | None,
        batch_size: int,
        **others: Any,
    ) -> None:
        for option, value in {"--num-fewshot": num_fewshot, "--limit": limit, "--include-path": include_path}.items():
            if value is not None and tasks is None:
                raise UserError(f"{option} {value}: requires --tasks, as in --tasks piqa,race")
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        if tasks is not None and not names:
            raise UserError("--tasks: names no task; give one or more, as in --tasks piqa,race")
        command(tasks=TaskOptions(names, num_fewshot or 0, limit, include_path, batch_size), **others)

    return with_tasks
