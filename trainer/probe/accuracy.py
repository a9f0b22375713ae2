"""The accuracy on tasks with random experts in one layer, which the paper measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.common.format import plus_minus
from trainer.common.tables import new_table
from trainer.evaluate.scores import Scores, with_accuracy
from trainer.probe.effects import OVER_LABELS, Effects, Over, effect_table, mean_and_spread, over_layers

if TYPE_CHECKING:
    from rich.table import Table

NO_ACCURACY = "--tasks: no task has an accuracy (the harness's `acc`) to measure; give a task that has one"


@dataclass(frozen=True)
class Accuracies:
    """Accuracies of one scoring, from 0 to 1: of each task, and their unweighted mean."""

    mean: float
    tasks: dict[str, float]


@dataclass(frozen=True)
class Drop:
    """The drop of an accuracy in percentage points: mean and standard deviation (None for one draw) over the draws."""

    drop: float
    spread: float | None


@dataclass(frozen=True)
class LayerDrop(Drop):
    """The drop with random experts in one layer; `accuracies` are those of each draw."""

    layer: int
    over: Over
    accuracies: tuple[Accuracies, ...]


@dataclass(frozen=True)
class MeanDrop(Drop):
    """The mean drop over the layers, of all tasks and of each."""

    over: Over
    tasks: dict[str, Drop]


@dataclass(frozen=True)
class Accuracy:
    """The effect of random experts on accuracy; `learned` are the scores of the learned routing."""

    learned: Scores
    layers: tuple[LayerDrop, ...]
    means: tuple[MeanDrop, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return the columns of each draw for the CSV file."""
        learned = accuracies(self.learned)
        return [
            {"accuracy": a.mean, "accuracy_baseline": learned.mean, "drop": 100 * (learned.mean - a.mean)}
            | {f"accuracy:{task}": value for task, value in a.tasks.items()}
            | {f"accuracy_baseline:{task}": value for task, value in learned.tasks.items()}
            for layer in self.layers
            for a in layer.accuracies
        ]

    def effects(self) -> Effects:
        by_layer = {(d.layer, d.over): (d.drop, d.spread) for d in self.layers}
        return by_layer | {(None, m.over): (m.drop, m.spread) for m in self.means}

    def tables(self, model: str) -> list[Table]:
        title = f"{model}: accuracy drop in percentage points with random experts in one layer"
        by_task = f"{model}: accuracy drop in percentage points by task, mean over the layers"
        overs = (f"over {OVER_LABELS[mean.over]}" for mean in self.means)
        tasks = new_table(by_task, "task", "examples", "learned", *overs)
        for task in with_accuracy(self.learned.tasks):
            drops = [mean.tasks[task.task] for mean in self.means]
            tasks.add_row(task.task, f"{task.examples:,}", str(task.metrics["acc"]), *map(_show, drops))
        tasks.add_section()
        tasks.add_row("mean", "", f"{self.learned.mean['acc']:.4f}", *map(_show, self.means))
        return [effect_table(title, self.effects(), "z.2f"), tasks]

    def notes(self) -> list[str]:
        lines = [
            f"The accuracy of the learned routing is {self.learned.mean['acc']:.4f}.",
            *self.learned.notes(),
            "For the learned routing, ± is the standard error over the examples of a task; for drops, it is the "
            "standard deviation over the draws.",
        ]
        counted = {task.task for task in with_accuracy(self.learned.tasks)}
        if others := [task.task for task in self.learned.tasks if task.task not in counted and not task.part]:
            lines.append(f"Tasks without an accuracy are left out: {', '.join(others)}.")
        return lines


def accuracy(learned: Scores, scored: Sequence[tuple[int, Over, Sequence[Accuracies]]]) -> Accuracy:
    """Summarise the accuracies of all draws by layer and protocol."""
    base = accuracies(learned)
    layers = tuple(
        LayerDrop(*_drop(base.mean, [[a.mean for a in own]]), layer, over, tuple(own)) for layer, over, own in scored
    )
    means = []
    for over in dict.fromkeys(d.over for d in layers):
        by_layer = [d.accuracies for d in layers if d.over == over]
        drop = _drop(base.mean, [[a.mean for a in own] for own in by_layer])
        tasks = {
            t: Drop(*_drop(value, [[a.tasks[t] for a in own] for own in by_layer])) for t, value in base.tasks.items()
        }
        means.append(MeanDrop(*drop, over, tasks))
    return Accuracy(learned, layers, tuple(means))


def _drop(learned: float, by_layer: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Return the mean and spread over the draws of the mean drop over the layers."""
    return mean_and_spread([100 * (learned - accuracy) for accuracy in over_layers(by_layer)])


def accuracies(scores: Scores) -> Accuracies:
    """Return the accuracies of the tasks that have one."""
    by_task = {task.task: task.metrics["acc"].value for task in with_accuracy(scores.tasks)}
    return Accuracies(scores.mean["acc"], by_task)


def _show(drop: Drop) -> str:
    return plus_minus(drop.drop, drop.spread, "z.2f")
