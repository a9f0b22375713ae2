"""Scores on tasks by lm-evaluation-harness, whose own model class wraps the export's model."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from itertools import chain
from typing import Any
from unittest.mock import patch

from trainer.common.errors import UserError
from trainer.evaluate.options import TaskOptions
from trainer.evaluate.scores import Score, Scores, TaskScores, with_accuracy
from trainer.export.loaded_model import LoadedModel
from trainer.telemetry.console import say

try:
    from lm_eval import __version__ as harness_version
    from lm_eval import evaluator
    from lm_eval.api.group import Group
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(
        f"--tasks: requires lm-evaluation-harness ({error}): pip install -c constraints.txt -r requirements-eval.txt, "
        "or the extra `eval`"
    ) from None

_BOOTSTRAP_ITERS = 1000
"""Resamples for the standard error of a perplexity; that of an accuracy has a formula."""


class Tasks:
    """Tasks of lm-evaluation-harness with their data.

    Args:
        options: The names of tasks, groups or tags, and how to score them.

    Raises:
        UserError: There is no such task, or its data is not available.
    """

    def __init__(self, options: TaskOptions):
        self._options = options
        if options.include_path and not options.include_path.is_dir():
            raise UserError(f"--include-path {options.include_path}: no such folder; give the folder of your tasks")
        names = list(dict.fromkeys(options.names))
        say(f"tasks: {', '.join(names)}")
        with _quiet():
            self._tasks = self._load(names)

    def _load(self, names: Sequence[str]) -> list[Any]:
        include = str(self._options.include_path) if self._options.include_path else None
        manager = TaskManager(include_path=include, include_defaults=False)
        if not set(names) <= set(manager.all_subtasks):  # reading the harness's own 14,000 tasks takes seconds
            manager = TaskManager(include_path=include)
        for name in names:
            if name not in manager.all_tasks:
                near = get_close_matches(name, manager.all_tasks, 3)
                hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
                raise UserError(f"--tasks {name}: no such task; {hint}")
        found: list[Any] = []
        for name in names:
            try:
                loaded = manager.load([name])
            except Exception as error:  # errors of the hub, of the data or of the YAML file
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                raise UserError(
                    f"--tasks {name}: its data is not available ({reason}); without a network, give --include-path "
                    "with a task file that names local data"
                ) from error
            group = loaded.get("groups", {}).get(name)
            found += [group] if group else loaded["tasks"].values()
        return found

    @property
    def may_have_accuracy(self) -> bool:
        """Whether any task declares the metric `acc`; only the scores tell for certain."""
        leaves = (task.get_all_tasks() if isinstance(task, Group) else [task] for task in self._tasks)
        return any("acc" in leaf.aggregation() for leaf in chain.from_iterable(leaves))

    def score(self, loaded: LoadedModel, brief: bool = False) -> Scores:
        """Score a model.

        Args:
            loaded: The model.
            brief: Leave out progress bars and standard errors that are resampled, which take seconds each.

        Raises:
            UserError: An answer is longer than the model's window.
        """
        with (
            _quiet(bars=not brief) as cut,
            # It asks pip, git and the system about this machine, which takes seconds.
            patch.object(evaluator, "add_env_info", lambda _: None, create=True),
            # Standard errors would be resampled in forked processes, which may hang: this one has threads.
            patch.dict(os.environ, DISABLE_MULTIPROC="1"),
        ):
            model = HFLM(
                pretrained=loaded.model,
                tokenizer=loaded.tokenizer,
                backend="causal",
                batch_size=self._options.batch_size,
                mixed_precision_dtype="bfloat16" if loaded.bf16_autocast else None,
            )
            try:
                found = evaluator.simple_evaluate(
                    model,
                    tasks=list(self._tasks),
                    num_fewshot=self._options.num_fewshot,
                    limit=self._options.limit,
                    bootstrap_iters=0 if brief else _BOOTSTRAP_ITERS,
                    log_samples=False,
                    task_manager=TaskManager(include_defaults=False),  # the default reads all tasks again
                )
            except AssertionError as error:  # raised for an answer that is too long; a prompt is truncated instead
                raise UserError(
                    f"--tasks: an answer is longer than the model's window of {model.max_length} tokens, which the "
                    "harness cannot score; remove the task with such answers"
                ) from error
        scores = task_scores(found)
        return Scores(
            scores, mean_accuracies(scores), self._options.limit, cut.count, loaded.precision, harness_version
        )


class _CountCut(logging.Handler):
    """Counts the harness's warnings about requests longer than the model's window; there may be thousands."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith("Combined length")


@contextmanager
def _quiet(bars: bool = True) -> Iterator[_CountCut]:
    """Silence the harness, except for its progress bars on a terminal if `bars`; count truncated requests."""
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


def task_scores(found: dict[str, Any]) -> list[TaskScores]:
    """Return the scores in the harness's results."""
    parts = {part for children in found["group_subtasks"].values() for part in children}
    made = []
    for name, values in (found["results"] | found.get("groups", {})).items():
        metrics = {}
        for key, value in values.items():
            metric, _, way = key.partition(",")
            if way and not metric.endswith("_stderr") and isinstance(value, int | float):
                stderr = values.get(f"{metric}_stderr,{way}")
                known = float(stderr) if isinstance(stderr, int | float) else None
                metrics[metric if way == "none" else key] = Score(float(value), known)
        version, examples = found["versions"].get(name), int(values.get("sample_len", 0))
        version = None if version is None else str(version)
        made.append(TaskScores(name, examples, found["n-shot"].get(name), version, metrics, part=name in parts))
    return made


def mean_accuracies(scores: Sequence[TaskScores]) -> dict[str, float]:
    """Return `Scores.mean`."""
    counted = [task.metrics for task in with_accuracy(scores)]
    if not counted:
        return {}
    return {
        "acc": sum(metrics["acc"].value for metrics in counted) / len(counted),
        "acc_norm": sum(metrics.get("acc_norm", metrics["acc"]).value for metrics in counted) / len(counted),
        "tasks": len(counted),
    }
