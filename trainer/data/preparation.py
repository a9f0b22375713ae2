"""Writes the files of a prepared folder, or goes on with one that was begun.

Every `COMMIT_TOKENS` tokens the files so far are brought to the disk with the position in the source. Memory holds a
batch of pieces of documents, whatever the documents are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from trainer.common.atomic import write_whole
from trainer.common.errors import UserError
from trainer.common.strict_json import dumps, loads
from trainer.data.encoding import Encoder
from trainer.data.packing import SplitWriter
from trainer.data.prepared import COUNTS_FILE, FACTS_FILE, TOKENIZER_FILE
from trainer.data.reading.documents import Documents
from trainer.data.reading.sources import skipped_files
from trainer.data.settings import DataSettings, limited, pieces, readable
from trainer.data.splitting import SPLITS, Passage, Splitter, choose_splitter
from trainer.data.tokenizer import end_of_document_id, load_tokenizer, vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_CHARACTERS = 2_000_000  # tokenised at once, over all cores
COMMIT_TOKENS = 1 << 26  # between two positions from which preparation can go on
PROGRESS_FILE = "progress.npz"


@dataclass(frozen=True)
class _Batch:
    """Passages to tokenise at once, and the position behind them."""

    passages: list[Passage]
    documents: int
    reader: dict[str, Any]
    splitter: dict[str, Any]


class Preparation:
    """Writes the files of a prepared folder, or goes on with one that was begun."""

    def __init__(self, settings: DataSettings, folder: Path, progress: bool):
        self.settings, self.folder, self.progress = settings, folder, progress
        # What max_tokens limits: what is trained on, or held-out text of its own.
        self._main = next(split for split, part in zip(SPLITS, settings.split, strict=True) if part)

    def run(self) -> None:
        """Read, tokenise and pack everything."""
        settings, folder = self.settings, self.folder
        tokenizer = _load(settings)
        if self.progress and (left_out := skipped_files(settings.source)):
            print(left_out, file=sys.stderr)
        end_id = end_of_document_id(tokenizer)
        end = str(tokenizer.id_to_token(end_id))
        (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
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
        self._write_facts(tokenizer, end, splits)

    def _choose_splitter(self) -> Splitter:
        from tqdm import tqdm

        # Long only where a few documents are very long.
        what = f"measuring {readable(self.settings.source)}"
        looked_at = tqdm(pieces(self.settings), what, unit=" pieces", delay=2, leave=False, disable=not self.progress)
        return choose_splitter(looked_at, self.settings.split)

    def _tokenise(self, tokenizer: Tokenizer, end_id: int) -> None:
        import numpy as np
        from tqdm import tqdm

        encoder = Encoder(tokenizer)
        end_1 = np.array([end_id], np.uint32)
        begun = committed = self._tokens()
        begin = time.monotonic()
        with (
            tqdm(
                desc=f"tokenising {readable(self.settings.source)}",
                unit=" documents",
                total=self.settings.max_documents,
                initial=self._splitter.documents,
                disable=not self.progress,
            ) as bar,
            closing(_ahead(self._batches())) as batches,
        ):
            for batch in batches:
                wanted = [passage for passage in batch.passages if self._room(passage.split) > 0]
                for passage, ids in zip(wanted, encoder.encode([passage.text for passage in wanted]), strict=True):
                    if not self._enough():
                        self._add(passage, ids, end_1)
                tokens = self._tokens()
                bar.set_postfix_str(f"{(tokens - begun) / (time.monotonic() - begin):,.0f} tokens/s", refresh=False)
                bar.update(batch.documents)
                if self._enough():
                    break
                if tokens - committed >= COMMIT_TOKENS:
                    self._commit(batch)
                    committed = tokens
        if self.progress and encoder.slow_because:
            print(f"tokenised slowly: fastokens is not used ({encoder.slow_because})", file=sys.stderr)

    def _add(self, passage: Passage, ids: Any, end_1: Any) -> None:
        import numpy as np

        if passage.ends_document:
            ids = np.concatenate((ids, end_1))
        room = self._room(passage.split)
        if room > 0:
            size = len(passage.text.encode())
            if len(ids) > room:
                size = size * room // len(ids)
            self._writers[passage.split].add(ids[:room], size, passage.ends_document)

    def _enough(self) -> bool:
        """Whether nothing more is to be read; of a text that is split by size, what is held out comes later."""
        return self._splitter.size is None and self._room(self._main) <= 0

    def _room(self, split: str) -> int:
        """Tokens that a split still takes."""
        limit = self.settings.max_tokens
        if limit is None or (split != self._main and self._splitter.size is None):
            return sys.maxsize
        parts = dict(zip(SPLITS, self.settings.split, strict=True))
        return -(-limit * parts[split] // parts[self._main]) - self._writers[split].tokens

    def _tokens(self) -> int:
        return sum(writer.tokens for writer in self._writers.values())

    def _batches(self) -> Iterator[_Batch]:
        passages: list[Passage] = []
        size = documents = 0

        def batch() -> _Batch:
            return _Batch(passages, documents, self._documents.state_dict(), self._splitter.state_dict())

        for piece in limited(self._documents, self.settings.max_documents, self._splitter.documents):
            passages += self._splitter.assign(piece)
            size += len(piece.text)
            documents += piece.ends_document
            if size >= BATCH_CHARACTERS:
                yield batch()
                passages, size, documents = [], 0, 0
        if passages:
            yield batch()

    def _commit(self, batch: _Batch) -> None:
        """Bring everything so far to the disk, with the position from which to go on."""
        import numpy as np

        arrays: dict[str, Any] = {
            f"{split}/{name}": array
            for split, writer in self._writers.items()
            for name, array in writer.state_dict().items()
        }
        position = np.array(dumps({"reader": batch.reader, "splitter": batch.splitter}))

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, position=position, **arrays)

        write_whole(self.folder / PROGRESS_FILE, write)

    def _saved(self) -> dict[str, Any] | None:
        """What `_commit` has left; None if there is nothing from which to go on."""
        import numpy as np

        path = self.folder / PROGRESS_FILE
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                saved: dict[str, Any] = loads(str(arrays["position"]))
                saved["writers"] = {
                    split: {name: arrays[f"{split}/{name}"] for name in SplitWriter.SAVED} for split in SPLITS
                }
            whole = all(SplitWriter.holds(self.folder / f"{split}.arrow", saved["writers"][split]) for split in SPLITS)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            whole = False
        if self.progress:
            how = "going on with" if whole else "beginning again, for what was left is damaged:"
            print(f"{how} the preparation in {self.folder}", file=sys.stderr)
        if not whole:
            path.unlink()
            return None
        return saved

    def _check(self, splits: dict[str, Any]) -> None:
        settings = self.settings
        for split, part in zip(SPLITS[:2], settings.split[:2], strict=True):
            if part and splits[split].sequences == 0:
                how = "by size" if self._splitter.size is not None else "by document"
                raise UserError(
                    f"data.source {settings.source}: no full sequence for the {split} split ({splits[split].documents} "
                    f"of {self._splitter.documents} documents, {splits[split].tokens} tokens, split {how} as "
                    f"{':'.join(map(str, settings.split))}, and a sequence needs {settings.seq_len + 1}); give more "
                    "text, a shorter model.seq_len or another data.split"
                )

    def _write_facts(self, tokenizer: Tokenizer, end: str, splits: dict[str, Any]) -> None:
        import numpy as np

        documents = self._documents
        facts = {
            "settings": asdict(self.settings),
            "tokenizer_vocab": vocabulary(tokenizer),
            "end_of_document": end,
            "split_by": "document" if self._splitter.size is None else "size",
            "records": documents.records,
            "bad_records": {"count": documents.bad_records, "first": documents.first_bad},
            "splits": {split: asdict(facts) for split, facts in splits.items()},
        }
        with (self.folder / COUNTS_FILE).open("wb") as file:
            np.save(file, self._writers["train"].counts_V)
        made = (*(f"{split}.arrow" for split in SPLITS), COUNTS_FILE, TOKENIZER_FILE)
        facts["files"] = {name: (self.folder / name).stat().st_size for name in made}
        (self.folder / FACTS_FILE).write_text(dumps(facts, indent=1) + "\n")
        if self.progress:
            print(f"documents end with {end}", file=sys.stderr)
            if documents.bad_records:
                print(
                    f"{documents.bad_records:,} of {documents.records:,} records were skipped: "
                    f"{'; '.join(documents.first_bad)}",
                    file=sys.stderr,
                )


def _load(settings: DataSettings) -> Tokenizer:
    tokenizer = load_tokenizer(settings.tokenizer, settings.end_of_document)
    entries = vocabulary(tokenizer)
    if entries > settings.vocab:
        raise UserError(
            f"data.tokenizer {settings.tokenizer}: its vocabulary of {entries} does not fit model.vocab = "
            f"{settings.vocab}; set model.vocab to at least {entries} or name a smaller tokenizer"
        )
    return tokenizer


def _ahead(batches: Iterator[_Batch]) -> Generator[_Batch]:
    """The same batches, each read by a thread while the one before is worked on."""
    with ThreadPoolExecutor(1, "reader") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch
