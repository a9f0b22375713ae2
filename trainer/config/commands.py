"""The commands `recipes`, `init` and `completion`."""

from __future__ import annotations

from pathlib import Path

import click

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.format import plural
from trainer.common.strict_json import dumps
from trainer.common.tables import print_names
from trainer.config.completion import SHELLS, complete_file, complete_recipe, script
from trainer.config.options import count_option
from trainer.config.recipe import headline, recipe_names


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of the names.")
def recipes(as_json: bool) -> None:
    """List the recipes that come with the trainer.

    \b
    Example:
      unipool recipes
    """
    if as_json:
        print(dumps(recipe_names()))
    else:
        print_names({name: headline(name) for name in recipe_names()})


@click.command(short_help="Write a commented recipe to start from.")
@click.argument("name")
@click.option(
    "--from",
    "base",
    default="quickstart",
    show_default=True,
    metavar="RECIPE",
    shell_complete=complete_recipe,
    help="Recipe to make it from, by name or file.",
)
@click.option(
    "--source",
    metavar="PATH",
    shell_complete=complete_file,
    help="Text to train on; any data.source.  [default: the recipe's own]",
)
@count_option(
    "--devices", "Ranks, one on each GPU.  [default: this machine's GPUs; without any, as the recipe]", None, "N"
)
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
def init(name: str, base: str, source: str | None, devices: int | None, force: bool) -> None:
    """Write NAME.yaml, a recipe with the keys that are changed most often, and what they mean.

    It trains as it stands, on this machine's GPUs or, without any, on the CPU. With GPUs every rank has the whole pool,
    which is fastest as long as it fits; `unipool plan NAME.yaml --hardware h100 --devices N` compares the layouts.

    \b
    Examples:
      unipool init mine
      unipool init mine --from small --source text/
    """
    from trainer.common.gpus import look, why_none
    from trainer.config.starter import start_from

    if not Path(name).name.strip("."):
        raise UserError(f"NAME {name!r}: is no name of a file; give one, as in `unipool init mine`")
    path = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if path.exists() and not force:
        raise UserError(f"{path}: exists already; choose another name, or overwrite it with --force")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    facts = look()
    run = f"runs/{path.stem}"
    gpus = (devices or len(facts.gpus)) if facts.gpus else None
    text = start_from(base, run, source, gpus, devices)
    atomic_write(path, lambda temporary: temporary.write_text(text))
    where = plural(gpus, "GPU") if gpus else f"the CPU ({why_none(facts)})"
    print(f"{path}: {base}, for {where}")
    print("next:")
    for command, meaning in (
        (f"unipool doctor {path}", "is this machine ready"),
        (f"unipool plan {path}", "parameters, memory, FLOPs"),
        (f"unipool train {path}", "prepares the data, then trains"),
        (f"unipool watch {run}", "from another terminal"),
    ):
        print(f"  {command:<32}  # {meaning}")


@click.command(short_help="Print the completion script for a shell.")
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands, options, recipes, keys of --set and folders of runs in SHELL.

    SHELL is bash, zsh or fish. For bash, put the line eval "$(unipool completion bash)" into ~/.bashrc; for zsh, put
    eval "$(unipool completion zsh)" into ~/.zshrc, behind compinit; for fish, write the script to
    ~/.config/fish/completions/unipool.fish.

    \b
    Example:
      unipool completion bash
    """
    print(script(context.find_root().command, shell), end="")
