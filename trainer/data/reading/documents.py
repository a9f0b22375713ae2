"""The documents of a source as pieces, always in the same order, from any position."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.common.errors import UserError, one_line, os_reason
from trainer.data.reading.content import Content, file_stamp
from trainer.data.reading.hub import read_hub
from trainer.data.reading.readers import read_delimited, read_json, read_plain
from trainer.data.reading.records import PIECE_CHARACTERS, Bad, Found, Piece, Position, cut
from trainer.data.reading.sources import HUB_PREFIX, PYTHON_STDLIB, find_files, kind_of, shown
from trainer.data.reading.tables import read_arrow, read_parquet

_FIRST_BAD = 5
_BAD_SAMPLE = 100
"""Bad records after which their share is judged before the end of the source."""
_FEW_BAD = 10


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
        state: What `state_dict` returned, to resume behind the piece that was yielded last.

    Attributes:
        records: The number of records read so far, good or bad.
        bad_records: The number of those that could not be used.
        first_bad: "file, line N: reason" for the first five.
    """

    def __init__(
        self, source: str, text_field: str, max_bad_share: float = 0.05, state: Mapping[str, Any] | None = None
    ) -> None:
        state = state or {}
        self._source, self._text_field, self._max_bad_share = source, text_field, max_bad_share
        self.records: int = state.get("records", 0)
        self.bad_records: int = state.get("bad_records", 0)
        self.first_bad: list[str] = list(state.get("first_bad", []))
        self._documents: int = state.get("documents", 0)
        self._files: str | None = state.get("files")
        self._file: int = state.get("file", 0)
        self._at: Position | None = state.get("at")
        self._begun: int = state.get("begun", 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the piece that was yielded last, for JSON."""
        return {
            "files": self._files,
            "file": self._file,
            "at": self._at,
            "begun": self._begun,
            "documents": self._documents,
            "records": self.records,
            "bad_records": self.bad_records,
            "first_bad": list(self.first_bad),
        }

    def __iter__(self) -> Iterator[Piece]:
        """Continue behind the piece that was yielded last.

        Raises:
            UserError: There is nothing to read or no document in it, a file is damaged, cannot be read or changes
                meanwhile, too many records are bad, the files differ from those of `state`, or the hub is out of reach.
        """
        if self._source.startswith(HUB_PREFIX):
            name = HUB_PREFIX + self._source.removeprefix(HUB_PREFIX).partition(":")[0]
            if self._file == 0:
                yield from self._pieces(name, read_hub(self._source, self._text_field, self._at))
                self._file, self._at = 1, None
        else:
            yield from self._pieces_of_files(find_files(self._source).read)
        self._judge(at_end=True)

    def _pieces_of_files(self, files: list[Path]) -> Iterator[Piece]:
        digest = hashlib.sha256()
        for path in files:
            try:
                digest.update(repr((str(path), *file_stamp(path)[1:])).encode("utf-8", "surrogateescape"))
            except OSError as error:
                raise _unreadable(path, error) from error
        if self._files not in (None, digest.hexdigest()):
            raise UserError(
                f"data.source {shown(self._source)}: its files have changed since the position in them was saved; "
                "start again"
            )
        self._files = digest.hexdigest()
        for path in files[self._file :]:
            try:
                before = file_stamp(path)
                # The standard library is read as it always was, so that what was trained on it can be compared.
                content = Content(path, keep_mark=self._source == PYTHON_STDLIB)
                yield from self._pieces(shown(path), _read(content, self._text_field, self._at))
                if file_stamp(path) != before:
                    raise UserError(f"{shown(path)}: has changed while it was read; start again when it is complete")
            except OSError as error:
                raise _unreadable(path, error) from error
            self._file, self._at = self._file + 1, None

    def _pieces(self, where: str, found_at: Found) -> Iterator[Piece]:
        for found, position in found_at:
            if isinstance(found, Bad):
                self._at = position
                self._count_bad(f"{where}, {found.where}: {found.reason}")
            elif isinstance(found, Piece):
                self._at = position
                if found.ends_document:
                    self.records += 1
                    self._documents += 1
                yield found
            else:
                yield from self._pieces_of(found, position)

    def _pieces_of(self, text: str, position: Position) -> Iterator[Piece]:
        is_document = bool(text) and not text.isspace()
        begin = self._begun
        if is_document:
            while len(text) - begin > PIECE_CHARACTERS:
                self._begun = cut(text, begin)
                yield Piece(text[begin : self._begun], False)
                begin = self._begun
        self._at, self._begun = position, 0
        self.records += 1
        self._documents += is_document
        if is_document:
            yield Piece(text[begin:], True)

    def _count_bad(self, what: str) -> None:
        if self._source == PYTHON_STDLIB:  # it has files in other encodings to test that they can be read
            return
        self.records += 1
        self.bad_records += 1
        if len(self.first_bad) < _FIRST_BAD:
            self.first_bad.append(what)
        self._judge(at_end=False)

    def _judge(self, at_end: bool) -> None:
        if at_end or self.bad_records >= _BAD_SAMPLE or self._max_bad_share == 0:
            refuse_bad_share(self.bad_records, self.records, self._documents, self.first_bad, self._max_bad_share)
        if at_end and self._documents == 0:
            raise UserError(f"data.source {shown(self._source)}: contains no document; set it to a source with text")


def refuse_bad_share(bad: int, records: int, documents: int, first_bad: Sequence[str], max_bad_share: float) -> None:
    """Raise an error if too many records are bad: more than the share, and either more than ten or more than are good.

    Args:
        bad: The number of bad records.
        records: The number of records.
        documents: The number of documents in the good ones.
        first_bad: What was wrong with the first ones.
        max_bad_share: The largest share that is accepted; 0 makes the first one an error.

    Raises:
        UserError: Too many records are bad.
    """
    if max_bad_share == 0 and bad:
        raise UserError(first_bad[0])
    if bad > max_bad_share * records and (bad > _FEW_BAD or bad > documents):
        raise UserError(
            f"{first_bad[0]} ({bad:,} of {records:,} records are bad, and data.max_bad_share is {max_bad_share:g})"
        )


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
    if content.kind == "parquet":
        return read_parquet(content.path, text_field, at)
    if content.kind == "arrow":
        return read_arrow(content.path, text_field, at)
    return (read_json if content.kind == "json" else read_delimited)(content, text_field, at)


def _unreadable(path: Path, error: OSError) -> UserError:
    reason = os_reason(error) if error.strerror else one_line(error)
    return UserError(f"{shown(path)}: cannot be read ({reason}); make it readable or remove it from data.source")
