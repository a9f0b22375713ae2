"""How a rank comes from the launcher's environment to its first step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.checkpoint.resume import check_data, choose, early_check, load_checkpoint
from trainer.checkpoint.save import Saver
from trainer.cluster.process_groups import Job
from trainer.cluster.rendezvous import Launch, rendezvous
from trainer.common.gpus import check_queues, load_kernels_at_start, use_many_queues
from trainer.config.recipe import Recipe
from trainer.data.prepare import prepare_for
from trainer.data.prepared_data import PreparedData
from trainer.data.streaming.stream import PartStream
from trainer.engine.deterministic import use_deterministic_kernels
from trainer.engine.weights_and_biases import wandb_run
from trainer.export.initial import load_initial
from trainer.model.document_mask import document_end
from trainer.telemetry.console import say
from trainer.telemetry.measured import DiskSpace
from trainer.telemetry.run_folder import RunFolder
from trainer.telemetry.serving import Stage, serve_joined
from trainer.train.agreement import agreed_data, agreed_placement, agreed_schedule
from trainer.train.pool_rank import PoolRank
from trainer.train.profiling.profile import StepProfile
from trainer.train.reporter import Reporter, warn_of_memory
from trainer.train.trunk_rank import TrunkRank


@dataclass(frozen=True)
class Run:
    """A run on one rank, ready for its next step.

    Attributes:
        prepared: The data; None on pool ranks.
        start: Optimizer steps done.
        recorded: Optimizer steps that an earlier start had done, of which those after `start` are done again.
        held_out_rows: Rows of held-out text, which bound an evaluation.
    """

    recipe: Recipe
    job: Job
    folder: RunFolder
    prepared: PreparedData | None
    role: TrunkRank | PoolRank
    saver: Saver
    reporter: Reporter
    profile: StepProfile
    stage: Stage
    start: int
    recorded: int
    held_out_rows: int


def start(recipe: Recipe, launch: Launch, folder: RunFolder, stage: Stage, force: bool) -> Run:
    """Bring one rank up to the run's next step. A collective of all ranks."""
    use_deterministic_kernels()
    if not recipe.grid.colocated:
        load_kernels_at_start()
        use_many_queues()
    if recipe.train.compile is False and torch.cuda.is_available():
        torch.compiler.set_stance("force_eager")

    # Which rank of the job is this?
    resume = early_check(recipe, folder.checkpoints, force)
    watch, metrics = stage.watch, stage.metrics
    stage.enter("rendezvous", "start-up")
    member = rendezvous(recipe, launch)
    watch.joined_as(member)
    serve_joined(recipe, member, metrics)
    if not recipe.grid.colocated and member.payload_device.type == "cuda":
        check_queues()
    if member.rank == 0:
        folder.make()
        metrics.disk = DiskSpace(folder.path)
        folder.announce(member.shared.gather("metrics"))
        for line in (f"ranks by host: {member.roster}", *member.devices.lines):
            say(line)
        if recipe.router.force:
            say("unipool: router.force: tokens go to all experts in turn. For measuring only: nothing learns to route")

    # Trunk ranks prepare the data. All ranks agree on the schedule, then form their process groups.
    prepared = None
    if member.is_trunk:
        stage.enter("preparing", "data preparation")
        prepared = prepare_for(recipe, progress=member.leads_machine)
    stage.enter("starting", "start-up")
    schedule = agreed_schedule(member, recipe, folder, resume)
    job = Job(recipe, member, schedule.lanes)
    watch.joined = True
    warn_of_memory(job, recipe, schedule.lanes)

    # Where does the run start, and on which data?
    stage.enter("loading", "reading checkpoints")
    done, saved = choose(job, recipe, folder.checkpoints, force) or (0, None)
    data = agreed_data(job, prepared)
    if saved:
        check_data(recipe, saved, data, force)
    stage.enter("starting", "start-up")

    # Build this rank's role: model, engine, wire, metrics.
    placement = agreed_placement(job, recipe, saved, schedule.step)
    role: TrunkRank | PoolRank
    if prepared:
        training = prepared.stream("train", recipe.run.seed)
        validation = prepared.stream("validation", None)
        end = document_end(recipe, prepared)
        role = TrunkRank(recipe, job, schedule, placement, training, validation, end, metrics)
        job.shared.set("held-out rows", str(validation.rows))
    else:
        assert placement is not None, "a dense model has no pool ranks"
        role = PoolRank(recipe, job, schedule, placement, metrics)
    held_out_rows = int(job.shared.get("held-out rows"))  # pool ranks have no data
    saver = Saver(job, recipe, folder.checkpoints, role, data, metrics)
    job.barrier()
    (gpus,) = job.sum_over_ranks([float(job.device.type == "cuda")])
    if placement and gpus:
        stage.enter("warming_up", "warm-up")
        role.warm_up(job.start_timeout)
        stage.enter("starting", "start-up")

    # Load its state.
    if saved:
        stage.enter("loading", "loading the checkpoint")
        load_checkpoint(job, recipe, saved, role)
    elif recipe.train.init_from:
        stage.enter("loading", f"reading {recipe.train.init_from}")
        load_initial(recipe, role)
    if job.rank == 0:
        assert prepared, "rank 0 is a trunk rank"
        folder.begin(recipe, schedule.to_json(), job.devices.summary, prepared.tokenizer_files(), done)
        saver.clean()
    recorded = int(job.shared.broadcast("recorded", lambda: str(folder.recorded)))
    if prepared and isinstance(training, PartStream) and done < recipe.train.steps:
        # A step may not wait for as long as this may: neither the first one, nor the one in which an earlier start did.
        training.reach(min(max(done, recorded), recipe.train.steps - 1), recipe.train.global_batch)
    job.barrier()  # loading may take longer on one rank than a step may wait
    job.limit_waits()
    if job.rank == 0 and isinstance(role, TrunkRank):
        role.monitors.wandb = wandb_run(recipe, folder.path, done)
    reporter = Reporter(recipe, job, folder, role, done, schedule.lanes)
    profile = StepProfile(recipe, job, folder, isinstance(role, TrunkRank) and role.trunk.compiled)
    return Run(recipe, job, folder, prepared, role, saver, reporter, profile, stage, done, recorded, held_out_rows)
