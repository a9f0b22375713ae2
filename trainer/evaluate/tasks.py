"""Scores on tasks by lm-evaluation-harness, with its own model class round the export's model: its numbers."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

from trainer.common.errors import UserError
from trainer.evaluate.scores import Score, Scores, TaskScores, with_accuracy
from trainer.evaluate.subject import Subject
from trainer.telemetry.console import say

try:
    from lm_eval import __version__ as harness_version
    from lm_eval import evaluator
    from lm_eval.api.group import Group
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(
        f"--tasks: needs lm-evaluation-harness ({error}): pip install -r requirements-eval.txt, or the extra `eval`"
    ) from None

BOOTSTRAPS = 1000
"""Resamples for the standard error of a perplexity; those of accuracies have a formula."""


def evaluate(
    subject: Subject, tasks: Sequence[Any], num_fewshot: int, limit: int | None, batch_size: int, brief: bool = False
) -> Scores:
    """Score a model on tasks.

    Args:
        tasks: of `load_tasks`.
        limit: examples a task at most.
        brief: for one of many scorings: without the harness's progress bars, and without the standard errors that are
            resampled, which take seconds each.

    Raises:
        UserError: an answer is longer than the model's window.
    """
    with _quiet(bars=not brief) as cut, _without_machine():
        model = HFLM(
            pretrained=subject.model,
            tokenizer=subject.tokenizer,
            backend="causal",
            batch_size=batch_size,
            mixed_precision_dtype="bfloat16" if subject.mixed else None,
        )
        try:
            found = evaluator.simple_evaluate(
                model,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=0 if brief else BOOTSTRAPS,
                log_samples=False,
                task_manager=TaskManager(include_defaults=False),  # else it reads all of them again
            )
        except AssertionError as error:  # so it says that an answer does not fit, unlike a prompt, which it cuts
            raise UserError(
                f"--tasks: some answer is longer than the model's window of {model.max_length} tokens, which the "
                "harness does not score; leave that task out"
            ) from error
    scores = _scores(found)
    return Scores(scores, _mean(scores), limit, cut.count, subject.precision, harness_version)


class _CountCut(logging.Handler):
    """Counts the harness's warnings that a request is longer than the model's window; there may be thousands."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith("Combined length")


@contextmanager
def _quiet(bars: bool = True) -> Iterator[_CountCut]:
    """Progress bars if wanted, on a terminal only, nothing of the harness's on stdout; of its log one kind, counted."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    log, cut = logging.getLogger(HFLM.__module__), _CountCut()
    log.setLevel(logging.WARNING)
    log.propagate = False
    log.addHandler(cut)
    shown = sys.stderr if bars and sys.stderr.isatty() else io.StringIO()
    try:
        with redirect_stdout(shown), redirect_stderr(shown):
            yield cut
    finally:
        log.removeHandler(cut)


def _without_machine() -> AbstractContextManager[object]:
    """Keeps `simple_evaluate` from asking pip, git and the system what machine this is: seconds, each time."""
    return patch.object(evaluator, "add_env_info", lambda _results: None, create=True)


def load_tasks(names: Sequence[str], include: Path | None) -> list[Any]:
    """The harness's objects of tasks and groups, with their data.

    Args:
        names: tasks, groups or tags of the harness, or of the YAML files below `include`, which come first.

    Raises:
        UserError: there is no such task, or its data cannot be had.
    """
    if include and not include.is_dir():
        raise UserError(f"--include-path {include}: no such folder; give one with the YAML files of tasks")
    names = list(dict.fromkeys(names))
    say(f"tasks: {', '.join(names)}")
    with _quiet():
        return _load(names, include)


def _load(names: Sequence[str], include: Path | None) -> list[Any]:
    folder = str(include) if include else None
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):  # to read the harness's own 14,000 takes seconds
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, 3)
            meant = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists those there are"
            raise UserError(f"--tasks {name}: no such task; {meant}")
    found: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # the hub's, the data's and the YAML's own errors
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise UserError(
                f"--tasks {name}: its data cannot be had ({reason}); without a network give --include-path with a task "
                "file that names local data"
            ) from error
        group = loaded.get("groups", {}).get(name)
        found += [group] if group else loaded["tasks"].values()
    return found


def may_have_accuracy(tasks: Sequence[Any]) -> bool:
    """Whether any of `load_tasks` measures `acc`, by what it says itself; the answers alone tell for certain."""
    leaves = (task.get_all_tasks() if isinstance(task, Group) else [task] for task in tasks)
    return any("acc" in leaf.aggregation() for leaf in chain.from_iterable(leaves))


def _scores(found: dict[str, Any]) -> list[TaskScores]:
    parts = {part for children in found["group_subtasks"].values() for part in children}
    made = []
    for name, values in (found["results"] | found.get("groups", {})).items():
        metrics = {}
        for key, value in values.items():
            metric, _, way = key.partition(",")
            if not way or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{way}")
            known = float(stderr) if isinstance(stderr, int | float) else None
            metrics[metric if way == "none" else key] = Score(float(value), known)
        version, shots = found["versions"].get(name), found["n-shot"].get(name)
        made.append(
            TaskScores(
                task=name,
                examples=int(values.get("sample_len", 0)),
                num_fewshot=shots,
                version=None if version is None else str(version),
                metrics=metrics,
                part=name in parts,
            )
        )
    return made


def _mean(scores: Sequence[TaskScores]) -> dict[str, float]:
    counted = [task.metrics for task in with_accuracy(scores)]
    if not counted:
        return {}
    return {
        "acc": sum(metrics["acc"].value for metrics in counted) / len(counted),
        "acc_norm": sum(metrics.get("acc_norm", metrics["acc"]).value for metrics in counted) / len(counted),
        "tasks": len(counted),
    }
