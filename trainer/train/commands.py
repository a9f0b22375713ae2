"""The command `train`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from trainer.common.errors import UserError
from trainer.common.gpus import set_allocator
from trainer.common.machine import first_import_of
from trainer.config.options import recipe_arguments
from trainer.config.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from trainer.cluster.hostfile import Node


@click.command(short_help="Train a recipe, or resume it from its newest checkpoint.")
@recipe_arguments
@click.option("--force", is_flag=True, help="Resume even if settings that affect results have changed.")
@click.option("--dry-run", is_flag=True, help="Do every part of the job once, report each, and leave nothing behind.")
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Restart the job after a fault, at most N times. Has no effect under a launcher, which restarts it.",
)
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Start this node's ranks of a job on several nodes. FILE has lines HOST slots=RANKS, the same on all nodes.",
)
@click.option(
    "--node-rank", type=int, metavar="N", help="This node's line in the hostfile, counted from 0.  [with --hostfile]"
)
@click.option(
    "--master-addr", metavar="HOST", help="Host of rank 0; default: the hostfile's first host.  [with --hostfile]"
)
@click.option(
    "--master-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Port on which rank 0 listens; default: 29500.  [with --hostfile]",
)
def train(
    recipe: str,
    overrides: tuple[str, ...],
    force: bool,
    dry_run: bool,
    max_restarts: int,
    hostfile: Path | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
) -> None:
    """Train RECIPE, resuming from the newest complete checkpoint in its folder.

    Under a launcher (deepspeed, torchrun, mpirun) the command is one rank of the job. Without a launcher it starts the
    whole job on this machine, or one node's ranks with --hostfile, through the deepspeed launcher. On SIGTERM or
    SIGUSR1 the job saves a checkpoint and ends with status 75 on all nodes. The status is 3 if the model has diverged:
    the last validation loss is not finite or, with a section lock, has risen above what lock.stop_above allows.

    With --dry-run, all ranks start as usual, and once make a step, evaluate, generate text, save a checkpoint and read
    it back, in a hidden folder beside that of the run, which is then removed. The data is the prepared one, or some of
    the first documents. The table shows what works and how long it took.

    \b
    Examples:
      unipool train quickstart
      unipool train quickstart --dry-run
      unipool train quickstart --max-restarts 3 --set checkpoint.every=20
      unipool train quickstart --set train.steps=20 --set run.dir=runs/short
      unipool train recipe.yaml --hostfile hosts --node-rank 1
      deepspeed --num_accelerators 2 --module trainer train quickstart
    """
    from trainer.cluster.launch import end_on_signals, launched, run_locally, run_node

    end_on_signals()
    checked = load_recipe(recipe, overrides)
    # torch would print a C++ stack for every connection that breaks when another rank ends; we name that rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    set_allocator()
    if launched():
        from trainer.common.error_reporting import end_process

        with first_import_of("torch"):
            from trainer.cluster.rendezvous import read_launch
            from trainer.train.loop import train as train_rank

        if dry_run:
            from trainer.train.dry_run.job import dry_run as try_rank
            from trainer.train.dry_run.rehearsal import folder_of, rehearsal

            launch = read_launch()
            end_process(try_rank(checked, rehearsal(checked, folder_of(checked, launch.master_port)), launch))
        end_process(train_rank(checked, read_launch(), force))
    from trainer.checkpoint.resume import early_check
    from trainer.cluster.devices import check_machine
    from trainer.cluster.hostfile import find_node
    from trainer.data.prepare import prepare_for
    from trainer.export.initial import ExportedWeights
    from trainer.planning.hardware import find_hardware
    from trainer.telemetry.run_folder import RunFolder

    node = None
    if hostfile:
        node = find_node(checked, hostfile, node_rank, master_addr, master_port)
        if max_restarts:
            raise UserError(
                f"--max-restarts {max_restarts}: not allowed with --hostfile, because all nodes must restart together; "
                "let the cluster restart the job"
            )
    else:
        for option, value in (("node-rank", node_rank), ("master-addr", master_addr), ("master-port", master_port)):
            if value is not None:
                raise UserError(f"--{option} {value}: needs --hostfile, as in --hostfile hosts --node-rank 1")
        if checked.parallel.device == "cuda":
            check_machine(checked.grid, "cuda")
    if checked.parallel.hardware:  # find a wrong name before anything starts
        find_hardware(checked.parallel.hardware, "parallel.hardware =")
    folder = RunFolder(checked)
    folder.refuse_export()
    if not early_check(checked, folder.checkpoints, force) and checked.train.init_from:
        ExportedWeights(checked).check()
    if dry_run:
        _try_out(checked, node)
    folder.make()
    if node is None or node.has_trunk_ranks:
        with folder.removed_if_unused():
            prepare_for(checked, ends_on_signals=True)
    arguments = sys.argv[1:]
    sys.exit(run_node(checked, node, arguments) if node else run_locally(checked, arguments, max_restarts))


def _try_out(recipe: Recipe, node: Node | None) -> NoReturn:
    """Run the job of `--dry-run`, and remove what it leaves even if its ranks are killed."""
    from trainer.cluster.launch import run_locally, run_node
    from trainer.data.prepare import prepare_for
    from trainer.telemetry.run_folder import RunFolder
    from trainer.train.dry_run.rehearsal import FOLDER, folder_of, new_folder, nothing_left, rehearsal

    for number in (signal.SIGTERM, signal.SIGUSR1):  # until there are ranks, to which signals go
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    folder = folder_of(recipe, node.master_port, next(iter(node.slots))) if node else new_folder(recipe)
    os.environ[FOLDER] = str(folder)
    with nothing_left(folder):
        rehearsed, arguments = rehearsal(recipe, folder), sys.argv[1:]
        RunFolder(rehearsed).make()
        if node is None or node.has_trunk_ranks:
            prepare_for(rehearsed)
        status = run_node(rehearsed, node, arguments) if node else run_locally(rehearsed, arguments, 0)
    sys.exit(status)
