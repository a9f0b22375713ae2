"""The text of one record: found by a path of keys, and fit to be tokenised."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from trainer.data.reading.sources import one_line

PIECE_CHARACTERS = 1 << 20
RECORD_BYTES = 1 << 27
"""The longest record that is read: a line of JSON, an element of an array, a row's text. It is in memory as a whole."""

Position = list[int]
"""Behind a record, for its file's reader; JSON can hold it."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Piece:
    """A part of a document, so that a long one is never in memory as a whole.

    Attributes:
        text: never empty; at most PIECE_CHARACTERS long.
        ends_document: it is the last of its document.
    """

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used.

    Attributes:
        where: in its file: "line 3", "row 3".
        reason: what is wrong, and how to mend it.
    """

    where: str
    reason: str


def text_of(record: Any, text_field: str, where: str) -> str | Bad:
    """The text of a record under `text_field`: a key, or keys and list indices joined by dots."""
    value = record.get(text_field) if isinstance(record, dict) else None
    if value is None:
        try:
            value = under(record, text_field)
        except KeyError:
            return Bad(
                where, f'no text under "{one_line(text_field)}" ({_keys(record)}); mend it or set data.text_field'
            )
    return checked(value, text_field, where)


def checked(value: Any, text_field: str, where: str) -> str | Bad:
    """The value under `text_field` if it is a text that can be tokenised."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return Bad(where, f"invalid UTF-8 at byte {error.start + 1} of the text; convert the text to UTF-8")
    if not isinstance(value, str):
        return Bad(where, not_text(text_field, _kind(value)))
    if not value.isascii() and (half := _SURROGATE.search(value)):
        # An undecodable byte was read as one of these.
        what = "invalid UTF-8" if "\udc80" <= half[0] <= "\udcff" else "half a surrogate pair, which is invalid UTF-8,"
        return Bad(where, f"{what} in its text; mend or remove it")
    if "\0" in value:
        return Bad(where, "a NUL character in its text; mend or remove it")
    return value


def not_text(text_field: str, kind: str) -> str:
    """Why there is no text under a key that is there."""
    name = one_line(text_field)
    if kind.startswith("list"):
        return (
            f'"{name}" is a {kind}, as of chat messages or sentences; make one text of each first, '
            f"or set data.text_field to a text in it ({name}.0)"
        )
    return f'no text under "{name}" (it is {kind}); mend it or set data.text_field'


def too_long() -> str:
    """Why a record is not read."""
    return f"longer than {RECORD_BYTES:,} bytes; split it, or give it as a file of plain text"


def cut(text: str, begin: int = 0) -> int:
    """Where the piece ends that begins at `begin`, of a text that goes on for more than PIECE_CHARACTERS from there.

    Byte-level BPEs put a space with the word behind it. So tokens do not change where a piece ends between something
    and a single space before a letter, and hardly so behind a line.
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
    """(first key, rest of the path), the longest key first, for keys may hold dots."""
    yield path, ""
    for dot in reversed([*re.finditer(r"\.", path)]):
        yield path[: dot.start()], path[dot.end() :]


def under(record: Any, path: str) -> Any:
    """Raises KeyError where there is nothing."""
    if not path:
        return record
    if isinstance(record, dict):
        for key, rest in splits(path):
            if key in record:
                return under(record[key], rest)
    elif isinstance(record, list):
        index, _, rest = path.partition(".")
        if index.isdecimal() and len(index) < 10 and int(index) < len(record):
            return under(record[int(index)], rest)
    raise KeyError(path)


def listed(names: Iterable[str]) -> str:
    """The first twenty names, for a message."""
    names = [one_line(name)[:80] for name in islice(names, 21)]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _keys(record: Any) -> str:
    if not isinstance(record, dict):
        return f"its keys: none, it is {_kind(record)}"
    nested = (f"{key}.{inner}" for key, value in record.items() if isinstance(value, dict) for inner in value)
    return f"its keys: {listed(chain(record, nested))}"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        kinds = sorted({type(item).__name__ for item in value})
        return f"list of {' and '.join(kinds)}" if kinds else "list"
    return type(value).__name__
