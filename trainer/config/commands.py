"""The command `recipes`."""

from __future__ import annotations

import click

from trainer.common.strict_json import dumps
from trainer.config.recipe import recipe_names


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def recipes(as_json: bool) -> None:
    """List the recipes that come with the trainer.

    \b
    Example:
      unipool recipes
    """
    print(dumps(recipe_names()) if as_json else "\n".join(recipe_names()))
