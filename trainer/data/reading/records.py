"""The text of one record: found under a key or a path of keys, and checked to be fit for tokenising."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from trainer.common.errors import one_line, short_line

PIECE_CHARACTERS = 1 << 20
RECORD_BYTES = 1 << 27
"""The longest record that is read (a JSON line, an element of an array, a row's text), as it must fit into memory."""

Position = list[int]
"""The place after a record, for its file's reader; JSON can hold it."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Piece:
    """A part of a document, so that a long one never has to fit into memory.

    Attributes:
        text: At least one character, at most `PIECE_CHARACTERS`.
        ends_document: Whether this is the last piece of its document.
    """

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used.

    Attributes:
        where: Its place in the file, as "line 3" or "row 3".
        reason: What is wrong, and how to fix it.
    """

    where: str
    reason: str


Found = Iterator[tuple[str | Piece | Bad, Position]]
"""What a reader yields: a text, a piece of one or a bad record, with the position after it.

A reader can resume from any position that it has yielded.
"""


def text_of(record: Any, text_field: str, where: str) -> str | Bad:
    """Return the text of a record under `text_field`: a key, or keys and list indices joined by dots."""
    value = record.get(text_field) if isinstance(record, dict) else None
    if value is None:
        try:
            value = value_under(record, text_field)
        except KeyError:
            name = short_line(text_field)
            return Bad(where, f'no text under "{name}" ({_keys(record)}); fix it or set data.text_field')
    return checked_text(value, text_field, where)


def checked_text(value: Any, text_field: str, where: str) -> str | Bad:
    """Return the value found under `text_field` if it is a text that can be tokenised."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return Bad(where, f"invalid UTF-8 at byte {error.start + 1} of the text; convert the text to UTF-8")
    if not isinstance(value, str):
        return Bad(where, not_text(text_field, _type_of(value)))
    if not value.isascii() and (half := _SURROGATE.search(value)):
        # The readers decode an invalid byte as one of "\udc80" ... "\udcff".
        what = "invalid UTF-8" if "\udc80" <= half[0] <= "\udcff" else "half a surrogate pair, which is invalid UTF-8,"
        return Bad(where, f"{what} in its text; fix or remove it")
    if "\0" in value:
        return Bad(where, "a NUL character in its text; fix or remove it")
    return value


def not_text(text_field: str, kind: str) -> str:
    """Return why the value under `text_field`, of type `kind`, is not a text."""
    name = short_line(text_field)
    if kind.startswith("list"):
        return (
            f'"{name}" is a {kind}, such as chat messages or sentences; join them into one text first, '
            f"or set data.text_field to one of them ({name}.0)"
        )
    return f'no text under "{name}" (it is {kind}); fix it or set data.text_field'


def too_long() -> str:
    """Return why a record is too long to be read."""
    return f"longer than {RECORD_BYTES:,} bytes; split it, or provide it as a file of plain text"


def cut(text: str, begin: int = 0) -> int:
    """Return where the piece that starts at `begin` ends, in a text that is longer than `PIECE_CHARACTERS` from there.

    Byte-level BPEs join a space with the word after it. So tokens do not change if a piece ends before a single space
    that precedes a letter, and hardly change if it ends after a line.
    """
    limit = begin + PIECE_CHARACTERS
    lowest = limit - PIECE_CHARACTERS // 16
    at = limit
    while (at := text.rfind(" ", lowest, at)) > lowest:
        if text[at + 1].isalpha() and not text[at - 1].isspace():
            return at
    at = limit
    while (at := text.rfind("\n", lowest, at)) > lowest:
        if not text[at + 1].isspace():
            return at + 1
    return limit


def splits(path: str) -> Iterator[tuple[str, str]]:
    """Yield (first key, rest of the path), the longest key first, as keys may contain dots."""
    yield path, ""
    for dot in reversed([*re.finditer(r"\.", path)]):
        yield path[: dot.start()], path[dot.end() :]


def value_under(record: Any, path: str) -> Any:
    """Return what is under a path of keys.

    Raises:
        KeyError: There is nothing.
    """
    if not path:
        return record
    if isinstance(record, dict):
        for key, rest in splits(path):
            if key in record:
                return value_under(record[key], rest)
    elif isinstance(record, list):
        index, _, rest = path.partition(".")
        if index.isdecimal() and len(index) < 10 and int(index) < len(record):
            return value_under(record[int(index)], rest)
    raise KeyError(path)


def no_column(text_field: str, columns: Iterable[str]) -> str:
    """Return what to say of a table without the column `text_field`."""
    return (
        f'no column "{short_line(text_field)}"; set data.text_field to one of {_listed(columns)}, or '
        "remove the file from data.source"
    )


def _listed(names: Iterable[str]) -> str:
    """The first twenty names."""
    names = [one_line(name, 80) for name in islice(names, 21)]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _keys(record: Any) -> str:
    if not isinstance(record, dict):
        return f"it has no keys, it is {_type_of(record)}"
    nested = (f"{key}.{inner}" for key, value in record.items() if isinstance(value, dict) for inner in value)
    return f"its keys: {_listed(chain(record, nested))}"


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        kinds = sorted({type(item).__name__ for item in value})
        return f"list of {' and '.join(kinds)}" if kinds else "list"
    return type(value).__name__
