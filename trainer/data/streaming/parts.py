"""A source in parts of equally many sequences, each made by one process when it is first needed.

Part k holds the rows k N ... (k+1) N - 1 that preparing the whole source would give. Beside its rows it keeps where the
next part begins: the position in the source, and the tokens that have been read beyond its end.
"""

from __future__ import annotations

import threading
import weakref
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from trainer.common.errors import Unavailable, UserError, is_of_content
from trainer.common.format import duration
from trainer.common.safe_read import open_file, read_bytes
from trainer.common.strict_json import dumps, loads
from trainer.data.cache import Conduct, make_once
from trainer.data.encoding import Encoder
from trainer.data.packing import SplitRows, SplitWriter, token_type
from trainer.data.reading.documents import Documents
from trainer.data.reading.sources import find_files
from trainer.data.settings import SourceSettings, limited
from trainer.data.source_builder import BATCH_CHARACTERS, load_fitting_tokenizer
from trainer.data.splitting import Passage, Splitter
from trainer.data.status import Report
from trainer.data.tokenizer import end_of_document_id

ROWS_FILE, NEXT_FILE, FACTS_FILE = "train.arrow", "next.npz", "facts.json"


_NOTHING: NDArray[np.uint32] = np.empty(0, np.uint32)

_STOP_SECONDS = 5.0
"""How long the end of a process waits for a part in the making, which may itself wait for its source."""


class _Stopped(Exception):
    """The process ends."""


@dataclass(frozen=True)
class _Reader:
    """An open source.

    Attributes:
        part: The part that begins here.
        tokens: What comes next; it moves on `documents` and `splitter`.
        rest_T: Tokens of this part that have been read.
    """

    part: int
    documents: Documents
    splitter: Splitter
    tokens: Iterator[NDArray[np.uint32]]
    rest_T: NDArray[np.uint32]


class SourceParts:
    """The parts of a source. Several processes and threads may ask for the same ones.

    Args:
        settings: The source, whose validation and test text is left out; its tokenizer must exist.
        size: The number of rows of a part.
        ahead: Whether `reach_in_background` does anything: one process on a machine is enough.

    Attributes:
        total: The number of rows of the whole source; None until its end has been reached.
        close: Stops what `reach_in_background` has begun, and removes it; called when the process ends.
    """

    def __init__(self, settings: SourceSettings, size: int, conduct: Conduct, ahead: bool = True):
        self.settings, self.size, self._conduct, self._ahead = settings, size, conduct, ahead
        self.folder = settings.folder.with_name(f"{settings.folder.name}-parts-of-{size}")
        self.total: int | None = None
        self._rows: list[SplitRows] = []
        self._lock = threading.Lock()
        self._reader: _Reader | None = None  # kept open, because going back to a place may mean to read up to it
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self.close = weakref.finalize(self, _stop, self._stopped, self._threads)

    def reach(self, number: int) -> None:
        """Make the parts up to this one, as far as the source has so many.

        Raises:
            UserError: The source cannot be read or has changed; see `Documents` and `make_once`.
            Unavailable: Another thread or process has not made a part within `Conduct.patience`; see `make_once`.
        """
        if number < len(self._rows):  # while another thread may be making the next one
            return
        if not self._lock.acquire(timeout=self._conduct.patience):
            raise Unavailable(
                f"data.source {self.settings.source}: part {number} is not read after "
                f"{duration(self._conduct.patience)} (parallel.start_timeout_seconds); lower data.stream_window, or "
                "see whether the source still answers"
            )
        try:
            while len(self._rows) <= number and self.total is None:
                place = len(self._rows)
                path = make_once(self.folder, _name(place), partial(self._fill, place), self._conduct)
                last = _is_last(path)
                rows = _rows(path / ROWS_FILE, self.settings.vocab, self.size, last)
                if last:  # known before others may see the part, because it is shorter
                    self.total = place * self.size + len(rows)
                self._rows.append(rows)
        finally:
            self._lock.release()

    def reach_in_background(self, number: int) -> None:
        """Begin to make a part. If that fails, `reach` tries it again, and raises the error if it fails again."""

        def work() -> None:
            with suppress(Exception):
                self.reach(number)

        if self._ahead:
            self._threads[:] = [thread for thread in self._threads if thread.is_alive()]
            self._threads.append(threading.Thread(target=work, name="next part", daemon=True))
            self._threads[-1].start()

    def rows(self, number: int) -> SplitRows:
        """Return the rows of a part that has been reached."""
        return self._rows[number]

    @property
    def checksum(self) -> int:
        """A checksum of the tokens of the first part, which must have been reached.

        The settings of a data set on the hub have its name, but do not say which version of it has been read.
        """
        checksum: int = _fact(self.folder / _name(0), "checksum")
        return checksum

    def _fill(self, number: int, folder: Path, report: Report) -> None:
        s, end = self.settings, self.size * self.settings.seq_len
        reader = self._reader if self._reader and self._reader.part == number else self._open(number)
        self._reader = None
        progress = reader.documents.progress
        bad_before = progress.bad_records
        if number == 0 and (skipped := find_files(s.source).skipped_line(s.source)):
            report.note(skipped)
        wanted = end + s.seq_len + 1  # one row more, to see whether this is the last part
        if s.max_tokens is not None:
            wanted = min(wanted, s.max_tokens - number * end)
        writer = SplitWriter(folder / ROWS_FILE, s.seq_len, s.vocab)
        rest, count, checksum = [_NOTHING], 0, 0
        report.begin(f"tokenising {s.short_name}, part {number}", "tokens")
        try:
            for tokens_T in chain([reader.rest_T], reader.tokens):
                if self._stopped.is_set():
                    raise _Stopped
                own_T = tokens_T[: max(0, min(end + 1, wanted) - count)]
                checksum = zlib.crc32(own_T.tobytes(), checksum)
                writer.add(own_T, 0)
                rest.append(tokens_T[max(0, end - count) :].copy())  # a view would keep all of them
                count += len(tokens_T)
                report.at(count, min(count / wanted, 1.0))
                if count >= wanted:
                    break
            writer.close()
        finally:
            writer.abandon()
        report.end(count)
        if progress.bad_records > bad_before:
            report.note(progress.skipped_line())
        there = max(0, min(count, wanted) - 1) // s.seq_len
        if there == 0:
            raise UserError(
                f"data.source {s.source}: its training text is shorter than one sequence, {min(count, wanted)} of "
                f"{s.seq_len + 1} tokens; provide more text or a shorter model.seq_len"
            )
        rest_T = np.concatenate(rest)
        position = dumps({"reader": reader.documents.state_dict(), "documents": reader.splitter.documents})
        np.savez(folder / NEXT_FILE, position=np.array(position), tokens=rest_T.astype(token_type(s.vocab)))
        facts = {"last": there <= self.size, "checksum": checksum}
        (folder / FACTS_FILE).write_text(dumps(facts) + "\n")
        self._reader = replace(reader, part=number + 1, rest_T=rest_T)

    def _open(self, number: int) -> _Reader:
        """Open the source where a part begins."""
        s = self.settings
        position: dict[str, Any] = {"reader": None, "documents": 0}
        rest_T = _NOTHING
        if number:
            position, rest_T = self._end_of(number - 1)
        documents = Documents(s.source, s.text_field, s.max_bad_share, position["reader"])
        splitter = Splitter(s.split, None, position["documents"])
        return _Reader(number, documents, splitter, _tokens(s, documents, splitter), rest_T)

    def _end_of(self, number: int) -> tuple[dict[str, Any], NDArray[np.uint32]]:
        """Return where the part after this one begins in the source, and the tokens that were read beyond its end."""
        path = self.folder / _name(number) / NEXT_FILE
        try:
            with open_file(path) as file, np.load(file, allow_pickle=False) as arrays:
                return loads(str(arrays["position"])), arrays["tokens"].astype(np.uint32)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise _unusable(path, error) from error


