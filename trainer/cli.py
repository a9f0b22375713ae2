"""The command line. Exit status: 0 done; 2 the user's input is wrong, said in one line on stderr; 1 anything else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainer.config import Recipe, load_recipe, recipe_names
from trainer.endings import told
from trainer.errors import UserError
from trainer.evaluate.commands import evaluate
from trainer.export.commands import export, generate
from trainer.probe.commands import probe
from trainer.strict_json import dumps
from trainer.sweep.commands import sweep
from trainer.sweep.law_commands import law
from trainer.view.commands import report, watch

if TYPE_CHECKING:
    from trainer.forecast import Forecast
    from trainer.hardware import Hardware
    from trainer.predict import Simulation


def main() -> None:
    """Entry point of `python -m trainer` and of `unipool`."""
    with told():
        cli.main(prog_name="unipool", standalone_mode=False)


_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, as in --set train.steps=100."
)


def _recipe_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("recipe")(_set_option(command))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--local_rank", type=int, hidden=True, expose_value=False)  # deepspeed adds it; so does the environment
def cli() -> None:
    """Train UniPool mixture-of-experts language models: one pool of experts shared by all layers.

    RECIPE is a name (see `unipool recipes`) or a YAML file.
    """


@cli.command()
@_recipe_arguments
@click.option("--force", is_flag=True, help="Go on from a checkpoint though the recipe changes the mathematics.")
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Start the job again after a fault, at most N times. Under a launcher it restarts.",
)
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Start only this node's ranks of a job on several nodes; lines HOST slots=RANKS, the same on all nodes.",
)
@click.option("--node-rank", type=int, metavar="N", help="This node's line in the hostfile, from 0.  [with --hostfile]")
@click.option(
    "--master-addr", metavar="HOST", help="Where rank 0 is; default: the hostfile's first host.  [with --hostfile]"
)
@click.option(
    "--master-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Where rank 0 listens; default: 29500.  [with --hostfile]",
)
def train(
    recipe: str,
    overrides: tuple[str, ...],
    force: bool,
    max_restarts: int,
    hostfile: Path | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
) -> None:
    """Train RECIPE; go on from the newest checkpoint of its folder that is whole.

    Under a launcher (deepspeed, torchrun, mpirun) this is one rank; without one it starts the whole job on this
    machine through the deepspeed launcher, or with --hostfile one node's ranks. SIGTERM or SIGUSR1: save a checkpoint
    and end with status 75, on all nodes. Status 1 at the end of all steps: the validation loss is not finite.

    \b
    Examples:
      unipool train quickstart
      unipool train quickstart --max-restarts 3 --set checkpoint.every=20
      unipool train quickstart --set train.steps=20 --set run.dir=runs/short
      unipool train recipe.yaml --hostfile hosts --node-rank 1
      deepspeed --num_accelerators 2 --module trainer train quickstart
    """
    from trainer.launch import end_on_signals, run_locally, run_node

    end_on_signals()
    checked = load_recipe(recipe, overrides)
    # Else torch prints a C++ stack for every connection that another rank's end breaks; our message says whose.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from trainer.seat import launched, read_launch

    if launched():
        from trainer.train import train as train_rank

        sys.exit(train_rank(checked, read_launch(), force))
    from trainer.export.initial import ExportedWeights
    from trainer.hardware import find_hardware
    from trainer.hostfile import find_node
    from trainer.prepare import prepare_for
    from trainer.resume import early_check
    from trainer.run_folder import RunFolder

    node = None
    if hostfile:
        node = find_node(checked, hostfile, node_rank, master_addr, master_port)
        if max_restarts:
            raise UserError(
                f"--max-restarts {max_restarts}: not with --hostfile: all nodes must start again together, which is "
                "the cluster's to do"
            )
    else:
        for option, value in (("node-rank", node_rank), ("master-addr", master_addr), ("master-port", master_port)):
            if value is not None:
                raise UserError(f"--{option} {value}: goes with --hostfile, as in --hostfile hosts --node-rank 1")
    if checked.parallel.hardware:  # a wrong one is found before anything starts
        find_hardware(checked.parallel.hardware, "parallel.hardware =")
    folder = RunFolder(checked)
    if not early_check(checked, folder.checkpoints, force) and checked.train.init_from:
        ExportedWeights(checked).check()
    folder.make()
    if node is None or node.has_trunk_ranks:
        prepare_for(checked)
    arguments = sys.argv[1:]
    sys.exit(run_node(node, arguments) if node else run_locally(checked, arguments, max_restarts))


@cli.command()
@_recipe_arguments
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def prepare(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Tokenise and pack the data of RECIPE; does nothing where that is done.

    \b
    Example:
      unipool prepare quickstart
    """
    from trainer.data.prepared import describe
    from trainer.prepare import prepare_for

    prepared = prepare_for(load_recipe(recipe, overrides))
    print(dumps(prepared.to_json()) if as_json else describe(prepared))


@cli.command()
@_recipe_arguments
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
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
    from trainer.plan import make_plan, print_forecast, print_plan

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
        from trainer.predict import print_simulation

        print_simulation(simulation, in_seconds=checked.parallel.hardware is not None)
        if timeline:
            print(f"timeline: {timeline}")
    if outlook:
        print_forecast(*outlook)


def _simulate(recipe: Recipe, loads: Path | None, timeline: Path | None) -> Simulation:
    """Simulate, and draw the timeline."""
    if recipe.grid.colocated:
        raise UserError("--simulate: parallel.pool_ranks = 0: a colocated pool has nothing to overlap with")
    from trainer.predict import read_loads, simulate
    from trainer.schedule import make_schedule

    schedule = make_schedule(recipe)
    load_LM = read_loads(loads, recipe) if loads else None
    if timeline is None:
        return simulate(schedule, load_LM)
    from trainer.timeline import draw_timeline, shown_ranks

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
    from trainer.forecast import best_splits, forecast
    from trainer.hardware import bytes_a_second, find_hardware

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


@cli.command()
@click.argument("recipe", default="quickstart")
@_set_option
@click.option("--out", type=click.Path(path_type=Path), default="profile.json", show_default=True, help="The profile.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(recipe: str, overrides: tuple[str, ...], out: Path, device: str | None, as_json: bool) -> None:
    """Measure what this machine does with the shapes of RECIPE (default: quickstart); save that for `plan --hardware`.

    Products, memory, experts, router, a layer and the head of the trunk, and the wire between two processes; some
    minutes at most.

    \b
    Examples:
      unipool bench
      unipool bench unipool-182m --device cuda --out h100.json
      unipool plan unipool-182m --hardware h100.json
    """
    checked = load_recipe(recipe, overrides)
    from trainer.bench import pick_device, run
    from trainer.bench_tables import print_profile

    profile = run(checked, pick_device(device), out)
    if as_json:
        print(dumps(asdict(profile)))
        return
    print_profile(profile)
    print(f"saved {out}: unipool plan {recipe} --hardware {out}")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def recipes(as_json: bool) -> None:
    """List the recipes that come with the trainer.

    \b
    Example:
      unipool recipes
    """
    print(dumps(recipe_names()) if as_json else "\n".join(recipe_names()))


cli.add_command(export)
cli.add_command(generate)
cli.add_command(evaluate)
cli.add_command(watch)
cli.add_command(report)
cli.add_command(probe)
cli.add_command(sweep)
cli.add_command(law)
