"""The content of a text file as UTF-8: decompressed, converted as its byte-order mark says, the mark dropped.

A file's first bytes determine what it holds; its ending decides only if they are not conclusive.
"""

import bz2
import codecs
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from trainer.common.errors import UserError, short_line
from trainer.common.safe_read import open_file
from trainer.data.reading.sources import COMPRESSED, kind_of, shown

_BLOCK = 1 << 16
_COMPRESSED_BLOCK = 1 << 12  # decompressed at once; it is small because some codecs make 32,000 bytes of one

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
    (0, b"\x04\x22\x4d\x18", "compressed by lz4; decompress it, or compress it with zstd"),
    (0, b"%PDF-", "a PDF; save its text"),
    (0, b"\x00\x05\x16\x07", "a file in which macOS keeps another one's attributes; remove it"),
    (0, b"version https://git-lfs.github.com/spec/", 'a pointer of Git LFS; fetch its content with "git lfs pull"'),
)


class Content:
    """The content of one text file, readable from any byte.

    Args:
        keep_mark: Whether a byte-order mark is text, and the file is UTF-8 in any case.

    Attributes:
        kind: What `kind_of` returns, corrected by the first bytes.

    Raises:
        OSError: The file cannot be read.
        UserError: The file is of a type that cannot be read, in spite of its ending.
    """

    def __init__(self, path: Path, keep_mark: bool = False) -> None:
        self.path = path
        self.kind = kind_of(path.name) or "plain"
        self._codec = ""
        self._encoding = ""
        with open_file(path) as file:
            head = file.read(512)
        self._codec = next((codec for magic, codec in _CODECS if head.startswith(magic)), "")
        if self._codec:
            with self.open() as decompressed:
                head = decompressed.read(512)
            if any(head.startswith(magic) for magic, _ in _CODECS):
                raise UserError(f"{shown(path)}: is compressed twice; decompress it once")
        elif path.name.lower().endswith(COMPRESSED) and not _looks_like_text(head):
            raise UserError(f"{shown(path)}: damaged, or not a {path.suffix.lower()} file; fetch it again")
        if not keep_mark:
            self._encoding = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "")
        for at, magic, what in _NOT_TEXT:
            if head[at:].startswith(magic):
                raise UserError(f"{shown(path)}: is {what}")
        table = next((kind for magic, kind in _TABLES if head.startswith(magic)), None)
        if table and self._codec:
            raise UserError(f"{shown(path)}: is a compressed .{table} file; decompress it")
        self.kind = table or self.kind

    def open(self, offset: int = 0) -> IO[bytes]:
        """Open the content at byte `offset`, counted in UTF-8 after decompression."""
        file = open_file(self.path)
        if self._encoding == "utf-8":
            offset += len(codecs.BOM_UTF8)
        if not self._codec and self._encoding in ("", "utf-8"):
            file.seek(offset)
            return file
        chunks = iter(lambda: file.read(_COMPRESSED_BLOCK if self._codec else _BLOCK), b"")
        if self._codec:
            chunks = _decompress(chunks, self._codec, shown(self.path))
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


def _decompress(chunks: Iterator[bytes], codec: str, where: str) -> Iterator[bytes]:
    """Yield the content of one or more concatenated members (gzip, xz), streams (bzip2) or frames (zstd).

    The libraries' own file objects end silently at a damaged second member (bz2, lzma) or a truncated frame (zstd).
    """
    import zstandard

    errors = (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, ValueError, EOFError, MemoryError)
    decompressors: dict[str, Callable[[], Any]] = {
        ".gz": lambda: zlib.decompressobj(wbits=31),
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lzma.LZMADecompressor,
        ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    }
    member = None
    for chunk in chunks:
        while chunk:
            if member is None:
                chunk = chunk.lstrip(b"\0")  # tools pad .gz and .xz with them
                if not chunk:
                    break
                member = decompressors[codec]()
            try:
                yield member.decompress(chunk)
            except errors as error:
                raise UserError(
                    f"{where}: damaged, or not a {codec} file ({short_line(error)}); fetch it again"
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
            f"{where}: not valid {encoding.upper()}, although it begins with its byte-order mark; convert it to UTF-8"
        ) from error
