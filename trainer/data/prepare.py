"""Turns a source into packed splits, once: a folder that is either complete or not there, and that later runs find.

What is kept:

    <directory>/<source>-v<vocab>-s<seq_len>-<fingerprint>/
        train.arrow  validation.arrow  test.arrow  train-counts.npy  tokenizer.json  tokenizer_config.json  facts.json

While it is made the folder's name begins with `.partial-`. Every `COMMIT_TOKENS` tokens the files so far are brought to
the disk with the position in the source, and a later start goes on from there. Memory holds a batch of pieces of
documents, whatever the documents are.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.documents import Documents, Piece
from trainer.data.encoding import Encoder
from trainer.data.packing import SplitWriter
from trainer.data.prepared import COUNTS_FILE, FACTS_FILE, TOKENIZER_FILES, PreparedSource, open_prepared
from trainer.data.sources import source_files
from trainer.data.splitting import SPLITS, Parts, Passage, Splitter, choose_splitter
from trainer.data.tokenizer import end_of_document_id, load_tokenizer, tokenizer_file, train_tokenizer, vocabulary
from trainer.errors import UserError
from trainer.whole import partial_folder, whole_folder, write_whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 2  # part of the fingerprint: raise it when the same settings give other files
TRAIN = "train"  # as data.tokenizer: train one on the source
TOKENIZER_SAMPLE_BYTES = 50_000_000
BATCH_CHARACTERS = 2_000_000  # tokenised at once, over all cores
COMMIT_TOKENS = 1 << 26  # between two positions from which preparation can go on
PROGRESS_FILE = "progress.npz"


@dataclass(frozen=True)
class DataSettings:
    """What decides the prepared data of one source, and where it is kept.

    Attributes:
        source, text_field: as in `Documents`.
        tokenizer: a tokenizer.json, a name on the hub, or a folder that `train_on` made.
        vocab: the model's vocabulary; the tokenizer's must fit into it.
        split: the proportion of training, validation and test.
        max_documents: read no more than these, over all splits; None: all.
        max_tokens: stop after this many training tokens; None: read all.
        max_bad_share: of the records; see `Documents`.
        end_of_document: the token that ends a document; None: the tokenizer's own.
        directory: the folder in which prepared folders are kept.
    """

    source: str
    tokenizer: str
    vocab: int
    seq_len: int
    split: Parts
    text_field: str
    max_documents: int | None
    directory: str
    max_tokens: int | None = None
    max_bad_share: float = 0.05
    end_of_document: str | None = None


def prepare_source(settings: DataSettings, progress: bool) -> PreparedSource:
    """Return the prepared data of `settings`; make it first if it is not there.

    It is there if it was made of the same settings, source files (names, sizes, times of change) and tokenizer files.
    Then nothing is read but its facts. Processes that prepare the same data at once wait for the first one. One that is
    killed leaves a hidden folder, from which the next start goes on.

    Args:
        progress: show bars and notes on stderr.

    Raises:
        UserError: bad input (see `Documents`, `load_tokenizer`), a tokenizer that does not fit into the model's
            vocabulary, too little text for a sequence of each split that is asked for, a folder that cannot be written.
    """

    def fill(folder: Path) -> None:
        _Preparation(settings, folder, progress).run()

    name = f"{_readable(settings.source)}-v{settings.vocab}-s{settings.seq_len}-{_fingerprint(settings)}"
    return open_prepared(_make_once(Path(settings.directory).expanduser(), name, fill, progress, PROGRESS_FILE))


def train_on(sources: list[tuple[DataSettings, float]], progress: bool) -> str:
    """Train a byte-level BPE of `vocab` entries on the first 50 MB of training text; returns its folder.

    Args:
        sources: each with its share of these 50 MB.

    Raises:
        UserError: as `prepare_source`.
    """
    vocab = sources[0][0].vocab
    if vocab < 257:
        raise UserError(f"model.vocab = {vocab}: a tokenizer that is trained has 257 entries at least; set it to 257")

    def fill(folder: Path) -> None:
        from tqdm import tqdm

        def sample() -> Iterator[str]:
            for settings, share in sources:
                yield from _training_text(settings, int(TOKENIZER_SAMPLE_BYTES * share))

        bar = tqdm(sample(), "training the tokenizer", unit=" documents", disable=not progress)
        tokenizer = train_tokenizer(bar, vocab)
        (folder / TOKENIZER_FILES[0]).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    fingerprints = [(_fingerprint(replace(settings, seq_len=0)), share) for settings, share in sources]
    digest = hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()[:12]
    directory = Path(sources[0][0].directory).expanduser()
    return str(_make_once(directory, f"tokenizer-v{vocab}-{digest}", fill, progress))


def _training_text(settings: DataSettings, size: int) -> Iterator[str]:
    """The beginning of a source's training text: whole documents, or passages, until they have `size` bytes."""
    splitter = choose_splitter(_pieces(settings), settings.split)
    for piece in _pieces(settings):
        for passage in splitter.assign(piece):
            if passage.split == "train":
                yield passage.text
                size -= len(passage.text.encode())
                if size <= 0:
                    return


