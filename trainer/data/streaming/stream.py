"""The sequences of a run that trains while its text is being read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches import Place, SequenceStream, permutation
from trainer.data.streaming.parts import SourceParts


class PartStream(SequenceStream):
    """An endless stream of the sequences of a source, each of whose parts is shuffled on its own.

    The order depends on nothing but the seed and the size of a part: it is the same whether parts are there or are made
    meanwhile, and in every layout. A source that ends is read again, in another order.
    """

    def __init__(self, parts: SourceParts, seed: int):
        self._parts, self._seed = parts, seed
        self._shares = np.array([1.0])
        self._begun = -1
        self._order = lru_cache(maxsize=4)(self._order_of_part)

    def reach(self, step: int, global_batch: int) -> None:
        """Make the parts that a step reads, and those before them.

        Raises:
            UserError, Unavailable: See `SourceParts.reach`.
        """
        self._parts.reach(((step + 1) * global_batch - 1) // self._parts.size)

    def name(self, place: Place) -> str:
        """Return a place for people to read: the row in the whole source."""
        part, row = place
        return str(part * self._parts.size + row)

    def _place(self, source: int, number: int) -> Place:
        self._parts.reach(number // self._parts.size)
        total = self._parts.total
        epoch, index = (0, number) if total is None else divmod(number, total)
        part, row = divmod(index, self._parts.size)
        if part > self._begun:
            self._begun = part
            self._parts.reach_in_background(part + 1)
        return part, int(self._order(part, epoch)[row])

    def _read(self, places: Sequence[Place]) -> NDArray[np.int64]:
        return np.concatenate([self._parts.rows(part)[[row]] for part, row in places]).astype(np.int64)

    def _order_of_part(self, part: int, epoch: int) -> NDArray[np.uint32]:
        assert self._seed is not None, "parts are always shuffled"
        return permutation(len(self._parts.rows(part)), self._seed, epoch, part)
