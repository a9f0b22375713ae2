"""Turns a source into packed splits, once: a folder that is either complete or not there, and that later runs find.

What is kept:

    <directory>/<source>-v<vocab>-s<seq_len>-<fingerprint>/
        train.arrow  validation.arrow  test.arrow  tokenizer.json  facts.json
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.documents import read_documents
from trainer.data.packing import SPLITS, SplitFacts, SplitWriter, split_of
from trainer.data.sources import source_files
from trainer.data.tokenizer import (
    end_of_document_id,
    load_tokenizer,
    tokenizer_file,
    train_tokenizer,
    vocabulary,
)
from trainer.errors import UserError
from trainer.whole import whole_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

FORMAT = 1  # part of the fingerprint: raise it when the same settings give other files
TRAIN = "train"  # as data.tokenizer: train one on the source
TOKENIZER_SAMPLE_BYTES = 50_000_000
BATCH_CHARACTERS = 2_000_000  # tokenised at once, over all cores


@dataclass(frozen=True)
class DataSettings:
    """What decides the prepared data, and where it is kept.

    source, text_field: as in `read_documents`.
    tokenizer: a tokenizer.json, a name on the hub, or "train": a BPE of `vocab` entries trained on the first 50 MB of
        the source's training documents.
    vocab: the model's vocabulary; the tokenizer's must fit into it.
    split: the proportion of documents for train : validation : test.
    max_documents: read no more than these, over all splits; None: all.
    directory: the folder in which prepared folders are kept.
    """

    source: str
    tokenizer: str
    vocab: int
    seq_len: int
    split: tuple[int, int, int]
    text_field: str
    max_documents: int | None
    directory: str


@dataclass(frozen=True)
class PreparedData:
    """A finished folder of prepared data."""

    path: Path
    tokenizer_vocab: int
    train: SplitFacts
    validation: SplitFacts
    test: SplitFacts

    @property
    def identity(self) -> str:
        """Of what the model reads, wherever it lies and whenever it was made: the tokenizer and the splits' facts."""
        facts = {split: asdict(getattr(self, split)) for split in SPLITS}
        text = self.tokenizer().to_str() + json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def dataset(self, split: str) -> Dataset:
        """One of SPLITS, memory-mapped: a column `tokens`, rows of seq_len + 1 ids."""
        from datasets import Dataset

        return Dataset.from_file(str(self.path / f"{split}.arrow"))

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(str(self.path))


def prepare(settings: DataSettings, progress: bool) -> PreparedData:
    """Returns the prepared data of `settings`; makes it first if it is not there.

    It is there if it was made of the same settings, source files (names, sizes, times of change) and tokenizer file.
    Then nothing is read but its facts. Processes that prepare the same data at once wait for the first one; one that is
    killed leaves a hidden folder that the next start removes.

    progress: show bars on stderr.
    Raises UserError: bad input (see `read_documents`, `load_tokenizer`), a tokenizer that does not fit into the model's
    vocabulary, too little text for a sequence of train and of validation, a folder that cannot be written.
    """
    directory = Path(settings.directory).expanduser()
    name = _folder_name(settings)
    path = directory / name
    try:
        if not path.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(directory)
            with _acquire(directory / f"{name}.lock", progress):
                if not path.is_dir():
                    with whole_folder(path) as partial:
                        _fill(settings, partial, progress)
    except OSError as error:
        raise UserError(
            f"data.dir {directory}: prepared data cannot be written ({error}); make room or name another folder"
        ) from error
    return open_prepared(path)


def open_prepared(path: Path) -> PreparedData:
    """Opens a folder that `prepare` made."""
    facts = json.loads((path / "facts.json").read_text())
    splits = {split: SplitFacts(**facts["splits"][split]) for split in SPLITS}
    return PreparedData(path, facts["tokenizer_vocab"], **splits)


def _folder_name(settings: DataSettings) -> str:
    decisive = asdict(settings) | {"format": FORMAT}
    del decisive["directory"]
    decisive["files"] = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in source_files(settings.source)]
    local_tokenizer = tokenizer_file(settings.tokenizer) if settings.tokenizer != TRAIN else None
    if local_tokenizer:
        decisive["tokenizer_content"] = hashlib.sha256(local_tokenizer.read_bytes()).hexdigest()
    fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
    readable = re.sub(r"[^a-z0-9]+", "-", Path(settings.source).name.lower()).strip("-")[:40] or "data"
    return f"{readable}-v{settings.vocab}-s{settings.seq_len}-{fingerprint}"


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
    """Removes what killed processes left of any data set: partial folders whose lock nobody holds."""
    from filelock import FileLock, Timeout

    for partial in directory.glob(".partial-*"):
        try:
            with FileLock(directory / f"{partial.name.removeprefix('.partial-')}.lock", timeout=0):
                shutil.rmtree(partial, ignore_errors=True)
        except Timeout:
            continue  # it is being made right now


def _fill(settings: DataSettings, folder: Path, progress: bool) -> None:
    """Writes the files of a prepared folder in one pass over the documents (two where a tokenizer is trained)."""
    from tqdm import tqdm

    tokenizer = _tokenizer(settings, progress)
    end_id = end_of_document_id(tokenizer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    writers = {split: SplitWriter(folder / f"{split}.arrow", settings.seq_len, settings.vocab) for split in SPLITS}
    documents = tokens = 0
    begin = time.monotonic()
    with tqdm(desc="tokenising", unit=" documents", total=settings.max_documents, disable=not progress) as bar:
        for texts in _batches(_documents(settings)):
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for text, encoding in zip(texts, encodings, strict=True):
                writers[split_of(documents, settings.split)].add([*encoding.ids, end_id], len(text.encode()))
                documents += 1
                tokens += len(encoding) + 1
            bar.set_postfix_str(f"{tokens / (time.monotonic() - begin):,.0f} tokens/s", refresh=False)
            bar.update(len(texts))

    splits = {split: writer.close() for split, writer in writers.items()}
    for split in ("train", "validation"):
        if splits[split].sequences == 0:
            raise UserError(
                f"data.source {settings.source}: no full sequence for the {split} split ({splits[split].documents} of "
                f"{documents} documents, {splits[split].tokens} tokens; a sequence has {settings.seq_len} + 1); give "
                f"more documents, another data.split than {':'.join(map(str, settings.split))} or a smaller "
                "model.seq_len"
            )
    facts = {
        "tokenizer_vocab": vocabulary(tokenizer),
        "splits": {split: asdict(facts) for split, facts in splits.items()},
        "settings": asdict(settings),
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


def _tokenizer(settings: DataSettings, progress: bool) -> Tokenizer:
    from tqdm import tqdm

    if settings.tokenizer == TRAIN:
        sample = tqdm(_tokenizer_sample(settings), "training the tokenizer", unit=" documents", disable=not progress)
        tokenizer = train_tokenizer(sample, settings.vocab)
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
    entries = vocabulary(tokenizer)
    if entries > settings.vocab:
        raise UserError(
            f"data.tokenizer {settings.tokenizer}: its vocabulary of {entries} does not fit model.vocab = "
            f"{settings.vocab}; set model.vocab to at least {entries} or name a smaller tokenizer"
        )
    return tokenizer


def _tokenizer_sample(settings: DataSettings) -> Iterator[str]:
    size = 0
    for index, text in enumerate(_documents(settings)):
        if split_of(index, settings.split) == "train":
            yield text
            size += len(text.encode())
            if size >= TOKENIZER_SAMPLE_BYTES:
                return


def _documents(settings: DataSettings) -> Iterator[str]:
    return islice(read_documents(settings.source, settings.text_field), settings.max_documents)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
