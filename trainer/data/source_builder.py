"""Builds the prepared folder of one source, or resumes a build that was interrupted.

Every `COMMIT_TOKENS` tokens the files are flushed to the disk together with the position in the source. Memory holds a
few batches of pieces of documents, however long the documents are.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.safe_read import open_file
from trainer.common.strict_json import dumps, loads
from trainer.data.cache import PREVIOUS_FILE, PROGRESS_FILE
from trainer.data.encoding import Encoder
from trainer.data.packing import SplitWriter
from trainer.data.prepared_data import CHAT_FILE, COUNTS_FILE, FACTS_FILE, TOKENIZER_FILE
from trainer.data.reading.documents import Documents, Piece
from trainer.data.reading.sources import file_stamp, find_files
from trainer.data.settings import SourceSettings, limited
from trainer.data.splitting import SPLITS, Passage, Splitter, choose_splitter
from trainer.data.status import Report
from trainer.data.tokenizer import chat_settings, end_of_document_id, load_tokenizer, vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_CHARACTERS = 2_000_000
"""Characters that are tokenised at once, over all cores."""

COMMIT_TOKENS = 1 << 26
"""Tokens between two positions from which a build can resume."""


class ShareRead:
    """Tells which share of a source has been read, as far as its files or its limits say so."""

    def __init__(self, settings: SourceSettings):
        self._settings = settings
        self._sizes = [file_stamp(file)[1] for file in find_files(settings.source).read]
        self._bytes_tell = settings.text_bytes() is not None

    def of(self, reader: dict[str, Any], tokens: int) -> float | None:
        """Return the share; None if it is not known.

        Args:
            reader: The position in the source, from `Documents.state_dict`.
            tokens: The tokens so far of the split that `max_tokens` limits.
        """
        s, shares = self._settings, []
        if s.max_tokens:
            shares.append(tokens / s.max_tokens)
        if s.max_documents:
            shares.append(reader["documents"] / s.max_documents)
        if total := sum(self._sizes):
            read = sum(self._sizes[: reader["file"]])
            if self._bytes_tell and reader["at"]:
                read += reader["at"][0]
            shares.append(read / total)
        return min(max(shares), 1.0) if shares else None


@dataclass(frozen=True)
class _Batch:
    """Passages to tokenise at once, and the position after them."""

    passages: list[Passage]
    reader: dict[str, Any]
    splitter: dict[str, Any]


class SourceBuilder:
    """Builds the prepared folder of one source.

    Args:
        folder: The folder to fill; it may hold what an interrupted build has committed.
        report: Where to report progress.
    """

    def __init__(self, settings: SourceSettings, folder: Path, report: Report):
        self.settings, self.folder, self.report = settings, folder, report
        self._parts = dict(zip(SPLITS, settings.split, strict=True))
        # What max_tokens limits: the text that is trained on, or held-out text of its own.
        self._main = next(split for split, part in self._parts.items() if part)

    def run(self) -> None:
        """Read, tokenise and pack everything.

        Raises:
            UserError: See `trainer.data.prepare.prepare_source`.
        """
        settings, folder = self.settings, self.folder
        tokenizer = load_fitting_tokenizer(settings)
        if skipped := find_files(settings.source).skipped_line(settings.source):
            self.report.note(skipped)
        end_id = end_of_document_id(tokenizer)
        (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        if chat := chat_settings(settings.tokenizer):
            (folder / CHAT_FILE).write_text(dumps(chat, indent=1) + "\n")
        saved = self._saved()
        reader = saved["reader"] if saved else None
        self._documents = Documents(settings.source, settings.text_field, settings.max_bad_share, reader)
        self._splitter = Splitter(**saved["splitter"]) if saved else self._choose_splitter()
        with ExitStack() as stack:
            self._writers = {}
            for split in SPLITS:
                state = saved["writers"][split] if saved else None
                writer = SplitWriter(folder / f"{split}.arrow", settings.seq_len, settings.vocab, state)
                stack.callback(writer.abandon)
                self._writers[split] = writer
            self._tokenise(tokenizer, end_id)
            splits = {split: writer.close() for split, writer in self._writers.items()}
        self._check(splits)
        self._write_facts(tokenizer, end_id, splits)

    def _choose_splitter(self) -> Splitter:
        def pieces() -> Iterator[Piece]:
            for number, piece in enumerate(self.settings.pieces(), 1):
                self.report.at(number)
                yield piece

        # This takes long only if a few documents are very long.
        self.report.begin(f"measuring {self.settings.short_name}", "pieces")
        return choose_splitter(pieces(), self.settings.split)

    def _tokenise(self, tokenizer: Tokenizer, end_id: int) -> None:
        encoder = Encoder(tokenizer)
        end_1 = np.array([end_id], np.uint32)
        committed = self._tokens()
        share = ShareRead(self.settings)
        self.report.begin(f"tokenising {self.settings.short_name}", "tokens")
        self.report.at(committed)
        with closing(_read_ahead(self._batches())) as batches:
            for batch in batches:
                wanted = [passage for passage in batch.passages if self._room(passage.split) > 0]
                for passage, ids in zip(wanted, encoder.encode([passage.text for passage in wanted]), strict=True):
                    if not self._has_enough():
                        self._add(passage, ids, end_1)
                tokens = self._tokens()
                self.report.at(tokens, share.of(batch.reader, self._writers[self._main].tokens))
                if self._has_enough():
                    break
                if tokens - committed >= COMMIT_TOKENS:
                    self._commit(batch)
                    committed = tokens
        self.report.end(self._tokens())
        if encoder.slow_because:
            self.report.note(f"tokenised slowly, because fastokens was not used ({encoder.slow_because})")

    def _add(self, passage: Passage, ids: NDArray[np.uint32], end_1: NDArray[np.uint32]) -> None:
        if passage.ends_document:
            ids = np.concatenate((ids, end_1))
        room = self._room(passage.split)
        if room > 0:
            size = len(passage.text.encode())
            if len(ids) > room:
                size = size * room // len(ids)
            self._writers[passage.split].add(ids[:room], size, passage.ends_document)

    def _has_enough(self) -> bool:
        """Whether nothing more has to be read; in text that is split by size, the held-out part comes at the end."""
        return self._splitter.size is None and self._room(self._main) <= 0

    def _room(self, split: str) -> int:
        """The number of tokens that a split still takes."""
        limit = self.settings.max_tokens
        if limit is None or (split != self._main and self._splitter.size is None):
            return sys.maxsize
        return -(-limit * self._parts[split] // self._parts[self._main]) - self._writers[split].tokens

    def _tokens(self) -> int:
        return sum(writer.tokens for writer in self._writers.values())

    def _batches(self) -> Iterator[_Batch]:
        passages: list[Passage] = []
        size = 0

        def batch() -> _Batch:
            return _Batch(passages, self._documents.state_dict(), self._splitter.state_dict())

        for piece in limited(self._documents, self.settings.max_documents, self._splitter.documents):
            passages += self._splitter.assign(piece)
            size += len(piece.text)
            if size >= BATCH_CHARACTERS:
                yield batch()
                passages, size = [], 0
        if passages:
            yield batch()

    def _commit(self, batch: _Batch) -> None:
        """Flush everything so far to the disk, with the position from which to resume.

        Raises:
            TakenOver: Another process prepares the folder now.
        """
        self.report.refuse_if_taken_over()
        arrays: dict[str, Any] = {
            f"{split}/{name}": array
            for split, writer in self._writers.items()
            for name, array in writer.state_dict().items()
        }
        position = np.array(dumps({"reader": batch.reader, "splitter": batch.splitter}))

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, position=position, **arrays)

        if (self.folder / PROGRESS_FILE).is_file():
            shutil.copyfile(self.folder / PROGRESS_FILE, self.folder / PREVIOUS_FILE)
        atomic_write(self.folder / PROGRESS_FILE, write)

    def _saved(self) -> dict[str, Any] | None:
        """What `_commit` has saved last, or the time before if that is damaged; None if there is nothing to resume."""
        damaged = False
        for path in (self.folder / PROGRESS_FILE, self.folder / PREVIOUS_FILE):
            if not path.is_file():
                continue
            if saved := self._read_saved(path):
                self.report.note(
                    f"resuming the preparation in {self.folder}"
                    + (" from the position before the last, because its files are damaged" if damaged else "")
                )
                return saved
            damaged = True
        if damaged:
            self.report.note(f"starting the preparation in {self.folder} again, because its files are damaged")
            (self.folder / PROGRESS_FILE).unlink(missing_ok=True)
        return None

    def _read_saved(self, path: Path) -> dict[str, Any] | None:
        """What `_commit` has saved in a file, or None if the file, or what it describes, is damaged."""
        done = 0

        def read(size: int) -> None:
            nonlocal done
            done += size
            self.report.at(done)

        try:
            with open_file(path) as file, np.load(file, allow_pickle=False) as arrays:
                saved: dict[str, Any] = loads(str(arrays["position"]))
                saved["writers"] = {
                    split: {name: arrays[f"{split}/{name}"] for name in SplitWriter.SAVED} for split in SPLITS
                }
            self.report.begin(f"checking {self.folder}", "bytes")
            files = {split: self.folder / f"{split}.arrow" for split in SPLITS}
            intact = all(SplitWriter.holds(files[split], saved["writers"][split], read) for split in SPLITS)
            return saved if intact else None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def _check(self, splits: dict[str, Any]) -> None:
        settings = self.settings
        for split in SPLITS[:2]:
            if self._parts[split] and splits[split].sequences == 0:
                how = "by size" if self._splitter.size is not None else "by document"
                raise UserError(
                    f"data.source {settings.source}: the {split} split has less text than one sequence, "
                    f"{splits[split].tokens} of {settings.seq_len + 1} tokens (it got {splits[split].documents} of "
                    f"{self._splitter.documents} documents, split {how} as {':'.join(map(str, settings.split))}); "
                    "provide more text, a shorter model.seq_len or another data.split"
                )

    def _write_facts(self, tokenizer: Tokenizer, end_id: int, splits: dict[str, Any]) -> None:
        read, end = self._documents.progress, str(tokenizer.id_to_token(end_id))
        facts = {
            "settings": asdict(self.settings),
            "tokenizer_vocab": vocabulary(tokenizer),
            "end_of_document": end,
            "split_by": "document" if self._splitter.size is None else "size",
            "records": read.records,
            "bad_records": {"count": read.bad_records, "first": read.first_bad},
            "splits": {split: asdict(facts) for split, facts in splits.items()},
        }
        np.save(self.folder / COUNTS_FILE, self._writers["train"].counts_V)
        made: tuple[str, ...] = (*(f"{split}.arrow" for split in SPLITS), COUNTS_FILE, TOKENIZER_FILE)
        made += (CHAT_FILE,) * (self.folder / CHAT_FILE).is_file()
        facts["files"] = {name: (self.folder / name).stat().st_size for name in made}
        (self.folder / FACTS_FILE).write_text(dumps(facts, indent=1) + "\n")
        self.report.note(f"documents end with {end}")
        if read.bad_records:
            self.report.note(read.skipped_line())


def load_fitting_tokenizer(settings: SourceSettings) -> Tokenizer:
    """Load the tokenizer of a source.

    Raises:
        UserError: It is none (see `load_tokenizer`), or does not fit into the model's vocabulary.
    """
    tokenizer = load_tokenizer(settings.tokenizer, settings.end_of_document)
    entries = vocabulary(tokenizer)
    if entries > settings.vocab:
        raise UserError(
            f"data.tokenizer {settings.tokenizer}: its vocabulary of {entries} does not fit into model.vocab = "
            f"{settings.vocab}; set model.vocab to at least {entries}, or choose a smaller tokenizer"
        )
    return tokenizer


def _read_ahead(batches: Iterator[_Batch]) -> Generator[_Batch]:
    """Yield the same batches; a thread reads the next one while the caller works on the current one."""
    with ThreadPoolExecutor(1, "reader") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch
