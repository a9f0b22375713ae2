"""`eval` of the command line."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps, name_not_finite
from trainer.evaluate.options import batch_size_option, read_options, task_options


@click.command("eval")
@click.argument("source", metavar="RUN", type=click.Path(path_type=Path))
@task_options
@click.option(
    "--text", type=click.Path(path_type=Path), metavar="FILE", help="The loss on a text, in any format of data.source."
)
@click.option(
    "--batches",
    type=click.IntRange(min=1),
    metavar="N",
    help="Global batches of held-out text; default: the recipe's eval.batches.  [without --tasks and --text]",
)
@batch_size_option("Sequences a forward.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    help="Of the arithmetic. Default: the weights' (of a run fp32); of the validation loss, as the run was trained.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    source: Path,
    tasks: str | None,
    num_fewshot: int | None,
    limit: int | None,
    include_path: Path | None,
    text: Path | None,
    batches: int | None,
    batch_size: int,
    device: str | None,
    precision: str | None,
    as_json: bool,
) -> None:
    """Evaluate RUN: a run's newest checkpoint, one checkpoint (checkpoints/step_*), or an export of format hf.

    Without --tasks and --text: loss, perplexity and bits per byte on the run's held-out text, the loss that training
    says. With --text those of any text: windows of the model's seq_len tokens that do not overlap, as in training,
    every token but the first predicted once. With --tasks the scores of lm-evaluation-harness, which needs the extra
    `eval`; `lm_eval --model hf` gives an export the same ones. The result is also kept in RUN, in eval.json.

    Exit status 1: the model is broken: it computes numbers that are not finite. They are null in JSON, and listed under
    not_finite.

    \b
    Examples:
      unipool eval runs/quickstart
      unipool eval runs/quickstart --text README.md
      unipool eval runs/unipool-182m --tasks arc_easy,arc_challenge,piqa,hellaswag,winogrande,lambada_openai,race
      unipool eval runs/quickstart-hf --tasks hellaswag --include-path runs/tasks --limit 100
    """
    if tasks is not None and text is not None:
        raise UserError("--text: not with --tasks; evaluate twice")
    wanted = read_options(tasks, num_fewshot, limit, include_path)
    if batches is not None and (tasks or text):
        raise UserError(f"--batches {batches}: is of the held-out text: goes without --tasks and --text")

    from trainer.evaluate.record import save_result

    if wanted.names:
        from trainer.evaluate.tasks import evaluate as score  # first of all: it may not be installed
        from trainer.evaluate.tasks import load_tasks

        loaded = load_tasks(wanted.names, include_path)
    from trainer.evaluate.loss import text_loss, validation_loss
    from trainer.evaluate.subject import load_subject
    from trainer.evaluate.tables import print_loss, print_scores
    from trainer.export.soundness import sound

    subject = load_subject(source, device, precision, as_trained=not wanted.names and text is None)
    with sound(subject.model, f"{subject.path}: {subject.name}"):
        if wanted.names:
            what, scores = "tasks", score(subject, loaded, wanted.num_fewshot, limit, batch_size)
            result, show = asdict(scores), partial(print_scores, scores)
        else:
            what = f"text {text}" if text else "validation"
            loss = text_loss(subject, text, batch_size) if text else validation_loss(subject, batches, batch_size)
            result, show = asdict(loss), partial(print_loss, loss)
        result = name_not_finite(result)
        if as_json:
            print(dumps({"checkpoint": subject.name, what.split()[0]: result}))
        else:
            print(f"{subject.path}: {subject.name}")
            show()
        saved = save_result(subject.folder, subject.name, what, result)
        if not as_json:
            print(f"saved {saved}")
