"""Accuracy on tasks with random experts in one layer, in which METHOD.md's probe 1 is measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.common.errors import UserError
from trainer.evaluate.scores import Scores, with_accuracy
from trainer.evaluate.tables import settings, show_score
from trainer.probe.adapters import MoEModel
from trainer.probe.effects import WHAT, Effect, Over, effect_table, over_layers, show_effect, spread_of
from trainer.probe.output import table

if TYPE_CHECKING:
    from rich.table import Table

NO_ACCURACY = "--tasks: none has an accuracy (the harness's `acc`), whose drop is measured; give one that has"


@dataclass(frozen=True)
class Accuracies:
    """Of one scoring, from 0 to 1; `mean` is unweighted over the tasks."""

    mean: float
    tasks: dict[str, float]


@dataclass(frozen=True)
class Drop:
    """By how many percentage points an accuracy falls; mean and standard deviation (None for one) over the draws."""

    drop: float
    spread: float | None


@dataclass(frozen=True)
class LayerDrop:
    """One layer with random experts. `accuracies` are of every draw; drop and spread (see `Drop`) of their mean."""

    layer: int
    over: Over
    accuracies: tuple[Accuracies, ...]
    drop: float
    spread: float | None


@dataclass(frozen=True)
class MeanDrop:
    """The mean over the layers: of the mean over the tasks, and of each task."""

    over: Over
    drop: float
    spread: float | None
    tasks: dict[str, Drop]


@dataclass(frozen=True)
class Accuracy:
    """What random experts do to it. `learned` are the scores of the learned routing."""

    learned: Scores
    layers: tuple[LayerDrop, ...]
    means: tuple[MeanDrop, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A line a draw, for the CSV file."""
        learned = accuracies(self.learned)
        return [
            {"accuracy": a.mean, "accuracy_baseline": learned.mean, "drop": _points(learned.mean, a.mean)}
            | {f"accuracy:{task}": value for task, value in a.tasks.items()}
            | {f"accuracy_baseline:{task}": value for task, value in learned.tasks.items()}
            for layer in self.layers
            for a in layer.accuracies
        ]

    def effects(self) -> list[Effect]:
        means = [Effect(None, m.over, m.drop, m.spread) for m in self.means]
        return [Effect(d.layer, d.over, d.drop, d.spread) for d in self.layers] + means

    def tables(self, model: str) -> list[Table]:
        """By layer, and by task."""
        by_layer = f"{model}: accuracy drop with random experts in one layer, percentage points"
        by_task = f"{model}: accuracy drop by task, mean over the layers, percentage points"
        tasks = table(by_task, "task", "examples", "learned")
        for mean in self.means:
            tasks.add_column(f"over {WHAT[mean.over]}", justify="right")
        for task in with_accuracy(self.learned.tasks):
            drops = [mean.tasks[task.task] for mean in self.means]
            tasks.add_row(task.task, f"{task.examples:,}", show_score(task.metrics["acc"]), *map(_show, drops))
        tasks.add_section()
        tasks.add_row("mean", "", f"{self.learned.mean['acc']:.4f}", *map(_show, self.means))
        return [effect_table(by_layer, self.effects(), "z.2f"), tasks]

    def notes(self) -> list[str]:
        lines = [
            f"Accuracy of the learned routing: {self.learned.mean['acc']:.4f}, {settings(self.learned)}; the tables "
            "have by how much it falls. Means over tasks are unweighted.",
            "The learned routing's ± is the standard error over a task's examples; a drop's is over the draws alone.",
        ]
        counted = {task.task for task in with_accuracy(self.learned.tasks)}
        if others := [task.task for task in self.learned.tasks if task.task not in counted and not task.part]:
            lines.append(f"Left out, without an accuracy: {', '.join(others)}.")
        if self.learned.cut:
            lines.append(f"{self.learned.cut:,} requests are longer than the model's window and lost their beginnings.")
        return lines


class Exam:
    """Scorings of one model on the same tasks; that of the learned routing is made at once.

    Args:
        score: scores the model as it is then; its argument is `brief` of `evaluate.tasks.evaluate`.

    Attributes:
        learned: of the learned routing.
        forwards: of the model in one scoring, for the progress bar.

    Raises:
        UserError: no task has an accuracy, or what `score` raises.
    """

    def __init__(self, model: MoEModel, score: Callable[[bool], Scores]):
        self._model, self._score = model, score
        self.forwards = 0
        self.learned = self._take(False, self._count)
        if not self.learned.mean:
            raise UserError(NO_ACCURACY)

    def take(self, done: Callable[[], object]) -> Accuracies:
        """A further scoring; calls `done` after each forward."""
        return accuracies(self._take(True, done))

    def _count(self) -> None:
        self.forwards += 1

    def _take(self, brief: bool, done: Callable[[], object]) -> Scores:
        def hook(*_: Any) -> None:
            done()

        handle = self._model.model.register_forward_hook(hook)
        try:
            return self._score(brief)
        finally:
            handle.remove()


def accuracy(learned: Scores, taken: Sequence[tuple[int, Over, Sequence[Accuracies]]]) -> Accuracy:
    """What the scorings of (layer, protocol) come to, each with its draws."""
    base = accuracies(learned)
    layers = tuple(LayerDrop(layer, over, tuple(own), *_drops(base, [own])) for layer, over, own in taken)
    means = []
    for over in dict.fromkeys(d.over for d in layers):
        by_layer = [d.accuracies for d in layers if d.over == over]
        tasks = {task: Drop(*_drops(base, by_layer, task)) for task in base.tasks}
        means.append(MeanDrop(over, *_drops(base, by_layer), tasks))
    return Accuracy(learned, layers, tuple(means))


def accuracies(scores: Scores) -> Accuracies:
    """Of the tasks that have one; there must be some."""
    by_task = {task.task: task.metrics["acc"].value for task in with_accuracy(scores.tasks)}
    return Accuracies(scores.mean["acc"], by_task)


def _show(drop: Drop | MeanDrop) -> str:
    return show_effect(drop.drop, drop.spread, "z.2f")


def _drops(
    base: Accuracies, by_layer: Sequence[Sequence[Accuracies]], task: str | None = None
) -> tuple[float, float | None]:
    """(drop, spread) of a task or of the mean over them, of the mean over the layers."""
    by_draw = over_layers([[_points(_pick(base, task), _pick(a, task)) for a in own] for own in by_layer])
    return statistics.fmean(by_draw), spread_of(by_draw)


def _pick(found: Accuracies, task: str | None) -> float:
    return found.mean if task is None else found.tasks[task]


def _points(learned: float, random: float) -> float:
    return 100 * (learned - random)
