"""A step's sequences, the same ones in the same order whatever the layout, found from the step number alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from datasets import Dataset


def permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows 0 ... rows-1 in an epoch."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(np.arange(rows, dtype=np.uint32))


def evaluation_steps(rows: int, wanted: int, global_batch: int) -> int:
    """Global batches an evaluation takes from a split: as many as wanted where it has them, at least one.

    A split smaller than one global batch is read round and round until the batch is full, so that every trunk rank has
    its share; the loss is then the split's with some rows counted once more than others.
    """
    return max(1, min(wanted, rows // global_batch))


class SequenceStream:
    """An endless stream of a split's sequences n = 0, 1, 2, ...

    In epoch n // rows they come in an order of its own, decided by the seed. With seed None they come as they are
    stored, for evaluation.
    """

    def __init__(self, dataset: Dataset, seed: int | None):
        self.tokens = dataset.with_format("numpy")
        self.rows = len(dataset)
        self.seed = seed
        # A step may straddle two epochs, and ranks of one process may be at different ones.
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def micro_batches(
        self, step: int, global_batch: int, trunk_rank: int, trunk_ranks: int, micro_batch: int
    ) -> Iterator[torch.Tensor]:
        """Yields the micro-batches of one trunk rank in a step: int64, (micro_batch, seq_len + 1).

        Step s has the sequences [s * global_batch, (s + 1) * global_batch); trunk rank t of T has the t-th of T equal
        slices, cut into micro-batches in order. Inputs are [:, :-1], targets [:, 1:].
        """
        for rows in self.micro_batch_rows(step, global_batch, trunk_rank, trunk_ranks, micro_batch):
            yield torch.from_numpy(self.tokens[rows]["tokens"].astype(np.int64))

    def micro_batch_rows(
        self, step: int, global_batch: int, trunk_rank: int, trunk_ranks: int, micro_batch: int
    ) -> Iterator[list[int]]:
        """Yields which rows of the split are in each of these micro-batches."""
        assert global_batch % (trunk_ranks * micro_batch) == 0, "the recipe's check lets only whole micro-batches pass"
        share = global_batch // trunk_ranks
        first = step * global_batch + trunk_rank * share
        for start in range(first, first + share, micro_batch):
            yield [int(self._order(n // self.rows)[n % self.rows]) for n in range(start, start + micro_batch)]

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return np.arange(self.rows) if self.seed is None else permutation(self.rows, self.seed, epoch)
