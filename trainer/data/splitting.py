"""Which text is trained on and which is held out: by document, or by size if there are few documents."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trainer.data.reading.records import Piece

SPLITS = ("train", "validation", "test")
Parts = tuple[int, int, int]
"""A proportion of training, validation and test."""

FEWEST_DOCUMENTS = 10
"""Documents that training and validation must each be able to expect if whole documents are to be assigned."""

MOST_COUNTED = 10_000
"""Documents that are counted, at most, to find out whether there are few."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document, or a part of one, that belongs to one split.

    Attributes:
        ends_document: Whether the end-of-document token follows.
    """

    split: str
    text: str
    ends_document: bool


def split_of(document: int, parts: Parts) -> str:
    """Return the split of the document with this index: by a hash of the index, in the proportion of `parts`."""
    digest = hashlib.blake2b(f"document {document}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "little") % sum(parts)
    train, validation, _ = parts
    return "train" if place < train else "validation" if place < train + validation else "test"


class Splitter:
    """Assigns the pieces of a source to splits, in order.

    Args:
        size: UTF-8 bytes of the whole text: its beginning is for training, what follows for validation, and the end for
            test. None assigns each document to one split, by its index.
        documents, bytes: What has already been assigned, when resuming.
    """

    def __init__(self, parts: Parts, size: int | None, documents: int = 0, bytes: int = 0):
        self.parts, self.size, self.documents, self.bytes = parts, size, documents, bytes
        total = size or 0
        ends = [total * sum(parts[: i + 1]) // sum(parts) for i in range(len(parts))]
        self._spans = dict(zip(SPLITS, pairwise([0, *ends[:-1], math.inf]), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the arguments of a splitter that resumes from here, for JSON."""
        return {"parts": list(self.parts), "size": self.size, "documents": self.documents, "bytes": self.bytes}

    def assign(self, piece: Piece) -> Iterator[Passage]:
        """Yield the passages of the next piece."""
        if self.size is None:
            yield Passage(split_of(self.documents, self.parts), piece.text, piece.ends_document)
        else:
            yield from self._by_size(piece)
        self.documents += piece.ends_document

    def _by_size(self, piece: Piece) -> Iterator[Passage]:
        data = piece.text.encode()
        start, stop = self.bytes, self.bytes + len(data)
        self.bytes = stop
        for split, (first, last) in self._spans.items():
            begin, end = (_boundary(data, limit - start) for limit in (first, last))
            if begin < end:
                # A full split ends its last document, because what follows belongs to another split.
                ends = piece.ends_document or stop >= last
                yield Passage(split, data[begin:end].decode(), ends)


def _boundary(data: bytes, place: float) -> int:
    """The first place in UTF-8 data, from `place` on, that is between two characters."""
    end = int(min(max(place, 0), len(data)))
    while end < len(data) and data[end] & 0xC0 == 0x80:
        end += 1
    return end


def choose_splitter(pieces: Iterable[Piece], parts: Parts) -> Splitter:
    """Return a splitter by document, or by size if there are too few documents for this proportion.

    Args:
        pieces: The pieces of the source from its beginning. No more are read than are needed to decide.
    """
    wanted = [part for part in parts[:2] if part]
    if len(wanted) < 2:
        return Splitter(parts, None)
    enough = min(math.ceil(FEWEST_DOCUMENTS * sum(parts) / min(wanted)), MOST_COUNTED)
    documents = size = 0
    for piece in pieces:
        documents += piece.ends_document
        size += len(piece.text.encode())
        if documents >= enough:
            return Splitter(parts, None)
    return Splitter(parts, size)
