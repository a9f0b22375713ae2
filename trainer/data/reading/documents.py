"""The documents of a source as pieces, always in the same order, from any position."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.common.errors import UserError, os_reason
from trainer.data.reading.content import Content
from trainer.data.reading.hub import read_hub
from trainer.data.reading.readers import read_delimited, read_json, read_plain
from trainer.data.reading.records import PIECE_CHARACTERS, Bad, Found, Piece, Position, cut
from trainer.data.reading.sources import (
    HUB_PREFIX,
    PYTHON_STDLIB,
    file_stamp,
    find_files,
    kind_of,
    refuse_change,
    shown,
    unreadable,
)

_FIRST_BAD = 5
_BAD_SAMPLE = 100
"""Bad records after which their share is judged before the end of the source."""
_FEW_BAD = 10


@dataclass
class Progress:
    """How far a source has been read.

    Attributes:
        files: A digest of the source's files; None before the first one is read.
        file: The number of files read.
        at: The position in the current file, for its reader.
        begun: The characters that have been yielded of the document that follows it.
        documents: The number of documents read.
        records: The number of records read, good or bad.
        bad_records: The number of those that could not be used.
        first_bad: "file, line N: reason" for the first five.
    """

    files: str | None = None
    file: int = 0
    at: Position | None = None
    begun: int = 0
    documents: int = 0
    records: int = 0
    bad_records: int = 0
    first_bad: list[str] = field(default_factory=list)

    def skipped_line(self) -> str:
        """Return one line that says how many records were skipped, and why the first ones were."""
        return f"{self.bad_records:,} of {self.records:,} records were skipped: {'; '.join(self.first_bad)}"

    def refuse_bad_share(self, largest: float) -> None:
        """Raise a UserError if too many records are bad.

        Args:
            largest: The largest share of bad records that is accepted, except that up to ten are accepted next to as
                many good ones; 0 makes the first one an error.
        """
        bad = self.bad_records
        if largest == 0 and bad:
            raise UserError(self.first_bad[0])
        if bad > largest * self.records and (bad > _FEW_BAD or bad > self.documents):
            raise UserError(
                f"{self.first_bad[0]} ({bad:,} of {self.records:,} records are bad, and data.max_bad_share is "
                f"{largest:g})"
            )


class Documents:
    """Reads the documents of a source as pieces: files sorted by path, records in their order.

    A record that cannot be used (no text, not JSON, invalid UTF-8) is skipped and counted. A document of nothing but
    white space is skipped unless it is longer than a piece.

    Args:
        source: "python-stdlib"; "hub:NAME" or "hub:NAME:CONFIG" (its split "train", streamed); or a file, folder or
            glob of the types in `sources.ALLOWED`. A file of plain text is one document; in the other types each record
            has one under `text_field`.
        text_field: A key, or a path of keys and list indices joined by dots.
        max_bad_share: The largest share of bad records that is accepted; 0 makes the first one an error.
        state: What `state_dict` returned, to resume after the piece that was yielded last.

    Attributes:
        progress: How far the source has been read.
    """

    def __init__(
        self, source: str, text_field: str, max_bad_share: float = 0.05, state: Mapping[str, Any] | None = None
    ) -> None:
        self._source, self._text_field, self._max_bad_share = source, text_field, max_bad_share
        self.progress = Progress(**(state or {}))

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the piece that was yielded last, for JSON."""
        return asdict(self.progress)

    def __iter__(self) -> Iterator[Piece]:
        """Continue after the piece that was yielded last.

        Raises:
            UserError: There is nothing to read or no document in it, a file is damaged, cannot be read or changes
                meanwhile, too many records are bad, the files differ from those of `state`, or the hub is out of reach.
        """
        progress = self.progress
        if self._source.startswith(HUB_PREFIX):
            name = HUB_PREFIX + self._source.removeprefix(HUB_PREFIX).partition(":")[0]
            if progress.file == 0:
                yield from self._pieces(name, read_hub(self._source, self._text_field, progress.at))
                progress.file, progress.at = 1, None
        else:
            yield from self._pieces_of_files(find_files(self._source).read)
        progress.refuse_bad_share(self._max_bad_share)
        if progress.documents == 0:
            raise UserError(f"data.source {shown(self._source)}: contains no document; set it to a source with text")

    def _pieces_of_files(self, files: list[Path]) -> Iterator[Piece]:
        digest = hashlib.sha256()
        for path in files:
            digest.update(repr(file_stamp(path)).encode("utf-8", "surrogateescape"))
        if self.progress.files not in (None, digest.hexdigest()):
            raise UserError(
                f"data.source {shown(self._source)}: its files have changed since the position in them was saved; "
                "start again"
            )
        self.progress.files = digest.hexdigest()
        for path in files[self.progress.file :]:
            before = file_stamp(path)
            try:
                # The standard library is read as it always was, so that what was trained on it can be compared.
                content = Content(path, keep_mark=self._source == PYTHON_STDLIB)
                yield from self._pieces(shown(path), _read(content, self._text_field, self.progress.at))
            except OSError as error:
                raise unreadable(path, error) from error
            refuse_change(path, before)
            self.progress.file += 1
            self.progress.at = None

    def _pieces(self, where: str, found_at: Found) -> Iterator[Piece]:
        progress = self.progress
        for found, position in found_at:
            if isinstance(found, str):
                yield from self._pieces_of(found, position)
                continue
            progress.at = position
            if isinstance(found, Bad):
                self._count_bad(f"{where}, {found.where}: {found.reason}")
                continue
            progress.records += found.ends_document
            progress.documents += found.ends_document
            yield found

    def _pieces_of(self, text: str, position: Position) -> Iterator[Piece]:
        progress = self.progress
        is_document = bool(text) and not text.isspace()
        begin = progress.begun
        while is_document and len(text) - begin > PIECE_CHARACTERS:
            progress.begun = cut(text, begin)
            yield Piece(text[begin : progress.begun], False)
            begin = progress.begun
        progress.at, progress.begun = position, 0
        progress.records += 1
        progress.documents += is_document
        if is_document:
            yield Piece(text[begin:], True)

    def _count_bad(self, what: str) -> None:
        if self._source == PYTHON_STDLIB:  # it has files in other encodings to test that they can be read
            return
        progress = self.progress
        progress.records += 1
        progress.bad_records += 1
        if len(progress.first_bad) < _FIRST_BAD:
            progress.first_bad.append(what)
        if progress.bad_records >= _BAD_SAMPLE or self._max_bad_share == 0:
            progress.refuse_bad_share(self._max_bad_share)


