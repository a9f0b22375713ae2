"""What a run reports: progress line, metrics.jsonl, Prometheus, DeepSpeed's monitors, and a picture of the load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from operator import itemgetter
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pool.topology import Topology
from trainer.checkpoint.format import OwnershipRecord
from trainer.cluster.process_groups import Job
from trainer.common.strict_json import dumps, loads, name_not_finite
from trainer.config.recipe import Recipe
from trainer.planning.fit import memory_warnings
from trainer.planning.hardware import peak_flops
from trainer.planning.memory import CONTEXT
from trainer.planning.model_costs import count_flops
from trainer.telemetry.console import Progress, say
from trainer.telemetry.measured import peak_memory
from trainer.telemetry.over_steps import Spikes, Stragglers
from trainer.telemetry.run_folder import RunFolder
from trainer.telemetry.step_scalars import Efficiency, StepScalars, padded
from trainer.telemetry.time_breakdown import ACTIVITIES, Usage, shares
from trainer.telemetry.trainjob import TrainJobProgress, trainjob_progress
from trainer.train.evaluation.tasks import BackgroundTasks, Scored
from trainer.train.pool_rank import PoolRank
from trainer.train.trunk_rank import TrunkRank


class Reporter:
    """Reports the run. Every rank has one; rank 0 reports what is the same on all ranks.

    Args:
        done: Optimizer steps done before this start of the run.
        lanes: Micro-batches in flight on each trunk rank.
    """

    def __init__(self, recipe: Recipe, job: Job, folder: RunFolder, role: TrunkRank | PoolRank, done: int, lanes: int):
        self._recipe, self._job, self._folder, self._role = recipe, job, folder, role
        self._reported = (Usage(), Usage())
        self._flops = count_flops(recipe).training
        self._peak: float | None = None
        self._stragglers = Stragglers(peers(job.topology, job.rank), job.rank)
        self._spikes = {"loss": Spikes(), "gradient norm": Spikes()}
        self._in_spike: set[str] = set()
        self._tasks: BackgroundTasks | None = None
        self._progress: Progress | None = None
        self._trainjob: TrainJobProgress | None = None
        if job.rank:
            return
        self._peak = peak_flops(recipe, () if job.devices.shared else job.devices.names)
        addresses = job.shared.gather("metrics")
        names = [job.topology.describe(rank) for rank in range(job.topology.world_size)]
        where = [f"{name}: http://{address}/metrics" for name, address in zip(names, addresses, strict=True)]
        self._progress = Progress(recipe, done, where)
        role.metrics.info("unipool_run_info", _run(recipe, job, lanes))
        if role.ownership:
            self._owned(role.ownership)
        else:
            folder.drop_ownership()
        role.metrics.set("unipool_step", done)
        role.metrics.set("unipool_target_steps", recipe.train.steps)
        if self._peak:
            role.metrics.set("unipool_peak_flops_per_second", self._peak)
        if recipe.tasks:
            self._tasks = BackgroundTasks(recipe.tasks, folder.checkpoints)
        role.metrics.checkpoints_from(done, recipe.checkpoint.every)
        self._trainjob = trainjob_progress(recipe.train.steps, done)

    def usage(self) -> list[float]:
        """Return numbers for the sum over ranks.

        These are the seconds by activity since the last call, the trunk's, then the pool's, and each rank's memory and
        seconds of computing.
        """
        clock = self._role.clock
        now = (clock.total, clock.served) if self._job.is_trunk else (Usage(), clock.total)
        trunk, pool = (total.since(before) for total, before in zip(now, self._reported, strict=True))
        self._reported = now
        peak = peak_memory(self._job.device.index)
        memory = self._among_all(peak.get("gpu", peak["host"]))
        return [*astuple(trunk), *astuple(pool), *memory, *self._among_all(trunk.computing + pool.computing)]

    def _among_all(self, own: float) -> list[float]:
        """Return this rank's number in its place among those of all ranks, which are 0."""
        everywhere = [0.0] * self._job.topology.world_size
        everywhere[self._job.rank] = own
        return everywhere

    def step(self, done: int, scalars: StepScalars | None, usage: Sequence[float]) -> None:
        """Report a step.

        Args:
            scalars: The scalars of a trunk rank.
            usage: What `usage` returned, summed over the ranks.
        """
        activities, ranks = 2 * len(ACTIVITIES), self._job.topology.world_size
        memory, computing = usage[activities:-ranks], usage[-ranks:]
        if (score := self._stragglers.add(computing)) is not None:
            self._role.metrics.set("unipool_straggler_score", score)
        if not isinstance(self._role, TrunkRank) or scalars is None:
            return
        self._look_for_spikes(done, {"loss": scalars.loss, "gradient norm": scalars.grad_norm})
        spent = self._spent(usage[:activities])
        efficiency = self._efficiency(scalars, memory)
        shown = scalars.flat() | efficiency.flat() | {f"train/{name}": share for name, share in spent.items()}
        self._role.monitors.write(shown, done)
        if self._progress:
            self._role.metrics.efficiency(efficiency, self._flops * scalars.tokens)
            self._progress.step(done, scalars, efficiency)
            if self._trainjob:
                self._trainjob.step(done, {"loss": scalars.loss, "tokens_per_second": scalars.tokens_per_second})
            self._folder.append_metrics({"step": done, **scalars.record(), **efficiency.record(), **spent})

    def _look_for_spikes(self, done: int, values: Mapping[str, float]) -> None:
        """Report the first of adjacent steps whose loss or gradient norm jumps, with the data of the highest loss."""
        found = {name: spike for name, value in values.items() if (spike := self._spikes[name].add(value))}
        new, self._in_spike = found.keys() - self._in_spike, set(found)
        if not new or not isinstance(self._role, TrunkRank):
            return
        key = f"spike/{done}"
        worst = max(self._role.losses_by_rows(done - 1))  # all trunk ranks find the same spikes
        self._job.shared.put(key, dumps(name_not_finite({"loss": worst[0], "rows": worst[1]})))
        if not self._progress:
            return
        of_ranks = [loads(self._job.shared.get(f"{key}/{rank}")) for rank in range(self._job.role_size)]
        highest = max((own for own in of_ranks if own["loss"] is not None), key=itemgetter("loss"), default=None)
        worst_loss = f"{highest['loss']:.4f} on {highest['rows']}" if highest else "not finite"
        for name in sorted(new):
            self._progress.spike(done, name, found[name], f"the highest loss of a micro-batch is {worst_loss}")
            record = {"of": name, **asdict(found[name]), "highest": highest}
            self._folder.append_metrics({"step": done, "spike": record})

    def _efficiency(self, scalars: StepScalars, memory: Sequence[float]) -> Efficiency:
        """Return the efficiency of a step. Only rank 0 knows the peak of the hardware and the goodput.

        Args:
            memory: The peak memory of each rank.
        """
        topology = self._job.topology
        flops = self._flops * scalars.tokens_per_second / topology.world_size
        return Efficiency(
            flops_per_second=flops,
            mfu=flops * topology.world_size / self._peak if self._peak else None,
            trunk_memory=max(memory[: topology.trunk_ranks]),
            pool_memory=max(memory[topology.trunk_ranks :], default=None),
            goodput=self._folder.goodput(scalars.seconds if scalars.applied else 0.0),
        )

    def _spent(self, usage: Sequence[float]) -> dict[str, float]:
        """Return shares of the ranks' time by role and activity.

        A rank with both roles counts as a trunk rank, with all of its time; `serving_...` is what the pool has of that.
        """
        topology = self._job.topology
        trunk, pool = usage[: len(ACTIVITIES)], usage[len(ACTIVITIES) :]
        if topology.every_rank:
            total = sum(usage) or 1.0
            serving = {f"serving_{name}": spent / total for name, spent in zip(ACTIVITIES, pool, strict=True)}
            del serving["serving_optimizer"]  # one optimizer step for both
            return _named("trunk", [sum(both) for both in zip(trunk, pool, strict=True)]) | serving
        return _named("trunk", trunk) | ({} if topology.colocated else _named("pool", pool))

    def evaluation(self, done: int, val_loss: float, tokens: int, load_LM: Tensor | None) -> None:
        """Report an evaluation: its loss, its tokens, and the load by layer and the experts that it sees."""
        role = self._role
        if not isinstance(role, TrunkRank):
            return
        role.monitors.write({"eval/val_loss": val_loss}, done)
        if not self._progress:
            return
        role.metrics.set("unipool_validation_loss_nats", val_loss)
        self._progress.evaluation(done, val_loss)
        self._folder.append_metrics({"step": done, "val_loss": val_loss, "val_tokens": tokens})
        recorded_LM = role.recorded_load()
        if recorded_LM is None or load_LM is None:
            return
        self._folder.save_load(recorded_LM)

        def draw() -> NDArray[np.uint8]:
            from trainer.telemetry.expert_heatmap import heat_map_image

            title = f"{self._folder.path.name}: experts chosen on held-out text after step {done}"
            owners = role.ownership.owners if role.ownership else None
            return heat_map_image(load_LM.numpy(), title, self._recipe.model.groups, owners)

        role.monitors.write_image("load", draw, done)

    def samples(self, done: int, samples: Sequence[tuple[str, str]]) -> None:
        """Report prompts and their continuations by the model after `done` steps."""
        if isinstance(self._role, TrunkRank):
            self._role.monitors.write_samples(samples, done)
        if self._progress:
            told = [{"prompt": prompt, "text": text} for prompt, text in samples]
            self._folder.append_metrics({"step": done, "samples": told})

    def tasks(self, done: int, saved: int) -> None:
        """Let the newest checkpoint, after `saved` steps, be scored on tasks, and report scores that have come."""
        if self._tasks and (scored := self._tasks.follow(saved)):
            self._scored(done, scored)

    def _scored(self, done: int, scored: Scored) -> None:
        assert isinstance(self._role, TrunkRank), "rank 0 is a trunk rank"
        self._role.monitors.write_late(scored.flat(), scored.step)
        self._folder.append_metrics({"step": done, "tasks_of": scored.step, "tasks": scored.values})
        told = ", ".join(f"{name.removeprefix('tasks/')} {value:.4f}" for name, value in scored.flat().items())
        say(f"step {done}: tasks, with the checkpoint after step {scored.step}: {told}")

    def assigned(self, done: int) -> None:
        """Report which layer owns which expert, if they have been assigned after `done` steps."""
        record = self._role.ownership
        if not self._progress or not record or record.step != done:
            return
        self._owned(record)
        layers = range(len(record.shares))
        worst = min(layers, key=record.shares.__getitem__)
        say(
            f"unipool: after step {done} each layer owns {len(record.owners) // len(layers)} experts, which had "
            f"{fmean(record.shares):.1%} of its tokens on average, and {record.shares[worst]:.1%} in layer {worst}"
        )
        if short := [f"layer {layer} by {lack:.1%}" for layer, lack in enumerate(record.shortfalls) if lack]:
            say(f"warning: no assignment gives every layer its lock.coverage; short of it: {', '.join(short)}")

    def _owned(self, record: OwnershipRecord) -> None:
        self._folder.save_ownership(dumps(record.model_dump()))
        layers = len(record.shares)
        for layer, shortfall in enumerate(record.shortfalls):
            self._role.metrics.set("unipool_ownership_shortfall_ratio", shortfall, padded(layer, layers))

    def probe(self, done: int, loss: float, random_losses: Mapping[int, float], tokens: int) -> None:
        """Report a probe of the routing: the held-out loss, and with random experts in a layer, by layer."""
        role, layers = self._role, self._recipe.model.layers
        if not isinstance(role, TrunkRank):
            return
        added = {layer: random_loss - loss for layer, random_loss in random_losses.items()}
        mean = fmean(added.values())
        named = {padded(layer, layers): nats for layer, nats in added.items()}
        role.monitors.write({f"random_routing/{name}": nats for name, nats in {"mean": mean, **named}.items()}, done)
        if not self._progress:
            return
        for name, nats in named.items():
            role.metrics.set("unipool_random_routing_loss_nats", nats, name)
        self._progress.probe(done, mean, list(added))
        record = {"step": done, "probe_loss": loss, "probe_tokens": tokens, "random_routing": mean}
        self._folder.append_metrics({**record, "random_routing_by_layer": named})

    def end(self, status: int, done: int) -> None:
        """Wait for what is not done by the regular end of the run, once no other rank waits for this one.

        Args:
            status: The exit status; only a run that ends with 0 waits for scores on tasks.
            done: Optimizer steps done.
        """
        try:
            if self._tasks:
                for scored in self._tasks.rest() if status == 0 else ():
                    self._scored(done, scored)
                self._tasks.stop()
            if isinstance(self._role, TrunkRank):
                self._role.monitors.close()
        except Exception as error:  # the run has ended, and its status is known
            say(f"warning: a report after the end of the run failed ({type(error).__name__}: {error})")

    def close(self) -> None:
        """End the reports at the regular end of the run: Prometheus no longer looks for its metrics."""
        if self._progress and isinstance(self._role, TrunkRank):
            self._progress.close()
            if self._trainjob:
                self._trainjob.close()
            self._folder.withdraw()


