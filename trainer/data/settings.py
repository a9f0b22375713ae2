"""What determines the prepared data of a source."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.common.safe_read import open_file
from trainer.common.strict_json import dumps
from trainer.data.packing import token_type
from trainer.data.reading.documents import Documents, Piece
from trainer.data.reading.sources import COMPRESSED, HUB_PREFIX, file_stamp, find_files, kind_of
from trainer.data.splitting import Parts
from trainer.data.tokenizer import tokenizer_files

FORMAT = 2
"""Part of the fingerprint. Increase it when the same settings produce different files."""

TRAIN = "train"
"""The value of `data.tokenizer` that trains a tokenizer on the source."""


_BYTES_PER_TOKEN = 4
"""UTF-8 bytes that a token of a large vocabulary stands for in English text."""


@dataclass(frozen=True)
class Need:
    """Disk space that prepared data will need.

    Attributes:
        certain: Whether `max_tokens` determines it, rather than an estimate from the size of the source.
    """

    bytes: int
    certain: bool


@dataclass(frozen=True)
class SourceSettings:
    """What determines the prepared data of one source, and where they are kept.

    Attributes:
        source, text_field, max_bad_share: See `Documents`.
        tokenizer: A tokenizer.json, a folder that contains one, a name on the hub, or `TRAIN`.
        vocab: The model's vocabulary, which the tokenizer's must fit into.
        seq_len: Tokens of a sequence that are predicted.
        split: The proportion of training, validation and test.
        max_documents: The number of documents to read, over all splits; None reads all.
        max_tokens: The number of training tokens after which to stop; None reads all.
        end_of_document: The token that ends a document; None takes the tokenizer's own.
        directory: The folder that holds the prepared folders.
    """

    source: str
    tokenizer: str
    vocab: int
    seq_len: int
    split: Parts
    text_field: str
    max_documents: int | None
    directory: str
    max_tokens: int | None = None
    max_bad_share: float = 0.05
    end_of_document: str | None = None

    @property
    def short_name(self) -> str:
        """The source's name, shortened for names of folders and progress bars."""
        return re.sub(r"[^a-z0-9]+", "-", Path(self.source).name.lower()).strip("-")[:40] or "data"

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces of the documents to read, from the beginning."""
        return limited(Documents(self.source, self.text_field, self.max_bad_share), self.max_documents)

    @property
    def folder(self) -> Path:
        """The folder of the prepared data."""
        name = f"{self.short_name}-v{self.vocab}-s{self.seq_len}-{self.fingerprint()}"
        return Path(self.directory).expanduser() / name

    def text_bytes(self) -> int | None:
        """Return about how many bytes of text the source has; None if that is not known before it is read."""
        files = find_files(self.source).read
        if self.source.startswith(HUB_PREFIX) or not all(map(_size_tells, files)):
            return None
        return sum(file_stamp(file)[1] for file in files)

    def needs(self) -> Need | None:
        """Return the disk space that the prepared data will need; None if that is not known beforehand."""
        limit, text = self.max_tokens, self.text_bytes()
        if limit is not None:
            limit = limit * sum(self.split) // next(part for part in self.split if part)
        estimate = None if text is None else text // _BYTES_PER_TOKEN
        tokens = min((n for n in (limit, estimate) if n is not None), default=None)
        if tokens is None:
            return None
        token_bytes = token_type(self.vocab).itemsize
        return Need(token_bytes * tokens * (self.seq_len + 1) // self.seq_len, tokens == limit)

    def fingerprint(self) -> str:
        """Return a hash of the settings, the source's files (names, sizes, times) and the tokenizer's files."""
        decisive = asdict(self) | {"format": FORMAT}
        for key in ("directory", "max_bad_share"):  # they do not change the data
            del decisive[key]
        decisive["files"] = [file_stamp(file) for file in find_files(self.source).read]
        if self.tokenizer != TRAIN and (files := tokenizer_files(self.tokenizer)):
            decisive["tokenizer"] = [_checksum(file) for file in files]
        return hashlib.sha256(dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def _checksum(file: Path) -> str:
    with open_file(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _size_tells(file: Path) -> bool:
    """Whether a file is about as long as the text in it."""
    return kind_of(file.name) in ("plain", "json", "csv", "tsv") and not file.name.lower().endswith(COMPRESSED)


def limited(documents: Documents, limit: int | None, done: int = 0) -> Iterator[Piece]:
    """Yield the pieces of documents until `limit` documents have been read, counting `done` previous ones."""
    if limit is not None and done >= limit:
        return
    for piece in documents:
        yield piece
        done += piece.ends_document
        if done == limit:
            return
