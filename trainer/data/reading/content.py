"""The content of a text file as UTF-8: unpacked, converted where a byte-order mark says so, the mark dropped.

What a file holds is recognised by its first bytes, and its ending is believed only where these say nothing.
"""

import bz2
import codecs
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from trainer.common.errors import UserError
from trainer.data.reading.sources import COMPRESSED, kind_of, one_line, shown

_BLOCK = 1 << 16
_PACKED_BLOCK = 1 << 12  # unpacked at once: some codecs make 32,000 bytes of one, so that little at a time fills memory

_CODECS = (
    (b"\x1f\x8b", ".gz"),
    (b"BZh", ".bz2"),
    (b"\xfd7zXZ\0", ".xz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
)
_MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TABLES = ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow"))
_NOT_TEXT = (
    (0, b"PK\x03\x04", "a .zip archive or an office document; unpack it, or save it as text"),
    (0, b"PK\x05\x06", "an empty .zip archive; remove it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a .7z archive; unpack it"),
    (0, b"Rar!\x1a\x07", "a .rar archive; unpack it"),
    (257, b"ustar", "a .tar archive; unpack it"),
    (0, b"\x04\x22\x4d\x18", "packed by lz4; unpack it, or pack it by zstd"),
    (0, b"%PDF-", "a PDF; save its text"),
    (0, b"\x00\x05\x16\x07", "a file that macOS keeps beside another one; remove it"),
    (0, b"version https://git-lfs.github.com/spec/", 'a pointer of Git LFS; fetch its content by "git lfs pull"'),
)


class Content:
    """The content of one text file, which can be read from any of its bytes on.

    Args:
        keep_mark: take a byte-order mark for text, and the file for UTF-8.

    Attributes:
        path: the file.
        kind: as `kind_of` gives it, by the first bytes where they tell.

    Raises:
        OSError: the file cannot be read.
        UserError: it is of a kind that is not read, though its ending says otherwise.
    """

    def __init__(self, path: Path, keep_mark: bool = False) -> None:
        self.path = path
        self.kind = kind_of(path.name) or "plain"
        self._codec = ""
        self._encoding = ""
        with path.open("rb") as file:
            head = file.read(512)
        self._codec = next((codec for magic, codec in _CODECS if head.startswith(magic)), "")
        if self._codec:
            with self.open() as unpacked:
                head = unpacked.read(512)
            if any(head.startswith(magic) for magic, _ in _CODECS):
                raise UserError(f"{shown(path)}: is packed twice; unpack it once")
        elif path.name.lower().endswith(COMPRESSED) and not _looks_like_text(head):
            raise UserError(f"{shown(path)}: damaged or not a {path.suffix.lower()} file; fetch it again")
        if not keep_mark:
            self._encoding = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "")
        for at, magic, what in _NOT_TEXT:
            if head[at:].startswith(magic):
                raise UserError(f"{shown(path)}: is {what}")
        table = next((kind for magic, kind in _TABLES if head.startswith(magic)), None)
        if table and self._codec:
            raise UserError(f"{shown(path)}: is a packed .{table} file; unpack it")
        self.kind = table or self.kind

    def open(self, offset: int = 0) -> IO[bytes]:
        """The content from its byte `offset` on (of the content as it comes out of here)."""
        file = self.path.open("rb")
        if self._encoding == "utf-8":
            offset += len(codecs.BOM_UTF8)
        if not self._codec and self._encoding in ("", "utf-8"):
            file.seek(offset)
            return file
        chunks = iter(lambda: file.read(_PACKED_BLOCK if self._codec else _BLOCK), b"")
        if self._codec:
            chunks = _unpack(chunks, self._codec, shown(self.path))
        if self._encoding not in ("", "utf-8"):
            chunks = _to_utf8(chunks, self._encoding, shown(self.path))
        stream = io.BufferedReader(_Stream(file, chunks), 1 << 18)
        while offset and (skipped := stream.read(min(offset, _BLOCK))):
            offset -= len(skipped)
        return stream


class _Stream(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, file: IO[bytes], chunks: Iterator[bytes]) -> None:
        self._file = file
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _looks_like_text(head: bytes) -> bool:
    if any(head.startswith(mark) for mark, _ in _MARKS):
        return True
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(head) and b"\0" not in head


def _decompressor(codec: str) -> Callable[[], Any]:
    import zstandard

    return {
        ".gz": lambda: zlib.decompressobj(wbits=31),
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lzma.LZMADecompressor,
        ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    }[codec]


def _unpack(chunks: Iterator[bytes], codec: str, where: str) -> Iterator[bytes]:
    """The content of one or more members (of gzip, xz), streams (bzip2) or frames (zstd) behind each other.

    The libraries' own file objects end in silence at a damaged second member (bz2, lzma) or a truncated frame (zstd).
    """
    import zstandard

    new = _decompressor(codec)
    member = None
    for chunk in chunks:
        while chunk:
            if member is None:
                chunk = chunk.lstrip(b"\0")  # tools pad .gz and .xz with them
                if not chunk:
                    break
                member = new()
            try:
                yield member.decompress(chunk)
            except (
                zlib.error,
                lzma.LZMAError,
                zstandard.ZstdError,
                OSError,
                ValueError,
                EOFError,
                MemoryError,
            ) as error:
                raise UserError(
                    f"{where}: damaged or not a {codec} file ({one_line(error)}); fetch it again"
                ) from error
            chunk = member.unused_data if member.eof else b""
            member = None if member.eof else member
    if member is not None:
        raise UserError(f"{where}: truncated: it ends in the middle of the {codec} data; fetch it again")


def _to_utf8(chunks: Iterator[bytes], encoding: str, where: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")  # half a pair is one bad record, found later
    try:
        for chunk in chunks:
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not valid {encoding.upper()}, though it begins with its byte-order mark; convert it to UTF-8"
        ) from error


def decode(data: bytes, where: str, first_line: int) -> str:
    """Text of UTF-8, without its byte-order mark.

    Raises:
        UserError: it is not; names the line.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line, reason = invalid(error, data, first_line)
        raise UserError(f"{where}, {line}: {reason}; convert the file to UTF-8") from error


def invalid(error: UnicodeDecodeError, data: bytes, first_line: int) -> tuple[str, str]:
    """(the line of `data`, what is wrong in it)."""
    line = first_line + data.count(b"\n", 0, error.start)
    column = error.start - data.rfind(b"\n", 0, error.start)
    return f"line {line}", f"invalid UTF-8 at byte {column} of the line"


def identity(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written to or replaced."""
    facts = os.stat(path)
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
