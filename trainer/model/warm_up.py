"""Compiles the trunk's segments before the first step, in which waits for other ranks are short."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch

from trainer.common.errors import UserError, short_line
from trainer.config.recipe import Recipe
from trainer.model.lock import kinds_of_reach
from trainer.model.micro_batch import MicroBatchResult, Objective, PoolMap, train_dense_micro_batch, train_micro_batch
from trainer.model.pool_client import MicroBatch
from trainer.model.trunk import Trunk


def warm_up(trunk: Trunk, pool_map: PoolMap | None, recipe: Recipe) -> None:
    """Run micro-batches without a pool, so that all segments are compiled; does nothing if they are not to be.

    A run with a lock needs a graph for each kind of reach, and will change to the next within a step.

    Call it before the trunk has an engine, whose hooks would reduce the gradients.

    Raises:
        UserError: The compiler fails, perhaps because a C compiler or a header is missing.
    """
    if not trunk.compiled:
        return
    from torch._dynamo.exc import TorchDynamoException

    sequences_BS1 = torch.zeros(
        recipe.train.micro_batch, recipe.model.seq_len + 1, dtype=torch.int64, device=trunk.device
    )
    objective = Objective(1.0, lambda load_LM: None, recipe.router.z_loss, recipe.train.recompute)
    micro_batches: list[MicroBatch[MicroBatchResult]] = []
    if pool_map is None:
        micro_batches.append(train_dense_micro_batch(trunk, sequences_BS1, objective))
    else:
        for reaches in kinds_of_reach(recipe, trunk.device):
            seen = replace(pool_map, reaches=reaches)
            micro_batches.append(train_micro_batch(trunk, seen, sequences_BS1, 0, objective))
    try:
        for micro_batch in micro_batches:
            _run(micro_batch)
        trunk.zero_grad()
    except TorchDynamoException as error:
        raise UserError(
            f"train.compile: torch.compile fails ({compiler_error(str(error))}): set train.compile: false"
        ) from error


def _run(micro_batch: MicroBatch[MicroBatchResult]) -> None:
    rows_ND = None
    with suppress(StopIteration):
        while True:  # the rows are their own answer
            rows_ND = micro_batch.send(rows_ND).rows_ND  # type: ignore[arg-type]  # None starts a generator


def compiler_error(message: str) -> str:
    """Return what torch.compile says in one line: its first line, and the first error of a C++ compiler or the next."""
    first, *others = message.splitlines() or [""]
    causes = [line for line in others if " error: " in line] or others
    return short_line(" ".join([first, *causes[:1]]).strip())
