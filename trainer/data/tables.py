"""The records of Parquet and Arrow files. As in `readers`, a reader goes on from a position that it has given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.content import identity
from trainer.data.readers import Found
from trainer.data.records import Bad, Position, checked, listed, not_text, splits, under
from trainer.data.sources import shown
from trainer.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 24


def read_parquet(path: Path, text_field: str, at: Position | None) -> Found:
    """Rows of a Parquet file. A position counts the rows."""
    import pyarrow.parquet as pq

    (done,) = at or [0]
    row = 0
    with path.open("rb") as opened, _faults(path, "parquet"), pq.ParquetFile(opened, buffer_size=1 << 20) as file:
        column, _ = _column(file.schema_arrow, text_field, path)
        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            if row + facts.num_rows <= done:
                row += facts.num_rows
                continue
            size = _BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size)
            for batch in file.iter_batches(max(1, min(_BATCH_ROWS, size)), row_groups=[group], columns=[column]):
                rest = batch.slice(min(batch.num_rows, max(0, done - row)))
                number = row + batch.num_rows - rest.num_rows
                for found in _texts(rest, text_field, number):
                    number += 1
                    yield found, [number]
                row += batch.num_rows


def read_arrow(path: Path, text_field: str, at: Position | None) -> Found:
    """Rows of an Arrow file, or of an Arrow stream, which is what `datasets` writes.

    A position is the batch, rows of it, and rows before it. The file is mapped into memory, as a batch may be as large
    as the file.
    """
    import pyarrow as pa

    before = identity(path)
    first, done, row = at or [0, 0, 0]
    with path.open("rb") as opened, _faults(path, "arrow"), _mapped(opened.fileno()) as source:
        is_file = source.read(6) == b"ARROW1"
        open_ = pa.ipc.open_file if is_file else pa.ipc.open_stream
        source.seek(0)
        _, index = _column(open_(source).schema, text_field, path)
        source.seek(0)
        reader = open_(source, options=pa.ipc.IpcReadOptions(included_fields=[index]))
        if is_file:
            batches = (reader.get_batch(i) for i in range(first, reader.num_record_batches))
        else:
            for _ in range(first):
                reader.read_next_batch()
            batches = iter(reader)
        for number, batch in enumerate(batches, start=first):
            batch.validate()
            for begin in range(done, batch.num_rows, _BATCH_ROWS):
                if identity(path) != before:  # to read behind the end of a mapped file kills the process
                    raise UserError(f"{shown(path)}: has changed while it was read; start again when it is complete")
                for i, found in enumerate(_texts(batch.slice(begin, _BATCH_ROWS), text_field, row + begin), begin + 1):
                    yield found, [number, i, row]
            row += batch.num_rows
            done = 0


def _mapped(descriptor: int) -> pa.MemoryMappedFile:
    import pyarrow as pa

    return pa.memory_map(f"/dev/fd/{descriptor}")  # a path may have bytes that pyarrow refuses


@contextmanager
def _faults(path: Path, kind: str) -> Iterator[None]:
    """Tells what pyarrow finds wrong with a file in one line."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{shown(path)}: damaged or not a .{kind} file ({reason}); fetch it again") from error


def _column(schema: pa.Schema, text_field: str, path: Path) -> tuple[str, int]:
    """(what pyarrow reads a Parquet column by, the index of the top column in the schema)."""
    import pyarrow as pa

    for top, rest in splits(text_field):
        if top not in schema.names:
            continue
        index = schema.names.index(top)
        kind = schema.field(index).type
        names = [top]
        while rest and pa.types.is_struct(kind):
            inner = {field.name: field.type for field in kind}
            key, rest = next(((key, rest) for key, rest in splits(rest) if key in inner), ("", rest))
            if not key:
                break
            names.append(key)
            kind = inner[key]
        if rest and not _is_list(kind):
            break
        if not rest and not _is_text(kind):
            reason = not_text(text_field, f"list of {kind.value_type}" if _is_list(kind) else str(kind))
            raise UserError(f"{shown(path)}: {reason}")
        return ".".join(names), index
    nested = [
        f"{field.name}.{inner.name}" for field in schema if pa.types.is_struct(field.type) for inner in field.type
    ]
    raise UserError(
        f'{shown(path)}: no column "{text_field}"; set data.text_field to one of {listed(schema.names + nested)}'
    )


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(), pa.null()
    )  # fmt: skip


def _texts(batch: pa.RecordBatch, text_field: str, row: int) -> Iterator[str | Bad]:
    """The texts of a batch, whose first row is row + 1 of the file."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = batch.column(text_field if text_field in batch.schema.names else 0)
    rest = "" if text_field in batch.schema.names else text_field.removeprefix(batch.schema.names[0] + ".")
    while rest and pa.types.is_struct(array.type):
        inner = [field.name for field in array.type]
        key, rest = next((key, rest) for key, rest in splits(rest) if key in inner)
        array = pc.struct_field(array, inner.index(key))
    if rest:
        array.validate(full=True)
        for number, value in enumerate(array, start=row + 1):
            try:
                found = under(value.as_py(), rest)
            except KeyError:
                found = None
            yield checked(found, text_field, f"row {number}")
        return
    if pa.types.is_dictionary(array.type):
        array.validate(full=True)
        array = array.dictionary_decode()
    # As bytes, for pyarrow raises for a whole batch where one text is not UTF-8.
    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    array = array.cast(as_bytes.get(array.type, array.type))
    array.validate(full=True)
    for number, value in enumerate(array.to_pylist(), start=row + 1):
        yield checked(value, text_field, f"row {number}")
