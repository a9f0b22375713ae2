"""`eval` on the command line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError, os_reason
from trainer.common.safe_read import read_bytes
from trainer.common.strict_json import dumps, loads, name_not_finite
from trainer.common.tables import print_tables
from trainer.config.completion import RunPath
from trainer.config.options import count_option, device_option, json_option
from trainer.evaluate.options import TaskOptions, task_options

if TYPE_CHECKING:
    from trainer.evaluate.loss import TextLoss
    from trainer.evaluate.scores import Scores


@click.command("eval", short_help="Compute the loss on text, and scores on tasks.")
@click.argument("source", metavar="RUN", type=RunPath())
@task_options
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Compute the loss on this text, in any format of data.source.",
)
@count_option(
    "--batches", "Global batches of held-out text.  [without --tasks and --text; default: the recipe's eval.batches]"
)
@device_option
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    help="Precision of the computation.  [default: the run's train.precision for the validation loss, otherwise the "
    "type of the weights, which is fp32 in a run]",
)
@json_option
def evaluate(
    source: Path,
    tasks: TaskOptions,
    text: Path | None,
    batches: int | None,
    device: str | None,
    precision: str | None,
    as_json: bool,
) -> None:
    """Evaluate RUN: a run's newest checkpoint, one checkpoint (checkpoints/step_*), or an export of format hf.

    By default, compute the loss, perplexity and bits per byte on the run's held-out text; the loss is the one that
    training reports. With --text, compute them on any text: windows of the model's seq_len tokens do not overlap, as
    in training, and every token but the first is predicted once. With --tasks, score tasks of lm-evaluation-harness,
    which requires the extra `eval`; `lm_eval --model hf` computes the same scores on an export. The result is also
    saved to eval.json in RUN.

    The exit status is 1 if the model computes values that are not finite. In JSON, they are null and listed under
    not_finite.

    \b
    Examples:
      unipool eval runs/quickstart
      unipool eval runs/quickstart --text README.md
      unipool eval runs/unipool-182m --tasks arc_easy,arc_challenge,piqa,hellaswag,winogrande,lambada_openai,race
      unipool eval runs/quickstart-hf --tasks hellaswag --include-path runs/tasks --limit 100
    """
    if tasks.names and text is not None:
        raise UserError("--text: cannot be combined with --tasks; run the command twice")
    if batches is not None and (tasks.names or text):
        raise UserError(f"--batches {batches}: applies to the held-out text; leave out --tasks and --text")

    if tasks.names:
        from trainer.evaluate.tasks import Tasks

        loaded_tasks = Tasks(tasks)  # first, because the harness may not be installed
    from trainer.evaluate.loss import text_loss, validation_loss
    from trainer.export.loaded_model import finite_outputs, load_model

    result: Scores | TextLoss
    loaded = load_model(source, device, precision, as_trained=not tasks.names and text is None)
    with finite_outputs(loaded.model, f"{loaded.path}: {loaded.name}"):
        if tasks.names:
            what, result = "tasks", loaded_tasks.score(loaded)
        elif text:
            what, result = f"text {text}", text_loss(loaded, text, tasks.batch_size)
        else:
            what, result = "validation", validation_loss(loaded, batches, tasks.batch_size)
        record = name_not_finite(asdict(result))
        if as_json:
            print(dumps({"checkpoint": loaded.name, what.split()[0]: record}))
        else:
            print(f"{loaded.path}: {loaded.name}")
            print_tables(*result.tables(), notes=result.notes())
        saved = _save_result(loaded.folder, loaded.name, what, record)
        if not as_json:
            print(f"saved {saved}")


def _save_result(folder: Path, checkpoint: str, what: str, result: dict[str, Any]) -> Path:
    """Store a result in eval.json under the keys `checkpoint` and `what`; return the file's path.

    Raises:
        UserError: The file holds something else, or cannot be written.
    """
    path = folder / "eval.json"
    try:
        record = loads(read_bytes(path)) if path.exists() else {}
        record.setdefault(checkpoint, {})[what] = result
        atomic_write(path, lambda partial: partial.write_text(dumps(record, indent=2) + "\n"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({os_reason(error)}); the result is printed above") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: is not a record of `eval`; move it away (the result is printed above)") from None
    return path
