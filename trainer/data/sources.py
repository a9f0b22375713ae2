"""Documents, one string each, of a local copy, the Hugging Face hub or Python's own standard library.

Whatever is wrong with the input is a `UserError` of one line that names the file and the line, row or byte.
"""

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.errors import UserError

PYTHON_STDLIB = "python-stdlib"
HUB_PREFIX = "hub:"
PLAIN = (".txt", ".py", ".md")
KINDS = (*PLAIN, ".jsonl", ".jsonl.zst", ".parquet")
ALLOWED = f"allowed are {', '.join(KINDS)}"


def source_files(source: str) -> list[Path]:
    """The local files that `source` names, sorted; none for the hub.

    Raises UserError: nothing matched, a file of no known kind, an empty file.
    """
    if source.startswith(HUB_PREFIX):
        return []
    if source == PYTHON_STDLIB:
        return _stdlib_files()
    path = Path(source).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.name.endswith(KINDS)]
    elif path.is_file():
        files = [path]
    else:
        files = [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = sorted(file for file in files if file.is_file())
    if not files:
        raise UserError(
            f"data.source {source}: no file found; "
            f'give a file, folder, glob ({ALLOWED}), "hub:NAME" or "{PYTHON_STDLIB}"'
        )
    for file in files:
        if not file.name.endswith(KINDS):
            raise UserError(f"{file}: unknown kind of file; {ALLOWED}")
        if file.stat().st_size == 0:
            raise _empty(file)
    return files


def read_documents(source: str, text_field: str) -> Iterator[str]:
    """Yields the documents of `source` in an order that is always the same: files sorted by name, lines as they come.

    source: "python-stdlib"; "hub:NAME" or "hub:NAME:CONFIG" (its split "train", streamed); or a file, folder or glob of
    plain text (a document a file), .jsonl, .jsonl.zst or .parquet (a document a line or row, in `text_field`).
    Documents without a character are left out.

    Raises UserError: as `source_files`; invalid UTF-8, a truncated .zst, a record without text, a hub out of reach.
    """
    if source.startswith(HUB_PREFIX):
        yield from filter(None, _read_hub(source.removeprefix(HUB_PREFIX), text_field))
        return
    if source == PYTHON_STDLIB:
        yield from filter(None, _read_stdlib())
        return
    for path in source_files(source):
        try:
            documents = 0
            for text in filter(None, _read_file(path, text_field)):
                documents += 1
                yield text
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        if documents == 0:
            raise _empty(path)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - {"site-packages", "dist-packages", "__pycache__"}
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(f"data.source {PYTHON_STDLIB}: no .py file under {root}; name another source")
    return sorted(files)


def _read_stdlib() -> Iterator[str]:
    for path in _stdlib_files():
        try:
            yield path.read_bytes().decode()
        except UnicodeDecodeError:  # the library tests its own reading of other encodings
            continue


def _read_file(path: Path, text_field: str) -> Iterator[str]:
    if path.name.endswith(PLAIN):
        yield decode(path.read_bytes(), f"{path}", first_line=1)
    elif path.name.endswith(".parquet"):
        yield from _read_parquet(path, text_field)
    elif path.name.endswith(".zst"):
        yield from _read_jsonl(path, _lines(_decompress(path)), text_field)
    else:
        with path.open("rb") as lines:
            yield from _read_jsonl(path, lines, text_field)


def _read_jsonl(path: Path, lines: Iterator[bytes], text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        text = decode(line, f"{path}", first_line=number)
        if text.isspace() or not text:
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}); mend or remove the line") from error
        yield _text_of(record, text_field, f"{path}, line {number}")


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(f'{path}: no column "{text_field}"; set data.text_field to one of {", ".join(names)}')
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    yield _text_of({text_field: value.as_py()}, text_field, f"{path}, row {row}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {row}: invalid UTF-8 at byte {error.start}; convert the text to UTF-8") from error
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: damaged or not a parquet file ({reason}); fetch it again") from error


def _read_hub(name: str, text_field: str) -> Iterator[str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.utils import httpx  # the HTTP client that this version of the hub's library uses

    name, _, config = name.partition(":")
    try:
        records = load_dataset(name, config or None, split="train", streaming=True)
        for row, record in enumerate(records, start=1):
            yield _text_of(record, text_field, f"{HUB_PREFIX}{name}, row {row}")
    except DatasetNotFoundError as error:
        raise UserError(f"data.source {HUB_PREFIX}{name}: the hub has no such data set, or it is private") from error
    except (OSError, httpx.HTTPError) as error:
        raise UserError(
            f"data.source {HUB_PREFIX}{name}: the Hugging Face hub cannot be reached ({type(error).__name__}); "
            "try again, or give the path of a local copy"
        ) from error
    except ValueError as error:  # an unknown config or split: the message of `datasets` lists those there are
        raise UserError(f"data.source {HUB_PREFIX}{name}: {' '.join(str(error).split())}") from error


def _decompress(path: Path) -> Iterator[bytes]:
    """The content of a .zst of one or more frames. (zstandard's own stream_reader ends a truncated one in silence.)"""
    import zstandard

    frame = None
    with path.open("rb") as file:
        while data := file.read(1 << 17):
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise UserError(f"{path}: damaged or not a .zst file ({error}); fetch it again") from error
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise UserError(f"{path}: truncated: the .zst ends in the middle of a frame; fetch it again")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []
    for chunk in chunks:
        end_of_line, *following = chunk.split(b"\n")
        begun.append(end_of_line)
        for piece in following:
            yield b"".join(begun)
            begun = [piece]
    yield b"".join(begun)


def decode(data: bytes, where: str, first_line: int) -> str:
    """Text of UTF-8. Raises UserError, which names the line, where it is not."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise UserError(
            f"{where}, line {line}: invalid UTF-8 at byte {column} of the line; convert the file to UTF-8"
        ) from error


def _text_of(record: Any, text_field: str, where: str) -> str:
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(record) if isinstance(record, dict) else f"none, it is a {type(record).__name__}"
        raise UserError(f'{where}: no text under "{text_field}" (its keys: {keys}); mend it or set data.text_field')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape what UTF-8 cannot hold
        raise UserError(f"{where}: invalid UTF-8: half a surrogate pair in its text; mend or remove it") from error
    return text


def _empty(path: Path) -> UserError:
    return UserError(f"{path}: is empty, it holds no document; remove it or leave it out of data.source")
