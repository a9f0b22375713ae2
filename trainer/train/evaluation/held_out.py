"""Forward passes without gradients on a trunk rank: held-out loss, and generated text."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.cluster.process_groups import Job
from trainer.config.recipe import Recipe
from trainer.data.batches import SequenceStream
from trainer.model.micro_batch import PoolMap, Reroute, hidden_states
from trainer.model.pool_client import MicroBatch, PoolClient
from trainer.model.random_routing import random_routing
from trainer.model.trunk import Trunk
from trainer.planning.schedule import ScheduleSpec


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device. From memory that is pinned, a GPU does so while the host goes on."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def sequences(stream: SequenceStream, recipe: Recipe, job: Job, step: int) -> Iterator[Tensor]:
    """Yield this rank's micro-batches of a global batch, on the device."""
    for sequences_BS1 in stream.micro_batches(
        step, recipe.train.global_batch, job.rank, job.role_size, recipe.train.micro_batch
    ):
        yield to_device(sequences_BS1, job.device)


class HeldOut:
    """Evaluates and generates with the current weights, together with the other ranks.

    Args:
        validation: The held-out text.
    """

    def __init__(
        self,
        recipe: Recipe,
        job: Job,
        schedule: ScheduleSpec,
        trunk: Trunk,
        pool: PoolClient,
        validation: SequenceStream,
    ):
        self._recipe, self._job, self._schedule = recipe, job, schedule
        self._trunk, self._pool, self._validation = trunk, pool, validation

    @torch.no_grad()
    def evaluate(
        self, batches: int, step: int, pool_map: PoolMap | None, random_layer: int | None = None
    ) -> tuple[float, Tensor]:
        """Evaluate on `batches` global batches of held-out text, the same on every trunk rank.

        Args:
            step: Optimizer steps done.
            pool_map: Where the experts are; None in a dense model.
            random_layer: A layer that uses random experts instead of those that its router chooses.

        Returns:
            The mean cross-entropy in nats, and the load by layer and the experts that it sees.
        """
        plan = self._schedule.evaluation(batches * self._recipe.micro_batches)
        micro_batches = self._micro_batches(batches, pool_map, random_layer)
        results = self._pool.run(micro_batches, plan.lane_order[self._job.rank], step, plan.slots)
        total = torch.stack([loss for loss, _ in results]).double().sum().cpu()
        loads = [load_LM for _, load_LM in results if load_LM is not None]
        none_LM = torch.zeros(self._recipe.model.layers, max(1, self._recipe.experts_per_layer), dtype=torch.int64)
        held_out_LM = torch.stack(loads).sum(0).cpu() if loads else none_LM
        self._job.reducing()
        self._job.sum_over_role(total)
        self._job.sum_over_role(held_out_LM)
        return float(total) / (len(results) * self._job.role_size), held_out_LM

    def _micro_batches(
        self, batches: int, pool_map: PoolMap | None, random_layer: int | None
    ) -> Iterator[MicroBatch[tuple[Tensor, Tensor | None]]]:
        recipe, index = self._recipe, 0
        share = recipe.train.global_batch // self._job.role_size
        for batch in range(batches):
            first = batch * recipe.train.global_batch + self._job.rank * share
            for sequences_BS1 in sequences(self._validation, recipe, self._job, batch):
                reroute = None
                if random_layer is not None:
                    numbers = range(first, first + len(sequences_BS1))
                    reach = pool_map.seen_by(random_layer).reach if pool_map else None
                    reroute = random_routing(random_layer, recipe.experts_per_layer, recipe.run.seed, numbers, reach)
                yield self._evaluate_micro_batch(pool_map, sequences_BS1, index, reroute)
                first, index = first + len(sequences_BS1), index + 1

    def _evaluate_micro_batch(
        self, pool_map: PoolMap | None, sequences_BS1: Tensor, index: int, reroute: Reroute | None
    ) -> MicroBatch[tuple[Tensor, Tensor | None]]:
        h_BSD, load_LM = yield from hidden_states(self._trunk, pool_map, sequences_BS1[:, :-1], index, reroute)
        with self._trunk.autocast():
            return self._trunk.loss(h_BSD, sequences_BS1[:, 1:]), load_LM

    @torch.no_grad()
    def generate(
        self, prompt: list[int], tokens: int, step: int, pool_map: PoolMap | None, temperature: float = 0.8
    ) -> list[int] | None:
        """Continue `prompt` by `tokens` tokens, the same on every trunk rank.

        Args:
            step: Optimizer steps done.
            pool_map: Where the experts are; None in a dense model.
            temperature: Of the sampling; 0 takes the most probable token.

        Returns:
            The tokens, or None if logits were not finite; the pool receives as many requests in either case.
        """
        generator = torch.Generator().manual_seed(self._recipe.run.seed)
        plan, layers = self._schedule.generation(tokens), self._recipe.model.layers
        lane_order = plan.lane_order[self._job.rank]
        ids, finite = list(prompt), True
        for index in range(tokens):
            context_1S = torch.tensor([ids[-self._recipe.model.seq_len :]], device=self._job.device)
            coroutine = hidden_states(self._trunk, pool_map, context_1S, index)
            slots = plan.slots[index * layers : (index + 1) * layers]
            ((h_1SD, _),) = self._pool.run([coroutine], lane_order, step, slots)
            with self._trunk.autocast():
                logits_V = self._trunk.head(h_1SD[:, -1]).float().cpu()[0]
            finite = finite and bool(logits_V.isfinite().all())
            ids.append(_choose(logits_V, temperature, generator) if finite else 0)
        return ids[len(prompt) :] if finite else None


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if not temperature:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator))
