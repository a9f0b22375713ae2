"""The command `prepare`."""

from __future__ import annotations

import os
import signal

import click

from trainer.common.errors import START_AGAIN
from trainer.common.strict_json import dumps
from trainer.config.options import json_option, recipe_arguments
from trainer.config.recipe import load_recipe


@click.command(short_help="Tokenise and pack the data of a recipe.")
@recipe_arguments
@json_option
def prepare(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Tokenise and pack the data of RECIPE, unless that has already been done.

    This needs neither GPUs nor the ranks of a job. If it is interrupted in any way, the next start resumes. SIGTERM and
    SIGUSR1 end it with status 75. If another process prepares the same data, also on another machine that shares
    data.dir, it waits for that one.

    \b
    Examples:
      unipool prepare quickstart
      unipool prepare recipe.yaml --set data.dir=/shared/data
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(START_AGAIN))
    from trainer.data.prepare import prepare_for
    from trainer.data.prepared_data import describe

    prepared = prepare_for(load_recipe(recipe, overrides), ends_on_signals=True)
    print(dumps(prepared.to_json()) if as_json else describe(prepared))
