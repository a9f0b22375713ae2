"""The data of a recipe: every source is tokenised and packed once, and later runs find the result.

Each source has a folder:

    <data.dir>/<source>-v<vocab>-s<seq_len>-<fingerprint>/
        train.arrow  validation.arrow  test.arrow  train-counts.npy  tokenizer.json  facts.json
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from trainer.common.atomic import partial_folder
from trainer.common.errors import UserError
from trainer.common.format import size
from trainer.common.strict_json import dumps
from trainer.config.recipe import Recipe
from trainer.config.sections import Sources, source_list
from trainer.data.cache import Conduct, NotPrepared, make_once
from trainer.data.prepared_data import TOKENIZER_FILE, PreparedData, PreparedSource, open_prepared
from trainer.data.reading.documents import Progress
from trainer.data.settings import TRAIN, SourceSettings
from trainer.data.source_builder import SourceBuilder
from trainer.data.splitting import SPLITS, Parts, choose_splitter
from trainer.data.status import Report, tell
from trainer.data.streaming.parts import SourceParts
from trainer.data.streaming.streamed_data import StreamedData
from trainer.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer

TOKENIZER_SAMPLE_BYTES = 50_000_000
"""UTF-8 bytes of training text that a tokenizer is trained on."""

_LARGE = 1e9
"""Bytes of prepared data from which on the need for space is mentioned."""

Mixture = list[tuple[SourceSettings, float]]
"""Sources, each with its share; shares add up to 1."""


def prepare_for(recipe: Recipe, progress: bool = True, ends_on_signals: bool = False) -> PreparedData:
    """Prepare the recipe's data unless that has been done.

    Args:
        progress: Whether to write progress and notes on stderr.
        ends_on_signals: See `Conduct`.

    Raises:
        UserError: See `prepare_source`.
    """
    return _prepare(recipe, Conduct(progress, recipe.parallel.start_timeout_seconds, ends_on_signals))


def is_prepared(recipe: Recipe) -> bool:
    """Return whether the recipe's data is prepared.

    Raises:
        UserError: See `prepare_source`.
    """
    try:
        _prepare(recipe, Conduct(show=False, only_looks=True))
    except NotPrepared:
        return False
    return True


def _prepare(recipe: Recipe, conduct: Conduct) -> PreparedData:
    training, held_out = _mixtures(recipe)
    if recipe.data.stream_window is None:
        return prepare(training, held_out, conduct)
    assert held_out is not None, "the recipe's check asks for it"
    return _begin_stream(training, held_out, recipe.data.stream_window, conduct)


def _mixtures(recipe: Recipe) -> tuple[Mixture, Mixture | None]:
    """What is trained on, and held-out text if it comes from elsewhere."""
    d = recipe.data
    train, validation, test = d.split
    training = _mixture(recipe, d.source, d.split if d.validation is None else (train + validation, 0, test))
    return training, None if d.validation is None else _mixture(recipe, d.validation, (0, 1, 0))


def _begin_stream(training: Mixture, held_out: Mixture, window: int, conduct: Conduct) -> StreamedData:
    """Prepare the held-out text and the first part of the training text, which has `window` sequences."""
    ((settings, _),) = training
    if settings.tokenizer == TRAIN:
        settings = replace(settings, tokenizer=_train_on(training, conduct))
        held_out = [(replace(other, tokenizer=settings.tokenizer), share) for other, share in held_out]
    parts = SourceParts(settings, window, conduct, ahead=conduct.show)
    data = StreamedData((), _prepare_held_out(held_out, conduct), parts)
    parts.reach(0)
    return data


def _mixture(recipe: Recipe, sources: Sources, split: Parts) -> Mixture:
    """The settings and the share of each source. `data.max_tokens` applies to what is trained on."""
    d, m = recipe.data, recipe.model
    listed = source_list(sources)
    total = sum(s.weight for s in listed)
    return [
        (
            SourceSettings(
                source=s.source,
                tokenizer=d.tokenizer,
                vocab=m.vocab,
                seq_len=m.seq_len,
                split=split,
                text_field=s.text_field or d.text_field,
                max_documents=s.max_documents or d.max_documents,
                directory=d.dir,
                max_tokens=s.max_tokens or (d.max_tokens if split[0] else None),
                max_bad_share=d.max_bad_share,
                end_of_document=d.end_of_document,
            ),
            s.weight / total,
        )
        for s in listed
    ]


def prepare(training: Mixture, held_out: Mixture | None, conduct: Conduct) -> PreparedData:
    """Prepare the data of a run unless that has been done.

    Args:
        held_out: Text for validation; None takes the validation splits of `training`.

    Raises:
        UserError: See `prepare_source`.
    """
    sources = [*training, *(held_out or [])]
    if training[0][0].tokenizer == TRAIN:
        tokenizer = _train_on(training, conduct)
        sources = [(replace(settings, tokenizer=tokenizer), share) for settings, share in sources]
    _check_space([settings for settings, _ in sources], conduct.show)
    own = tuple((prepare_source(settings, conduct), share) for settings, share in sources[: len(training)])
    if held_out is None:
        return PreparedData(own, own)
    return PreparedData(own, _prepare_held_out(sources[len(training) :], conduct))


def _prepare_held_out(sources: Mixture, conduct: Conduct) -> tuple[tuple[PreparedSource, float], ...]:
    try:
        return tuple((prepare_source(settings, conduct), share) for settings, share in sources)
    except UserError as error:
        raise type(error)(str(error).replace("data.source", "data.validation", 1)) from error


def _check_space(sources: Sequence[SourceSettings], show: bool) -> None:
    """Say how much space the sources that are not prepared yet need, as far as that is known beforehand.

    Raises:
        UserError: Sources that reach `max_tokens` do not fit.
    """
    missing = {folder: s for s in sources if not (folder := s.folder).is_dir()}
    needs = {folder: need for folder, s in missing.items() if (need := s.needs())}
    if not needs:
        return
    directory = next(iter(missing)).parent
    free = shutil.disk_usage(next(p for p in (directory, *directory.absolute().parents) if p.is_dir())).free
    wanted = sum(need.bytes - _written(folder) for folder, need in needs.items())
    certain = all(need.certain for need in needs.values())
    line = f"data.dir {directory}: the prepared data needs {'' if certain else 'about '}{size(wanted)}"
    if certain and wanted > free:
        raise UserError(
            f"{line}, but only {size(free)} are free; free some space, set another folder, or lower data.max_tokens"
        )
    if show and (wanted > _LARGE or wanted > free):
        tell(f"{line}, and {size(free)} are free")


def _written(folder: Path) -> int:
    """Return the bytes that an unfinished preparation of a folder has written."""
    written = 0
    for file in partial_folder(folder).glob("*.arrow"):
        with suppress(FileNotFoundError):  # another process has just finished it
            written += file.stat().st_size
    return written


def prepare_source(settings: SourceSettings, conduct: Conduct) -> PreparedSource:
    """Return the prepared data of one source; make them first if they are not there.

    They are there if they were made with the same settings, source files (names, sizes, modification times) and
    tokenizer files; then nothing but their facts is read.

    Raises:
        UserError: The input is bad (see `Documents` and `load_tokenizer`), the tokenizer does not fit into the model's
            vocabulary, a split has too little text for one sequence, or a folder cannot be written.
    """

    def fill(folder: Path, report: Report) -> None:
        SourceBuilder(settings, folder, report).run()

    folder = settings.folder
    prepared = open_prepared(make_once(folder.parent, folder.name, fill, conduct))
    bad, documents = prepared.bad_records, sum(prepared.facts(split).documents for split in SPLITS)
    progress_then = Progress(documents=documents, records=bad.records, bad_records=bad.count, first_bad=list(bad.first))
    progress_then.refuse_bad_share(settings.max_bad_share)
    return prepared


def _train_on(sources: Mixture, conduct: Conduct) -> str:
    """Train a tokenizer of `vocab` entries on the beginning of the training text; return its folder.

    Each source contributes its share of `TOKENIZER_SAMPLE_BYTES`.
    """
    vocab = sources[0][0].vocab
    if vocab < SMALLEST_VOCABULARY:
        raise UserError(
            f"model.vocab = {vocab}: a trained tokenizer has at least {SMALLEST_VOCABULARY} entries; set it to "
            f"{SMALLEST_VOCABULARY} or more"
        )

    def fill(folder: Path, report: Report) -> None:
        read = 0

        def sample() -> Iterator[str]:
            nonlocal read
            for settings, share in sources:
                for text in _training_text(settings, int(TOKENIZER_SAMPLE_BYTES * share)):
                    yield text
                    read += 1
                    report.at(read)

        report.begin("reading text to train the tokenizer", "documents")
        tokenizer = train_tokenizer(sample(), vocab)
        report.end(read)
        (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    fingerprints = [(replace(settings, seq_len=0).fingerprint(), share) for settings, share in sources]
    digest = hashlib.sha256(dumps(fingerprints).encode()).hexdigest()[:12]
    directory = Path(sources[0][0].directory).expanduser()
    return str(make_once(directory, f"tokenizer-v{vocab}-{digest}", fill, conduct))


def _training_text(settings: SourceSettings, size: int) -> Iterator[str]:
    """The beginning of a source's training text: whole documents or passages, until they have `size` UTF-8 bytes."""
    splitter = choose_splitter(settings.pieces(), settings.split)
    for piece in settings.pieces():
        for passage in splitter.assign(piece):
            if passage.split == "train":
                yield passage.text
                size -= len(passage.text.encode())
                if size <= 0:
                    return
