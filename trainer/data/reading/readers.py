"""The records of text files: plain text; JSON in lines, arrays or single records; and delimited tables."""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from trainer.common.errors import UserError, short_line
from trainer.data.reading.content import Content
from trainer.data.reading.records import (
    PIECE_CHARACTERS,
    RECORD_BYTES,
    Bad,
    Found,
    Piece,
    Position,
    checked_text,
    cut,
    no_column,
    text_of,
    too_long,
)
from trainer.data.reading.sources import shown

_BLOCK = 1 << 20
_CSV_FIELD = RECORD_BYTES // 4  # `csv` uses four bytes for a character
_SPACE = re.compile(r"[ \t\n\r]*")
_BOM = "\ufeff"


def read_plain(content: Content, at: Position | None) -> Found:
    """Read a file as one document. A file that is not UTF-8 is one bad record, so a long file is read twice."""
    if not at and (found := _short_or_bad(content)) is not None:
        yield found, [len(found.encode()) if isinstance(found, str) else 0, 1]
        return
    offset, line = at or (0, 1)
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode  # invalid bytes were found before
    text = ""
    with content.open(offset) as stream:
        while True:
            while len(text) <= PIECE_CHARACTERS and (block := stream.read(_BLOCK)):
                text += decode(block)
            if len(text) <= PIECE_CHARACTERS:
                break
            end = cut(text)
            piece, text = text[:end], text[end:]
            offset += _utf8_bytes(piece)
            line += piece.count("\n")
            yield Piece(piece, False), [offset, line]
        if text:
            yield Piece(text, True), [offset + _utf8_bytes(text), line]


def _short_or_bad(content: Content) -> str | Bad | None:
    """The text of a short file, or what is wrong with a file; None if it is long and good."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    line, blocks, text = 1, 0, ""
    with content.open() as stream:
        try:
            while block := stream.read(_BLOCK):
                if (nul := block.find(b"\0")) >= 0:
                    line += block.count(b"\n", 0, nul)
                    return Bad(f"line {line}", "a NUL character: not text, or UTF-16 without its mark; convert it")
                text = decode(block)
                blocks += 1
                line += block.count(b"\n")
            decode(b"", final=True)
        except UnicodeDecodeError as error:
            # The decoder's input begins with what it kept of the previous block, which has no line feed.
            data = bytes(error.object)
            line += data.count(b"\n", 0, error.start)
            column = error.start - data.rfind(b"\n", 0, error.start)
            return Bad(f"line {line}", f"invalid UTF-8 at byte {column} of the line; convert the file to UTF-8")
    return text if blocks <= 1 else None


def read_json(content: Content, text_field: str, at: Position | None) -> Found:
    """Read lines of JSON, an array of records, or records that span lines, whatever the file's ending is."""
    with content.open() as stream:
        head = stream.read(_BLOCK)
    if _is_array(head, content.path.name.lower()):
        return _read_values(content, text_field, at, array=True)
    if _spans_lines(head):
        return _read_values(content, text_field, at, array=False)
    return _read_lines(content, text_field, at)


def _is_array(head: bytes, name: str) -> bool:
    begin = re.match(rb"\s*\[\s*(\{|\]?\s*$)?", head)
    return begin is not None and (begin[1] is not None or (".json" in name and ".jsonl" not in name))


def _spans_lines(head: bytes) -> bool:
    """Whether the first record spans several lines."""
    lines = [line for line in head.split(b"\n", 50) if line.strip()]
    if len(lines) < 2 or not lines[0].lstrip().startswith(b"{") or lines[1].lstrip().startswith(b"{"):
        return False
    try:
        json.loads(lines[0])
    except (ValueError, RecursionError):
        return True
    return False


def _read_lines(content: Content, text_field: str, at: Position | None) -> Found:
    offset, number = at or (0, 0)
    loads = json.loads
    with content.open(offset) as stream:
        while line := stream.readline(RECORD_BYTES):
            number += 1
            offset += len(line)
            found: str | Bad
            if _is_cut_off(line):
                offset += _skip_line(stream)
                yield Bad(f"line {number}", too_long()), [offset, number]
                continue
            try:
                text = line.decode()
                if text.isspace():
                    continue
                record = loads(text.removeprefix(_BOM))  # concatenated files have a mark in the middle
                found = text_of(record, text_field, f"line {number}")
            except UnicodeDecodeError as error:
                reason = f"invalid UTF-8 at byte {error.start + 1} of the line; convert it to UTF-8"
                found = Bad(f"line {number}", reason)
            except (ValueError, RecursionError) as error:
                found = Bad(f"line {number}", f"not valid JSON ({_json_fault(error)}); fix or remove the line")
            yield found, [offset, number]


