"""`probe` of the command line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainer.common.errors import UserError
from trainer.evaluate.options import TaskOptions, batch_size_option, read_options, task_options

if TYPE_CHECKING:
    from trainer.evaluate.scores import Scores
    from trainer.probe.adapters import Source
    from trainer.probe.effects import Over
    from trainer.probe.text import Text

_seed_option = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws.")


def _probe(command: Callable[..., None]) -> Callable[..., None]:
    """What all probes take."""
    for decorate in (
        click.option("--out", type=_file(), metavar="FILE.png", help="Draw it."),
        click.option("--csv", "csv_file", type=_file(), metavar="FILE", help="Write it as CSV."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option(
            "--tokens", type=click.IntRange(min=1), default=16_384, show_default=True, help="Of the text that are read."
        ),
        click.option(
            "--text",
            type=click.Path(exists=True, path_type=Path),
            metavar="FILE",
            help="Read this text, in any format of data.source; default: what the run has held out.",
        ),
        click.argument("source"),
    ):
        command = decorate(command)
    return command


def _file() -> click.Path:
    return click.Path(dir_okay=False, path_type=Path)


def _run(
    measure: Callable[[Source, Text], Any],
    source: str,
    text: Path | None,
    tokens: int,
    as_json: bool,
    csv_file: Path | None,
    out: Path | None,
) -> None:
    from trainer.export.soundness import sound
    from trainer.probe.adapters import load as load_source
    from trainer.probe.output import check_files, deliver
    from trainer.probe.text import read_text

    check_files((csv_file, out))
    loaded = load_source(source, own_text=text is None)
    read = read_text(loaded, text, tokens)
    with sound(loaded.model.model, source):
        result = measure(loaded, read)
    deliver(result, as_json, csv_file, out)


@click.group()
def probe() -> None:
    """Look into a trained model: what its routing is worth, and how it uses its experts.

    SOURCE is a run or a checkpoint of it, an export of format hf, or a Hugging Face model (its folder, or its name on
    the hub) of type Qwen2-MoE, Qwen3-MoE, DeepSeek-V2, DeepSeek-V3, OLMoE or Mixtral. All but a run need --text. Exit
    status 1: the model is broken: it computes numbers that are not finite, of which there is nothing to show.

    \b
    Example:
      unipool probe load runs/quickstart --out load.png
    """


@probe.command()
@_probe
@click.option(
    "--layers", default="deep", show_default=True, help="deep (the deep half), all, or numbers from 0, as in 4,6-7."
)
@click.option(
    "--over",
    "overs",
    multiple=True,
    type=click.Choice(["layer", "pool", "matched"]),
    help="Draw from the experts that the layer sees, all of the pool, or the layer's most used ones; may be given "
    "several times.  [default: those that differ]",
)
@click.option("--matched", type=click.IntRange(min=1), default=8, show_default=True, help="Of how many most used ones.")
@click.option("--draws", type=click.IntRange(min=1), default=3, show_default=True, help="Repetitions, for the spread.")
@_seed_option
@task_options
@batch_size_option("Sequences a forward.  [--tasks]")
def randomize(
    layers: str,
    overs: tuple[Over, ...],
    matched: int,
    draws: int,
    seed: int,
    tasks: str | None,
    num_fewshot: int | None,
    limit: int | None,
    include_path: Path | None,
    batch_size: int,
    **common: Any,
) -> None:
    """How much the loss rises with random experts in one layer, each layer of the deep half in turn.

    Each token's experts are drawn uniformly; the gate values stay the learned ones. The most used experts are counted
    on the text that is read. With --tasks also how far accuracy falls: each draw is scored as by `eval`.

    \b
    Examples:
      unipool probe randomize runs/quickstart --out randomize.png
      unipool probe randomize runs/quickstart --layers 4,6-7 --over matched --draws 5
      unipool probe randomize runs/unipool-182m --tasks arc_easy,piqa,hellaswag --limit 500
      unipool probe randomize allenai/OLMoE-1B-7B-0924 --text README.md
    """
    wanted = read_options(tasks, num_fewshot, limit, include_path)
    loaded = _load(wanted)

    def measure(source: Source, text: Text) -> Any:
        from trainer.probe.randomize import pick_layers
        from trainer.probe.randomize import randomize as run_probe

        picked = pick_layers(source.model, layers)
        score = _scorer(source, loaded, wanted, batch_size) if loaded else None
        return run_probe(source.model, text, picked, overs, matched, draws, seed, score)

    _run(measure, **common)


def _load(wanted: TaskOptions) -> list[Any]:
    """The tasks, before any other work: the harness may not be installed, or there is no such task."""
    if not wanted.names:
        return []
    from trainer.evaluate.tasks import load_tasks, may_have_accuracy
    from trainer.probe.accuracy import NO_ACCURACY

    loaded = load_tasks(wanted.names, wanted.include_path)
    if not may_have_accuracy(loaded):
        raise UserError(NO_ACCURACY)
    return loaded


def _scorer(source: Source, tasks: list[Any], wanted: TaskOptions, batch_size: int) -> Callable[[bool], Scores]:
    from trainer.evaluate.subject import Subject, stored_precision
    from trainer.evaluate.tasks import evaluate

    model = source.model.model
    subject = Subject(
        Path(source.model.name), model, source.tokenizer, source.run, stored_precision(model), mixed=False
    )
    return partial(evaluate, subject, tasks, wanted.num_fewshot, wanted.limit, batch_size)


@probe.command()
@_probe
def reuse(**common: Any) -> None:
    """How many different experts a token meets over its layers: histogram, mean, share of the layers.

    \b
    Example:
      unipool probe reuse runs/quickstart --out reuse.png
    """

    def measure(source: Source, text: Text) -> Any:
        from trainer.probe.reuse import reuse as run_probe

        return run_probe(source.model, text)

    _run(measure, **common)


@probe.command()
@_probe
def load(**common: Any) -> None:
    """Which layer uses which expert: heat map and totals, effective experts, coverage, how layers differ.

    \b
    Example:
      unipool probe load runs/quickstart --out load.png
    """

    def measure(source: Source, text: Text) -> Any:
        from trainer.probe.load import load as run_probe

        return run_probe(source.model, text)

    _run(measure, **common)


@probe.command()
@_probe
@click.option(
    "--sample", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens a layer that outputs are of."
)
@_seed_option
def redundancy(sample: int, seed: int, **common: Any) -> None:
    """How alike experts are: cosine of their weights, and of their outputs on the same tokens.

    \b
    Example:
      unipool probe redundancy runs/quickstart --out redundancy.png
    """

    def measure(source: Source, text: Text) -> Any:
        from trainer.probe.redundancy import redundancy as run_probe

        return run_probe(source.model, text, sample, seed)

    _run(measure, **common)
