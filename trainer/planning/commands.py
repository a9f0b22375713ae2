"""The command `plan`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trainer.common.errors import UserError
from trainer.common.format import plural
from trainer.common.strict_json import dumps
from trainer.config.completion import Items, complete_file, matching
from trainer.config.options import json_option, recipe_arguments
from trainer.config.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from pool.placement import ShardSplit
    from trainer.planning.hardware import Hardware
    from trainer.planning.schedule import ScheduleSpec
    from trainer.planning.step_time import StepTime
    from trainer.planning.what_if import Variant


def _complete_hardware(context: click.Context, parameter: click.Parameter, begun: str) -> Items:
    """Complete the name of a data sheet, or any file."""
    from trainer.planning.hardware import DATA_SHEETS

    return matching(begun, dict.fromkeys(DATA_SHEETS, "")) or complete_file(context, parameter, begun)


@click.command(short_help="Show parameters, memory and the trunk:pool split of a recipe.")
@recipe_arguments
@json_option
@click.option(
    "--simulate", is_flag=True, help="Compare lock step with 1 to 4 lanes: time, utilisation, load and memory."
)
@click.option(
    "--loads",
    type=click.Path(exists=True, path_type=Path),
    metavar="RUN|FILE",
    help="Use the expert load of a run, or of a .npy file by layer and expert, instead of an even one.  "
    "[with --simulate]",
)
@click.option(
    "--timeline",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw what each rank does when.  [with --simulate]",
)
@click.option(
    "--hardware",
    metavar="NAME|FILE",
    shell_complete=_complete_hardware,
    help="Predict the time of a step on h100, h200, a100, or on a profile made by `bench`.",
)
@click.option(
    "--devices", type=int, help="Number of devices to lay out; default: the recipe's ranks.  [with --hardware]"
)
@click.option(
    "--interconnect",
    type=float,
    metavar="GBIT/S",
    help="Speed of a rank's link, each way; default: the hardware's own.  [with --hardware]",
)
@click.option(
    "--network",
    type=float,
    metavar="GBIT/S",
    help="Speed of a rank's link to other nodes, each way; default: the hardware's own.  [with --hardware]",
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
    network: float | None,
) -> None:
    """Print parameters, memory, tokens, FLOPs and the best trunk:pool split of RECIPE, and warn where it does not fit.

    With --hardware, also predict how long a step takes, whether the wire limits it, and which layouts are fastest.

    \b
    Examples:
      unipool plan unipool-182m
      unipool plan unipool-182m --simulate --timeline step.png
      unipool plan quickstart --simulate --loads runs/quickstart
      unipool plan unipool-182m --hardware h100 --devices 16 --interconnect 400
    """
    from trainer.planning.hardware import find_hardware, with_link, with_network
    from trainer.planning.report import make_cost_report, print_cost_report

    if not simulate and (loads or timeline):
        raise UserError(f"{'--loads' if loads else '--timeline'}: needs --simulate")
    for option, value in (("--devices", devices), ("--interconnect", interconnect), ("--network", network)):
        if value is not None and hardware is None:
            raise UserError(f"{option} {value:g}: needs --hardware, as in --hardware h100")
    checked = load_recipe(recipe, overrides)
    if hardware and simulate:
        checked = load_recipe(recipe, [*overrides, f"parallel.hardware={dumps(hardware)}"])
    named = hardware or checked.parallel.hardware
    device = find_hardware(named) if named else None
    linked = device if device is None or interconnect is None else with_link(device, interconnect)
    linked = linked if linked is None or network is None else with_network(linked, network)
    report = make_cost_report(checked, linked)
    predicted = (*_predict(checked, linked, devices), device) if hardware and device and linked else None
    simulated = _simulate(checked, loads, timeline) if simulate else None
    if as_json:
        tree = report.to_json() | {"simulated": [asdict(variant) for variant in simulated[1]] if simulated else []}
        if predicted:
            own, best, device = predicted
            tree["predicted"] = asdict(own) | {"hardware": asdict(device), "layouts": [asdict(step) for step in best]}
        print(dumps(tree))
        return
    print_cost_report(report)
    if simulated:
        from trainer.planning.what_if import print_what_if

        print_what_if(*simulated)
        if timeline:
            print(f"timeline: {timeline}")
    if predicted:
        from trainer.planning.step_time import print_step_time

        print_step_time(*predicted)
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)


def _simulate(
    recipe: Recipe, loads: Path | None, timeline: Path | None
) -> tuple[ScheduleSpec, list[Variant], list[ShardSplit]]:
    """Compare schedules, and draw the timeline of the recipe's own."""
    if recipe.grid.colocated:
        raise UserError("--simulate: a colocated pool has neither ranks nor messages that could overlap with the trunk")
    from trainer.planning.schedule import make_schedule
    from trainer.planning.what_if import read_loads, recommend_splits, record_own_step, what_if

    spec = make_schedule(recipe)
    load_LM = read_loads(loads, recipe) if loads else None
    variants = what_if(spec, load_LM)
    if timeline:
        from trainer.planning.timeline import draw_timeline

        title = f"{recipe.run.dir}: one step, {plural(spec.lanes, 'lane')}"
        in_seconds = recipe.parallel.hardware is not None
        try:
            draw_timeline(record_own_step(spec, load_LM), recipe.grid, timeline, title, in_seconds)
        except OSError as error:
            raise UserError(f"--timeline {timeline}: cannot be written ({error.strerror})") from None
    return spec, variants, recommend_splits(recipe, load_LM)


def _predict(recipe: Recipe, hardware: Hardware, devices: int | None) -> tuple[StepTime, tuple[StepTime, ...]]:
    """Predict the recipe's own step and the best layouts.

    A model without a pool has no other layouts; those of a colocated recipe are compared only if --devices is given.
    """
    from trainer.planning.step_time import best_layouts, step_time

    if devices is not None and recipe.model.ffn == "dense":
        raise UserError(f"--devices {devices}: model.ffn = dense: there is no pool to lay out")
    if devices is not None and devices < 1:
        raise UserError(f"--devices {devices}: must be at least 1")
    best: tuple[StepTime, ...] = ()
    if devices is not None or not recipe.grid.colocated:
        try:
            best = best_layouts(recipe, devices or recipe.grid.world_size, hardware)
        except UserError:
            if devices is not None:  # otherwise nobody asked for layouts, and the recipe's own step is enough
                raise
    return step_time(recipe, hardware), best