def _read_values(content: Content, text_field: str, at: Position | None, array: bool) -> Found:
    """Read the records of an array, or concatenated records, over any number of lines."""
    offset, line, index = at or (0, 1, 0)
    with content.open(offset) as stream:
        window = _Window(stream, shown(content.path), offset, line)
        if array and not at:
            window.take("[")
        while (char := window.next()) or array:
            if array and char == "]":
                window.take("]")
                if window.next():
                    raise window.error("something follows the end of the array")
                return
            if array and index:
                window.take(",")
                window.next()
            where = f"line {window.line}"
            record = window.value()
            index += 1
            yield text_of(record, text_field, where), [window.offset, window.line, index]


class _Window:
    """The text of a JSON file around the value that is being parsed.

    Attributes:
        offset, line: The place of the next character in the content.
    """

    def __init__(self, stream: IO[bytes], where: str, offset: int, line: int) -> None:
        self.offset, self.line = offset, line
        self._stream, self._where = stream, where
        # An invalid byte makes one record bad, not the file.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0

    def next(self) -> str:
        """Skip white space and return the next character; "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match
            self._move(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, char: str) -> None:
        """Skip white space and this character."""
        if self.next() != char:
            raise self.error(f'"{char}" is missing' if self._text else "it ends in the middle")
        self._move(self._at + 1)

    def value(self) -> Any:
        """Parse the value that begins here."""
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if not isinstance(error, json.JSONDecodeError) or not self._more():
                    raise self.error(_json_fault(error)) from error
            else:
                if end < len(self._text) or not self._more():  # a number may continue
                    self._move(end)
                    return value

    def error(self, reason: str) -> UserError:
        """Return an error that names the place."""
        return UserError(f"{self._where}, line {self.line}: not valid JSON ({reason}); fix the file or fetch it again")

    def _move(self, to: int) -> None:
        passed = self._text[self._at : to]
        self.offset += _utf8_bytes(passed)
        self.line += passed.count("\n")
        self._at = to

    def _more(self) -> bool:
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) > RECORD_BYTES:
            raise UserError(f"{self._where}, line {self.line}: a record is {too_long()}")
        block = self._stream.read(max(_BLOCK, len(self._text)))
        self._text += self._decode(block, final=not block)
        return bool(block)


def read_delimited(content: Content, text_field: str, at: Position | None) -> Found:
    """Read the rows of a table whose first line names its columns."""
    csv.field_size_limit(_CSV_FIELD)
    delimiter, names, begin = _header(content, text_field)
    column = names.index(text_field)
    with content.open((at or begin)[0]) as stream:
        lines = _Lines(stream, *(at or begin))
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            where = f"line {lines.number + 1}"
            found: str | Bad
            try:
                row = next(rows)
                if not row:
                    continue
                if lines.too_long:
                    found = Bad(where, too_long())
                elif len(row) != len(names):
                    found = Bad(where, f"{len(row)} fields, but there are {len(names)} columns; fix it")
                else:
                    found = checked_text(row[column], text_field, where)
            except StopIteration:
                return
            except csv.Error as error:
                found = Bad(where, f"not a row ({error}; quotes within a field must be doubled); fix it")
            lines.too_long = False
            yield found, [lines.offset, lines.number]


class _Lines:
    """Lines for `csv`, which reads as many as a row has."""

    def __init__(self, stream: IO[bytes], offset: int, number: int) -> None:
        self.offset, self.number = offset, number
        self.too_long = False
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(RECORD_BYTES)
        if not line:
            raise StopIteration
        self.number += 1
        self.offset += len(line)
        if _is_cut_off(line):
            self.offset += _skip_line(self._stream)
            self.too_long = True
        return line.decode("utf-8", "surrogateescape")


def _header(content: Content, text_field: str) -> tuple[str, list[str], Position]:
    """(the delimiter that makes `text_field` a column, the columns, the position after the header)."""
    where = shown(content.path)
    columns: list[str] = []
    for delimiter in "\t" if content.kind == "tsv" else ",;\t|":
        with content.open() as stream:
            lines = _Lines(stream, 0, 0)
            try:
                names = [name.strip() for name in next(csv.reader(lines, delimiter=delimiter, strict=True), [])]
            except csv.Error as error:
                raise UserError(f"{where}, line 1: does not name columns ({short_line(error)}); fix it") from error
        if text_field in names:
            return delimiter, names, [lines.offset, lines.number]
        columns = names if len(names) > len(columns) else columns
    raise UserError(f"{where}: {no_column(text_field, columns)}")


def _is_cut_off(line: bytes) -> bool:
    """Whether a line is longer than what was read of it."""
    return len(line) == RECORD_BYTES and not line.endswith(b"\n")


def _skip_line(stream: IO[bytes]) -> int:
    """Read to the end of the line; return the number of bytes."""
    size = 0
    while block := stream.readline(_BLOCK):
        size += len(block)
        if block.endswith(b"\n"):
            break
    return size


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"
