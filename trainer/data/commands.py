"""The command `prepare`."""

from __future__ import annotations

import click

from trainer.common.strict_json import dumps
from trainer.config.options import json_option, recipe_arguments
from trainer.config.recipe import load_recipe


@click.command(short_help="Tokenise and pack the data of a recipe.")
@recipe_arguments
@json_option
def prepare(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Tokenise and pack the data of RECIPE, unless that has already been done.

    \b
    Example:
      unipool prepare quickstart
    """
    from trainer.data.prepare import prepare_for
    from trainer.data.prepared_data import describe

    prepared = prepare_for(load_recipe(recipe, overrides))
    print(dumps(prepared.to_json()) if as_json else describe(prepared))
