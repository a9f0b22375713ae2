"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, as in --set train.steps=100."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Device to compute on.  [default: cuda if available]"
)
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random numbers."
)


def recipe_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument RECIPE and the option --set to a command."""
    return click.argument("recipe")(set_option(command))
