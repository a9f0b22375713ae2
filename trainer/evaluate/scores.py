"""A model's scores on tasks, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.common.format import number, plural, plus_minus
from trainer.common.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Score:
    """The value of a metric, and its standard error if the harness estimates one."""

    value: float
    stderr: float | None

    def __str__(self) -> str:
        return plus_minus(self.value, self.stderr)


@dataclass(frozen=True)
class TaskScores:
    """The scores of a task or of a group of tasks.

    Attributes:
        num_fewshot: The number of solved examples before each question; None for a group.
        metrics: The scores, by the harness's names.
        part: Whether the task belongs to a group that is also listed.
    """

    task: str
    examples: int
    num_fewshot: int | None
    version: str | None
    metrics: dict[str, Score]
    part: bool


@dataclass(frozen=True)
class Scores:
    """A model's scores on all tasks.

    Attributes:
        mean: Unweighted means of `acc` and `acc_norm` over the `tasks` that have an accuracy. A group counts once;
            `acc` replaces a missing `acc_norm`. Empty if no task has an accuracy.
        limit: The maximum number of examples of a task; None for all.
        cut: The number of requests that were longer than the model's window and lost their beginning.
        harness: The version of lm-evaluation-harness.
    """

    tasks: list[TaskScores]
    mean: dict[str, float]
    limit: int | None
    cut: int
    precision: str
    harness: str

    def tables(self) -> list[Table]:
        accuracies = ("acc", "acc_norm")
        made = new_table("", "task", "examples", *accuracies, "other metrics")
        for task in self.tasks:
            shown = [str(task.metrics.get(name, "-")) for name in accuracies]
            others = [f"{name} {score}" for name, score in task.metrics.items() if name not in accuracies]
            name = f"  {task.task}" if task.part else task.task
            made.add_row(name, f"{task.examples:,}", *shown, "\n".join(others))
        if self.mean:
            made.add_section()
            made.add_row("mean", "", *(number(self.mean[name], ".4f") for name in accuracies))
        return [made]

    def notes(self) -> list[str]:
        shots = sorted({task.num_fewshot for task in self.tasks if task.num_fewshot is not None})
        shown = "zero-shot" if shots == [0] else f"{', '.join(map(str, shots))} solved examples before each question"
        limit = f", at most {plural(self.limit, 'example')} per task" if self.limit else ""
        lines = [f"lm-evaluation-harness {self.harness}, {shown}{limit}, {self.precision}."]
        if self.mean:
            tasks = plural(int(self.mean["tasks"]), "task")
            lines.append(f"The mean is unweighted, over {tasks}; acc replaces a missing acc_norm.")
        if self.cut:
            lines.append(f"{self.cut:,} requests were longer than the model's window and lost their beginning.")
        return lines


def with_accuracy(scores: Sequence[TaskScores]) -> list[TaskScores]:
    """Return the tasks that count in the mean."""
    return [task for task in scores if "acc" in task.metrics and not task.part]
