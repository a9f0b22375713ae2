"""The tables that `eval` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.evaluate.loss import TextLoss
    from trainer.evaluate.scores import Score, Scores, TaskScores

ACCURACIES = ("acc", "acc_norm")


def print_loss(loss: TextLoss) -> None:
    """Loss, perplexity, bits per byte, and of how much text."""
    print(f"loss            {loss.loss:.4f} nats a token")
    print(f"perplexity      {loss.perplexity:,.2f}")
    print(f"bits per byte   {loss.bits_per_byte:.4f}")
    print(f"tokens          {loss.tokens:,} predicted, in windows of {loss.window}, {loss.precision}")
    print(f"bytes           {loss.bytes:,}")


def print_scores(scores: Scores) -> None:
    """A line a task, and the mean."""
    width = max(len("mean"), *(len(_name(task)) for task in scores.tasks)) + 2
    print(f"{'task':<{width}}{'examples':>8}{'acc':>17}{'acc_norm':>17}")
    for task in scores.tasks:
        accuracies = "".join(f"{show_score(task.metrics.get(name)):>17}" for name in ACCURACIES)
        rest = ((name, score) for name, score in task.metrics.items() if name not in ACCURACIES)
        others = (f"{name} {show_score(score, '.4g')}" for name, score in rest)
        print("  ".join([f"{_name(task):<{width}}{task.examples:>8,}{accuracies}", *others]))
    if scores.mean:
        means = "".join(f"{f'{scores.mean[name]:.4f}':<8}".rjust(17) for name in ACCURACIES)
        print(f"{'mean':<{width}}{'':>8}{means}".rstrip())
        tasks = f"{scores.mean['tasks']:g} task{'s' if scores.mean['tasks'] > 1 else ''}"
        print(f"- unweighted, over {tasks}; acc_norm with acc where a task has none. {settings(scores)}")
    if scores.cut:
        print(f"- {scores.cut:,} requests are longer than the model's window: their beginnings were left out.")


def settings(scores: Scores) -> str:
    """How they were asked."""
    shots = sorted({task.num_fewshot for task in scores.tasks if task.num_fewshot is not None})
    parts = ["zero-shot" if shots == [0] else f"{', '.join(map(str, shots))} examples before each", scores.precision]
    if scores.limit:
        parts.append(f"at most {scores.limit} examples a task")
    return f"{', '.join(parts)}, lm-evaluation-harness {scores.harness}"


def _name(task: TaskScores) -> str:
    return f"  {task.task}" if task.part else task.task


def show_score(score: Score | None, form: str = ".4f") -> str:
    """With its standard error, if it has one."""
    if score is None:
        return "-"
    return f"{score.value:{form}}" + (f" ± {score.stderr:{form}}" if score.stderr is not None else "")
