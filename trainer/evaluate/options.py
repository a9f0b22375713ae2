"""The options of commands that score a model on tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from trainer.common.errors import UserError
from trainer.config.options import count_option


@dataclass(frozen=True)
class TaskOptions:
    """The values of the options; `names` is empty without --tasks."""

    names: list[str]
    num_fewshot: int
    limit: int | None
    include_path: Path | None
    batch_size: int


def task_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options about tasks to a command, which gets them as the argument `tasks`, a `TaskOptions`."""

    @click.option("--tasks", metavar="TASK,...", help="Score tasks of lm-evaluation-harness.")
    @click.option(
        "--num-fewshot", type=click.IntRange(0), help="Solved examples before a question.  [with --tasks; default: 0]"
    )
    @count_option("--limit", "Use only the first N examples of each task.  [with --tasks]", metavar="N")
    @click.option(
        "--include-path",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Folder with your own task files (YAML), which take precedence.  [with --tasks]",
    )
    @count_option("--batch-size", "Sequences per forward pass.", 8)
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
