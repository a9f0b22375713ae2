"""The command `bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from trainer.common.strict_json import dumps
from trainer.config.completion import complete_recipe
from trainer.config.options import json_option, set_option
from trainer.config.recipe import load_recipe


@click.command(short_help="Measure this machine, for `plan --hardware`.")
@click.argument("recipe", default="quickstart", shell_complete=complete_recipe)
@set_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="profile.json",
    show_default=True,
    help="File to write the profile to.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Device to measure; default: parallel.device.")
@json_option
def bench(recipe: str, overrides: tuple[str, ...], out: Path, device: str | None, as_json: bool) -> None:
    """Measure how fast this machine computes with the shapes of RECIPE (default: quickstart), for `plan --hardware`.

    Measures dense products, memory, experts, the router, a layer and the head of the trunk, and the wire between two
    processes; on a GPU also launches and copies. This takes a few minutes at most.

    \b
    Examples:
      unipool bench
      unipool bench unipool-182m --device cuda --out h100.json
      unipool plan unipool-182m --hardware h100.json
    """
    checked = load_recipe(recipe, overrides)
    from trainer.bench.measure import run
    from trainer.bench.tables import print_profile
    from trainer.common.machine import pick_device
    from trainer.engine.deterministic import use_deterministic_kernels

    use_deterministic_kernels()  # as in `train`: on a GPU attention's backward takes longer
    wanted, setting = (device, "--device") if device else (checked.parallel.device, "parallel.device =")
    profile = run(checked, pick_device(None if wanted == "auto" else wanted, setting), out)
    if as_json:
        print(dumps(asdict(profile)))
        return
    print_profile(profile)
    print(f"saved {out}; predict with: unipool plan {recipe} --hardware {out}")