def _stop(stopped: threading.Event, threads: list[threading.Thread]) -> None:
    stopped.set()
    for thread in threads:
        if thread is not threading.current_thread():  # which may have had the last reference to its `SourceParts`
            thread.join(_STOP_SECONDS)


def _is_last(part: Path) -> bool:
    last: bool = _fact(part, "last")
    return last


def _fact(part: Path, name: str) -> Any:
    try:
        return loads(read_bytes(part / FACTS_FILE))[name]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _unusable(part / FACTS_FILE, error) from error


def _rows(file: Path, vocab: int, size: int, last: bool) -> SplitRows:
    """Open the rows of a part: `size`, or fewer in the last one."""
    try:
        rows = SplitRows(file, vocab)
        if not (0 < len(rows) <= size and (last or len(rows) == size)):
            raise ValueError(f"it has {len(rows):,} of {size:,} sequences")
        return rows
    except (OSError, ValueError, LookupError) as error:  # pyarrow's own kinds are some of these
        raise _unusable(file, error) from error


def _unusable(file: Path, error: Exception) -> UserError:
    if not is_of_content(error):
        return Unavailable(f"{file}: cannot be read ({error})")
    return UserError(f"{file}: is damaged ({error}); delete {file.parent.parent}, and it will be made again")


def _name(number: int) -> str:
    return f"{number:06d}"


def _tokens(settings: SourceSettings, documents: Documents, splitter: Splitter) -> Iterator[NDArray[np.uint32]]:
    """Yield the tokens of the training text; in between, the last two arguments are at the position after them."""
    tokenizer = load_fitting_tokenizer(settings)
    encoder, end_1 = Encoder(tokenizer), np.array([end_of_document_id(tokenizer)], np.uint32)
    for passages in _batches(documents, splitter, settings.max_documents):
        encoded = zip(passages, encoder.encode([passage.text for passage in passages]), strict=True)
        yield np.concatenate([part for p, ids in encoded for part in ((ids, end_1) if p.ends_document else (ids,))])


def _batches(documents: Documents, splitter: Splitter, limit: int | None) -> Iterator[list[Passage]]:
    """Yield passages for training to tokenise at once."""
    passages: list[Passage] = []
    size = 0
    for piece in limited(documents, limit, splitter.documents):
        passages += [passage for passage in splitter.assign(piece) if passage.split == "train"]
        size += len(piece.text)
        if size >= BATCH_CHARACTERS and passages:
            yield passages
            passages, size = [], 0
    if passages:
        yield passages
