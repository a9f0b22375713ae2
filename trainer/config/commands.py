"""The commands `recipes` and `completion`."""

from __future__ import annotations

import click

from trainer.common.strict_json import dumps
from trainer.config.completion import SHELLS, script
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


@click.command(short_help="Print the script with which a shell completes commands.")
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script with which SHELL completes commands, options, recipes, keys of --set and folders of runs.

    SHELL is bash, zsh or fish. For bash, put the line eval "$(unipool completion bash)" into ~/.bashrc; for zsh, put
    eval "$(unipool completion zsh)" into ~/.zshrc, behind compinit; for fish, write the script to
    ~/.config/fish/completions/unipool.fish.

    \b
    Example:
      unipool completion bash
    """
    print(script(context.find_root().command, shell), end="")
