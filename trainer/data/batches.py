"""A step's sequences: the same ones in the same order in every layout, computed from the step number alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Place = tuple[int, int]
"""A sequence: the number of its data set, and its row there."""


class Rows(Protocol):
    """A data set: rows of S+1 tokens. An array is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: list[int], /) -> NDArray[Any]: ...


def permutation(rows: int, seed: int, epoch: int, source: int = 0) -> NDArray[np.uint32]:
    """Return the order of the rows 0 ... rows-1 of a data set in an epoch."""
    entropy = [seed, epoch, source] if source else [seed, epoch]
    return np.random.Generator(np.random.PCG64(entropy)).permutation(np.arange(rows, dtype=np.uint32))


def evaluation_steps(rows: int, wanted: int, global_batch: int) -> int:
    """Return the number of global batches of an evaluation: as many as wanted and available, but at least one.

    A split that is smaller than one global batch is repeated until the batch is full, so that every trunk rank has its
    part; the loss is then the split's, with some rows counted once more than others.
    """
    return max(1, min(wanted, rows // global_batch))


def mixed(first: int, count: int, shares: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which sources the elements first ... first+count-1 of a mixture come from.

    The k-th element of source i is due at (k + 1/2) / shares[i]. Elements come in the order in which they are due; of
    several that are due at once, that of the first source comes first. So in any stretch each source has its share, to
    within one element.

    Args:
        shares: The share of each source; they add up to 1.

    Returns:
        (sources, the elements' numbers within their sources), both (count,).
    """
    sources = len(shares)
    # Until time t source i has floor(shares[i] t + 1/2) elements; all sources have t, to within one for each source.
    begin, end = first - sources - 1, first + count + sources + 1
    skipped = np.maximum(np.floor(shares * begin + 0.5), 0).astype(np.int64)
    limits = np.maximum(np.floor(shares * end + 0.5), 0).astype(np.int64)
    source_E = np.repeat(np.arange(sources), limits - skipped)
    number_E = np.concatenate([np.arange(a, b) for a, b in zip(skipped, limits, strict=True)])
    order_E = np.lexsort((source_E, (number_E + 0.5) / shares[source_E]))
    kept = order_E[first - int(skipped.sum()) :][:count]
    return source_E[kept], number_E[kept]


class SequenceStream:
    """An endless stream of the sequences n = 0, 1, 2, ... of one or several data sets, mixed by their shares.

    The k-th sequence of a data set belongs to its epoch k // rows. Each epoch has its own order of rows, determined by
    the seed.

    Args:
        seed: The seed; None keeps the rows as they are stored, for evaluation.
        shares: The share of each data set; they add up to 1.

    Attributes:
        rows: The number of sequences until the first data set has been read once.
    """

    def __init__(self, datasets: Sequence[Rows], seed: int | None, shares: Sequence[float] = (1.0,)):
        self._datasets = datasets
        self._lengths = [len(dataset) for dataset in datasets]
        self._shares = np.array(shares)
        self._seed = seed
        self.rows = min(int(length / share) for length, share in zip(self._lengths, shares, strict=True))
        # A step may straddle two epochs, and the ranks of one process may be in different ones.
        self._order = lru_cache(maxsize=2 * len(datasets))(self._order_of_epoch)

    def micro_batches(
        self, step: int, global_batch: int, trunk_rank: int, trunk_ranks: int, micro_batch: int
    ) -> Iterator[torch.Tensor]:
        """Yield the micro-batches of one trunk rank in a step: int64, (micro_batch, seq_len + 1).

        Step s has the sequences [s * global_batch, (s + 1) * global_batch). Trunk rank t of T has the t-th of T equal
        slices, cut into micro-batches in order. Inputs are [:, :-1], targets [:, 1:].
        """
        for places in self.places(step, global_batch, trunk_rank, trunk_ranks, micro_batch):
            yield torch.from_numpy(self._read(places))

    def places(
        self, step: int, global_batch: int, trunk_rank: int, trunk_ranks: int, micro_batch: int
    ) -> Iterator[list[Place]]:
        """Yield the places of the sequences of each of these micro-batches."""
        assert global_batch % (trunk_ranks * micro_batch) == 0, "the recipe's check ensures complete micro-batches"
        share = global_batch // trunk_ranks
        first = step * global_batch + trunk_rank * share
        sources, numbers = mixed(first, share, self._shares)
        for start in range(0, share, micro_batch):
            part = slice(start, start + micro_batch)
            yield [self._place(int(i), int(k)) for i, k in zip(sources[part], numbers[part], strict=True)]

    def name(self, place: Place) -> str:
        """Return a place for people to read: the row, after the number of the data set if there are several."""
        source, row = place
        return str(row) if len(self._datasets) == 1 else f"{source}:{row}"

    def _place(self, source: int, number: int) -> Place:
        epoch, index = divmod(number, self._lengths[source])
        return source, index if self._seed is None else int(self._order(source, epoch)[index])

    def _read(self, places: list[Place]) -> NDArray[np.int64]:
        (first, _), rows = places[0], [row for _, row in places]
        if all(source == first for source, _ in places):
            return self._datasets[first][rows].astype(np.int64)
        return np.concatenate([self._datasets[source][[row]] for source, row in places]).astype(np.int64)

    def _order_of_epoch(self, source: int, epoch: int) -> NDArray[np.uint32]:
        assert self._seed is not None
        return permutation(self._lengths[source], self._seed, epoch, source)
