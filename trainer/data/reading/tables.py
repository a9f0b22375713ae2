"""The records of Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.common.errors import UserError, short_line
from trainer.common.safe_read import open_file
from trainer.data.reading.records import (
    RECORD_BYTES,
    Bad,
    Found,
    Position,
    checked_text,
    no_column,
    not_text,
    splits,
    too_long,
    value_under,
)
from trainer.data.reading.sources import file_stamp, refuse_change, shown

_BATCH_ROWS = 32
_BATCH_BYTES = 1 << 24
_BINARY = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
"""The types of texts, each with the type of the same bytes."""


def read_parquet(path: Path, text_field: str, at: Position | None) -> Found:
    """Read the rows of a Parquet file. A position counts rows."""
    (done,) = at or [0]
    row = 0
    with (
        open_file(path) as opened,
        _reported_errors(path, "parquet"),
        pq.ParquetFile(opened, buffer_size=1 << 20) as file,
    ):
        _, rest, read = _column(file.schema_arrow, text_field, path)
        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            if row + facts.num_rows <= done:
                row += facts.num_rows
                continue
            size = _BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size)
            for batch in file.iter_batches(max(1, min(_BATCH_ROWS, size)), row_groups=[group], columns=[read]):
                begin = min(batch.num_rows, max(0, done - row))
                texts = _texts(batch.column(0).slice(begin), rest, text_field, row + begin)
                for number, found in enumerate(texts, start=row + begin + 1):
                    yield found, [number]
                row += batch.num_rows


def read_arrow(path: Path, text_field: str, at: Position | None) -> Found:
    """Read the rows of an Arrow file, or of an Arrow stream, which is what `datasets` writes.

    A position is the batch, rows in it, and rows before it. The file is mapped into memory, as a batch may be as large
    as the file.
    """
    before = file_stamp(path)
    first, done, row = at or [0, 0, 0]
    # We open the file, because pyarrow refuses paths that are not UTF-8.
    with (
        open_file(path) as opened,
        _reported_errors(path, "arrow"),
        pa.memory_map(f"/dev/fd/{opened.fileno()}") as source,
    ):
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source)
        index, rest, _ = _column(reader.schema, text_field, path)
        if is_file:
            batches: Iterator[Any] = (reader.get_batch(i) for i in range(first, reader.num_record_batches))
        else:
            batches = islice(reader, first, None)
        for number, batch in enumerate(batches, start=first):
            array = batch.column(index)
            array.validate()
            for begin in range(done, len(array), _BATCH_ROWS):
                refuse_change(path, before)  # reading past the end of a mapped file kills the process
                texts = _texts(array.slice(begin, _BATCH_ROWS), rest, text_field, row + begin)
                for done_in_batch, found in enumerate(texts, start=begin + 1):
                    yield found, [number, done_in_batch, row]
            row += len(array)
            done = 0


@contextmanager
def _reported_errors(path: Path, kind: str) -> Iterator[None]:
    """Report what pyarrow finds wrong with a file in one line."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = short_line(error)
        raise UserError(f"{shown(path)}: damaged, or not a .{kind} file ({reason}); fetch it again") from error


def _column(schema: pa.Schema, text_field: str, path: Path) -> tuple[int, str, str]:
    """Find the column of the texts, or raise a UserError.

    Returns:
        The column's number; the path to the text within the column, "" if the column holds texts; and what pyarrow has
        to read of a Parquet file, which may be one field of a struct.
    """
    top, rest = next(((top, rest) for top, rest in splits(text_field) if top in schema.names), ("", text_field))
    if top:
        index = schema.names.index(top)
        kind, left = _inner(schema.field(index).type, rest)
        if not left and not _is_text(kind):
            reason = not_text(text_field, f"list of {kind.value_type}" if _is_list(kind) else str(kind))
            raise UserError(f"{shown(path)}: {reason}")
        if not left or _is_list(kind):
            return index, rest, top if left else text_field
    structs = [field for field in schema if pa.types.is_struct(field.type)]
    nested = [f"{field.name}.{inner.name}" for field in structs for inner in field.type]
    raise UserError(f"{shown(path)}: {no_column(text_field, schema.names + nested)}")


def _inner(kind: pa.DataType, path: str) -> tuple[pa.DataType, str]:
    """(the type under a path through structs, what is left of the path)."""
    if path and pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        for key, rest in splits(path):
            if key in fields:
                return _inner(fields[key], rest)
    return kind, path


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in {*_BINARY, *_BINARY.values(), pa.null()}


def _texts(array: pa.Array, rest: str, text_field: str, row: int) -> Iterator[str | Bad]:
    """Yield the texts of a part of a column that begins after row `row` of the file."""
    while rest and pa.types.is_struct(array.type):
        inner = [field.name for field in array.type]
        key, rest = next((key, rest) for key, rest in splits(rest) if key in inner)
        array = pc.struct_field(array, inner.index(key))
    if rest or pa.types.is_dictionary(array.type):
        array.validate(full=True)
    if rest:
        for number, value in enumerate(array, start=row + 1):
            try:
                found = value_under(value.as_py(), rest)
            except KeyError:
                found = None
            yield checked_text(found, text_field, f"row {number}")
        return
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    # As bytes, because pyarrow raises an error for the whole array if one text is not UTF-8.
    array = array.cast(_BINARY.get(array.type, array.type))
    array.validate(full=True)
    for number, value in enumerate(array, start=row + 1):
        where = f"row {number}"
        if value.is_valid and value.as_buffer().size > RECORD_BYTES:
            yield Bad(where, too_long())
        else:
            yield checked_text(value.as_py(), text_field, where)