def _pieces(settings: DataSettings) -> Iterator[Piece]:
    return _limited(Documents(settings.source, settings.text_field, settings.max_bad_share), settings.max_documents)


def _limited(documents: Documents, limit: int | None, done: int = 0) -> Iterator[Piece]:
    """The pieces of documents until `limit` of them have been read, with those that are behind it."""
    if limit is not None and done >= limit:
        return
    for piece in documents:
        yield piece
        done += piece.ends_document
        if done == limit:
            return


def _make_once(
    directory: Path, name: str, fill: Callable[[Path], None], progress: bool, progress_file: str | None = None
) -> Path:
    """The folder `directory`/`name`, which `fill` makes if it is not there."""
    path = directory / name
    try:
        if not path.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(directory)
            with _acquire(directory / f"{name}.lock", progress):
                if not path.is_dir():
                    with whole_folder(path, progress_file) as partial:
                        fill(partial)
    except OSError as error:
        kept = progress_file is not None and (partial_folder(path) / progress_file).is_file()
        raise UserError(
            f"data.dir {directory}: prepared data cannot be written ({error}); make room or name another folder"
            + ("; started again, the preparation goes on" if kept else "")
        ) from error
    return path


def _readable(source: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", Path(source).name.lower()).strip("-")[:40] or "data"


def _fingerprint(settings: DataSettings) -> str:
    decisive = asdict(settings) | {"format": FORMAT}
    for key in ("directory", "max_bad_share"):  # what they let pass is the same data
        del decisive[key]
    decisive["files"] = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in source_files(settings.source)]
    local_tokenizer = tokenizer_file(settings.tokenizer) if settings.tokenizer != TRAIN else None
    if local_tokenizer:
        named = (local_tokenizer.with_name(name) for name in {local_tokenizer.name, *TOKENIZER_FILES})
        decisive["tokenizer"] = sorted(hashlib.sha256(f.read_bytes()).hexdigest() for f in named if f.is_file())
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def _acquire(lock_file: Path, say_so: bool) -> AbstractContextManager[object]:
    """Waits for the lock, which the system takes from a process that dies, and holds it for a `with`."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if say_so:
            print(f"waiting for another process, which holds {lock_file}", file=sys.stderr)
        return lock.acquire()


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed processes have left from which nobody could go on: partial folders whose lock nobody holds."""
    from filelock import FileLock, Timeout

    for partial in directory.glob(".partial-*"):
        if (partial / PROGRESS_FILE).is_file():
            continue
        try:
            with FileLock(directory / f"{partial.name.removeprefix('.partial-')}.lock", timeout=0):
                shutil.rmtree(partial, ignore_errors=True)
        except Timeout:
            continue  # it is being made right now


