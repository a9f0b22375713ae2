"""Turns a source into packed splits, once: a folder that is either complete or not there, and that later runs find.

What is kept:

    <directory>/<source>-v<vocab>-s<seq_len>-<fingerprint>/
        train.arrow  validation.arrow  test.arrow  train-counts.npy  tokenizer.json  facts.json

While it is made the folder's name begins with `.partial-`; a later start goes on from there.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from trainer.common.atomic import partial_folder, whole_folder
from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.data.preparation import PROGRESS_FILE, Preparation
from trainer.data.prepared import TOKENIZER_FILE, PreparedData, PreparedSource, open_prepared
from trainer.data.reading.documents import refuse_bad_share
from trainer.data.settings import TRAIN, DataSettings, fingerprint, pieces, readable
from trainer.data.splitting import SPLITS, choose_splitter
from trainer.data.tokenizer import train_tokenizer

TOKENIZER_SAMPLE_BYTES = 50_000_000

Shares = list[tuple[DataSettings, float]]
"""Sources, and the share of each; shares add up to 1."""


def prepare(training: Shares, held_out: Shares | None, progress: bool) -> PreparedData:
    """Prepare the data of a run where that is not done yet.

    Args:
        held_out: text for validation; None: the validation splits of `training`.
        progress: show bars and notes on stderr.

    Raises:
        UserError: see `prepare_source`.
    """
    sources = [*training, *(held_out or [])]
    if training[0][0].tokenizer == TRAIN:
        folder = _train_on(training, progress)
        sources = [(replace(settings, tokenizer=folder), share) for settings, share in sources]
    own = tuple((prepare_source(settings, progress), share) for settings, share in sources[: len(training)])
    if held_out is None:
        return PreparedData(own, own)
    try:
        others = tuple((prepare_source(settings, progress), share) for settings, share in sources[len(training) :])
    except UserError as error:
        raise UserError(str(error).replace("data.source", "data.validation", 1)) from error
    return PreparedData(own, others)


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
        Preparation(settings, folder, progress).run()

    name = f"{readable(settings.source)}-v{settings.vocab}-s{settings.seq_len}-{fingerprint(settings)}"
    prepared = open_prepared(_make_once(Path(settings.directory).expanduser(), name, fill, progress, PROGRESS_FILE))
    bad, documents = prepared.bad_records, sum(prepared.facts(split).documents for split in SPLITS)
    refuse_bad_share(bad.count, bad.records, documents, bad.first, settings.max_bad_share)
    return prepared


def _train_on(sources: Shares, progress: bool) -> str:
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
        (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    fingerprints = [(fingerprint(replace(settings, seq_len=0)), share) for settings, share in sources]
    digest = hashlib.sha256(dumps(fingerprints).encode()).hexdigest()[:12]
    directory = Path(sources[0][0].directory).expanduser()
    return str(_make_once(directory, f"tokenizer-v{vocab}-{digest}", fill, progress))


def _training_text(settings: DataSettings, size: int) -> Iterator[str]:
    """The beginning of a source's training text: whole documents, or passages, until they have `size` bytes."""
    splitter = choose_splitter(pieces(settings), settings.split)
    for piece in pieces(settings):
        for passage in splitter.assign(piece):
            if passage.split == "train":
                yield passage.text
                size -= len(passage.text.encode())
                if size <= 0:
                    return


def _make_once(
    directory: Path, name: str, fill: Callable[[Path], None], progress: bool, progress_file: str | None = None
) -> Path:
    """The folder `directory`/`name`, which `fill` makes if it is not there."""
    path = directory / name
    try:
        if not path.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(directory, name, progress)
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


def _remove_abandoned(directory: Path, name: str, say_so: bool) -> None:
    """Remove what killed processes have left and nobody could go on from: partial folders whose lock nobody holds.

    Those of other settings than `name` that could go on are kept, and said.
    """
    from filelock import FileLock, Timeout

    for partial in sorted(directory.glob(".partial-*")):
        whole = partial.name.removeprefix(".partial-")
        try:
            with FileLock(directory / f"{whole}.lock", timeout=0):
                if not (partial / PROGRESS_FILE).is_file():
                    shutil.rmtree(partial, ignore_errors=True)
                elif say_so and whole != name:
                    print(f"{partial}: an unfinished preparation; delete it if it is not needed", file=sys.stderr)
        except Timeout:
            continue  # it is being made right now