def read_documents(source: str, text_field: str, max_bad_share: float = 0.05) -> Iterator[str]:
    """Yield complete documents; see `Documents`."""
    pieces: list[str] = []
    for piece in Documents(source, text_field, max_bad_share):
        pieces.append(piece.text)
        if piece.ends_document:
            yield "".join(pieces)
            pieces = []


def read_text_option(file: Path) -> Iterator[str]:
    """Yield the documents of the file that --text names, in any of the formats of `data.source`.

    A file of unknown type, such as README, is read as plain text. The first bad record is an error.

    Raises:
        UserError: See `Documents`.
    """
    try:
        if os.path.isfile(file) and kind_of(file.name) is None:
            yield _plain_text(file)
        else:
            yield from read_documents(str(file), "text", max_bad_share=0)
    except OSError as error:
        raise UserError(f"--text {shown(file)}: cannot be read ({os_reason(error)})") from error
    except UserError as error:
        raise UserError(f"--text {str(error).removeprefix('data.source ')}") from error


def _plain_text(file: Path) -> str:
    pieces = []
    for found, _ in read_plain(Content(file), None):
        if isinstance(found, Bad):
            raise UserError(f"{shown(file)}, {found.where}: {found.reason}")
        pieces.append(found.text if isinstance(found, Piece) else found)
    return "".join(pieces)


def _read(content: Content, text_field: str, at: Position | None) -> Found:
    if content.kind == "plain":
        return read_plain(content, at)
    if content.kind == "json":
        return read_json(content, text_field, at)
    if content.kind in ("csv", "tsv"):
        return read_delimited(content, text_field, at)
    from trainer.data.reading.tables import read_arrow, read_parquet  # loads pyarrow

    return (read_parquet if content.kind == "parquet" else read_arrow)(content.path, text_field, at)