def warn_of_memory(job: Job, recipe: Recipe, lanes: int) -> None:
    """Say so on the first rank of each role if it needs, by the estimate, more than its GPU has.

    It is no error: the estimate is of a CPU's kernels, and a refusal that is wrong would be worse than one that comes
    from the GPU a little later.
    """
    if job.device.type != "cuda" or job.rank not in (0, job.topology.trunk_ranks):
        return
    free, _ = torch.cuda.mem_get_info(job.device)  # other processes may use the GPU too; this one's context exists
    role = "trunk" if job.is_trunk else "pool"
    for warning in memory_warnings(recipe, lanes, free + CONTEXT, f"{job.name}'s GPU", role):
        say(f"warning: {warning}")


def _named(side: str, seconds: Sequence[float]) -> dict[str, float]:
    return {f"{side}_{name}": share for name, share in shares(seconds).items()}


def peers(topology: Topology, rank: int) -> range:
    """Return the ranks of a rank's role."""
    if topology.is_trunk(rank):
        return range(topology.trunk_ranks)
    return range(topology.trunk_ranks, topology.world_size)


def _run(recipe: Recipe, job: Job, lanes: int) -> dict[str, object]:
    m, t = recipe.model, job.topology
    model = "dense" if m.ffn == "dense" else {1: "unipool", m.layers: "vanilla"}.get(m.groups, "grouped")
    return {
        "run": Path(recipe.run.dir).name,
        "model": model,
        "layers": m.layers,
        "experts": recipe.pool.experts,
        "top_k": recipe.router.top_k,
        "router": recipe.router.kind,
        "layout": t.layout,
        "trunk_ranks": t.trunk_ranks,
        "pool_ranks": t.world_size - t.trunk_ranks,
        "expert_parallel": t.expert_parallel,
        "lanes": lanes,
        "precision": recipe.train.precision,
        "devices": job.devices.summary,
    }
