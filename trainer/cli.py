"""The command line, which registers the commands of all rooms.

Exit status: 0 on success, 2 for a user's mistake (one line on stderr), 1 for anything else.
"""

from __future__ import annotations

import logging

import click

from trainer.bench.commands import bench
from trainer.common.error_reporting import report_errors
from trainer.config.commands import completion, init, recipes
from trainer.config.completion import PROGRAM, register_shells
from trainer.data.commands import prepare
from trainer.doctor.commands import doctor
from trainer.evaluate.commands import evaluate
from trainer.export.commands import export, generate
from trainer.importing.commands import import_, resize, upcycle
from trainer.planning.commands import plan
from trainer.probe.commands import probe
from trainer.scaling_law.commands import law
from trainer.serve.commands import serve
from trainer.sweep.commands import sweep
from trainer.train.commands import train
from trainer.view.commands import own, report, watch

_TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers whose warnings say nothing to a user: transformers loads torchao, where it is installed, for every model."""


def main() -> None:
    """Entry point of `python -m trainer` and of `unipool`."""
    register_shells()
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    with report_errors():
        cli.main(prog_name=PROGRAM, standalone_mode=False)


def _version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from trainer.doctor.software import versions

        print(versions())
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--local_rank", type=int, hidden=True, expose_value=False
)  # deepspeed passes it, but the environment has it too
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Print versions, for a report.",
)
def cli() -> None:
    """Train UniPool mixture-of-experts language models: one pool of experts shared by all layers.

    RECIPE is a name (see `unipool recipes`) or a YAML file.
    """


for command in (
    train,
    prepare,
    plan,
    bench,
    recipes,
    export,
    import_,
    upcycle,
    resize,
    generate,
    serve,
    evaluate,
    watch,
    report,
    own,
    probe,
    sweep,
    law,
    completion,
    init,
    doctor,
):
    cli.add_command(command)
