"""The command `plan`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.config.options import json_option, recipe_arguments
from trainer.config.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from trainer.planning.hardware import Hardware
    from trainer.planning.step_time import Forecast
    from trainer.planning.what_if import Simulation


@click.command()
@recipe_arguments
@json_option
@click.option("--simulate", is_flag=True, help="Simulate a step in lock step and with lanes: time, use, load, memory.")
@click.option(
    "--loads",
    type=click.Path(exists=True, path_type=Path),
    metavar="RUN|FILE",
    help="Load that a run has recorded, or a .npy file by layer and expert; default: even.  [with --simulate]",
)
@click.option(
    "--timeline",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw what each rank does when.  [with --simulate]",
)
@click.option(
    "--hardware", metavar="NAME|FILE", help="Predict seconds a step: h100, h200, a100, or a profile made by `bench`."
)
@click.option("--devices", type=int, help="Split this many devices; default: the recipe's ranks.  [with --hardware]")
@click.option(
    "--interconnect",
    type=float,
    metavar="GBIT/S",
    help="Link of a rank, each way; default: the hardware's own.  [with --hardware]",
)
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    as_json: bool,
    simulate: bool,
    loads: Path | None,
    timeline: Path | None,
    hardware: str | None,
    devices: int | None,
    interconnect: float | None,
) -> None:
    """Print parameters, memory, tokens, FLOPs and the recommended trunk:pool split of RECIPE.

    With --hardware also what a step would last there, whether the wire binds, and the best splits of the devices.

    \b
    Examples:
      unipool plan unipool-182m
      unipool plan unipool-182m --simulate --timeline step.png
      unipool plan quickstart --simulate --loads runs/quickstart
      unipool plan unipool-182m --hardware h100 --devices 16 --interconnect 400
    """
    from trainer.planning.report import make_plan, print_forecast, print_plan

    checked = load_recipe(recipe, overrides)
    if hardware and simulate:
        checked = load_recipe(recipe, [*overrides, f"parallel.hardware={dumps(hardware)}"])
    made = make_plan(checked)
    outlook = _forecast(checked, hardware, devices, interconnect)
    simulation = _simulate(checked, loads, timeline) if simulate else None
    if not simulate and (loads or timeline):
        raise UserError(f"{'--loads' if loads else '--timeline'}: goes with --simulate")
    if as_json:
        tree = made.to_json() | {"simulated": [asdict(p) for p in simulation.predictions] if simulation else []}
        if outlook:
            own, best, found = outlook
            tree["predicted"] = asdict(own) | {"hardware": asdict(found), "splits": [asdict(f) for f in best]}
        print(dumps(tree))
        return
    print_plan(made)
    if simulation:
        from trainer.planning.what_if import print_simulation

        print_simulation(simulation, in_seconds=checked.parallel.hardware is not None)
        if timeline:
            print(f"timeline: {timeline}")
    if outlook:
        print_forecast(*outlook)


def _simulate(recipe: Recipe, loads: Path | None, timeline: Path | None) -> Simulation:
    """Simulate, and draw the timeline."""
    if recipe.grid.colocated:
        raise UserError("--simulate: parallel.pool_ranks = 0: a colocated pool has nothing to overlap with")
    from trainer.planning.schedule import make_schedule
    from trainer.planning.what_if import read_loads, simulate

    schedule = make_schedule(recipe)
    load_LM = read_loads(loads, recipe) if loads else None
    if timeline is None:
        return simulate(schedule, load_LM)
    from trainer.planning.timeline import draw_timeline, shown_ranks

    found = simulate(schedule, load_LM, shown_ranks(recipe.grid))
    unit = "seconds" if recipe.parallel.hardware else "nominal units"
    title = f"{recipe.run.dir}: one step, {found.own_way}"
    try:
        draw_timeline(found.own, recipe.grid, timeline, title, unit)
    except OSError as error:
        raise UserError(f"--timeline {timeline}: cannot be written ({error.strerror})") from None
    return found


def _forecast(
    recipe: Recipe, name: str | None, devices: int | None, interconnect: float | None
) -> tuple[Forecast, tuple[Forecast, ...], Hardware] | None:
    """The recipe's own step and the best splits; None without --hardware.

    A model without a pool has no splits; a colocated one has them where --devices asks.
    """
    if name is None:
        for option, value in (("--devices", devices), ("--interconnect", interconnect)):
            if value is not None:
                raise UserError(f"{option} {value:g}: goes with --hardware, as in --hardware h100")
        return None
    from trainer.planning.hardware import bytes_a_second, find_hardware
    from trainer.planning.step_time import best_splits, forecast

    hardware = find_hardware(name)
    link = None if interconnect is None else bytes_a_second(interconnect)
    if devices is not None and recipe.model.ffn == "dense":
        raise UserError(f"--devices {devices}: model.ffn = dense: there is no pool to split from the trunk")
    if devices is not None and devices < 2:
        raise UserError(f"--devices {devices}: must be at least 2, a trunk rank and a pool rank")
    best: tuple[Forecast, ...] = ()
    if devices is not None or not recipe.grid.colocated:
        try:
            best = best_splits(recipe, devices or recipe.grid.world_size, hardware, link)
        except UserError:
            if devices is not None:  # else nobody asked for splits, and the recipe's own step has its say
                raise
    return forecast(recipe, hardware, link), best, hardware
