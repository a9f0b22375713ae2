"""What decides the prepared data of a source."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.data.reading.documents import Documents, Piece
from trainer.data.reading.sources import shown, source_files
from trainer.data.splitting import Parts
from trainer.data.tokenizer import tokenizer_files

FORMAT = 2  # part of the fingerprint: raise it when the same settings give other files
TRAIN = "train"  # as data.tokenizer: train one on the source


@dataclass(frozen=True)
class DataSettings:
    """What decides the prepared data of one source, and where it is kept.

    Attributes:
        source, text_field: as in `Documents`.
        tokenizer: a tokenizer.json, a name on the hub, or a folder that `prepare` made.
        vocab: the model's vocabulary; the tokenizer's must fit into it.
        split: the proportion of training, validation and test.
        max_documents: read no more than these, over all splits; None: all.
        max_tokens: stop after this many training tokens; None: read all.
        max_bad_share: of the records; see `Documents`.
        end_of_document: the token that ends a document; None: the tokenizer's own.
        directory: the folder in which prepared folders are kept.
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


def pieces(settings: DataSettings) -> Iterator[Piece]:
    """The pieces of the documents that are to be read, from the beginning."""
    return limited(Documents(settings.source, settings.text_field, settings.max_bad_share), settings.max_documents)


def limited(documents: Documents, limit: int | None, done: int = 0) -> Iterator[Piece]:
    """The pieces of documents until `limit` of them have been read, with those that are behind it."""
    if limit is not None and done >= limit:
        return
    for piece in documents:
        yield piece
        done += piece.ends_document
        if done == limit:
            return


def _identity(file: Path) -> tuple[str, int, int]:
    try:
        return str(file), file.stat().st_size, file.stat().st_mtime_ns
    except OSError as error:
        raise UserError(f"{shown(file)}: cannot be read ({error.strerror}); restore it or leave it out") from error


def readable(source: str) -> str:
    """A source in short, for the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", Path(source).name.lower()).strip("-")[:40] or "data"


def fingerprint(settings: DataSettings) -> str:
    """Of the settings, the files of the source and those of the tokenizer."""
    decisive = asdict(settings) | {"format": FORMAT}
    for key in ("directory", "max_bad_share"):  # what they let pass is the same data
        del decisive[key]
    decisive["files"] = [_identity(file) for file in source_files(settings.source)]
    if settings.tokenizer != TRAIN and (files := tokenizer_files(settings.tokenizer)):
        decisive["tokenizer"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
