"""Packs the documents of a split, end to end, into rows of an Arrow file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "validation", "test")
ROWS_PER_WRITE = 1000


@dataclass(frozen=True)
class SplitFacts:
    documents: int
    bytes: int  # of UTF-8 text: with `tokens` it turns nats per token into bits per byte
    tokens: int  # end-of-document tokens included
    sequences: int  # rows of the dataset
    unigram_entropy: float  # nats: the loss of a model that knows how frequent each token is, and nothing else


def split_of(document: int, parts: tuple[int, int, int]) -> str:
    """The split of the document with this index: by a hash of the index alone, in the proportion of `parts`."""
    digest = hashlib.blake2b(f"document {document}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "little") % sum(parts)
    train, validation, _ = parts
    return "train" if place < train else "validation" if place < train + validation else "test"


class SplitWriter:
    """Writes one split: rows of S+1 tokens, each starting with the last token of the one before.

    So every token but the split's first is predicted exactly once; only the last, partial row is dropped. At most
    ROWS_PER_WRITE rows and one document are held in memory.
    """

    def __init__(self, path: Path, seq_len: int, vocab: int):
        import pyarrow as pa

        self.seq_len = seq_len
        self.dtype = np.dtype(np.uint16 if vocab <= 1 << 16 else np.uint32)
        tokens = pa.list_(pa.from_numpy_dtype(self.dtype), seq_len + 1)
        self.schema = pa.schema([("tokens", tokens)])
        self.file = pa.OSFile(str(path), "wb")
        self.stream = pa.ipc.new_stream(self.file, self.schema)
        self.unwritten = np.empty(0, self.dtype)  # the start of the next row
        self.pending: list[np.ndarray] = []  # a document each
        self.pending_tokens = 0
        self.counts = np.zeros(vocab, np.int64)
        self.documents = self.bytes = self.sequences = 0

    def add(self, ids: list[int], text_bytes: int) -> None:
        """Appends a document. ids: its tokens, the end-of-document token included, all below `vocab`."""
        self.documents += 1
        self.bytes += text_bytes
        self.pending.append(np.array(ids, self.dtype))
        self.pending_tokens += len(ids)
        if self.pending_tokens >= ROWS_PER_WRITE * self.seq_len:
            self._write()

    def close(self) -> SplitFacts:
        """Writes what is left and finishes the file."""
        self._write()
        self.stream.close()
        self.file.close()
        tokens = int(self.counts.sum())
        p_V = self.counts[self.counts > 0] / max(tokens, 1)
        return SplitFacts(self.documents, self.bytes, tokens, self.sequences, float((p_V * -np.log(p_V)).sum()))

    def _write(self) -> None:
        import pyarrow as pa

        new_T = np.concatenate([np.empty(0, self.dtype), *self.pending])
        self.counts += np.bincount(new_T, minlength=len(self.counts))
        self.pending, self.pending_tokens = [], 0
        tokens_T = np.concatenate([self.unwritten, new_T])
        rows = max(0, len(tokens_T) - 1) // self.seq_len
        self.unwritten = tokens_T[rows * self.seq_len :].copy()
        if rows == 0:
            return
        rows_RS1 = np.lib.stride_tricks.sliding_window_view(tokens_T, self.seq_len + 1)[:: self.seq_len][:rows]
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows_RS1.reshape(-1)), self.seq_len + 1)
        self.stream.write_batch(pa.record_batch([column], schema=self.schema))
        self.sequences += rows
