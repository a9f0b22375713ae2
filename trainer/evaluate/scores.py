"""What a model reaches on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A metric of a task; stderr is None where the harness has none."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskScores:
    """A task or a group of tasks.

    Attributes:
        examples: how many were asked.
        num_fewshot: solved examples before each; None for a group.
        version: of the task; None where it has none.
        metrics: by the harness's names.
        part: it belongs to a group that is listed too.
    """

    task: str
    examples: int
    num_fewshot: int | None
    version: str | None
    metrics: dict[str, Score]
    part: bool


@dataclass(frozen=True)
class Scores:
    """What a model reaches.

    Attributes:
        mean: unweighted over tasks that have an accuracy, groups counted as one: of `acc`, and of `acc_norm` (`acc` of
            tasks without that one). Empty if none has.
        limit: examples a task at most.
        cut: requests longer than the model's window, which lost their beginning.
        harness: version.
    """

    tasks: list[TaskScores]
    mean: dict[str, float]
    limit: int | None
    cut: int
    precision: str
    harness: str


def with_accuracy(scores: Sequence[TaskScores]) -> list[TaskScores]:
    """Those that count in the mean."""
    return [task for task in scores if "acc" in task.metrics and not task.part]
