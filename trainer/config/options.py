"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from trainer.config.completion import complete_recipe, complete_setting

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=complete_setting,
    help="Override a key, as in --set train.steps=100.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Device to compute on.  [default: cuda if available]"
)
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random numbers."
)


def count_option(name: str, help: str, default: int | None = None, metavar: str | None = None) -> Decorator:
    """Make an option that takes a whole number of at least 1; without a default it is None."""
    shown = default is not None
    return click.option(name, type=click.IntRange(1), default=default, show_default=shown, metavar=metavar, help=help)


def recipe_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument RECIPE and the option --set to a command."""
    return click.argument("recipe", shell_complete=complete_recipe)(set_option(command))