@dataclass(frozen=True)
class _Batch:
    """Passages to tokenise at once, and the position behind them."""

    passages: list[Passage]
    documents: int
    reader: dict[str, Any]
    splitter: dict[str, Any]


class _Preparation:
    """Writes the files of a prepared folder, or goes on with one that was begun."""

    def __init__(self, settings: DataSettings, folder: Path, progress: bool):
        self.settings, self.folder, self.progress = settings, folder, progress

    def run(self) -> None:
        """Read, tokenise and pack everything."""
        settings, folder = self.settings, self.folder
        tokenizer = _load(settings)
        end_id = end_of_document_id(tokenizer, settings.end_of_document)
        end = str(tokenizer.id_to_token(end_id))
        (folder / TOKENIZER_FILES[0]).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (folder / TOKENIZER_FILES[1]).write_text(json.dumps({"eos_token": end}) + "\n", encoding="utf-8")
        saved = self._saved()
        reader = saved["reader"] if saved else None
        self._documents = Documents(settings.source, settings.text_field, settings.max_bad_share, reader)
        self._splitter = Splitter(**saved["splitter"]) if saved else choose_splitter(_pieces(settings), settings.split)
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

    def _tokenise(self, tokenizer: Tokenizer, end_id: int) -> None:
        import numpy as np
        from tqdm import tqdm

        encoder = Encoder(tokenizer)
        end_1 = np.array([end_id], np.uint32)
        begun = committed = self._tokens()
        begin = time.monotonic()
        with (
            tqdm(
                desc=f"tokenising {_readable(self.settings.source)}",
                unit=" documents",
                total=self.settings.max_documents,
                initial=self._splitter.documents,
                disable=not self.progress,
            ) as bar,
            closing(_ahead(self._batches())) as batches,
        ):
            for batch in batches:
                wanted = [passage for passage in batch.passages if self._room(passage.split)]
                for passage, ids in zip(wanted, encoder.encode([passage.text for passage in wanted]), strict=True):
                    self._add(passage, ids, end_1)
                tokens = self._tokens()
                bar.set_postfix_str(f"{(tokens - begun) / (time.monotonic() - begin):,.0f} tokens/s", refresh=False)
                bar.update(batch.documents)
                if self._splitter.size is None and not self._room("train"):
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

    def _room(self, split: str) -> int:
        """Tokens that a split still takes."""
        limit = self.settings.max_tokens
        if limit is None or (split != "train" and self._splitter.size is None):
            return sys.maxsize
        parts = dict(zip(SPLITS, self.settings.split, strict=True))
        return -(-limit * parts[split] // max(parts["train"], 1)) - self._writers[split].tokens

    def _tokens(self) -> int:
        return sum(writer.tokens for writer in self._writers.values())

    def _batches(self) -> Iterator[_Batch]:
        passages: list[Passage] = []
        size = documents = 0

        def batch() -> _Batch:
            return _Batch(passages, documents, self._documents.state_dict(), self._splitter.state_dict())

        for piece in _limited(self._documents, self.settings.max_documents, self._splitter.documents):
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
        position = np.array(json.dumps({"reader": batch.reader, "splitter": batch.splitter}))

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
        with np.load(path, allow_pickle=False) as arrays:
            saved: dict[str, Any] = json.loads(str(arrays["position"]))
            saved["writers"] = {
                split: {name: arrays[f"{split}/{name}"] for name in SplitWriter.SAVED} for split in SPLITS
            }
        if self.progress:
            print(f"going on with the preparation in {self.folder}", file=sys.stderr)
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
        (self.folder / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n")
        if self.progress:
            print(f"documents end with {end}", file=sys.stderr)
            if documents.bad_records:
                print(
                    f"{documents.bad_records:,} of {documents.records:,} records were skipped: "
                    f"{'; '.join(documents.first_bad)}",
                    file=sys.stderr,
                )


def _load(settings: DataSettings) -> Tokenizer:
    tokenizer = load_tokenizer(settings.tokenizer)
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
