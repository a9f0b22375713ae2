"""Reading a source in the tests of its documents."""

import csv
from pathlib import Path

import pytest

from trainer.common.errors import UserError
from trainer.data.reading.documents import Documents, read_documents

LINE = b'{"text": "a document"}\n'
BOM = b"\xef\xbb\xbf"
MANY = LINE * 60  # one bad record among them is few


def read(source, text_field="text") -> list[str]:
    return list(read_documents(str(source), text_field))


def message_of(source, text_field="text", **options) -> str:
    with pytest.raises(UserError) as error:
        list(Documents(str(source), text_field, **options))
    assert str(error.value).isprintable()
    return str(error.value)


def bad_records_of(source, text_field="text", good=60) -> list[str]:
    """The first bad records of a source of 60 good ones, without the path."""
    read = Documents(str(source), text_field)
    assert sum(piece.ends_document for piece in read) == good
    assert read.progress.records == good + read.progress.bad_records
    return [line.removeprefix(f"{source}, ") for line in read.progress.first_bad]


def write_delimited(path: Path, texts: list[str], delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(texts))
