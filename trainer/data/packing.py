"""Packs the tokens of a split, document after document, into rows of an Arrow file, and reads these rows."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.common.errors import UserError
from trainer.common.safe_read import open_file

ROWS_PER_WRITE = 1000
_READ_BYTES = 1 << 24
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # in Arrow's streaming format


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds.

    Attributes:
        bytes: Its text in UTF-8 bytes; with `tokens` it converts nats per token into bits per byte.
        tokens: The number of tokens, including those that end documents.
        unigram_entropy: The loss, in nats, of a model that knows only how frequent each token is.
    """

    documents: int
    bytes: int
    tokens: int
    sequences: int
    unigram_entropy: float


def unigram_entropy(counts_V: NDArray[Any]) -> float:
    """Return the entropy, in nats, of tokens with these counts, (V,); 0 if all are 0."""
    p_V = counts_V[counts_V > 0] / max(counts_V.sum(), 1)
    return float((p_V * -np.log(p_V)).sum())


def token_type(vocab: int) -> np.dtype[Any]:
    """Return the type in which the tokens of a vocabulary are stored."""
    return np.dtype(np.uint16 if vocab <= 1 << 16 else np.uint32)


class SplitWriter:
    """Writes one split as rows of S+1 tokens, each starting with the last token of the previous one.

    So every token except the split's first is predicted exactly once, and only the last, partial row is dropped. Memory
    holds at most `ROWS_PER_WRITE` rows besides what is added at once.

    The file is a stream of Arrow messages, written one by one, so that a writer can resume where `state_dict` was
    called: what the file holds beyond that point is cut off. The checksum of what comes before is part of the state.

    Args:
        seq_len: S.
        vocab: The number of different tokens.
        saved: What `state_dict` returned; None begins a new file.
    """

    SAVED = ("numbers", "unwritten", "counts_V")
    """The keys of `state_dict`."""

    def __init__(self, path: Path, seq_len: int, vocab: int, saved: dict[str, Any] | None = None):
        import pyarrow as pa

        self.seq_len = seq_len
        self.dtype = token_type(vocab)
        tokens = pa.list_(pa.from_numpy_dtype(self.dtype), seq_len + 1)
        self.schema = pa.schema([("tokens", tokens)])
        self.unwritten = np.empty(0, self.dtype)  # the beginning of the next row
        self.pending: list[NDArray[Any]] = []
        self.pending_tokens = 0
        self.counts_V = np.zeros(vocab, np.int64)
        self.documents = self.bytes = self.tokens = self.sequences = self.checksum = 0
        self.file = path.open("wb" if saved is None else "r+b")
        if saved is None:
            self._put(self.schema.serialize())
            return
        numbers = (int(n) for n in saved["numbers"])
        self.documents, self.bytes, self.tokens, self.sequences, self.checksum, size = numbers
        self.unwritten, self.counts_V = saved["unwritten"].astype(self.dtype), saved["counts_V"]
        self.file.truncate(size)
        self.file.seek(size)

    @staticmethod
    def holds(path: Path, saved: dict[str, Any], read: Callable[[int], object]) -> bool:
        """Whether a file has, unaltered, all that was written when `state_dict` returned `saved`.

        Args:
            read: Called with the number of bytes of every block that has been read.
        """
        *_, wanted, left = (int(n) for n in saved["numbers"])
        checksum = 0
        with open_file(path) as file:
            while left and (block := file.read(min(left, _READ_BYTES))):
                checksum = zlib.crc32(block, checksum)
                left -= len(block)
                read(len(block))
        return left == 0 and checksum == wanted

    def add(self, ids: NDArray[Any], text_bytes: int, ends_document: bool = True) -> None:
        """Append a document, or a part of one.

        Args:
            ids: Its tokens, all below `vocab`, including the one that ends the document.
            text_bytes: The size of its text in UTF-8 bytes.
            ends_document: Whether the document ends here.
        """
        self.documents += ends_document
        self.bytes += text_bytes
        self.tokens += len(ids)
        self.pending.append(ids.astype(self.dtype))
        self.pending_tokens += len(ids)
        if self.pending_tokens >= ROWS_PER_WRITE * self.seq_len:
            self._write()

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Flush everything to the disk and return what a writer needs to resume from here."""
        self._write()
        self.file.flush()
        os.fsync(self.file.fileno())
        numbers = (self.documents, self.bytes, self.tokens, self.sequences, self.checksum, self.file.tell())
        return {"numbers": np.array(numbers, np.int64), "unwritten": self.unwritten, "counts_V": self.counts_V.copy()}

    def close(self) -> SplitFacts:
        """Write what is left and finish the file."""
        self._write()
        self.file.write(_END_OF_STREAM)
        self.file.close()
        entropy = unigram_entropy(self.counts_V)
        return SplitFacts(self.documents, self.bytes, self.tokens, self.sequences, entropy)

    def abandon(self) -> None:
        """Close the file as it is."""
        self.file.close()

    def _write(self) -> None:
        import pyarrow as pa

        new_T = np.concatenate([np.empty(0, self.dtype), *self.pending])
        self.counts_V += np.bincount(new_T, minlength=len(self.counts_V))
        self.pending, self.pending_tokens = [], 0
        tokens_T = np.concatenate([self.unwritten, new_T])
        rows = max(0, len(tokens_T) - 1) // self.seq_len
        self.unwritten = tokens_T[rows * self.seq_len :].copy()
        if rows == 0:
            return
        rows_RS1 = np.lib.stride_tricks.sliding_window_view(tokens_T, self.seq_len + 1)[:: self.seq_len][:rows]
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows_RS1.reshape(-1)), self.seq_len + 1)
        self._put(pa.record_batch([column], schema=self.schema).serialize())
        self.sequences += rows

    def _put(self, message: Any) -> None:
        self.checksum = zlib.crc32(message, self.checksum)
        self.file.write(message)


class SplitRows:
    """The rows that a `SplitWriter` wrote, memory-mapped.

    `datasets` could read them too, but importing it takes as long as a step, and so does pandas, which `to_numpy` of
    pyarrow would import.

    Args:
        vocab: The number of different tokens. Rows are checked as they are read: a larger one means a damaged file.

    Raises:
        OSError, ValueError, LookupError: The file cannot be read or has other content.
    """

    def __init__(self, path: Path, vocab: int):
        import pyarrow as pa

        self._path, self._vocab = path, vocab
        try:
            open_file(path).close()  # mapping a pipe would wait
            with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
                parts = stream.read_all()["tokens"].chunks
            self._parts = [_view(part.flatten()).reshape(len(part), -1) for part in parts]
        except (NotImplementedError, TypeError, AttributeError) as error:  # by its header it has other columns
            raise ValueError(f"not rows of tokens: {error}") from error
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, rows: Sequence[int]) -> NDArray[Any]:
        """Return a copy of these rows, (len(rows), S+1).

        Raises:
            UserError: A row holds a token that is not in the vocabulary.
        """
        parts = np.searchsorted(self._ends, rows, side="right")
        found = np.stack([self._parts[part][row - self._ends[part]] for part, row in zip(parts, rows, strict=True)])
        if (largest := found.max(initial=0)) >= self._vocab:
            raise UserError(
                f"{self._path}: is damaged (token {largest} in a vocabulary of {self._vocab}); delete "
                f"{self._path.parent}, and it will be made again"
            )
        return found


def _view(tokens: Any) -> NDArray[Any]:
    """Return the numbers of an Arrow array, where they are."""
    dtype = np.dtype(str(tokens.type))
    return np.frombuffer(tokens.buffers()[1], dtype, len(tokens), tokens.offset * dtype.itemsize)
